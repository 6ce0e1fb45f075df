"""The paper's tables and figures, and tables of one's own: rows, columns, and the runs behind each number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milora.methods import METHODS, method
from reproduction.settings import Comparison, Limit, Request, Settings, config_fields

TABLE_1_TASKS = ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa", "aqua", "gsm8k")
TABLE_2_TASKS = TABLE_1_TASKS[:5]
PAIR = ("boolq", "piqa")
INSTRUCTIONS = "alpaca"
INSTRUCTION_TESTS = ("mt-bench", "mmlu", "bbh")
"""Tasks without training rows: adapters that are tested on them are trained on Alpaca."""

RANKS = (8, 16, 32, 64, 128, 256)
CHOSEN = (1, 2, 3, 4, 5, 6, 7)
COEFFICIENTS = (0, 1e-3, 1e-2, 1e-1, 1)
MULTI_TASK_METHODS = ("lora", "moelora", "dora", "milora")
MOELORA_ON_AXIS: Mapping[str, Any] = {"r": 32, "num_experts": 8, "top_k": 4}
"""MOELoRA at the paper's setting, where its rank or its number of chosen experts varies."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "MiLoRA": {},
    "MiLoRA-1 (mean pooling)": {"pooler": "mean"},
    "MiLoRA-2 (last-token pooling)": {"pooler": "last"},
    "MiLoRA-3 (GeLU)": {"router_activation": "gelu"},
    "MiLoRA-4 (ReLU lower half, GeLU upper half)": {"router_activation": "relu|gelu"},
    "MiLoRA-5 (GeLU lower half, ReLU upper half)": {"router_activation": "gelu|relu"},
}
"""Table 5's rows."""


@dataclass(frozen=True)
class Variant:
    """A method with the fields that a row sets.

    Attributes:
        label: The row's name.
        method: One of [`milora.methods.METHODS`].
        settings: Fields of its configuration.
        training: Fields of `TrainingArguments`.
        sized: Whether the request's budget decides the method's size. False where the row sets it.
        tuned: The label under which tuned values are chosen: of the method, or of the row where rows are tuned one by
            one.
        backbone: Another backbone than the request's.
    """

    label: str
    method: str
    settings: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    sized: bool = True
    tuned: str = ""
    backbone: str = ""


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
    """A row of a table, or a point of a figure.

    Attributes:
        variant: What it is about.
        cells: By column, a cell for each seed.
        label: Its name.
        paper: The name of the row in the paper, where it has one.
        x: The place on the axis of a figure, whose lines are the methods.
        group: Table 7's backbone.
    """

    variant: Variant
    cells: Mapping[str, tuple[Cell, ...]]
    label: str
    paper: str = ""
    x: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Section:
    """A table or figure: its name (`table1`), heading, columns (tasks) and rows."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def cells(self) -> Iterator[Cell]:
        """All cells, row by row."""
        for row in self.rows:
            for of_column in row.cells.values():
                yield from of_column


def sections(request: Request) -> list[Section]:
    """The sections of a request that have rows; Table 4 is measured and has none."""
    found = []
    for name in request.chosen_sections():
        of = _Builder(name, request)
        if name in request.comparisons:
            found.append(_comparison(of, request.comparisons[name]))
        elif name in BUILDERS:
            found.append(BUILDERS[name](of))
    return [section for section in found if section.rows]


class _Builder:
    def __init__(self, name: str, request: Request) -> None:
        self.name = name
        self.request = request
        self.limit = request.limits.get(name, Limit())

    def tasks(self, of_paper: Sequence[str]) -> tuple[str, ...]:
        """The paper's tasks; those of them that are named; or where none of them is, all that are named."""
        named = self.limit.tasks or self.request.tasks
        return tuple(name for name in named if name in of_paper) or named or tuple(of_paper)

    def methods(self, of_paper: Sequence[str]) -> list[str]:
        return [name for name in of_paper if name in (self.request.only_methods or of_paper)]

    def values(self, of_paper: Sequence[float]) -> tuple[float, ...]:
        return self.limit.values or tuple(of_paper)

    def single(self, variant: Variant, tasks: Sequence[str], paper: str = "", label: str = "", **fields: Any) -> Row:
        """A row with an adapter for each task."""
        cells = {
            task: self._seeded(variant, (INSTRUCTIONS,) if task in INSTRUCTION_TESTS else (task,), task)
            for task in tasks
        }
        return Row(variant, cells, label or variant.label, paper, **fields)

    def together(self, variant: Variant, tasks: Sequence[str], paper: str = "", label: str = "") -> Row:
        """A row with one adapter for all tasks."""
        cells = {task: self._seeded(variant, tuple(tasks), task) for task in tasks}
        return Row(variant, cells, label or variant.label, paper)

    def _seeded(self, variant: Variant, tasks: tuple[str, ...], test: str) -> tuple[Cell, ...]:
        backbone = variant.backbone or self.request.backbone
        return tuple(Cell(variant, backbone, tasks, test, seed) for seed in self.limit.seeds or self.request.seeds)


