"""The report: Markdown, a CSV file and a picture for each table and figure, from the results in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from milora.paper import published
from milora.paper.differences import budget_lines, differences, environment_lines, tuning_lines
from milora.paper.figures import PAPER_LIMIT, Shares, line_figure, share_figure, shares, shares_csv
from milora.paper.grid import Grid
from milora.paper.lost_rows import lost_row_notes
from milora.paper.sections import Section
from milora.paper.statistics import Measurements
from milora.paper.store import FILE, Results
from milora.paper.tables import section_table
from milora.paper.usage import unused_lines, used_records
from milora.tasks.files import read_text
from milora_core.errors import MiLoraError
from milora_core.files import write_text, writing

NAME = "README.md"
NOTES = "NOTES.md"
"""In the output folder: what its readers should know besides, by whoever made it. It stands in the report."""

LINES = ("figure3", "figure4", "figure5")
KEPT = ". The results are kept."

Speed = Callable[[Path], list[str]]
"""Writes the files of Table 4 to a folder and returns its Markdown, line by line."""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: The Markdown.
        files: Everything, the Markdown included, relative to the folder.
        errors: Why sections are missing that could not be made.
    """

    path: Path
    files: tuple[str, ...]
    errors: tuple[str, ...] = ()


def write_report(grid: Grid, results: Results, folder: Path, command: str = "", speed: Speed | None = None) -> Report:
    """Writes the report of what has finished; each file whole or not at all.

    A `NOTES.md` in the folder stands near the report's top.

    Args:
        grid: What is reported.
        results: What is known of its runs.
        folder: Where to write.
        command: What made the report, for a reader who wants to make it again.
        speed: Makes Table 4, which is measured and not trained; without it the report has none. What it
            raises as [`MiLoraError`] stands in the table's place.

    Raises:
        MiLoraError: If a file cannot be written, matplotlib is missing, or `NOTES.md` cannot be read.
    """
    writer = _Writer(folder)
    measured = Measurements(grid, results)
    used = used_records(grid, results)
    lines = ["# The paper's tables and figures, measured", ""]
    if command:
        # Table 4 is measured without runs.
        has_runs = grid.sections and (results.finished or results.failures)
        runs = f" Runs are in [`{FILE}`]({FILE}), a line each." if has_runs else ""
        lines += [f"Made by `{command}`.{runs}", ""]
    lines += _notes(folder)
    if grid.sections:
        lines += ["## Set-up, and how it differs from the paper's", ""]
        lines += [f"- {line}" for line in differences(grid, used)]
        lines += ["", *budget_lines(grid), "", *tuning_lines(grid, results), "", *environment_lines(used)]
        lines += ["", *unused_lines(grid, results)]
    for section in grid.sections:
        lines += ["", f"## {section.title}", ""]
        lines += (
            _figure2(section, measured, writer) if section.name == "figure2" else _section(section, measured, writer)
        )
    errors = []
    if speed is not None:
        lines += ["", "## Table 4: speed and memory", ""]
        try:
            lines += speed(folder)
        except MiLoraError as error:
            # Everything else took hours and has nothing to do with it.
            lines.append(f"Not measured: {error}")
            errors.append(f"Table 4: {error}")
    lines += _failures(grid, results)
    writer.text(NAME, _joined(lines))
    return Report(folder / NAME, tuple(writer.files), tuple(errors))


def _notes(folder: Path) -> list[str]:
    path = folder / NOTES
    return [read_text(path).strip(), ""] if path.is_file() else []


def _section(section: Section, measured: Measurements, writer: _Writer) -> list[str]:
    table = section_table(section, measured)
    lines = []
    if section.name in LINES:
        shown = f"{section.name.replace('figure', 'figure ')} shows {published.figure(section.name)}"
        lines += [f"The paper's {shown}; its points are not printed as numbers.", ""]
        if writer.picture(f"{section.name}.png", lambda path: line_figure(section, measured, path)):
            lines += [f"![{section.title}]({section.name}.png)", ""]
    writer.text(f"{section.name}.csv", table.csv())
    return [*lines, *table.markdown().splitlines(), "", f"Numbers: [{section.name}.csv]({section.name}.csv)"]


def _figure2(section: Section, measured: Measurements, writer: _Writer) -> list[str]:
    by_task = shares(section, measured)
    lines = [f"The paper's figure 2 shows the {published.figure('figure2')}.", ""]
    lines += [f"Not run: {note}" for note in _not_run(section, measured)]
    if not by_task:
        return [*lines, "Nothing has been measured for this figure yet."]
    title = "Share of each expert in what MiLoRA's routers choose, by task"
    if writer.picture("figure2.png", lambda path: share_figure(by_task, title, path)):
        lines += [f"![{title}](figure2.png)", ""]
    writer.text("figure2.csv", shares_csv(by_task))
    lines += [_largest_share(task, of_task) for task, of_task in by_task.items()]
    lines += [
        "",
        "Above: each expert's share of all choices in all blocks, the mean over seeds, with lines from the least "
        "seed to the greatest. Below: the share of test prompts that chose an expert in a block, the mean over seeds.",
        "",
        *(part for note in lost_row_notes(section, measured) for part in (note, "")),
        "Numbers: [figure2.csv](figure2.csv)",
    ]
    return lines


def _largest_share(task: str, of_task: Shares) -> str:
    index = max(range(len(of_task.experts)), key=lambda i: of_task.overall[i][0])
    share = of_task.overall[index][0]
    verdict = "within" if share <= PAPER_LIMIT else "above"
    return (
        f"- {task}: the most used expert is `{of_task.experts[index]}` with {share:.1%}, {verdict} the paper's "
        f"{100 * PAPER_LIMIT:.0f} %."
    )


def _not_run(section: Section, measured: Measurements) -> list[str]:
    found = []
    for column, cells in section.rows[0].cells.items():
        reason = measured.grid.missing(cells[0], column)
        if reason is not None:
            found.append(f"{column}: {reason}.\n")
    return found


def _failures(grid: Grid, results: Results) -> list[str]:
    failed = {
        run.label: results.failures[run.digest][-1]
        for run in grid.runs(results, lambda digest: True)
        if run.digest in results.failures and run.digest not in results.finished
    }
    if not failed:
        return []
    lines = [f"- {label}: {message}" for label, message in failed.items()]
    return ["", "## Runs that failed", "", "They are tried again with the next call.", "", *lines]


def _joined(lines: list[str]) -> str:
    """Lines as a text, without two empty ones in succession."""
    kept = [line for index, line in enumerate(lines) if line or (index > 0 and lines[index - 1])]
    return "\n".join(kept).rstrip() + "\n"


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[str] = []

    def text(self, name: str, text: str) -> None:
        write_text(self._folder / name, text, KEPT)
        self.files.append(name)

    def picture(self, name: str, draw: Callable[[Path], bool]) -> bool:
        path = self._folder / name
        with writing(path, KEPT):
            drawn = draw(path)
        if drawn:
            self.files.append(name)
        return drawn
