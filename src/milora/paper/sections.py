"""The paper's tables and figures as what they ask for: rows or points, columns, and the cells behind each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from milora.methods import METHODS, method
from milora.paper.request import ReportRequest
from milora.paper.runs import Cell, Settings, Variant
from milora_core.routing import ROUTER_NORMS

TABLE_1_TASKS = ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa", "aqua", "gsm8k")
TABLE_2_TASKS = ("arc-easy", "arc-challenge", "boolq", "obqa", "piqa")
PAIR = ("boolq", "piqa")
INSTRUCTIONS = "alpaca"
INSTRUCTION_TESTS = ("mt-bench", "mmlu", "bbh")
"""What a model trained on instructions is tested on; these have no training rows of their own."""

WITHOUT_CONVERSATIONS = ("mmlu", "bbh")
"""What its variants are tested on: judged conversations are dear, and only Table 3 and figure 2 have them."""

RANKS = (8, 16, 32, 64, 128, 256)
CHOSEN = (1, 2, 3, 4, 5, 6, 7)
COEFFICIENTS = (0, 1e-3, 1e-2, 1e-1, 1)
MULTI_TASK_METHODS = ("lora", "moelora", "dora", "milora")

ABLATIONS: Mapping[str, Settings] = {
    "MiLoRA": {},
    "MiLoRA-1 (mean pooling)": {"pooler": "mean"},
    "MiLoRA-2 (last-token pooling)": {"pooler": "last"},
    "MiLoRA-3 (GeLU)": {"router_activation": "gelu"},
    "MiLoRA-4 (ReLU lower half, GeLU upper half)": {"router_activation": "relu|gelu"},
    "MiLoRA-5 (GeLU lower half, ReLU upper half)": {"router_activation": "gelu|relu"},
}
"""Table 5's rows."""

PAPER_MOELORA: Settings = {"r": 32, "num_experts": 8, "top_k": 4}
"""MOELoRA where its rank or its number of chosen experts is what varies, whatever the budget is."""

GATES = ("hard", "softmax", "renormalized")


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure.

    Attributes:
        label: Its name.
        cells: By column, a cell for each seed.
        paper: The name of the row in the paper, where it has one.
        series: The line that a point belongs to.
        x: Where on the line it is.
        backbone: Which backbone it is about, where a table has several.
    """

    label: str
    cells: Mapping[str, tuple[Cell, ...]]
    paper: str = ""
    series: str = ""
    x: float | None = None
    backbone: str = ""


@dataclass(frozen=True)
class Section:
    """A table or figure.

    Attributes:
        name: As the command line has it, such as `table1`.
        title: Its heading.
        columns: What is tested.
        rows: What is compared.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order of the rows; some more than once."""
        for row in self.rows:
            for of_column in row.cells.values():
                yield from of_column


def sections(request: ReportRequest, base: Callable[[str], Settings]) -> list[Section]:
    """The sections that are asked for, in the paper's order.

    Args:
        request: Which, and with which tasks and seeds.
        base: The settings of a method at its budget.
    """
    return [build(_Builder(name, request, base)) for name, build in BUILDERS.items() if name in request.sections]


class _Builder:
    """What the sections' builders share: a section's tasks and seeds, and cells by column."""

    def __init__(self, name: str, request: ReportRequest, base: Callable[[str], Settings]) -> None:
        self.name = name
        self.request = request
        self.base = base
        self.limits = request.limits.get(name, {})

    def tasks(self, of_paper: Sequence[str]) -> tuple[str, ...]:
        """The paper's tasks, those of them that were named, or if none of them was, what was named."""
        named = self.limits.get("tasks") or self.request.tasks
        if not named:
            return tuple(of_paper)
        return tuple(name for name in named if name in of_paper) or tuple(named)

    def methods(self, of_paper: Sequence[str]) -> list[str]:
        """The paper's methods, those of them that were named."""
        return [name for name in of_paper if not self.request.only_methods or name in self.request.only_methods]

    def values(self, of_paper: Sequence[float]) -> tuple[float, ...]:
        """The points of a figure."""
        return tuple(self.limits.get("values") or of_paper)

    def variant(self, name: str, label: str = "", own_tuning: bool = False, **settings: object) -> Variant:
        """A method at its budget, with some settings otherwise."""
        return Variant(label or method(name).title, name, {**self.base(name), **settings}, own_tuning)

    def single(
        self, variant: Variant, tasks: Sequence[str], backbone: str = "", *, routes_suffice: bool = False
    ) -> dict[str, tuple[Cell, ...]]:
        """An adapter for each task."""
        converses = not backbone and dict(variant.settings) == dict(self.base(variant.method))
        return {task: self._seeded(backbone, variant, *_trained_for(task, converses), routes_suffice) for task in tasks}

    def together(self, variant: Variant, tasks: Sequence[str]) -> dict[str, tuple[Cell, ...]]:
        """One adapter for all tasks."""
        return dict.fromkeys(tasks, self._seeded("", variant, tuple(tasks), tuple(tasks)))

    def _seeded(
        self,
        backbone: str,
        variant: Variant,
        tasks: tuple[str, ...],
        tests: tuple[str, ...],
        routes_suffice: bool = False,
    ) -> tuple[Cell, ...]:
        seeds = self.limits.get("seeds") or self.request.seeds
        on = backbone or self.request.backbone
        return tuple(Cell(on, variant, tasks, tests, seed, routes_suffice) for seed in seeds)


