"""What the tables and figures are made of: variants of methods, cells that ask for them, and runs that answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from milora_core.errors import MiLoraError

Settings = Mapping[str, Any]

IDENTITY_FORMAT = 1
"""Part of every digest: to be raised when what a run does changes although its settings do not."""


class UnfinishedRunError(MiLoraError):
    """A run cannot be finished for now, though nothing is wrong with it: the next call goes on with what it made."""


def canonical(value: Any) -> str:
    """One text for equal settings, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)


@dataclass(frozen=True)
class Variant:
    """A method as a row of a table or a point of a figure shows it.

    Attributes:
        label: Its name there.
        method: One of [`milora.methods.METHODS`].
        settings: Fields of its configuration.
        own_tuning: Whether a tuned setting is chosen for this variant by itself, rather than taken from the method.
    """

    label: str
    method: str
    settings: Settings = field(default_factory=dict)
    own_tuning: bool = False


@dataclass(frozen=True)
class Cell:
    """A variant, trained on some tasks together and tested on some, with a seed, on a backbone."""

    backbone: str
    variant: Variant
    tasks: tuple[str, ...]
    tests: tuple[str, ...]
    seed: int
    routes_suffice: bool = False
    """Whether only what the routers choose is asked for, to which MT-Bench needs no judge."""

    @property
    def key(self) -> str:
        """Equal for cells that the same run answers."""
        return canonical([self.backbone, self.variant.method, self.variant.settings, self.tasks, self.tests, self.seed])

    def __str__(self) -> str:
        return f"{self.variant.label} on {'+'.join(self.tasks)}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """One training with its evaluation.

    Attributes:
        label: For people.
        backbone: As the user named it.
        method: One of [`milora.methods.METHODS`].
        settings: Fields of the method's configuration, also those at their defaults that a section may vary.
        tasks: Trained on.
        tests: Tested on.
        seed: Of the adapter's start and the order of the rows.
        training: Fields of `TrainingArguments`.
        data: Fields of `DataArguments`.
        evaluation: See [`milora.paper.request.Evaluation`]; with the judge's name where one grades answers.
        fingerprints: Of the backbone's files and of the rows of train, dev and test, as these decide the outcome too.
    """

    label: str
    backbone: str
    method: str
    settings: Settings
    tasks: tuple[str, ...]
    tests: tuple[str, ...]
    seed: int
    training: Settings
    data: Settings
    evaluation: Settings
    fingerprints: Settings

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the outcome, but the versions of libraries, which are recorded beside it."""
        return {
            "format": IDENTITY_FORMAT,
            "method": self.method,
            "settings": dict(self.settings),
            "tasks": list(self.tasks),
            "tests": list(self.tests),
            "seed": self.seed,
            "training": dict(self.training),
            "data": dict(self.data),
            "evaluation": dict(self.evaluation),
            "fingerprints": dict(self.fingerprints),
        }

    @cached_property
    def digest(self) -> str:
        """The run's name: a hash of its identity."""
        return hashlib.blake2b(canonical(self.identity).encode(), digest_size=10).hexdigest()
