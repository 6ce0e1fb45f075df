"""Table 4: speed and memory of decoding, measured by `milora.benchmark` and kept beside the other results."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from milora.benchmark import DecodeSettings, table4
from milora.methods import method
from milora.paper import published
from milora.paper.store import WORKING_FOLDER
from milora_core.errors import MiLoraError
from milora_core.files import write_json

FILE = "table4.json"
METHODS = ("dora", "moelora", "milora")

Say = Callable[[str], None]


def speed_section(
    folder: Path, settings: DecodeSettings | None = None, say: Say = lambda _: None, *, measure: bool = True
) -> list[str]:
    """Measures Table 4 unless it has been measured, and returns its Markdown, line by line.

    The measurement is in `table4.json` in the folder; taken away, it is made again. Of several processes one measures,
    and the others wait for it.

    Args:
        folder: The report's.
        settings: What is measured; by default the benchmark's own backbone for the machine.
        say: Told what is measured.
        measure: Whether to measure at all.

    Raises:
        MiLoraError: If the file cannot be read or written, or the benchmark refuses the settings.
    """
    path = folder / FILE
    if not path.exists() and not measure:
        return ["Not measured yet."]
    if not path.exists():
        # Two processes that measured at once would measure each other.
        working = folder / WORKING_FOLDER
        working.mkdir(parents=True, exist_ok=True)
        with FileLock(working / "table4.lock"):
            if not path.exists():
                write_json(path, table4(settings, say).to_dict())
    return _lines(_read(path))


def _lines(result: Mapping[str, Any]) -> list[str]:
    rows = {(row["method"], row["beam"]): row for row in result["rows"]}
    printed = {(name, beam): values for name in METHODS for beam, *values in published.table4()[method(name).title]}
    settings, environment = result["settings"], result["environment"]
    # A slow method may have been asked for fewer tokens, so that the others get their turns.
    written = {key: row.get("new_tokens", settings.get("new_tokens")) for key, row in rows.items()}
    differ = len(set(written.values())) > 1
    lines = [
        f"|  | beam |{' new tokens |' if differ else ''} tokens a second | paper | MiLoRA is faster by | paper | "
        "peak memory, MiB | paper |",
        f"| --- | ---: |{' ---: |' if differ else ''} ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, beam), row in rows.items():
        paper = printed.get((name, beam))
        ours = rows.get(("milora", beam))
        speed = f"{row['tokens_per_second']:.1f}"
        if "tokens_per_second_low" in row:
            speed += f" ({row['tokens_per_second_low']:.1f} to {row['tokens_per_second_high']:.1f})"
        factor = f"{_factor(ours, row):.3f}" if ours and name != "milora" else "-"
        in_paper = f"{printed['milora', beam][0] / paper[0]:.3f}" if paper and name != "milora" else "-"
        memory = "-" if row.get("peak_memory_mib") is None else f"{row['peak_memory_mib']:.0f}"
        title = method(name).title if name in METHODS else name
        cells = [title, str(beam), *([str(written[name, beam])] if differ else []), speed]
        cells += [str(paper[0]) if paper else "-", factor, in_paper, memory, str(paper[1]) if paper else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    machine = (environment.get("gpu") or {}).get("name") or environment.get("processor")
    lines += [
        "",
        f"Median over {settings.get('rounds')} rounds, methods in turn; {settings.get('backbone')} with random "
        f"weights, {settings.get('prompt_tokens')} prompt tokens, {_new_tokens(written.values())}, {machine}. "
        "The paper: Llama-2 7B on an A40. The whole measurement is in "
        f"[{FILE}]({FILE}).",
    ]
    return lines


def _new_tokens(written: Collection[Any]) -> str:
    counts = sorted({count for count in written if count is not None})
    if len(counts) < 2:
        return f"{counts[0] if counts else 'some'} new ones"
    return f"{counts[0]} to {counts[-1]} new ones (each row has its number)"


def _factor(ours: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The median of the rounds' ratios, where the file has them: they were measured next to each other."""
    of_rounds = ours.get("ratios", {}).get(row["method"])
    return float(of_rounds["median"] if of_rounds else ours["tokens_per_second"] / row["tokens_per_second"])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MiLoraError(f"{path} cannot be read ({error}); remove it to measure again.") from error
    if not isinstance(found, dict) or "rows" not in found:
        raise MiLoraError(f"{path} is no measurement of milora bench decode; remove it to measure again.")
    return found
