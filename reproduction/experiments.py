"""Tables and figures as rows, columns, and the runs of each number. The paper's sections are in `paper.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reproduction.settings import Comparison, Limit, Request, Settings, split_fields

INSTRUCTIONS = "alpaca"
INSTRUCTION_TESTS = ("mt-bench", "mmlu", "bbh")
"""Tasks without training rows. Adapters for these tests are trained on Alpaca."""


@dataclass(frozen=True)
class Variant:
    """A row's method, with the fields of its configuration (`settings`) and of `TrainingArguments` that the row sets.

    `backbone` is a backbone other than the request's, on which the method has the paper's size. `tuned` is the label of
    the tuned values, if each row is tuned separately.
    """

    label: str
    method: str
    settings: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    backbone: str = ""
    tuned: str = ""


@dataclass(frozen=True)
class Cell:
    """One number for one seed: a variant trained on one or several tasks and tested on one."""

    variant: Variant
    backbone: str
    tasks: tuple[str, ...]
    test: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.label} on {'+'.join(self.tasks)}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure at `x`. `cells` holds a cell for each column and seed."""

    label: str
    method: str
    cells: Mapping[str, tuple[Cell, ...]]
    x: float | None


@dataclass(frozen=True)
class Section:
    """A table or figure: its name (`table1`), heading, comparison, columns (tasks) and rows."""

    name: str
    title: str
    comparison: Comparison
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def sections(request: Request) -> list[Section]:
    """The sections of a request that have rows. Table 4 is measured and has none."""
    there = request.all_comparisons()
    found = [_section(name, there[name], request) for name in request.chosen_sections() if name in there]
    return [section for section in found if section.rows]


def _section(name: str, comparison: Comparison, request: Request) -> Section:
    limit = request.limits.get(name, Limit())
    # By default the section's tasks. If tasks are named: those of the section among them, or all of them if none is.
    named, own = limit.tasks or request.tasks, comparison.tasks
    columns = tuple(task for task in named if task in own) or named or own
    rows = []
    for label, row in comparison.rows.items():
        is_left_out = request.only_methods and row.method not in request.only_methods
        has_backbone = not row.backbone or row.backbone in request.other_backbones
        if is_left_out or not has_backbone or (limit.values and row.x not in limit.values):
            continue
        settings, training = split_fields(row.method, row.model_extra or {})
        backbone = request.other_backbones.get(row.backbone, "")
        tuned = label if comparison.tune_each_row else ""
        variant = Variant(label, row.method, settings, training, backbone, tuned)
        cells = {}
        for task in columns:
            trained = columns if row.together else (INSTRUCTIONS,) if task in INSTRUCTION_TESTS else (task,)
            on = backbone or request.backbone
            cells[task] = tuple(Cell(variant, on, trained, task, seed) for seed in limit.seeds or request.seeds)
        rows.append(Row(label, row.method, cells, row.x))
    return Section(name, comparison.title or name, comparison, columns, tuple(rows))