def _plain(name: str) -> Variant:
    return Variant(method(name).title, name)


def _comparison(of: _Builder, comparison: Comparison) -> Section:
    tasks = of.limit.tasks or comparison.tasks or of.request.tasks
    rows = []
    for label, row in comparison.rows.items():
        known = config_fields(row.method)
        settings = {name: value for name, value in row.overrides.items() if name in known}
        training = {name: value for name, value in row.overrides.items() if name not in known}
        tuned = label if comparison.tune_each_row else ""
        variant = Variant(label, row.method, settings, training, tuned=tuned)
        rows.append((of.together if comparison.together else of.single)(variant, tasks))
    return Section(of.name, comparison.title or of.name, tuple(tasks), tuple(rows))


def _table1(of: _Builder) -> Section:
    tasks = of.tasks(TABLE_1_TASKS)
    rows = [of.single(_plain(name), tasks, method(name).title) for name in of.methods(tuple(METHODS))]
    return Section(of.name, "Table 1: one adapter for each task", tasks, tuple(rows))


def _table2(of: _Builder) -> Section:
    tasks = of.tasks(TABLE_2_TASKS)
    rows = []
    for variant in map(_plain, of.methods(MULTI_TASK_METHODS)):
        rows.append(of.single(variant, tasks, f"{variant.label} ST", f"{variant.label} ST"))
        rows.append(of.together(variant, tasks, f"{variant.label} MT", f"{variant.label} MT"))
    return Section(of.name, "Table 2: one adapter for each task (ST) or for all (MT)", tasks, tuple(rows))


def _table3(of: _Builder) -> Section:
    rows = [
        of.single(_plain(name), INSTRUCTION_TESTS, method(name).title) for name in of.methods(("moelora", "milora"))
    ]
    title = "Table 3: instruction tuning on Alpaca (mt-bench: the judge's mean grade, of 10)"
    return Section(of.name, title, INSTRUCTION_TESTS, tuple(rows))


def _table5(of: _Builder) -> Section:
    tasks = of.tasks((*PAIR, "mmlu"))
    rows = [
        of.single(Variant(label, "milora", dict(settings)), tasks, label)
        for label, settings in ABLATIONS.items()
        if of.methods(("milora",))
    ]
    return Section(of.name, "Table 5: poolers and activations of MiLoRA's router", tasks, tuple(rows))


def _table7(of: _Builder) -> Section:
    """Other backbones, each method at the paper's size."""
    tasks = of.tasks((*PAIR, "mmlu"))
    rows = [
        of.single(Variant(f"{title}: {method(name).title}", name, sized=False, backbone=backbone), tasks, group=title)
        for title, backbone in of.request.other_backbones.items()
        for name in of.methods(("moelora", "milora"))
    ]
    return Section(of.name, "Table 7: other backbones", tasks, tuple(rows))


def _figure2(of: _Builder) -> Section:
    tasks = of.tasks(("mt-bench", *PAIR))
    rows = [of.single(_plain("milora"), tasks)]
    return Section(of.name, "Figure 2: what the routers choose", tasks, tuple(rows))


def _figure3(of: _Builder) -> Section:
    return _axis(of, "Figure 3: the number of chosen experts k", "k", "top_k", CHOSEN, ("milora", "moelora"))


def _figure4(of: _Builder) -> Section:
    title = "Figure 4: the coefficient λ of the load-balancing loss"
    return _axis(of, title, "λ", "load_balancing_coef", COEFFICIENTS, ("milora",))


def _figure5(of: _Builder) -> Section:
    return _axis(of, "Figure 5: the rank r", "r", "r", RANKS, ("milora", "moelora"))


def _axis(of: _Builder, title: str, symbol: str, name: str, values: Sequence[float], methods: Sequence[str]) -> Section:
    tasks, rows = of.tasks(PAIR), []
    for value in of.values(values):
        exact = float(value) if name == "load_balancing_coef" else int(value)
        for which in of.methods(methods):
            settings = {**(MOELORA_ON_AXIS if which == "moelora" else {}), name: exact}
            variant = Variant(
                f"{method(which).title}, {symbol} = {value:g}", which, settings, sized="r" not in settings
            )
            rows.append(of.single(variant, tasks, x=float(value)))
    return Section(of.name, title, tasks, tuple(rows))


BUILDERS: Mapping[str, Callable[[_Builder], Section]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table5": _table5,
    "table7": _table7,
    "figure2": _figure2,
    "figure3": _figure3,
    "figure4": _figure4,
    "figure5": _figure5,
}
