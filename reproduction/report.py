"""Writes the report (tables in Markdown, CSV and JSON, and figures) from the records in a folder."""

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
from reproduction.grid import Grid
from reproduction.measurements import Measurements, shares
from reproduction.store import Record, full_settings

NAME = "report.md"
JSON_NAME = "report.json"
AVERAGE = "average"
NOTHING = "-"
CAPTION = "Accuracy in percent: the median over seeds (the least to the greatest)."
LOST = "Rows without an answer, without room for one, and too long to train on, all seeds together:"
WITH_PARAMETERS = ("table1", "table2")

Table = list[dict[str, Any]]
"""Rows by column."""


@dataclass(frozen=True)
class Report:
    """A written report: the Markdown file, all files relative to the folder, and the reasons for missing parts."""

    path: Path
    files: tuple[str, ...]
    errors: tuple[str, ...] = ()


def write_report(grid: Grid, folder: Path, speed: Callable[[Path], Table] | None = None) -> Report:
    """Writes the report of the finished runs. Each file is written completely or not at all.

    Args:
        grid: The grid, with its records.
        folder: The report's folder.
        speed: Measures Table 4 into a folder and returns its rows. A [`MiLoraError`] leaves the rest of the report.

    Raises:
        MiLoraError: If a file cannot be written, or matplotlib is missing.
    """
    measured = Measurements(grid)
    files: list[str] = []
    used = list({record["run"]: record for run in grid.runs() for record in grid.answers(run)[-1:]}.values())
    parts = ["# Tables and figures", f"```yaml\n{grid.request.to_yaml()}```"]
    tables = {
        "Made with": (_made_with(used), 3),
        "Data": (_data(used), 3),
        "Tunable parameters": (_budgets(grid, used), 2),
        "Tuned on dev": (_tuning(grid), 3),
    }
    for title, (rows, left) in tables.items():
        parts += [f"## {title}", _markdown(rows, left)] if rows else []
    data: dict[str, Any] = {title: rows for title, (rows, _) in tables.items()}
    for section in grid.sections:
        data[section.name] = _numbers(section, measured)
        _write(folder, f"{section.name}.csv", _csv(data[section.name]), files)
        parts += [f"## {section.title}", *_section(section, measured, data[section.name], folder, files)]
    errors = []
    if speed is not None:
        try:
            data["table4"] = speed(folder)
            parts += ["## Table 4: tokens a second and peak memory of decoding", _markdown(data["table4"], 1)]
        except MiLoraError as error:
            # The other sections took hours and do not depend on it.
            errors.append(f"Table 4: {error}")
    data["Failed runs"] = _failures(grid)
    parts += ["## Failed runs", _markdown(data["Failed runs"], 2)] if data["Failed runs"] else []
    _write(folder, NAME, "\n\n".join(parts) + "\n", files)
    _write(folder, JSON_NAME, json.dumps(data, ensure_ascii=False, indent=1) + "\n", files)
    return Report(folder / NAME, tuple(files), tuple(errors))


# ------------------------------------------------------------------------------ sections


def _section(section: Section, measured: Measurements, numbers: Table, folder: Path, files: list[str]) -> list[str]:
    """A section's Markdown: its picture, its table, and the number of skipped rows."""
    parts = []
    path = folder / f"{section.name}.png"
    by_task = shares(section, measured) if section.name == "figure2" else {}
    if by_task or (section.comparison.axis and any(one["seeds"] for one in numbers)):
        with writing(path):
            if by_task:
                share_figure(by_task, section.title, path)
            else:
                line_figure(section, measured, path)
        files.append(path.name)
        parts.append(f"![{section.title}]({path.name})")
    if section.name == "figure2":
        overall: dict[str, dict[str, str]] = {}
        for one in numbers:
            if one["block"] == "all":
                overall.setdefault(one["task"], {"": one["task"]})[one["expert"]] = f"{float(one['share']):.1%}"
        return [*parts, _markdown(list(overall.values()), 1)] if overall else parts
    names = ("row", "column", "test_rows", "unparsed", "no_room", "left_out")
    lost = [
        {name: one[name] for name in names} for one in numbers if one["unparsed"] or one["no_room"] or one["left_out"]
    ]
    return [
        *parts,
        _markdown(_readable(section, measured, numbers), 1),
        CAPTION,
        *([LOST, _markdown(lost, 2)] if lost else []),
    ]


