"""What a report is asked for: in a YAML file, on the command line, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from milora.errors import MiLoraError, did_you_mean
from milora.methods import METHODS, method
from milora.paper.runs import Settings
from milora.tasks import registry

SECTIONS = (
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
    "table7",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "router-choices",
)
SEEDS = (0, 1, 2, 3, 4)
"""As many as the paper's."""

BACKBONES_OF_TABLE_7: Mapping[str, str] = {"Llama-2 13B": "llama-2-13b", "Gemma 2B": "gemma-2b"}
CRITERIA = ("perplexity", "accuracy")
LIMITS = ("tasks", "seeds", "values")
PAPER_BUDGET = "paper"
MILORA_BUDGET = "milora"


@dataclass(frozen=True)
class Evaluation:
    """How adapters are tested.

    Args:
        test_rows: The first rows of each test split, or all of them.
        dev_rows: Rows of each dev split that are generated for too; none unless a setting is tuned on them.
        beams: Width of the beam search.
        batch_size: Prompts a batch.
    """

    test_rows: int | None = None
    dev_rows: int = 0
    beams: int = 3
    batch_size: int = 8


@dataclass(frozen=True)
class ReportRequest:
    """Which sections, on what, and how.

    Args:
        sections: Of [`SECTIONS`].
        backbone: `tiny`, a folder or a hub id.
        other_backbones: Table 7's, by the names that they have in the paper.
        tasks: Instead of the paper's.
        seeds: Of the runs; medians are over them.
        only_methods: Leave the others out.
        data_dir: Folder of the benchmarks' files.
        budget: `milora` (all methods within 5 % of MiLoRA's tunable parameters), `paper` (the paper's settings as they
            are), or the number of tunable parameters. On the paper's backbones `milora` is `paper`.
        training: Fields of `TrainingArguments` that differ from the paper's settings.
        data: Fields of `DataArguments`, such as `train_rows`.
        evaluation: How adapters are tested.
        methods: By method, fields of `TrainingArguments` or of its configuration that it alone has otherwise. A list in
            place of a number is what is to be tried for a tuned field.
        tune: By field of `TrainingArguments`, the values to try for each method and its tasks, with the first seed. The
            best on dev is used for all seeds.
        tune_by: `perplexity` or `accuracy`, on dev.
        limits: By section, other `tasks`, `seeds`, or `values` of a figure's axis.
        threads: Of torch; its own default if `None`.
    """

    sections: tuple[str, ...] = SECTIONS
    backbone: str = "tiny"
    other_backbones: Mapping[str, str] = field(default_factory=lambda: dict(BACKBONES_OF_TABLE_7))
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    only_methods: tuple[str, ...] = ()
    data_dir: str | None = None
    budget: str | int = MILORA_BUDGET
    training: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    methods: Mapping[str, Settings] = field(default_factory=dict)
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tune_by: str = "perplexity"
    limits: Mapping[str, Settings] = field(default_factory=dict)
    threads: int | None = None

    def training_of(self, name: str) -> dict[str, Any]:
        """What a method's training has otherwise than the paper's, but for what is tuned."""
        known = training_fields()
        own = {field: value for field, value in self.methods.get(name, {}).items() if field in known}
        return {field: value for field, value in {**self.training, **own}.items() if field not in self.tuned(name)}

    def settings_of(self, name: str) -> dict[str, Any]:
        """What a method's configuration has otherwise than at its budget."""
        known = training_fields()
        return {field: value for field, value in self.methods.get(name, {}).items() if field not in known}

    def tuned(self, name: str) -> dict[str, tuple[Any, ...]]:
        """The fields that are tuned for a method, and what is tried; a method may fix one, or try other values."""
        own = self.methods.get(name, {})
        found = {}
        for field_name, values in self.tune.items():
            value = own.get(field_name, values)
            if isinstance(value, list | tuple):
                found[field_name] = tuple(value)
        return found


def read_request(path: Path | None, flags: Mapping[str, Any]) -> ReportRequest:
    """The request that a YAML file and flags, which override it, stand for.

    Args:
        path: The file, with fields of [`ReportRequest`]; `None` for the defaults.
        flags: Fields by name; mappings are merged into the file's.

    Raises:
        MiLoraError: If the file cannot be read, a name is unknown or a value is out of range.
    """
    values = _read(path) if path is not None else {}
    for name, value in flags.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    names = [one.name for one in fields(ReportRequest)]
    for name in values:
        if name not in names:
            raise MiLoraError(f"{path} has {name!r}, which a report does not know{did_you_mean(name, names)}.")
    for name in ("training", "data", "methods", "tune", "limits"):
        if name in values:
            values[name] = _numbers(values[name])
    values["evaluation"] = _evaluation(values.get("evaluation", {}))
    for name in ("sections", "tasks", "seeds", "only_methods"):
        if name in values:
            values[name] = _listed(values[name])
    values["sections"] = tuple(dict.fromkeys(map(section_name, values.get("sections", SECTIONS))))
    values["tune"] = {name: tuple(_numbers(_listed(tried))) for name, tried in values.get("tune", {}).items()}
    request = ReportRequest(**values)
    _check(request)
    return request


