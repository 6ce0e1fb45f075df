"""Writes the report (tables in Markdown, CSV and JSON, and figures) from the records in a folder."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora.markdown import markdown_table
from milora.methods import METHODS, method
from milora_core.errors import MiLoraError
from milora_core.files import write_text
from reproduction import published
from reproduction.experiments import Row, Section
from reproduction.figures import line_figure, share_figure
from reproduction.grid import Grid
from reproduction.measurements import Results, results, shares, summary
from reproduction.store import Record, full_settings

AVERAGE = "average"
NOTHING = "-"
CAPTION = "Accuracy in percent: the median over seeds (the least to the greatest)."
LOST = "Rows without an answer, without room for one, and too long to train on, all seeds together:"
WITH_PARAMETERS = ("table1", "table2")

Table = list[dict[str, Any]]
"""Rows by column."""


@dataclass
class Report:
    """A report: its Markdown file, the names of all its files in the folder, and the reasons for missing parts."""

    path: Path
    files: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def write(self, name: str, text: str) -> None:
        """Writes a file, completely or not at all."""
        write_text(self.path.with_name(name), text)
        self.files.append(name)


def write_report(grid: Grid, folder: Path, table4: Callable[[], Table] | None = None) -> Report:
    """Writes the report of the finished runs.

    `table4` returns the rows of Table 4. If it raises a [`MiLoraError`], the rest of the report is written.
    """
    report = Report(folder / "report.md")
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
        found = results(grid, section)
        data[section.name] = _share_numbers(found) if section.name == "figure2" else _numbers(section, found)
        report.write(f"{section.name}.csv", _csv(data[section.name]))
        parts += [f"## {section.title}", *_section(section, found, data[section.name], report)]
    if table4 is not None:
        try:
            data["table4"] = table4()
            parts += ["## Table 4: tokens a second and peak memory of decoding", _markdown(data["table4"], 1)]
        except MiLoraError as error:
            # The other sections took hours and do not depend on it.
            report.errors.append(f"Table 4: {error}")
    data["Failed runs"] = _failures(grid)
    parts += ["## Failed runs", _markdown(data["Failed runs"], 2)] if data["Failed runs"] else []
    report.write(report.path.name, "\n\n".join(parts) + "\n")
    report.write("report.json", json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    return report


def _section(section: Section, found: Results, numbers: Table, report: Report) -> list[str]:
    """A section's Markdown: its picture, its table, and the number of skipped rows."""
    parts = []
    by_task = shares(found) if section.name == "figure2" else {}
    if by_task or (section.comparison.axis and any(one["seeds"] for one in numbers)):
        path = report.path.with_name(f"{section.name}.png")
        if by_task:
            share_figure(by_task, section.title, path)
        else:
            line_figure(section, found, path)
        report.files.append(path.name)
        parts.append(f"![{section.title}]({path.name})")
    if section.name == "figure2":
        overall = [
            {"": task, **{expert: f"{of[0]:.1%}" for expert, of in zip(one.experts, one.overall, strict=True)}}
            for task, one in by_task.items()
        ]
        return [*parts, _markdown(overall, 1)] if overall else parts
    parts += [_markdown(_readable(section, found, numbers), 1), CAPTION]
    names = ("row", "column", "test_rows", "unparsed", "no_room", "left_out")
    lost = [{name: one[name] for name in names} for one in numbers if any(one[name] for name in names[3:])]
    return [*parts, LOST, _markdown(lost, 2)] if lost else parts


def _readable(section: Section, found: Results, numbers: Table) -> Table:
    """The section's table for readers, with the paper's numbers."""
    with_paper = {one["column"] for one in numbers if one["paper"] != ""}
    rows: dict[str, dict[str, Any]] = {}
    for one in numbers:
        row, column = one["row"], one["column"]
        cells = rows.setdefault(row, {"": row})
        if section.name in WITH_PARAMETERS and len(cells) == 1:
            for name, key in (("tunable, M", "tunable"), ("activated, M", "activated_mean")):
                cells[name] = NOTHING if one[key] == "" else f"{one[key] / 1e6:.2f}"
        of_cell = summary(found, row, *_averaged(section, column))
        cells[column] = NOTHING if of_cell is None else str(of_cell)
        if column in with_paper:
            # The paper's average may be over other tasks.
            over = f" ({len(published.tasks(section.name))} tasks)" if column == AVERAGE else ""
            cells[f"{column}, paper{over}"] = NOTHING if one["paper"] == "" else f"{one['paper']:g}"
    return list(rows.values())


