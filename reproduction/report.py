"""The report: tables in Markdown, CSV and JSON, and figures, from the records in a folder. People write the prose."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora.markdown import markdown_table
from milora.methods import METHODS, method
from milora_core.errors import MiLoraError
from milora_core.files import write_text, writing
from reproduction import published
from reproduction.experiments import Row, Section
from reproduction.figures import line_figure, share_figure
from reproduction.grid import Choice, Grid
from reproduction.statistics import Measurements, shares
from reproduction.store import Record

NAME = "report.md"
JSON_NAME = "report.json"
AVERAGE = "average"
MILLION = 1e6
NOTHING = "-"
CAPTION = "Accuracy in percent: the median over seeds (the least to the greatest)."
AXES = ("figure3", "figure4", "figure5")

Table = list[dict[str, Any]]
"""Rows by column."""

Speed = Callable[[Path], Table]
"""Writes Table 4's measurement to a folder and returns its rows."""


@dataclass(frozen=True)
class Report:
    """What was written: the Markdown, all files relative to the folder, and why parts are missing."""

    path: Path
    files: tuple[str, ...]
    errors: tuple[str, ...] = ()


def write_report(grid: Grid, folder: Path, speed: Speed | None = None) -> Report:
    """Writes the report of the runs that have finished, each file whole or not at all.

    Args:
        grid: What is reported, with its records.
        folder: Where to write.
        speed: Makes Table 4. A [`MiLoraError`] that it raises leaves the rest of the report.

    Raises:
        MiLoraError: If a file cannot be written, or matplotlib is missing.
    """
    writer = _Writer(folder)
    measured = Measurements(grid)
    used = _used(measured)
    parts = ["# Tables and figures", f"```yaml\n{grid.request.to_yaml()}```"]
    data: dict[str, Any] = {"settings": grid.request.model_dump(mode="json", exclude={"data_dir", "judge_url"})}
    for name, title, rows in (
        ("made_with", "Made with", _made_with(used)),
        ("data", "Data", _data(used)),
        ("budgets", "Tunable parameters", _budgets(grid, used)),
        ("tuning", "Tuned on dev", _tuning(grid)),
    ):
        data[name] = rows
        if rows:
            parts += [f"## {title}", _markdown(rows)]
    data["sections"] = {}
    for section in grid.sections:
        numbers = _numbers(section, measured)
        data["sections"][section.name] = numbers
        parts += [f"## {section.title}", *_section(section, measured, numbers, writer)]
    errors = []
    if speed is not None:
        parts.append("## Table 4: tokens a second and peak memory of decoding")
        try:
            data["table4"] = speed(folder)
            parts += [_markdown(data["table4"]), "Every method in the same rounds; ratios are medians over rounds."]
        except MiLoraError as error:
            # The other sections took hours and do not depend on it.
            errors.append(f"Table 4: {error}")
    data["failed"] = _failures(grid)
    if data["failed"]:
        parts += ["## Failed runs", _markdown(data["failed"], left=2)]
    writer.text(NAME, "\n\n".join(parts) + "\n")
    writer.text(JSON_NAME, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    return Report(folder / NAME, tuple(writer.files), tuple(errors))


# ------------------------------------------------------------------------------ sections


def _section(section: Section, measured: Measurements, numbers: Table, writer: _Writer) -> list[str]:
    parts, csv_file = [], f"{section.name}.csv"
    picture = f"{section.name}.png"
    if section.name == "figure2":
        by_task = shares(section, measured)
        if by_task:
            writer.picture(picture, lambda path: share_figure(by_task, section.title, path))
            parts.append(f"![{section.title}]({picture})")
        writer.table(csv_file, numbers)
        return [*parts, _markdown(_overall(numbers)), f"Numbers: [{csv_file}]({csv_file})"]
    if section.name in AXES and any(one["median"] != "" for one in numbers):
        writer.picture(picture, lambda path: line_figure(section, measured, path))
        parts.append(f"![{section.title}]({picture})")
    writer.table(csv_file, numbers)
    parts += [_markdown(_accuracies(section, measured)), CAPTION]
    lost = [
        {name: one[name] for name in ("row", "column", "test_rows", "unparsed", "no_room", "left_out")}
        for one in numbers
        if one["unparsed"] or one["no_room"] or one["left_out"]
    ]
    if lost:
        parts += ["Rows without an answer (`unparsed`), without room for one (`no_room`), too long to train on "
                  "(`left_out`), all seeds together:", _markdown(lost, left=2)]  # fmt: skip
    return [*parts, f"Numbers: [{csv_file}]({csv_file})"]


def _accuracies(section: Section, measured: Measurements) -> Table:
    """The section as people read it, beside the paper's numbers."""
    columns, with_average = section.columns, _has_average(section)
    has_paper = {
        column: any(_paper(section, row, column) is not None for row in section.rows)
        for column in (*columns, AVERAGE)
    }
    table = []
    for row in section.rows:
        cells: dict[str, Any] = {"": row.label}
        if section.name in ("table1", "table2"):
            found = measured.records(row, columns[0])
            for name, key in (("tunable, M", "tunable"), ("activated, M", "activated_mean")):
                cells[name] = f"{found[0]['parameters'][key] / MILLION:.2f}" if found else NOTHING
        for column in (*columns, *([AVERAGE] if with_average else [])):
            summary = measured.average(row, columns) if column == AVERAGE else measured.accuracy(row, column)
            cells[column] = NOTHING if summary is None else str(summary)
            if has_paper[column]:
                printed = _paper(section, row, column)
                cells[_paper_heading(section, column)] = NOTHING if printed is None else f"{printed:g}"
        table.append(cells)
    return table


def _numbers(section: Section, measured: Measurements) -> Table:
    """A row for each number, for programs."""
    if section.name == "figure2":
        return _share_numbers(section, measured)
    found = []
    for row in section.rows:
        for column in (*section.columns, *([AVERAGE] if _has_average(section) else [])):
            is_mean = column == AVERAGE
            summary = measured.average(row, section.columns) if is_mean else measured.accuracy(row, column)
            records = [] if is_mean else measured.records(row, column)
            tests = [record["tests"][column] for record in records if column in record["tests"]]
            rates = sorted({record["full_training"]["learning_rate"] for record in records})
            first = records[0]["parameters"] if records else {}
            found.append(
                {
                    "section": section.name,
                    "row": row.label,
                    "method": row.variant.method,
                    "x": "" if row.x is None else row.x,
                    "column": column,
                    "median": _rounded(summary and summary.median),
                    "min": _rounded(summary and min(summary.values)),
                    "max": _rounded(summary and max(summary.values)),
                    "seeds": len(summary.values) if summary else 0,
                    "values": " ".join(f"{value:.3f}" for value in summary.values) if summary else "",
                    "paper": _rounded(_paper(section, row, column)),
                    **{key: first.get(key, "") for key in ("tunable", "activated_mean", "activated_max")},
                    "test_rows": sum(test["rows"] for test in tests),
                    "unparsed": sum(test["unparsed"] for test in tests),
                    "no_room": sum(test["no_room"] for test in tests),
                    "left_out": sum(record["rows"]["left_out"] for record in records),
                    "learning_rate": " ".join(f"{rate:g}" for rate in rates),
                }
            )
    return found


def _share_numbers(section: Section, measured: Measurements) -> Table:
    """Figure 2's numbers by task, block and expert; those of block `all` are shares of all choices."""
    found = []
    for task, of_task in shares(section, measured).items():
        for expert, (share, low, high) in zip(of_task.experts, of_task.overall, strict=True):
            found.append((task, "all", expert, f"{share:.4f}", f"{low:.4f}", f"{high:.4f}", of_task.seeds))
        for block, row in zip(of_task.blocks, of_task.by_block, strict=True):
            for expert, share in zip(of_task.experts, row, strict=True):
                found.append((task, block, expert, f"{share:.4f}", "", "", of_task.seeds))
    names = ("task", "block", "expert", "share", "min", "max", "seeds")
    return [dict(zip(names, one, strict=True)) for one in found]


def _overall(numbers: Table) -> Table:
    """Figure 2 as people read it: tasks by experts, shares of all choices."""
    by_task: dict[str, dict[str, Any]] = {}
    for one in numbers:
        if one["block"] == "all":
            by_task.setdefault(one["task"], {"": one["task"]})[one["expert"]] = f"{float(one['share']):.1%}"
    return list(by_task.values()) or [{"": NOTHING}]


def _has_average(section: Section) -> bool:
    return len(section.columns) > 1 and section.name not in ("table3", "table7", *AXES)


def _paper_heading(section: Section, column: str) -> str:
    """The heading of the paper's numbers. Its average is over the tasks that it has."""
    tasks = len(published.tasks(section.name)) if column == AVERAGE else 0
    is_other = column == AVERAGE and set(section.columns) != set(published.tasks(section.name))
    return f"{column}, paper ({tasks} tasks)" if is_other else f"{column}, paper"


def _paper(section: Section, row: Row, column: str) -> float | None:
    """The paper's number; `None` where it has none."""
    if section.name == "table7":
        # Two rows without names; the text says that the second one is MiLoRA's.
        pair = published.table7().get(row.group)
        return None if pair is None else pair[row.variant.method == "milora"].get(column)
    if section.name not in published.TABLES:
        return None
    printed = published.row(section.name, row.paper)
    return printed.get("avg" if column == AVERAGE else column)


def _rounded(value: float | None) -> Any:
    return "" if value is None else round(value, 3)


# -------------------------------------------------------------------------------- set-up


def _used(measured: Measurements) -> list[Record]:
    """The records behind the report's numbers and choices, each once."""
    grid = measured.grid
    runs = [grid.answers(run)[-1:] for run in grid.runs()]
    return list({record["run"]: record for found in runs for record in found}.values())


def _made_with(records: Sequence[Record]) -> Table:
    """By revision, machine and versions: how many runs, and their hours."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        environment = record["environment"]
        machine = (environment.get("gpu") or {}).get("name") or environment.get("processor") or "unknown"
        libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        key = (str(record["revision"]), f"{machine}, {environment.get('threads')} threads", libraries)
        groups.setdefault(key, []).append(record)
    return [
        {
            "revision": key[0],
            "machine": key[1],
            "versions": key[2],
            "runs": len(of_group),
            "hours": f"{sum(float(record['seconds']['total']) for record in of_group) / 3600:.1f}",
        }
        for key, of_group in groups.items()
    ]


def _data(records: Sequence[Record]) -> Table:
    """By task, split and fingerprint: how many rows and runs. Two fingerprints of one split mean two data sets."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for record in records:
        rows, single = record["rows"], len(record["tasks"]) == 1
        for split in ("train", "dev", "test"):
            for task, fingerprint in record["fingerprints"].get(split, {}).items():
                of_test = record["tests"].get(task, {}).get("rows", "") if split == "test" else ""
                count = of_test if split == "test" else rows[split] if single else ""
                counts[task, split, fingerprint, str(count)] += 1
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (task, split, fingerprint, count), runs in counts.items():
        row = table.setdefault(
            (task, split, fingerprint), {"task": task, "split": split, "fingerprint": fingerprint, "rows": "", "runs": 0}
        )
        row["rows"] = row["rows"] or count
        row["runs"] += runs
    return list(table.values())


def _budgets(grid: Grid, records: Sequence[Record]) -> Table:
    """Each method's size and its parameters, of the methods whose size the budget sets."""
    table = []
    for name in METHODS:
        variants = [row.variant for section in grid.sections for row in section.rows if row.variant.method == name]
        if not any(variant.sized and not variant.settings for variant in variants):
            continue
        size = grid.size(name) or {}
        wanted = {**size, **grid.request.method_settings(name)}
        found = [one for one in records if one["method"] == name and wanted.items() <= one["settings"].items()]
        counts = found[0]["parameters"] if found else {}
        table.append(
            {
                "": method(name).title,
                "size": ", ".join(f"`{field}={value}`" for field, value in size.items()) or NOTHING,
                **{
                    heading: f"{counts[key]:,}" if counts else NOTHING
                    for heading, key in (
                        ("tunable", "tunable"),
                        ("activated, mean", "activated_mean"),
                        ("activated, most", "activated_max"),
                    )
                },
            }
        )
    return table


def _tuning(grid: Grid) -> Table:
    """What was tried on dev and taken; empty where nothing was tuned."""
    choices: dict[tuple[str, tuple[str, ...]], Choice] = {}
    for cell in grid.cells():
        if grid.tuned(cell.variant):
            choice = grid.choice(cell)
            choices.setdefault((choice.label, choice.tasks), choice)
    return [
        {
            "": choice.label,
            "trained on": " + ".join(choice.tasks),
            f"tried ({', '.join(grid.request.tune)}): dev": ", ".join(
                f"{_values(values)}: {_merit(merit, choice.criterion)}" for values, merit in choice.tried
            ),
            "taken": NOTHING if choice.best is None else _values(choice.best),
        }
        for choice in choices.values()
    ]


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values.values())


def _merit(merit: float | None, criterion: str) -> str:
    return NOTHING if merit is None else f"{-merit:.1%}" if criterion == "accuracy" else f"{merit:.3f}"


def _failures(grid: Grid) -> Table:
    runs = {run.key: run for run in grid.runs() if not grid.answers(run)}
    return [{"run": run.label, "error": grid.failed[key][-1]["error"]} for key, run in runs.items() if key in grid.failed]


# ------------------------------------------------------------------------------- writing


def _markdown(rows: Table, left: int = 1) -> str:
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], left=left)


class _Writer:
    """Writes files whole, and remembers their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[str] = []

    def text(self, name: str, text: str) -> None:
        write_text(self._folder / name, text)
        self.files.append(name)

    def table(self, name: str, rows: Table) -> None:
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.text(name, text.getvalue())

    def picture(self, name: str, draw: Callable[[Path], None]) -> None:
        with writing(self._folder / name):
            draw(self._folder / name)
        self.files.append(name)
