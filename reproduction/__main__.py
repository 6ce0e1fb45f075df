"""`python -m reproduction`: makes the missing runs of tables and figures, then writes the report."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NoReturn

from milora_core.errors import MiLoraError, importing
from milora_core.interruption import handle_signals

if TYPE_CHECKING:
    from reproduction.grid import Grid
    from reproduction.store import Store


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MiLoraError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns 0; 1 if runs failed or Table 4 could not be made; 2 after a user's mistake, with one line on standard error;
    128 + signal if a signal ends it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return _run(_parser().parse_args(arguments))
    except KeyboardInterrupt as error:
        return _complain(f"{error or 'interrupted'}; the same command continues", getattr(error, "status", 130))
    except (MiLoraError, OSError) as error:
        return _complain(str(error), 2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m reproduction", description=__doc__)
    parser.add_argument("--table", action="append", default=[], metavar="N", help="1 to 5 or 7, or a comparison's name")
    parser.add_argument("--figure", action="append", default=[], metavar="N", help="2 to 5")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="YAML; see reproduction/README.md")
    parser.add_argument("--backbone", metavar="NAME", help="'tiny', a folder or a hub id")
    parser.add_argument("--data-dir", metavar="DIR", help="benchmark files; by default MILORA_DATA_DIR or the hub")
    set_help = "a setting by its dotted name, such as training.max_steps=100 or seeds=0,1; can be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=set_help)
    parser.add_argument("--output", type=Path, default=Path("out/report"), metavar="DIR", help="results and report")
    parser.add_argument("--dry-run", action="store_true", help="list the runs; touch no data, backbone or network")
    parser.add_argument("--no-run", action="store_true", help="write the report of the runs that have finished")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(options: argparse.Namespace) -> int:
    with importing("reproduction", "python -m reproduction"):
        from reproduction.grid import Grid
        from reproduction.inputs import backbone_config
        from reproduction.report import write_report
        from reproduction.settings import parse_overrides, read_request
        from reproduction.store import Store
        from reproduction.table4 import table4

    sections = [*options.table, *(f"figure{number}" for number in options.figure)]
    given = {"sections": sections or None, "backbone": options.backbone, "data_dir": options.data_dir}
    overrides = parse_overrides(options.set) | {name: value for name, value in given.items() if value is not None}
    request = read_request(options.settings, overrides)
    works = not (options.dry_run or options.no_run)
    store = Store(options.output)
    records = store.read()
    # Records of format 1 do not store the sizes for the budget.
    needs_config = works or any(record.get("format", 1) == 1 for record in records)
    grid = Grid(request, records, partial(backbone_config, network=works) if needs_config else lambda backbone: None)
    grid.see(records, lambda run: True)
    runs = grid.plan()
    left = sum(run["state"] != "finished" for run in runs)
    seconds = [float(record["seconds"]["total"]) for record in records if record["status"] == "finished"]
    about = f", about {timedelta(seconds=round(left * median(seconds)))} in one process" if seconds and left else ""
    summary = f"{len(runs) - left} runs have finished, {left} are left{about}."
    if options.dry_run:
        lines = [f"{run['state']:13}  {run['label']}" for run in runs]
        print(json.dumps({"runs": runs, "summary": summary}) if options.json else "\n".join([*lines, summary]))
        return 0
    _say(summary)
    failed, missing = _work(grid, store) if works else (0, {})
    grid.see(store.read())
    has_table4 = "table4" in request.chosen_sections()
    report = write_report(grid, store.folder, partial(table4, store, _say, works) if has_table4 else None)
    result = {"report": str(report.path), "files": report.files, "errors": report.errors, "failed": failed}
    result["missing"] = missing
    print(json.dumps(result, ensure_ascii=False) if options.json else f"report in {report.path}")
    for message in report.errors:
        _say(message)
    if failed:
        _say(f"{failed} runs failed; the report says why, and the same command tries them again.")
    return 1 if failed or report.errors else 0


def _work(grid: Grid, store: Store) -> tuple[int, dict[str, str]]:
    """Makes the runs. Returns the number of failed runs and the missing inputs."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from reproduction.inputs import Inputs
    from reproduction.run import check_training
    from reproduction.worker import Worker

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if grid.request.threads is not None:
        torch.set_num_threads(grid.request.threads)
    check_training(grid)
    inputs = Inputs(grid.request)
    failed = Worker(grid, store, inputs, say=_say).work()
    for name, reason in inputs.missing.items():
        _say(f"cannot be run: {name}: {reason}")
    return failed, inputs.missing


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(message: str, status: int) -> int:
    _say(f"reproduction: {' '.join(message.split())}")
    return status


if __name__ == "__main__":
    handle_signals()
    sys.exit(main())
