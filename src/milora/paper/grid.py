"""The runs that tables and figures need: what is shared, what is tuned first, and what cannot be run."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from milora.evaluation.run import Judging
from milora.methods import METHODS, Counts, method, parameter_counts
from milora.paper.budget import SIZES, Budget, equal_budgets
from milora.paper.materials import MT_BENCH, NEEDS_A_JUDGE, Materials, has_answers
from milora.paper.request import MILORA_BUDGET, PAPER_BUDGET, PERPLEXITY, ReportRequest
from milora.paper.runs import Cell, Run, Settings, Variant
from milora.paper.sections import Section, sections
from milora.paper.store import Record, Results
from milora_core.errors import MiLoraError

VARIED = ("r", "num_experts", "top_k", "pooler", "router_activation", "gate", "load_balancing_coef")
VARIED_OF_MILORA = (*VARIED, "router_norm")
"""Fields that sections vary. A run names them also where they are at their defaults: so runs are shared, and a
default that changes makes another run."""

EMPTY = Budget({}, Counts(0, 0, 0))
ROUTED = ("milora", "midora")
"""Methods with a router a block."""

Settled = Callable[[str], bool]
"""Whether a run, by its digest, will not be made (again): it has finished, or failed for this time."""


@dataclass(frozen=True)
class Choice:
    """What was tried for the tuned fields of a method on some tasks, and what is best on dev.

    Attributes:
        label: The variant.
        tasks: It was trained on.
        criterion: `perplexity` or `accuracy`: what dev says.
        tried: The values of each try, with what dev said of it; `None` of a try that has failed or is missing.
        best: The values taken; `None` while tries are missing or where all have failed.
    """

    label: str
    tasks: tuple[str, ...]
    criterion: str
    tried: tuple[tuple[Settings, float | None], ...]
    best: Settings | None


class Grid:
    """The runs of a report.

    Args:
        request: What is asked for.
        materials: What is at hand.

    Raises:
        MiLoraError: If a method has no size at which it meets the budget, or the backbone is unknown.
    """

    def __init__(self, request: ReportRequest, materials: Materials | None = None) -> None:
        self.request = request
        self.materials = materials or Materials(
            request.data_dir, Judging(url=request.judge_url, model=request.judge_model)
        )
        self._budgets: dict[str, Budget] | None = None
        self._runs: dict[str, Run] = {}
        self.sections: list[Section] = sections(request, self.base_settings)

    def base_settings(self, name: str) -> dict[str, Any]:
        """The settings of a method at its budget, with what the request has for it."""
        return {**self.budgets().get(name, EMPTY).settings, **self.request.settings_of(name)}

    def budgets(self) -> Mapping[str, Budget]:
        """The methods at equal budgets; none where the paper's settings are taken as they are."""
        if self._budgets is None:
            self._budgets = {}
            if self.request.budget != PAPER_BUDGET:
                target = None if self.request.budget == MILORA_BUDGET else int(self.request.budget)
                names = self.request.only_methods or tuple(METHODS)
                config = self.materials.config(self.request.backbone)
                self._budgets = equal_budgets(config, names, target)
        return self._budgets

    def cells(self) -> list[Cell]:
        """The cells of all sections, each once, in the order of the sections."""
        found: dict[str, Cell] = {}
        for section in self.sections:
            for cell in section.cells():
                # What is possible for one of the cells that a run answers is possible for the run.
                suffices = cell.key in found and found[cell.key].routes_suffice
                found[cell.key] = replace(cell, routes_suffice=True) if suffices else cell
        return list(found.values())

    def missing(self, cell: Cell, test: str | None = None) -> str | None:
        """Why a cell has no run, or a test of it no result, in a line; `None` if nothing is in the way."""
        reason = self.materials.backbone_missing(cell.backbone)
        for task in cell.tasks:
            reason = reason or self.materials.rows_missing(task, "train")
        tests = [test] if test is not None else cell.tests
        reasons = [self._of_test(cell, name) for name in tests]
        return reason or (reasons[0] if all(reasons) else None)

    def candidates(self, cell: Cell) -> list[tuple[Settings, Run]]:
        """What is tried to tune a cell's method on its tasks, with the first seed; nothing where nothing is tuned."""
        tuned = self.request.tuned(cell.variant.method)
        if not tuned:
            return []
        variant = cell.variant
        if not variant.own_tuning:
            variant = Variant(method(variant.method).title, variant.method, self._base_on(cell))
        values = [dict(zip(tuned, one, strict=True)) for one in itertools.product(*tuned.values())]
        first = Cell(cell.backbone, variant, cell.tasks, cell.tests, self.request.seeds[0])
        return [(value, self._make(first, value)) for value in values]

    def choice(self, cell: Cell, results: Results, settled: Settled) -> Choice:
        """The tuned values of a cell: the best of the tries that have finished, when none of them is to come."""
        candidates = self.candidates(cell)
        tried = tuple((value, self._merit(results.finished.get(run.digest))) for value, run in candidates)
        finished = [(merit, value) for value, merit in tried if merit is not None]
        complete = all(settled(run.digest) for _, run in candidates)
        best = min(finished, key=lambda pair: pair[0])[1] if finished and complete else None
        label = cell.variant.label if cell.variant.own_tuning else method(cell.variant.method).title
        criterion = self.request.tune_by if all(map(has_answers, cell.tasks)) else PERPLEXITY
        return Choice(label, cell.tasks, criterion, tried, best)

    def run(self, cell: Cell, results: Results, settled: Settled) -> Run | None:
        """The run of a cell; `None` if it cannot be made, or while its settings are still being tuned."""
        if self.missing(cell) is not None:
            return None
        if not self.request.tuned(cell.variant.method):
            return self._make(cell, {})
        best = self.choice(cell, results, settled).best
        return None if best is None else self._make(cell, best)

    def runs(self, results: Results, settled: Settled, cells: list[Cell] | None = None) -> list[Run]:
        """The runs that can be named so far, each once: tries first, then those of cells whose tries are settled."""
        found: dict[str, Run] = {}
        possible = [cell for cell in (self.cells() if cells is None else cells) if self.missing(cell) is None]
        for cell in possible:
            for _, run in self.candidates(cell):
                found.setdefault(run.digest, run)
        for cell in possible:
            resolved = self.run(cell, results, settled)
            if resolved is not None:
                found.setdefault(resolved.digest, resolved)
        return list(found.values())

    def shard(self, index: int, count: int) -> list[Cell]:
        """The cells of one of `count` shares of the grid, which cover it and do not overlap.

        Cells that share a tuned setting stay together; otherwise shares are as equal as they can be made greedily.

        Args:
            index: From 1 to `count`.
            count: How many shares.

        Raises:
            MiLoraError: If there is no such share.
        """
        if not 1 <= index <= count:
            raise MiLoraError(f"--shard takes i/n with i from 1 to n, such as 1/2; found {index}/{count}.")
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells():
            groups.setdefault(self._group(cell), []).append(cell)
        loads = [0] * count
        share: list[Cell] = []
        for cells in sorted(groups.values(), key=len, reverse=True):
            lightest = loads.index(min(loads))
            loads[lightest] += len(cells)
            if lightest == index - 1:
                share += cells
        return share

    def counts(self, cell: Cell) -> Counts:
        """The parameters of a cell's variant, also of one that cannot be run."""
        settings = dict(cell.variant.settings)
        return parameter_counts(cell.variant.method, self.materials.config(cell.backbone), **settings)

    def _group(self, cell: Cell) -> str:
        """Equal for cells that wait for the same tries, or that the same run answers."""
        if self.missing(cell) is not None:
            return cell.key
        candidates = self.candidates(cell)
        return candidates[0][1].digest if candidates else self._make(cell, {}).digest

    def awaited(self, cells: list[Cell], results: Results, settled: Settled) -> list[Cell]:
        """Cells that need a run of their own which cannot be named before their tries are done; one for each run."""
        found: dict[str, Cell] = {}
        for cell in cells:
            if self.missing(cell) is not None or self.run(cell, results, settled) is not None:
                continue
            candidates = self.candidates(cell)
            if all(settled(run.digest) for _, run in candidates):
                continue
            tries = {run.digest for _, run in candidates}
            possible = [self._make(cell, value) for value, _ in candidates]
            if any(run.digest not in tries for run in possible):
                found.setdefault(possible[0].digest, cell)
        return list(found.values())

    def _of_test(self, cell: Cell, test: str) -> str | None:
        """Why a test of a cell has no result."""
        missing = self.materials.rows_missing(test, "test")
        is_judged = self.request.judge_url is not None
        return missing if missing or test != MT_BENCH or is_judged or cell.routes_suffice else NEEDS_A_JUDGE

    def _is_tested(self, cell: Cell, test: str) -> bool:
        """Whether a cell's run has a test, the same for all cells that it answers.

        Of methods with routers MT-Bench has the routes without a judge too.
        """
        if self.materials.rows_missing(test, "test") is not None:
            return False
        return test != MT_BENCH or self.request.judge_url is not None or cell.variant.method in ROUTED

    def _dev_sources(self, tasks: tuple[str, ...]) -> list[str]:
        """Where dev rows come from: those that every training looks at between its steps, and those of dev accuracy."""
        given = self.request.data.get("dev_data") or tasks
        sources = [given] if isinstance(given, str) else list(given)
        return list(dict.fromkeys([*sources, *(tasks if self.request.evaluation.dev_rows else ())]))

    def _base_on(self, cell: Cell) -> dict[str, Any]:
        is_other = cell.backbone != self.request.backbone
        return {} if is_other else self.base_settings(cell.variant.method)

    def _merit(self, record: Record | None) -> float | None:
        """What dev says of a finished try; less is better. Tasks without right answers have perplexity only."""
        if record is None:
            return None
        if self.request.tune_by == PERPLEXITY:
            return _finite(record.get("dev_perplexity"))
        dev = record["dev"].values()
        if not all("accuracy" in of_task for of_task in dev):
            return _finite(statistics.fmean(of_task["perplexity"] for of_task in dev))
        return -statistics.fmean(of_task["accuracy"] for of_task in dev)

    def _make(self, cell: Cell, tuned: Settings) -> Run:
        key = f"{cell.key} {sorted(tuned.items())}"
        if key not in self._runs:
            self._runs[key] = self._build(cell, tuned)
        return self._runs[key]

    def _build(self, cell: Cell, tuned: Settings) -> Run:
        request, name = self.request, cell.variant.method
        tests = tuple(test for test in cell.tests if self._is_tested(cell, test))
        judged = {"judge": request.judge_model} if request.judge_url is not None and MT_BENCH in tests else {}
        prints = self.materials
        return Run(
            label=", ".join([str(cell), *(f"{field} {value:g}" for field, value in tuned.items())]),
            backbone=cell.backbone,
            method=name,
            settings={**_defaults(name), **cell.variant.settings},
            tasks=cell.tasks,
            tests=tests,
            seed=cell.seed,
            training={"learning_rate": _paper_learning_rate(), **request.training_of(name), **tuned},
            data=request.data,
            evaluation={**asdict(request.evaluation), **judged},
            fingerprints={
                "backbone": prints.backbone_fingerprint(cell.backbone),
                "train": {task: prints.rows_fingerprint(task, "train") for task in cell.tasks},
                "dev": {source: prints.rows_fingerprint(source, "dev") for source in self._dev_sources(cell.tasks)},
                "test": {task: prints.rows_fingerprint(task, "test") for task in tests},
            },
        )


def _finite(perplexity: float | None) -> float:
    # Of a run that diverged there is no number, or none to compare with.
    return float(perplexity) if perplexity is not None and math.isfinite(perplexity) else math.inf


@cache
def _paper_learning_rate() -> float:
    from milora.training import TrainingArguments

    rate: Any = next(one.default for one in fields(TrainingArguments) if one.name == "learning_rate")
    return float(rate)


@cache
def _defaults(name: str) -> dict[str, Any]:
    """What a method's varied fields and its size are by default."""
    varied = VARIED_OF_MILORA if name in ROUTED else VARIED if name == "moelora" else ()
    default = method(name).config_class() if varied else None
    values = {field: getattr(default, field) for field in varied if hasattr(default, field)}
    size = SIZES.get(name)
    return {**values, **({size.field: size.paper} if size else {})}
