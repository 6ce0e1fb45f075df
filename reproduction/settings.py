"""The settings of a reproduction: pydantic models, read from a YAML file and from `--set`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic import NonNegativeInt as Natural
from pydantic import PositiveInt as Positive

from milora.methods import METHODS
from milora.tasks import registry
from milora_core.errors import MiLoraError, did_you_mean

Settings = dict[str, Any]
TABLE_4 = "table4"
"""A section without runs: it is measured."""


def _named(kind: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    if name not in names:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")
    return name


def _section(name: Any) -> str:
    """`table1` for `1`, `table1`, `table-1` or `Table 1`."""
    short = str(name).lower().replace(" ", "").replace("-", "")
    return f"table{short}" if short.isdigit() else short if short in (*paper_sections(), TABLE_4) else str(name)


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(lambda one: one if isinstance(one, list | tuple) else (one,))]
"""A list, or one of its items."""

SectionName = Annotated[str, BeforeValidator(_section)]
TaskName = Annotated[str, AfterValidator(lambda name: _named("task", name, registry.names()))]
MethodName = Annotated[str, AfterValidator(lambda name: _named("method", name, METHODS))]
AtLeastOne = Field(min_length=1)


class Strict(BaseModel):
    """A model without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(Strict):
    """How adapters are tested: on the first `test_rows` rows of each test split (default: all), with beam search."""

    test_rows: Positive | None = None
    beams: Positive = 3
    batch_size: Positive = 8


class Limit(Strict):
    """Overrides for one section: its tasks, its seeds, the points of its axis."""

    tasks: Several[TaskName] = ()
    seeds: Several[Natural] = ()
    values: Several[float] = ()


class ComparisonRow(BaseModel):
    """A method, and overrides for any fields of its configuration or of `TrainingArguments`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: MethodName
    together: bool = False  # train one adapter for all tasks instead of one for each
    x: float | None = None  # the value on the axis of a figure; each method is a line
    backbone: str = ""  # a name in `other_backbones`


class Comparison(Strict):
    """A table or figure: its rows by label."""

    rows: Annotated[dict[str, ComparisonRow], AtLeastOne]
    title: str = ""  # the heading; by default the name
    tasks: Several[TaskName] = ()  # the columns; by default the request's tasks
    average: bool = True  # whether to add a column with the mean over tasks
    axis: str = ""  # the axis label, if the comparison is a figure of lines
    marked: float | None = None  # the paper's value on the axis
    tune_each_row: bool = False  # by default a row uses the values tuned for its method


@cache
def paper_sections() -> dict[str, Comparison]:
    """The paper's tables and figures by name."""
    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    return {name: Comparison(**values) for name, values in yaml.safe_load(text).items()}


class Request(Strict):
    """The settings of a reproduction. `reproduction/README.md` describes each field."""

    sections: Several[SectionName] = ()
    backbone: str = "tiny"
    other_backbones: dict[str, str] = {}
    tasks: Several[TaskName] = ()
    seeds: Annotated[Several[Natural], AtLeastOne] = (0, 1, 2, 3, 4)
    only_methods: Several[MethodName] = ()
    data_dir: str | None = Field(default_factory=lambda: os.environ.get("MILORA_DATA_DIR") or None)
    budget: Literal["milora", "paper"] | Positive = "milora"
    training: Settings = {}
    data: Settings = {}
    evaluation: Evaluation = Evaluation()
    methods: dict[MethodName, Settings] = {}
    tune: dict[str, Annotated[Several[Any], AtLeastOne]] = {}
    limits: dict[str, Limit] = {}
    comparisons: dict[str, Comparison] = {}
    threads: Positive | None = None
    judge_url: str | None = None
    judge_model: str = "gpt-4"

    @model_validator(mode="after")
    def _agrees(self) -> Request:
        for name in (*self.sections, *self.limits):
            _named("section", name, (*self.all_comparisons(), TABLE_4))
        if taken := {*paper_sections(), TABLE_4} & set(self.comparisons):
            raise ValueError(f"comparisons: {min(taken)} is a section of the paper; give the table another name")
        for name in (*self.training, *self.tune):
            _named("field of training", name, sorted(training_defaults()))
        rows = [(row.method, row.model_extra or {}) for one in self.comparisons.values() for row in one.rows.values()]
        for method, overrides in (*self.methods.items(), *rows):
            for name, value in overrides.items():
                if name in config_fields(method):
                    continue
                _named(f"field of {method} or of training", name, sorted(training_defaults()))
                if isinstance(value, list | tuple) and name not in self.tune:
                    raise ValueError(f"{method}: {name} is a list of values to try; add it to tune as well")
        return self

    def all_comparisons(self) -> dict[str, Comparison]:
        """The paper's sections and those of the request."""
        return {**paper_sections(), **self.comparisons}

    def chosen_sections(self) -> tuple[str, ...]:
        """The requested sections; by default all."""
        return tuple(dict.fromkeys(self.sections)) or (*self.all_comparisons(), TABLE_4)

    def of_method(self, method: str) -> tuple[Settings, Settings]:
        """The fields that `methods` sets for a method: of its configuration, and of training (with lists to try)."""
        return split_fields(method, self.methods.get(method, {}))

    def to_yaml(self) -> str:
        """The settings that differ from their defaults, without locations and the number of threads."""
        own = self.model_dump(mode="json", exclude_defaults=True, exclude={"data_dir", "judge_url", "threads"})
        return yaml.safe_dump(own, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


@cache
def config_fields(method: str) -> frozenset[str]:
    """The fields of a method's configuration."""
    return frozenset(one.name for one in fields(METHODS[method].config_class) if one.init)


def split_fields(method: str, overrides: Settings) -> tuple[Settings, Settings]:
    """Splits overrides into fields of a method's configuration and fields of training."""
    own = config_fields(method)
    of_method = {name: value for name, value in overrides.items() if name in own}
    return of_method, {name: value for name, value in overrides.items() if name not in own}


@cache
def training_defaults() -> Settings:
    """The defaults of the `TrainingArguments` fields that a reproduction may set."""
    from milora.training import TrainingArguments

    own = ("output_dir", "seed", "resume_from_checkpoint")
    return {one.name: one.default for one in fields(TrainingArguments) if one.name not in own}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_request(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Request:
    """Reads a request from a YAML file and from overrides by dotted name, such as `training.max_steps`.

    Raises a [`MiLoraError`] that names the first mistake.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise MiLoraError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise MiLoraError(f"{path} must hold a mapping, such as 'tasks: [boolq]'; found {values!r}.")
    for name, value in (overrides or {}).items():
        *parents, last = name.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise MiLoraError(f"--set {name}: {parent} is no mapping.")
        inner[last] = value
    try:
        return Request(**values)
    except ValidationError as error:
        raise MiLoraError(_first_mistake(error)) from error


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Parses `["training.max_steps=3", "seeds=0,1"]` into a mapping. Values are YAML; commas separate list items."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise MiLoraError(f"--set takes NAME=VALUE, such as training.max_steps=100; found {text!r}.")
        listed = "," in value and value[0] not in "[{\"'"
        try:
            found[name.strip()] = yaml.load(f"[{value}]" if listed else value, _Loader)
        except yaml.YAMLError as error:
            raise MiLoraError(f"--set {name}: {value!r} is no YAML value.") from error
    return found


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [*Request.model_fields, *Evaluation.model_fields, *Limit.model_fields, *Comparison.model_fields]
        return f"{where}: there is no such setting{did_you_mean(str(first['loc'][-1]), known)}"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}; found {first['input']!r}"
