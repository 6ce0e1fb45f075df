"""Whether a request can be met: names that exist, values of their fields' kinds, training that is not refused."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from milora.methods import METHODS, method
from milora.paper.request import CRITERIA, LIMITS, MILORA_BUDGET, PAPER_BUDGET, SECTIONS, ReportRequest
from milora.tasks import registry
from milora_core.errors import MiLoraError, did_you_mean

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text (in quotes, where YAML would read it otherwise)",
    type(None): "null",
}
"""The kinds of values that are checked; fields of other kinds are left to what reads them."""

WHOLE_AXES = ("figure3", "figure5")
"""Figures whose axis has whole numbers from 1."""

TEXTS = ("backbone", "data_dir", "judge_url", "judge_model")
OPTIONAL = ("data_dir", "judge_url")


def check_request(request: ReportRequest) -> None:
    """Looks at everything that would otherwise fail hours later, or once in every run.

    Raises:
        MiLoraError: With the first thing that is wrong.
    """
    from milora.training import DataArguments, TrainingArguments

    _check_fields(request)
    _check_limits(request)
    trained = _trained()
    known("training", request.training, trained)
    known("tune", request.tune, trained)
    own = {"backbone", "task", "data", "data_dir"}
    known("data", request.data, {one.name for one in fields(DataArguments)} - own)
    _check_kinds("data", request.data, DataArguments)
    _check_kinds("training", request.training, TrainingArguments)
    for name, values in request.tune.items():
        if not values:
            raise MiLoraError("tune needs at least one value for each field, as in learning_rate: [1e-3, 3e-3].")
        for value in values:
            _check_kinds("tune", {name: value}, TrainingArguments)
    known("methods", request.methods, METHODS)
    known("only_methods", request.only_methods, METHODS)
    for name in request.methods:
        _check_method(request, name)
    if request.tune_by not in CRITERIA:
        raise MiLoraError(f"tune_by must be {' or '.join(CRITERIA)}; found {request.tune_by!r}.")
    if request.tune and request.tune_by == "accuracy" and request.evaluation.dev_rows < 1:
        raise MiLoraError("tune_by: accuracy needs evaluation: {dev_rows: N}, the dev rows to measure it on.")
    check_trainings(request, here=False)


def check_trainings(request: ReportRequest, *, here: bool) -> None:
    """Makes the arguments of every training that the request can ask for, once each.

    Args:
        request: The request.
        here: Whether the runs are to be made on this machine, see
            [`milora.paper.training_settings.check_training`].

    Raises:
        MiLoraError: If training refuses some values; of a single method's with its name.
    """
    from milora.paper.training_settings import check_training

    seen: list[dict[str, Any]] = []
    for name in request.only_methods or METHODS:
        tuned = request.tuned(name)
        for values in itertools.product(*tuned.values()):
            settings = {**request.training_of(name), **dict(zip(tuned, values, strict=True))}
            if settings in seen:
                continue
            seen.append(settings)
            try:
                check_training(settings, here=here)
            except MiLoraError as error:
                of_method = f"methods: {name}: " if request.methods.get(name) else ""
                raise MiLoraError(f"{of_method}{error}") from error


def known(where: str, names: Iterable[Any], there: Iterable[str]) -> None:
    """Refuses names that are not there.

    Raises:
        MiLoraError: With the nearest that is, and with all of them where they are few.
    """
    there = list(there)
    for name in names:
        if name not in there:
            shown = f"; there are {', '.join(there)}" if len(there) <= len(METHODS) else ""
            raise MiLoraError(f"{where}: there is no {name!r}{shown}{did_you_mean(str(name), there)}")


def _check_fields(request: ReportRequest) -> None:
    for name in TEXTS:
        value = getattr(request, name)
        if not (isinstance(value, str) and value) and not (value is None and name in OPTIONAL):
            raise MiLoraError(f"{name} must be a text; found {value!r}.")
    for title, backbone in request.other_backbones.items():
        if not isinstance(backbone, str) or not isinstance(title, str):
            raise MiLoraError(f"other_backbones: {title!r} must name a folder or a hub id; found {backbone!r}.")
    _check_seeds("seeds", request.seeds)
    if request.threads is not None and not _is_whole(request.threads, 1):
        raise MiLoraError(f"threads must be a whole number of at least 1; found {request.threads!r}.")
    if request.budget not in (MILORA_BUDGET, PAPER_BUDGET) and not _is_whole(request.budget, 1):
        raise MiLoraError(f"budget must be milora, paper or a number of parameters; found {request.budget!r}.")
    if request.judge_url is not None:
        from milora.evaluation.mt_bench.client import ChatEndpoint

        ChatEndpoint(request.judge_url, request.judge_model)
    _check_tasks(request.tasks)


def _check_limits(request: ReportRequest) -> None:
    known("limits", request.limits, SECTIONS)
    for name, limits in request.limits.items():
        known(f"limits of {name}", limits, LIMITS)
        _check_tasks(limits.get("tasks", ()))
        if "seeds" in limits:
            _check_seeds(f"limits of {name}: seeds", limits["seeds"])
        for value in limits.get("values", ()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise MiLoraError(f"limits of {name}: values must be numbers; found {value!r}.")
            if name in WHOLE_AXES and not _is_whole(value, 1):
                raise MiLoraError(f"limits of {name}: values must be whole numbers of at least 1; found {value!r}.")


def _check_method(request: ReportRequest, name: str) -> None:
    from milora.training import TrainingArguments

    settings, trained = request.methods[name], _trained()
    config = method(name).config_class
    known(f"methods: {name}", settings, trained | {one.name for one in fields(config) if one.init})
    for field, value in settings.items():
        where, is_list = f"methods: {name}", isinstance(value, list | tuple)
        if field not in trained:
            _check_kinds(where, {field: value}, config)
        elif is_list and field in request.tune:
            if not value:
                raise MiLoraError(f"{where}: {field} needs at least one value to try.")
            for one in value:
                _check_kinds(where, {field: one}, TrainingArguments)
        elif is_list and kinds_of(TrainingArguments).get(field):
            raise MiLoraError(
                f"{where}: {field} is a list, of values to try, and tune does not name it: give one value, or add "
                f"'tune: {{{field}: {list(value)}}}'."
            )
        else:
            _check_kinds(where, {field: value}, TrainingArguments)


def _check_tasks(names: Iterable[Any]) -> None:
    for name in names:
        if name not in registry.names():
            near = did_you_mean(str(name), registry.names())
            raise MiLoraError(f"There is no task {name!r}; there are {', '.join(registry.names())}{near}")


def _check_seeds(where: str, seeds: tuple[Any, ...]) -> None:
    if not seeds or not all(_is_whole(seed, 0) for seed in seeds):
        raise MiLoraError(f"{where} must be whole numbers, at least one; found {list(seeds)}.")


def _check_kinds(where: str, values: Mapping[str, Any], of: type) -> None:
    for name, value in values.items():
        kinds = kinds_of(of).get(name, frozenset())
        # A whole number is a number; true and false are none.
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if kinds and not fits:
            wanted = " or ".join(text for kind, text in KINDS.items() if kind in kinds)
            raise MiLoraError(f"{where}: {name} must be {wanted}; found {value!r}.")


@cache
def kinds_of(of: type) -> dict[str, frozenset[type]]:
    """By field of a dataclass, the kinds that its values may have; fields of other kinds than [`KINDS`] are left out.

    Args:
        of: The class.
    """
    found = {}
    for name, hint in get_type_hints(of).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if all(part in KINDS for part in parts):
            found[name] = frozenset(parts)
    return found


def _trained() -> set[str]:
    from milora.paper.training_settings import training_fields

    return training_fields()


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
