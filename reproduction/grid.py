"""Maps the cells of tables to runs: the tuning runs, the records that answer a cell, and the remaining runs."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from milora.methods import method
from reproduction.budgets import size_at
from reproduction.experiments import Cell, Section, Variant, sections
from reproduction.settings import Request, Settings
from reproduction.store import FAILED, FINISHED, FORMAT, Record, backbone_name, canonical, key_of

MT_BENCH = "mt-bench"
ROUTED = ("milora", "midora")
"""Methods with one router per block."""


@dataclass(frozen=True)
class Run:
    """One training with its tests.

    `settings` are fields of the method's configuration; `budget` determines those in `size`. `training` and `data` are
    fields of `TrainingArguments` and `DataArguments`.
    """

    label: str
    backbone: str
    method: str
    settings: Settings
    budget: str | int | None
    size: Settings
    tasks: tuple[str, ...]
    tests: tuple[str, ...]
    seed: int
    training: Settings
    data: Settings
    evaluation: Settings

    @property
    def says(self) -> Record:
        """The run's fields in its record. Reports find the run by these fields."""
        said = {name: value for name, value in asdict(self).items() if name not in ("label", "tests")}
        is_folder = Path(self.backbone).is_dir()
        return {"format": FORMAT, **said, "backbone": backbone_name(self.backbone) if is_folder else self.backbone}

    @cached_property
    def key(self) -> str:
        """A key that is equal for equal runs; see [`key_of`]."""
        return key_of(self.says)

    def digest(self, fingerprints: Mapping[str, Any]) -> str:
        """The name of the run's working folder and lock."""
        text = canonical([self.key, list(self.tests), fingerprints])
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


class Choice(NamedTuple):
    """The values `tried` for tuned fields, each with its dev perplexity (`None` without a record), and the `best`.

    `best` is `None` while tries are missing, or if all have failed.
    """

    tried: tuple[tuple[Settings, float | None], ...]
    best: Settings | None


