"""The sections as tables: text for people, and one line a number for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from milora.methods import method
from milora.paper import published
from milora.paper.lost_rows import lost_row_notes, lost_rows
from milora.paper.sections import Row, Section
from milora.paper.statistics import Measurements, Summary, leaders
from milora.paper.wording import listed

NOTHING = "-"
AVERAGE = "average"
MILLION = 1e6
WITH_PARAMETERS = ("table1", "table2")


@dataclass(frozen=True)
class Table:
    """A section, rendered.

    Attributes:
        header: Names of the columns.
        rows: Cells as Markdown.
        notes: What a reader should know to read it, a sentence each.
        records: One for each number, for CSV.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    records: tuple[dict[str, object], ...]

    def markdown(self) -> str:
        """As a Markdown table with its notes below."""
        align = ["---", *["---:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, align, *self.rows)]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)]).rstrip() + "\n"

    def csv(self) -> str:
        """As CSV, one line a number."""
        text = io.StringIO()
        names = list(dict.fromkeys(name for record in self.records for name in record))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def section_table(section: Section, measured: Measurements) -> Table:
    """A section's rows by what they are tested on, each number beside the paper's where it has one.

    Args:
        section: The table or figure.
        measured: The results.
    """
    columns = section.columns
    summaries = {column: [measured.accuracy(row, column) for row in section.rows] for column in columns}
    with_average = len(columns) > 1 and section.name in published.TABLES and section.name != "table3"
    if with_average:
        summaries[AVERAGE] = [measured.average(row, columns) for row in section.rows]
    paper = _Paper(section)
    header = ["", *(["tunable, M", "activated, M"] if section.name in WITH_PARAMETERS else [])]
    for column in summaries:
        header += [column, *([paper.heading(column)] if paper.has(column) else [])]
    best = {column: leaders(of_column) for column, of_column in summaries.items()}
    rows = []
    for index, row in enumerate(section.rows):
        cells = [row.label, *(_parameters(row, section, measured) if section.name in WITH_PARAMETERS else [])]
        for column, of_column in summaries.items():
            cells.append(summary_text(of_column[index], bold=best[column] == (index, True)))
            if paper.has(column):
                cells.append(paper.text(row, column))
        rows.append(tuple(cells))
    return Table(
        tuple(header),
        tuple(rows),
        (
            *_reading(section, summaries, best),
            *lost_row_notes(section, measured),
            *_missing(section, measured),
            *paper.notes(),
        ),
        tuple(_records(section, measured, summaries, paper)),
    )


def summary_text(summary: Summary | None, *, bold: bool = False) -> str:
    """`78.2 (77.0 to 79.1)`: the median and the spread; how many seeds there are where some are missing."""
    if summary is None:
        return NOTHING
    median = f"**{summary.median:.1f}**" if bold else f"{summary.median:.1f}"
    spread = f"{summary.low:.1f} to {summary.high:.1f}" if len(summary.values) > 1 else ""
    partial = f"{len(summary.values)} of {summary.asked} seeds" if len(summary.values) < summary.asked else ""
    inside = "; ".join(part for part in (spread, partial) if part)
    return f"{median} ({inside})" if inside else median


class _Paper:
    """What the paper prints in the place of a number."""

    def __init__(self, section: Section) -> None:
        self._section = section
        is_table = section.name in published.TABLES
        self._rows = {row.label: published.row(section.name, row.paper) if is_table else {} for row in section.rows}
        if section.name == "table7":
            self._rows = {row.label: _table7_row(row) for row in section.rows}
        self._own = set(section.columns) == self._tasks()

    def has(self, column: str) -> bool:
        return any(self._key(column) in values for values in self._rows.values())

    def heading(self, column: str) -> str:
        return "paper" if column != AVERAGE or self._own else f"paper, its {len(self._tasks())} tasks"

    def value(self, row: Row, column: str) -> float | None:
        return self._rows[row.label].get(self._key(column))

    def text(self, row: Row, column: str) -> str:
        value = self.value(row, column)
        return NOTHING if value is None else f"{value:g}"

    def notes(self) -> list[str]:
        if not any(self.has(column) for column in (*self._section.columns, AVERAGE)):
            return []
        of = "the backbones of the rows" if self._section.name == "table7" else "Llama-2 7B"
        own = [column for column in self._section.columns if not self.has(column)]
        not_there = f" It has no figures for {listed(own)}." if own else ""
        return [f"The paper's figures are on {of}, medians of five seeds.{not_there}"]

    def _tasks(self) -> set[str]:
        names = {name for values in self._rows.values() for name in values}
        return {name for name in names if not name.endswith("_m") and name != "avg"}

    @staticmethod
    def _key(column: str) -> str:
        return "avg" if column == AVERAGE else column


def _table7_row(row: Row) -> dict[str, float]:
    # Two rows without names; the text says that the higher, second one is MiLoRA's.
    pair = published.table7().get(row.backbone)
    return {} if pair is None else pair[row.label.endswith(method("milora").title)]


def _parameters(row: Row, section: Section, measured: Measurements) -> list[str]:
    column = section.columns[0]
    records = measured.records(row, column)
    paper = published.row(section.name, row.paper)
    if records:
        of_run = records[0]["parameters"]
        tunable, activated = (of_run[name] / MILLION for name in ("tunable", "activated_mean"))
    else:
        counts = measured.grid.counts(row.cells[column][0])
        tunable, activated = counts.tunable / MILLION, counts.activated_mean / MILLION
    texts = []
    for value, name in ((tunable, "tunable_m"), (activated, "activated_m")):
        printed = f" (paper {paper[name]:g})" if name in paper else ""
        texts.append(f"{value:.2f}{printed}")
    return texts


def _reading(
    section: Section, summaries: dict[str, list[Summary | None]], best: dict[str, tuple[int | None, bool]]
) -> list[str]:
    known = [column for column in summaries if any(summaries[column])]
    if not known:
        return ["Nothing has been measured for this table yet."]
    notes = ["Accuracy in percent: the median over seeds, and the least and the greatest in brackets."]
    if len(section.rows) == 1:
        return notes
    leading = [column for column in known if best[column][1]]
    overlapping = [column for column in known if not best[column][1]]
    if leading:
        notes.append(
            "Bold: the highest median, where even its lowest seed is above every other row's highest "
            f"({listed(leading)})."
        )
    if overlapping:
        told = "; ".join(_best_in(section, column, summaries[column], best[column][0]) for column in overlapping)
        notes.append(f"Nothing is bold where the seeds' spread overlaps with the best row's: {told}.")
    if AVERAGE in known:
        notes.append(_ranking(section, summaries[AVERAGE]))
    return notes


def _best_in(section: Section, column: str, summaries: Sequence[Summary | None], best: int | None) -> str:
    if best is None:
        top = max(summary.median for summary in summaries if summary is not None)
        tied = [
            row.label
            for row, summary in zip(section.rows, summaries, strict=True)
            if summary is not None and summary.median == top
        ]
        return f"{column}, where {listed(tied)} share the highest median"
    highest = summaries[best]
    assert highest is not None
    reached = sum(
        summary is not None and summary.high >= highest.low for index, summary in enumerate(summaries) if index != best
    )
    single = " (one seed)" if len(highest.values) == 1 else ""
    reach = "reaches" if reached == 1 else "reach"
    label = section.rows[best].label
    return f"{column}, where {label} has the highest median and {reached} of the others {reach} it{single}"


def _ranking(section: Section, averages: Sequence[Summary | None]) -> str:
    """The place of MiLoRA by the average, here and in the paper."""
    ordered = _order([(row.label, s.median) for row, s in zip(section.rows, averages, strict=True) if s is not None])
    told = ", ".join(f"{label} {value:.1f}" for label, value in ordered)
    printed = {row.label: published.row(section.name, row.paper).get("avg") for row in section.rows}
    in_paper = _order([(label, value) for label, value in printed.items() if value is not None])
    places = []
    for label in (label for label, _ in ordered if label.split()[0] == method("milora").title):
        here = _place(label, ordered)
        there = _place(label, in_paper)
        beside = f" (in the paper {there} of {len(in_paper)})" if there else ""
        places.append(f"{label} has place {here} of {len(ordered)}{beside}")
    return f"By the average: {told}. {'; '.join(places)}.".replace(". .", ".")


def _order(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])


def _place(label: str, ordered: list[tuple[str, float]]) -> int:
    """From 1; those with equal values share the better place. 0 if it is not there."""
    value = dict(ordered).get(label)
    return 0 if value is None else 1 + sum(other > value for _, other in ordered)


def _missing(section: Section, measured: Measurements) -> list[str]:
    """Why numbers are missing, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in section.rows:
        for column, cells in row.cells.items():
            reason = measured.grid.missing(cells[0], column) if cells else None
            if reason is not None:
                place = f"{row.backbone}, {column}" if row.backbone else column
                of_reason = reasons.setdefault(reason, [])
                if place not in of_reason:
                    of_reason.append(place)
    return [f"Not run: {listed(places)}: {reason}." for reason, places in reasons.items()]


def _records(
    section: Section, measured: Measurements, summaries: dict[str, list[Summary | None]], paper: _Paper
) -> list[dict[str, object]]:
    found = []
    for index, row in enumerate(section.rows):
        for column, of_column in summaries.items():
            summary = of_column[index]
            records = measured.records(row, column) if column != AVERAGE else []
            lost = lost_rows(records, column)
            first = records[0]["parameters"] if records else {}
            cell = next(iter(row.cells.values()))[0]
            reason = measured.grid.missing(row.cells[column][0], column) if column != AVERAGE else None
            found.append(
                {
                    "section": section.name,
                    "row": row.label,
                    "method": cell.variant.method,
                    "x": "" if row.x is None else row.x,
                    "column": column,
                    "median": _rounded(summary.median if summary else None),
                    "min": _rounded(summary.low if summary else None),
                    "max": _rounded(summary.high if summary else None),
                    "seeds": len(summary.values) if summary else 0,
                    "values": " ".join(f"{value:.3f}" for value in summary.values) if summary else "",
                    "paper": _rounded(paper.value(row, column)),
                    "tunable": first.get("tunable", ""),
                    "activated_mean": first.get("activated_mean", ""),
                    "activated_max": first.get("activated_max", ""),
                    "test_rows": lost.tested,
                    "unparsed": lost.unparsed,
                    "no_room": lost.no_room,
                    "left_out": lost.left_out,
                    "learning_rate": " ".join(f"{rate:g}" for rate in _learning_rates(records)),
                    "missing": reason or "",
                }
            )
    return found


def _learning_rates(records: list[dict[str, object]]) -> list[float]:
    rates = [record["training"]["learning_rate"] for record in records]  # type: ignore[index]
    return sorted(set(rates))


def _rounded(value: float | None) -> object:
    return "" if value is None else round(value, 3)