def _numbers(section: Section, found: Results) -> Table:
    """The section's numbers for programs, one row per number."""
    has_average = len(section.columns) > 1 and section.comparison.average and not section.comparison.axis
    columns = [*section.columns, AVERAGE] if has_average else section.columns
    return [_number(section, row, column, found) for row in section.rows for column in columns]


def _averaged(section: Section, column: str) -> tuple[str, ...]:
    return section.columns if column == AVERAGE else (column,)


def _number(section: Section, row: Row, column: str, found: Results) -> dict[str, Any]:
    of_cell = summary(found, row.label, *_averaged(section, column))
    values = of_cell.values if of_cell else ()
    records = [record for record in found.get((row.label, column), ()) if record is not None]
    tests = [record["tests"][column] for record in records if column in record["tests"]]
    rates = sorted({record["full_training"]["learning_rate"] for record in records})
    parameters = records[0]["parameters"] if records else {}
    paper = published.row(section.name, row.label).get("avg" if column == AVERAGE else column)
    return {
        "section": section.name,
        "row": row.label,
        "method": row.method,
        "x": "" if row.x is None else row.x,
        "column": column,
        "median": round(of_cell.median, 3) if of_cell else "",
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


def _share_numbers(found: Results) -> Table:
    """Figure 2's numbers by task, block and expert; those of block `all` are shares of all choices."""
    rows: list[tuple[Any, ...]] = []
    for task, of_task in shares(found).items():
        for expert, overall in zip(of_task.experts, of_task.overall, strict=True):
            rows.append((task, "all", expert, *(f"{share:.4f}" for share in overall), of_task.seeds))
        for block, of_block in zip(of_task.blocks, of_task.by_block, strict=True):
            for expert, share in zip(of_task.experts, of_block, strict=True):
                rows.append((task, block, expert, f"{share:.4f}", "", "", of_task.seeds))
    names = ("task", "block", "expert", "share", "min", "max", "seeds")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _made_with(records: Sequence[Record]) -> Table:
    """The number of runs and their hours, by revision, machine and versions."""
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for record in records:
        environment = record["environment"]
        machine = (environment.get("gpu") or {}).get("name") or environment.get("processor")
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        key = (str(record["revision"]), f"{machine}, {environment.get('threads')} threads", versions)
        seconds[key].append(record["seconds"]["total"])
    names = ("revision", "machine", "versions", "runs", "hours")
    rows = [(*key, len(times), f"{sum(times) / 3600:.1f}") for key, times in seconds.items()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _data(records: Sequence[Record]) -> Table:
    """The number of runs by task, split and fingerprint. Two fingerprints of one split mean two data sets."""
    counts = Counter(
        (task, split, fingerprint)
        for record in records
        for split in ("train", "dev", "test")
        for task, fingerprint in record["fingerprints"].get(split, {}).items()
    )
    names = ("task", "split", "fingerprint", "runs")
    return [dict(zip(names, (*key, runs), strict=True)) for key, runs in counts.items()]


def _budgets(grid: Grid, records: Sequence[Record]) -> Table:
    """Each method's size at the budget, and its parameters."""
    table = []
    for name in METHODS:
        size = grid.size(name) or {}
        wanted = {**size, **grid.request.of_method(name)[0]}
        found = [one for one in records if one["method"] == name]
        used = [one for one in found if wanted.items() <= full_settings(name, one["settings"]).items()]
        if used:
            text = ", ".join(f"`{field}={value}`" for field, value in size.items()) or NOTHING
            shown = {"tunable": "tunable", "activated, mean": "activated_mean", "activated, most": "activated_max"}
            numbers = {heading: f"{used[0]['parameters'][key]:,}" for heading, key in shown.items()}
            table.append({"": method(name).title, "size": text, **numbers})
    return table


def _tuning(grid: Grid) -> Table:
    """The values tried on dev, and the chosen ones."""
    choices = {
        (cell.variant.tuned or method(cell.variant.method).title, cell.tasks): grid.choice(cell)
        for cell in grid.cells
        if grid.tuned(cell.variant)
    }
    return [
        {
            "": label,
            "trained on": " + ".join(tasks),
            "tried: dev perplexity": ", ".join(
                f"{_values(values)}: {NOTHING if found is None else format(found, '.3f')}"
                for values, found in choice.tried
            ),
            "taken": NOTHING if choice.best is None else _values(choice.best),
        }
        for (label, tasks), choice in choices.items()
    ]


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values.values())


def _failures(grid: Grid) -> Table:
    runs = [run for run in grid.runs() if run.key in grid.failed and not grid.answers(run)]
    return [{"run": run.label, "error": grid.failed[run.key][-1]["error"]} for run in runs]


def _markdown(rows: Table, left: int) -> str:
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows], left=left)


def _csv(rows: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