class Grid:
    """The cells of a request, and the records that answer them.

    `config` returns the transformers configuration of a backbone, or `None` if it is not available.
    """

    def __init__(
        self, request: Request, records: Iterable[Record] = (), config: Callable[[str], Any] = lambda backbone: None
    ) -> None:
        self.request = request
        self.sections: list[Section] = sections(request)
        columns = [column for section in self.sections for row in section.rows for column in row.cells.values()]
        self.cells: list[Cell] = [cell for column in columns for cell in column]
        self._config = config
        self._sizes: dict[str, Settings | None] = {}
        self.see(records)

    def see(self, records: Iterable[Record], waits: Callable[[Run], bool] = lambda run: False) -> None:
        """Updates the grid with all records, oldest first.

        `waits` is whether a missing record of a run may still come. A choice waits for such tries.
        """
        self._waits = waits
        self._finished: dict[str, list[Record]] = {}
        self.failed: dict[str, list[Record]] = {}
        self._recorded: dict[str, Settings] = {}
        own = backbone_name(self.request.backbone)
        for record in records:
            by_status = {FINISHED: self._finished, FAILED: self.failed}[record["status"]]
            by_status.setdefault(key_of(record), []).append(record)
            if record.get("budget") == self.request.budget and backbone_name(record["backbone"]) == own:
                self._recorded[record["method"]] = record["size"]

    def size(self, name: str) -> Settings | None:
        """The fields that set a method's size for the request's budget; `None` if the backbone is not available.

        Records store their sizes, so a report needs no backbone.
        """
        if name in self._recorded or self.request.budget == "paper":
            return self._recorded.get(name, {})
        if name not in self._sizes:
            config = self._config(self.request.backbone)
            self._sizes[name] = None if config is None else size_at(name, config, self.request.budget)
        return self._sizes[name]

    def tuned(self, variant: Variant) -> dict[str, tuple[Any, ...]]:
        """The tuned fields of a variant and the values to try. A method or a row may fix a field."""
        own = {**self.request.of_method(variant.method)[1], **variant.training}
        values = {name: own.get(name, tried) for name, tried in self.request.tune.items()}
        return {name: tuple(tried) for name, tried in values.items() if isinstance(tried, list | tuple)}

    def asked(self, cell: Cell, values: Settings) -> Run:
        """The run of a cell with these tuned values."""
        request, variant = self.request, cell.variant
        tuned = self.tuned(variant)
        of_method, of_training = request.of_method(variant.method)
        training = {**request.training, **of_training, **variant.training}
        own = {} if variant.backbone else of_method
        size = {} if variant.backbone else self.size(variant.method) or {}
        evaluation = request.evaluation.model_dump()
        if cell.test == MT_BENCH and request.judge_url is not None:
            evaluation["judge"] = request.judge_model
        return Run(
            label=", ".join([str(cell), *(f"{name} {value}" for name, value in values.items())]),
            backbone=cell.backbone,
            method=variant.method,
            settings={**size, **own, **variant.settings},
            budget=None if variant.backbone else request.budget,
            size=size,
            tasks=cell.tasks,
            tests=(cell.test,),
            seed=cell.seed,
            training={**{name: value for name, value in training.items() if name not in tuned}, **values},
            data=dict(request.data),
            evaluation=evaluation,
        )

    def tries(self, cell: Cell) -> list[tuple[Settings, Run]]:
        """The runs that tune a cell's method on its tasks, with the first seed; empty if nothing is tuned."""
        tuned = self.tuned(cell.variant)
        if not tuned:
            return []
        variant = cell.variant
        if not variant.tuned:
            variant = Variant(method(variant.method).title, variant.method, backbone=variant.backbone)
        first = Cell(variant, cell.backbone, cell.tasks, cell.test, self.request.seeds[0])
        combinations = [dict(zip(tuned, values, strict=True)) for values in itertools.product(*tuned.values())]
        return [(values, self.asked(first, values)) for values in combinations]

    def choice(self, cell: Cell) -> Choice:
        """The tuned values of a cell: the best of its tries, once no further try is expected."""
        tries = self.tries(cell)
        tried = tuple((values, _perplexity(self._last(run))) for values, run in tries)
        known = [(perplexity, values) for values, perplexity in tried if perplexity is not None]
        is_waiting = any(self._last(run) is None and self._waits(run) for _, run in tries)
        return Choice(tried, None if is_waiting or not known else min(known, key=lambda pair: pair[0])[1])

    def run(self, cell: Cell) -> Run | None:
        """The run of a cell; `None` while its values are still being tuned."""
        if not self.tuned(cell.variant):
            return self.asked(cell, {})
        best = self.choice(cell).best
        return None if best is None else self.asked(cell, best)

    def record(self, cell: Cell) -> Record | None:
        """The newest record that answers a cell."""
        run = self.run(cell)
        return None if run is None else self._last(run)

    def answers(self, run: Run) -> list[Record]:
        """The records of a run that have all of its tests, oldest first."""
        return [one for one in self._finished.get(run.key, ()) if all(self._has(one, test) for test in run.tests)]

    def runs(self) -> list[Run]:
        """The runs known so far, each once with all its tests; tries come first."""
        found: dict[str, list[Run]] = {}
        tries = [run for cell in self.cells for _, run in self.tries(cell)]
        for run in (*tries, *map(self.run, self.cells)):
            if run is not None:
                found.setdefault(run.key, []).append(run)
        return [_joined(same) for same in found.values()]

    def plan(self) -> list[dict[str, str]]:
        """Every run with its state; `after tuning` if its settings depend on unfinished tries."""
        runs = self.runs()
        states = {run.key: "failed before" if run.key in self.failed else "open" for run in runs}
        states |= {run.key: "finished" for run in runs if self.answers(run)}
        labels = {run.key: run.label for run in runs}
        for cell in self.cells:
            tries = self.tries(cell)
            if self.run(cell) is None and any(self._waits(run) for _, run in tries):
                key = self.asked(cell, tries[0][0]).key
                states.setdefault(key, "after tuning")
                labels.setdefault(key, str(cell))
        return [{"label": labels[key], "state": state} for key, state in states.items()]

    def _last(self, run: Run) -> Record | None:
        return next(reversed(self.answers(run)), None)

    def _has(self, record: Record, test: str) -> bool:
        if test != MT_BENCH:
            return test in record["tests"]
        if self.request.judge_url is not None:
            return bool(record["tests"].get(test, {}).get("judge") == self.request.judge_model)
        return test in record["tests"] or test in record["expert_shares"]


def _joined(same: Sequence[Run]) -> Run:
    """Joins runs that differ only in their tests into one with all tests, and with the judge if one of them has it."""
    tests = tuple(dict.fromkeys(test for run in same for test in run.tests))
    judged = next((run for run in same if "judge" in run.evaluation), same[0])
    return replace(same[0], tests=tests, evaluation=judged.evaluation)


def _perplexity(record: Record | None) -> float | None:
    """The dev perplexity; infinite for a run that diverged, `None` without a record."""
    if record is None:
        return None
    found = record["dev_perplexity"]
    return float(found) if found is not None and math.isfinite(found) else math.inf
