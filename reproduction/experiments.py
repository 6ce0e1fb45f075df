"""Tables and figures as rows, columns, and the runs behind each number. The paper's are in `paper.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from reproduction.settings import Comparison, Limit, Request, Settings, split_fields

INSTRUCTIONS = "alpaca"
INSTRUCTION_TESTS = ("mt-bench", "mmlu", "bbh")
"""Tasks without training rows: adapters that are tested on them are trained on Alpaca."""


@dataclass(frozen=True)
class Variant:
    """A method with the fields of its configuration and of training that a row sets.

    Attributes:
        label: The row's name.
        method: One of [`milora.methods.METHODS`].
        settings: Fields of its configuration.
        training: Fields of `TrainingArguments`.
        backbone: Another backbone than the request's, at the paper's size.
        tuned: The label under which values are tuned where rows are tuned one by one.
    """

    label: str
    method: str
    settings: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    backbone: str = ""
    tuned: str = ""


@dataclass(frozen=True)
class Cell:
    """One number for one seed: a variant trained on some tasks together and tested on one."""

    variant: Variant
    backbone: str
    tasks: tuple[str, ...]
    test: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.label} on {'+'.join(self.tasks)}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure at `x`: by column, a cell for each seed."""

    variant: Variant
    cells: Mapping[str, tuple[Cell, ...]]
    x: float | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        return self.variant.label


@dataclass(frozen=True)
class Section:
    """A table or figure: its name (`table1`), what it is made from, its columns (tasks) and rows."""

    name: str
    comparison: Comparison
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The heading."""
        return self.comparison.title or self.name

    def cells(self) -> Iterator[Cell]:
        """All cells, row by row."""
        for row in self.rows:
            for of_column in row.cells.values():
                yield from of_column


def sections(request: Request) -> list[Section]:
    """The sections of a request that have rows. Table 4 is measured and has none."""
    there = request.all_comparisons()
    found = [_section(name, there[name], request) for name in request.chosen_sections() if name in there]
    return [section for section in found if section.rows]


def _section(name: str, comparison: Comparison, request: Request) -> Section:
    limit = request.limits.get(name, Limit())
    # The section's own tasks; those of them that are named; or where none of them is, all that are named.
    named, own = limit.tasks or request.tasks, comparison.tasks
    columns = tuple(task for task in named if task in own) or named or own
    rows = []
    for label, row in comparison.rows.items():
        is_left_out = request.only_methods and row.method not in request.only_methods
        if is_left_out or (limit.values and row.x not in limit.values):
            continue
        if row.backbone and row.backbone not in request.other_backbones:
            continue
        settings, training = split_fields(row.method, row.overrides)
        backbone = request.other_backbones.get(row.backbone, "")
        tuned = label if comparison.tune_each_row else ""
        variant = Variant(label, row.method, settings, training, backbone, tuned)
        cells = {}
        for task in columns:
            trained = columns if row.together else (INSTRUCTIONS,) if task in INSTRUCTION_TESTS else (task,)
            on = backbone or request.backbone
            cells[task] = tuple(Cell(variant, on, trained, task, seed) for seed in limit.seeds or request.seeds)
        rows.append(Row(variant, cells, row.x))
    return Section(name, comparison, columns, tuple(rows))