def _trained_for(task: str, converses: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an adapter that is tested on a task is trained on, and all that it is tested on."""
    if task not in INSTRUCTION_TESTS:
        return (task,), (task,)
    return (
        INSTRUCTIONS,
    ), INSTRUCTION_TESTS if converses or task not in WITHOUT_CONVERSATIONS else WITHOUT_CONVERSATIONS


def _table1(of: _Builder) -> Section:
    tasks = of.tasks(TABLE_1_TASKS)
    rows = [
        Row(method(name).title, of.single(of.variant(name), tasks), paper=method(name).title)
        for name in of.methods(tuple(METHODS))
    ]
    return Section(of.name, "Table 1: one adapter for each task", tasks, tuple(rows))


def _table2(of: _Builder) -> Section:
    tasks = of.tasks(TABLE_2_TASKS)
    rows = []
    for name in of.methods(MULTI_TASK_METHODS):
        title = method(name).title
        rows.append(Row(f"{title} ST", of.single(of.variant(name), tasks), paper=f"{title} ST"))
        rows.append(Row(f"{title} MT", of.together(of.variant(name), tasks), paper=f"{title} MT"))
    return Section(of.name, "Table 2: one adapter for each task (ST) or for all (MT)", tasks, tuple(rows))


def _table3(of: _Builder) -> Section:
    rows = [
        Row(method(name).title, of.single(of.variant(name), INSTRUCTION_TESTS), paper=method(name).title)
        for name in of.methods(("moelora", "milora"))
    ]
    title = "Table 3: instruction tuning on Alpaca (mt-bench: the judge's mean grade, of 10)"
    return Section(of.name, title, INSTRUCTION_TESTS, tuple(rows))


def _table5(of: _Builder) -> Section:
    tasks = _with_mmlu(of)
    rows = [
        Row(label, of.single(of.variant("milora", label, **settings), tasks), paper=label)
        for label, settings in ABLATIONS.items()
    ]
    return Section(of.name, "Table 5: poolers and activations of MiLoRA's router", tasks, tuple(rows))


def _table7(of: _Builder) -> Section:
    tasks = _with_mmlu(of)
    rows = [
        Row(
            f"{title}: {method(name).title}",
            # Budgets are for the backbone of the other tables; the paper's settings are for its backbones.
            of.single(Variant(method(name).title, name), tasks, backbone),
            backbone=title,
        )
        for title, backbone in of.request.other_backbones.items()
        for name in of.methods(("moelora", "milora"))
    ]
    return Section(of.name, "Table 7: other backbones", tasks, tuple(rows))


def _with_mmlu(of: _Builder) -> tuple[str, ...]:
    return of.tasks((*PAIR, "mmlu"))


def _figure2(of: _Builder) -> Section:
    tasks = of.tasks(("mt-bench", *PAIR))
    row = Row("MiLoRA", of.single(of.variant("milora"), tasks, routes_suffice=True))
    return Section(of.name, "Figure 2: what the routers choose", tasks, (row,))


def _figure3(of: _Builder) -> Section:
    tasks = of.tasks(PAIR)
    moelora = {**PAPER_MOELORA}
    rows = []
    for k in of.values(CHOSEN):
        for name in of.methods(("milora", "moelora")):
            settings = {"top_k": int(k)} if name == "milora" else {**moelora, "top_k": int(k)}
            rows.append(_point(of, name, tasks, f"k = {int(k)}", k, settings))
    return Section(of.name, "Figure 3: the number of chosen experts k", tasks, tuple(rows))


def _figure4(of: _Builder) -> Section:
    tasks = of.tasks(PAIR)
    rows = [
        _point(of, "milora", tasks, f"λ = {value:g}", value, {"load_balancing_coef": float(value)})
        for value in of.values(COEFFICIENTS)
    ]
    return Section(of.name, "Figure 4: the coefficient λ of the load-balancing loss", tasks, tuple(rows))


def _figure5(of: _Builder) -> Section:
    tasks = of.tasks(PAIR)
    rows = []
    for r in of.values(RANKS):
        for name in of.methods(("milora", "moelora")):
            settings = {"r": int(r)} if name == "milora" else {**PAPER_MOELORA, "r": int(r)}
            rows.append(_point(of, name, tasks, f"r = {int(r)}", r, settings))
    return Section(of.name, "Figure 5: the rank r", tasks, tuple(rows))


def _point(of: _Builder, name: str, tasks: Sequence[str], point: str, x: float, settings: Settings) -> Row:
    title = method(name).title
    label = f"{title}, {point}"
    return Row(label, of.single(of.variant(name, label, **settings), tasks), series=title, x=float(x))


def _router_choices(of: _Builder) -> Section:
    tasks = of.tasks(PAIR)
    rows = []
    for gate in GATES:
        for norm in ROUTER_NORMS:
            label = f"gate {gate}, norm {norm}"
            # Gates scale the experts' output differently, so that one learning rate for all would favour some.
            variant = of.variant("milora", label, own_tuning=True, gate=gate, router_norm=norm)
            rows.append(Row(label, of.single(variant, tasks)))
    return Section(of.name, "Router choices: gates, and what of the router's input is normalised", tasks, tuple(rows))


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
    "router-choices": _router_choices,
}
"""By name, in the order of the report. Table 4 is measured by `milora.benchmark`, not by runs."""