def _readable(section: Section, measured: Measurements, numbers: Table) -> Table:
    """The section's table for readers, with the paper's numbers."""
    with_paper = {one["column"] for one in numbers if one["paper"] != ""}
    rows: dict[str, dict[str, Any]] = {}
    for row in section.rows:
        rows[row.label] = {"": row.label}
        if section.name in WITH_PARAMETERS:
            records = measured.records(row, section.columns[0])
            for name, key in (("tunable, M", "tunable"), ("activated, M", "activated_mean")):
                rows[row.label][name] = f"{records[0]['parameters'][key] / 1e6:.2f}" if records else NOTHING
    by_label = {row.label: row for row in section.rows}
    for one in numbers:
        column, cells = one["column"], rows[one["row"]]
        summary = measured.summary(by_label[one["row"]], section, column)
        cells[column] = NOTHING if summary is None else str(summary)
        if column in with_paper:
            cells[_paper_heading(section, column)] = NOTHING if one["paper"] == "" else f"{one['paper']:g}"
    return list(rows.values())


def _numbers(section: Section, measured: Measurements) -> Table:
    """The section's numbers for programs, one row per number."""
    if section.name == "figure2":
        return _share_numbers(section, measured)
    comparison = section.comparison
    has_average = len(section.columns) > 1 and comparison.average and not comparison.axis
    return [
        _number(section, row, column, measured)
        for row in section.rows
        for column in (*section.columns, *([AVERAGE] if has_average else []))
    ]


def _number(section: Section, row: Row, column: str, measured: Measurements) -> dict[str, Any]:
    summary = measured.summary(row, section, column)
    values = summary.values if summary else ()
    records = [] if column == AVERAGE else measured.records(row, column)
    tests = [record["tests"][column] for record in records if column in record["tests"]]
    rates = sorted({record["full_training"]["learning_rate"] for record in records})
    parameters = records[0]["parameters"] if records else {}
    paper = _paper(section, row, column)
    return {
        "section": section.name,
        "row": row.label,
        "method": row.variant.method,
        "x": "" if row.x is None else row.x,
        "column": column,
        "median": round(summary.median, 3) if summary else "",
        "min": round(min(values), 3) if values else "",
        "max": round(max(values), 3) if values else "",
        "seeds": len(values),
        "values": " ".join(f"{value:.3f}" for value in values),
        "paper": "" if paper is None else round(paper, 3),
        **{key: parameters.get(key, "") for key in ("tunable", "activated_mean", "activated_max")},
        "test_rows": sum(test["rows"] for test in tests),
        "unparsed": sum(test["unparsed"] for test in tests),
        "no_room": sum(test["no_room"] for test in tests),
        "left_out": sum(record["rows"]["left_out"] for record in records),
        "learning_rate": " ".join(f"{rate:g}" for rate in rates),
    }


def _share_numbers(section: Section, measured: Measurements) -> Table:
    """Figure 2's numbers by task, block and expert; those of block `all` are shares of all choices."""
    found: list[tuple[Any, ...]] = []
    for task, of_task in shares(section, measured).items():
        for expert, (share, low, high) in zip(of_task.experts, of_task.overall, strict=True):
            found.append((task, "all", expert, f"{share:.4f}", f"{low:.4f}", f"{high:.4f}", of_task.seeds))
        for block, row in zip(of_task.blocks, of_task.by_block, strict=True):
            for expert, share in zip(of_task.experts, row, strict=True):
                found.append((task, block, expert, f"{share:.4f}", "", "", of_task.seeds))
    names = ("task", "block", "expert", "share", "min", "max", "seeds")
    return [dict(zip(names, one, strict=True)) for one in found]