def section_name(name: str) -> str:
    """`table1` for `1`, `table1`, `table-1` or `Table 1`.

    Raises:
        MiLoraError: If there is no such section.
    """
    short = str(name).lower().replace(" ", "").replace("_", "-")
    for candidate in (short, f"table{short}", short.replace("-", "")):
        if candidate in SECTIONS:
            return candidate
    raise MiLoraError(f"There is no section {name!r}; there are {', '.join(SECTIONS)}{did_you_mean(short, SECTIONS)}")


def training_fields() -> set[str]:
    """The fields of `TrainingArguments` that a report may set."""
    from milora.training import TrainingArguments

    return {one.name for one in fields(TrainingArguments)} - {"output_dir", "seed", "resume_from_checkpoint"}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MiLoraError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise MiLoraError(
            f"{path} must hold a mapping, such as 'tasks: [bundled-choice]'; found {type(values).__name__}."
        )
    return values


def _evaluation(values: Any) -> Evaluation:
    known = [one.name for one in fields(Evaluation)]
    for name in values:
        if name not in known:
            raise MiLoraError(f"evaluation has no field {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}")
    for name, value in values.items():
        least = 0 if name == "dev_rows" else 1
        if value is not None and (not isinstance(value, int) or value < least):
            raise MiLoraError(f"evaluation: {name} must be a whole number of at least {least}; found {value!r}.")
    return Evaluation(**values)


def _listed(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return tuple(part for part in value.replace(",", " ").split() if part)
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _check(request: ReportRequest) -> None:
    from milora.training import DataArguments

    _known("methods", request.methods, METHODS)
    _known("only_methods", request.only_methods, METHODS)
    _known("limits", request.limits, SECTIONS)
    _known("training", request.training, training_fields())
    _known("tune", request.tune, training_fields())
    own = {"backbone", "task", "data", "data_dir"}
    _known("data", request.data, {one.name for one in fields(DataArguments)} - own)
    for name, limits in request.limits.items():
        _known(f"limits of {name}", limits, LIMITS)
    for name, settings in request.methods.items():
        of_method = {one.name for one in fields(method(name).config_class) if one.init}
        _known(f"methods: {name}", settings, training_fields() | of_method)
    for name in (*request.tasks, *(task for limits in request.limits.values() for task in limits.get("tasks", ()))):
        if name not in registry.names():
            near = did_you_mean(name, registry.names())
            raise MiLoraError(f"There is no task {name!r}; there are {', '.join(registry.names())}{near}")
    if not request.seeds or not all(isinstance(seed, int) and seed >= 0 for seed in request.seeds):
        raise MiLoraError(f"seeds must be whole numbers, at least one; found {list(request.seeds)}.")
    if request.tune_by not in CRITERIA:
        raise MiLoraError(f"tune_by must be {' or '.join(CRITERIA)}; found {request.tune_by!r}.")
    if any(not values for values in request.tune.values()):
        raise MiLoraError("tune needs at least one value for each field, as in learning_rate: [1e-3, 3e-3].")
    if request.tune and request.tune_by == "accuracy" and request.evaluation.dev_rows < 1:
        raise MiLoraError("tune_by: accuracy needs evaluation: {dev_rows: N}, the dev rows to measure it on.")
    if isinstance(request.budget, str) and request.budget not in (MILORA_BUDGET, PAPER_BUDGET):
        raise MiLoraError(f"budget must be milora, paper or a number of parameters; found {request.budget!r}.")


def _known(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            shown = f"; there are {', '.join(known)}" if len(known) <= len(METHODS) else ""
            raise MiLoraError(f"{where}: there is no {name!r}{shown}{did_you_mean(name, known)}")


def parse_settings(texts: Sequence[str], option: str = "--set", example: str = "learning_rate=1e-3") -> dict[str, Any]:
    """`["learning_rate=1e-3"]` as a mapping, values read as YAML.

    Args:
        texts: What the option was given.
        option: Its name, for messages.
        example: Of a value of it, for messages.

    Raises:
        MiLoraError: If a text has no name or no value.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign:
            raise MiLoraError(f"{option} takes name=value, such as {example}; found {text!r}.")
        found[name.strip().replace("-", "_")] = number(value)
    return found


def _numbers(value: Any) -> Any:
    """A value of a YAML file with 1e-3, which YAML takes for a text, as the number that people mean by it."""
    if isinstance(value, Mapping):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner) for inner in value]
    return number(value) if isinstance(value, str) else value


def number(text: str) -> Any:
    """What people mean by a text: a number, a truth value, nothing (`null`), or the text."""
    words: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
