"""Rows that came to nothing, in a number or in the training behind it: what there are of them, and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from milora.paper.sections import Section
from milora.paper.statistics import Measurements
from milora.paper.store import Record
from milora.paper.wording import listed


@dataclass(frozen=True)
class LostRows:
    """The rows behind a number and those of them that came to nothing, all seeds together.

    Attributes:
        tested: Test rows.
        unparsed: Of these, outputs in which no answer was found; they are wrong.
        no_room: Of these, prompts that leave no room for an answer in the backbone; they are wrong, and not `unparsed`.
        read: Rows to train on and of dev, also those that were left out.
        left_out: Of these, those that were longer than `max_length`.
    """

    tested: int
    unparsed: int
    no_room: int
    read: int
    left_out: int


def lost_rows(records: Sequence[Record], test: str) -> LostRows:
    """Counts.

    Args:
        records: Of the runs behind a number, one for each seed.
        test: The task that they are tested on; a run without a result of it has no test rows.
    """
    scores = [record["tests"][test] for record in records if test in record["tests"]]
    rows = [record["rows"] for record in records]
    left_out = sum(of_run["left_out"] for of_run in rows)
    return LostRows(
        tested=sum(score["rows"] for score in scores),
        unparsed=sum(score["unparsed"] for score in scores),
        no_room=sum(score["no_room"] for score in scores),
        read=sum(of_run["train"] + of_run["dev"] for of_run in rows) + left_out,
        left_out=left_out,
    )


def lost_row_notes(section: Section, measured: Measurements) -> list[str]:
    """A sentence for each kind of loss that a section has, with the tasks and rows that it is in.

    Args:
        section: The table or figure.
        measured: The results.
    """
    tested: dict[str, dict[str, LostRows]] = {}
    # By what they were trained on: a run that several columns show has lost its rows once.
    trained: dict[str, dict[str, LostRows]] = {}
    for row in section.rows:
        for column in section.columns:
            records = measured.records(row, column)
            if records:
                lost = lost_rows(records, column)
                tested.setdefault(column, {})[row.label] = lost
                trained.setdefault(" + ".join(records[0]["tasks"]), {})[row.label] = lost
    sentences: list[tuple[str, Mapping[str, Mapping[str, LostRows]], Callable[[LostRows], tuple[int, int]]]] = [
        (
            "Prompts that leave no room for an answer in the backbone, which are not cut and count as wrong",
            tested,
            lambda lost: (lost.no_room, lost.tested),
        ),
        (
            "Outputs in which no answer is found, which count as wrong",
            tested,
            lambda lost: (lost.unparsed, lost.tested),
        ),
        (
            "Rows longer than `max_length`, which are left out of training and dev",
            trained,
            lambda lost: (lost.left_out, lost.read),
        ),
    ]
    told = [(start, _told(by_task, count)) for start, by_task, count in sentences]
    return [f"{start}, all seeds together: {places}." for start, places in told if places]


def _told(by_task: Mapping[str, Mapping[str, LostRows]], count: Callable[[LostRows], tuple[int, int]]) -> str:
    """`in boolq IAPT (33 of 300) and LoRA (1 of 300); in piqa every row (12 of 300)`; empty where nothing was lost."""
    places = []
    for task, by_label in by_task.items():
        labels: dict[tuple[int, int], list[str]] = {}
        for label, lost in by_label.items():
            labels.setdefault(count(lost), []).append(label)
        is_alike = len(labels) == 1 and len(by_label) > 1
        groups = [
            f"{'every row' if is_alike else listed(of_count)} ({lost} of {of}{' each' if len(of_count) > 1 else ''})"
            for (lost, of), of_count in labels.items()
            if lost
        ]
        if groups:
            places.append(f"in {task} {listed(groups)}")
    return "; ".join(places)