def _paper(section: Section, row: Row, column: str) -> float | None:
    """The paper's number, or `None`."""
    if section.name == "table7":
        # Two rows without names; the text says that the second one is MiLoRA's.
        pair = published.table7().get(row.label.partition(":")[0])
        return None if pair is None else pair[row.variant.method == "milora"].get(column)
    if section.name not in published.TABLES:
        return None
    return published.row(section.name, row.label).get("avg" if column == AVERAGE else column)


def _paper_heading(section: Section, column: str) -> str:
    """The heading of the paper's numbers; its average may be over other tasks."""
    tasks = published.tasks(section.name) if column == AVERAGE else []
    return f"{column}, paper ({len(tasks)} tasks)" if column == AVERAGE else f"{column}, paper"


# -------------------------------------------------------------------------------- set-up


def _made_with(records: Sequence[Record]) -> Table:
    """The number of runs and their hours, by revision, machine and versions."""
    runs: Counter[tuple[str, ...]] = Counter()
    seconds: Counter[tuple[str, ...]] = Counter()
    for record in records:
        environment = record["environment"]
        machine = (environment.get("gpu") or {}).get("name") or environment.get("processor")
        libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        key = (str(record["revision"]), f"{machine}, {environment.get('threads')} threads", libraries)
        runs[key] += 1
        seconds[key] += record["seconds"]["total"]
    names = ("revision", "machine", "versions")
    return [
        {**dict(zip(names, key, strict=True)), "runs": count, "hours": f"{seconds[key] / 3600:.1f}"}
        for key, count in runs.items()
    ]


def _data(records: Sequence[Record]) -> Table:
    """The number of runs by task, split and fingerprint. Two fingerprints of one split mean two data sets."""
    counts = Counter(
        (task, split, fingerprint)
        for record in records
        for split in ("train", "dev", "test")
        for task, fingerprint in record["fingerprints"].get(split, {}).items()
    )
    names = ("task", "split", "fingerprint")
    return [{**dict(zip(names, key, strict=True)), "runs": runs} for key, runs in counts.items()]


def _budgets(grid: Grid, records: Sequence[Record]) -> Table:
    """Each method's size at the budget, and its parameters."""
    table = []
    for name in METHODS:
        size = grid.size(name) or {}
        wanted = {**size, **grid.request.of_method(name)[0]}
        found = [one for one in records if one["method"] == name and _has(one, wanted)]
        if found:
            counts = found[0]["parameters"]
            text = ", ".join(f"`{field}={value}`" for field, value in size.items()) or NOTHING
            shown = {"tunable": "tunable", "activated, mean": "activated_mean", "activated, most": "activated_max"}
            numbers = {heading: f"{counts[key]:,}" for heading, key in shown.items()}
            table.append({"": method(name).title, "size": text, **numbers})
    return table


def _has(record: Record, wanted: Mapping[str, Any]) -> bool:
    settings = full_settings(record["method"], record["settings"])
    return all(settings[name] == value for name, value in wanted.items())


def _tuning(grid: Grid) -> Table:
    """The values tried on dev, and the chosen ones."""
    choices = [grid.choice(cell) for cell in grid.cells() if grid.tuned(cell.variant)]
    return [
        {
            "": choice.label,
            "trained on": " + ".join(choice.tasks),
            "tried: dev perplexity": ", ".join(
                f"{_values(values)}: {NOTHING if found is None else format(found, '.3f')}"
                for values, found in choice.tried
            ),
            "taken": NOTHING if choice.best is None else _values(choice.best),
        }
        for choice in {(choice.label, choice.tasks): choice for choice in choices}.values()
    ]


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values.values())


def _failures(grid: Grid) -> Table:
    runs = [run for run in grid.runs() if run.key in grid.failed and not grid.answers(run)]
    return [{"run": run.label, "error": grid.failed[run.key][-1]["error"]} for run in runs]


# ------------------------------------------------------------------------------- writing


def _markdown(rows: Table, left: int) -> str:
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], left=left)


def _csv(rows: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(folder: Path, name: str, text: str, files: list[str]) -> None:
    write_text(folder / name, text)
    files.append(name)
