"""What a report is asked for; [`milora.paper.request_reading`] reads it from a file and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from milora.paper.runs import Settings

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
PERPLEXITY = "perplexity"
CRITERIA = (PERPLEXITY, "accuracy")
LIMITS = ("tasks", "seeds", "values")
PAPER_BUDGET = "paper"
MILORA_BUDGET = "milora"
JUDGE_MODEL = "gpt-4"
"""The paper's judge of MT-Bench."""


@dataclass(frozen=True)
class Evaluation:
    """How adapters are tested.

    Args:
        test_rows: The first rows of each test split, or all of them.
        dev_rows: Rows of each dev split that adapters are tested on too; none unless a setting is tuned on them.
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
        tune_by: `perplexity` or `accuracy`, on dev; tasks without a right answer are tuned by perplexity.
        limits: By section, other `tasks`, `seeds`, or `values` of a figure's axis.
        threads: Of torch; its own default if `None`.
        judge_url: Root of the OpenAI-compatible API that grades the answers to MT-Bench; without one they are not made.
            Its key is taken from the environment, see [`milora.evaluation.mt_bench.client.KEY_VARIABLES`].
        judge_model: The judge's name there.
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
    tune_by: str = PERPLEXITY
    limits: Mapping[str, Settings] = field(default_factory=dict)
    threads: int | None = None
    judge_url: str | None = None
    judge_model: str = JUDGE_MODEL

    def training_of(self, name: str) -> dict[str, Any]:
        """What a method's training has otherwise than the paper's, but for what is tuned."""
        known = _training_fields()
        own = {field: value for field, value in self.methods.get(name, {}).items() if field in known}
        return {field: value for field, value in {**self.training, **own}.items() if field not in self.tuned(name)}

    def settings_of(self, name: str) -> dict[str, Any]:
        """What a method's configuration has otherwise than at its budget."""
        known = _training_fields()
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


def _training_fields() -> set[str]:
    # TRL takes seconds to import, and a request is made also where nothing is trained.
    from milora.paper.training_settings import training_fields

    return training_fields()
