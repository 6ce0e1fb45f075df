"""Everything that is measured of a model on one task, by the settings of `milora evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from milora.errors import MiLoraError
from milora.evaluation.generation import evaluate_task
from milora.evaluation.perplexity import completion_perplexity
from milora.evaluation.progress import Watch
from milora.inference.generation import Decoding
from milora.tasks.task import Split, Task


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, on which rows, and how.

    Attributes:
        split: Which rows.
        limit: How many of them; all with `None`.
        seed: Of their order.
        beams: Width of the beam search.
        max_new_tokens: Length at which an answer is cut; by default what the task needs.
        batch_size: Rows a batch.
        accuracy: Whether answers are generated.
        perplexity: Whether the perplexity of the gold completions is measured.
        output_dir: Where predictions go, a file a task; `None` keeps none.

    Raises:
        MiLoraError: If nothing is to be measured.
    """

    split: Split = "test"
    limit: int | None = None
    seed: int = 0
    beams: int = 3
    max_new_tokens: int | None = None
    batch_size: int = 8
    accuracy: bool = True
    perplexity: bool = False
    output_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.accuracy and not self.perplexity:
            raise MiLoraError("There is nothing to measure: ask for accuracy, for perplexity, or for both.")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, beside results: what they depend on."""
        values = asdict(self)
        return {name: values[name] for name in ("split", "limit", "seed", "beams", "max_new_tokens")}

    def predictions_of(self, task: Task) -> Path | None:
        """The file for a task's predictions."""
        name = task.name if self.split == "test" else f"{task.name}-{self.split}"
        return None if self.output_dir is None else self.output_dir / f"{name}.jsonl"


Evaluator: TypeAlias = Callable[[Any, Any, Task, EvaluationSettings, Watch | None], dict[str, Any]]
"""From a model, its tokenizer, a task and settings to results for JSON; `accuracy` is what enters the mean."""

EVALUATORS: dict[str, Evaluator] = {}
"""The tasks that are measured otherwise than by comparing a row's answer, by name."""


def evaluate(
    model: Any, tokenizer: Any, task: Task, settings: EvaluationSettings, progress: Watch | None = None
) -> dict[str, Any]:
    """The results of a model on a task, as [`Evaluation.to_dict`] and [`Perplexity.to_dict`] have them.

    Raises:
        MiLoraError: As [`evaluate_task`] and [`completion_perplexity`] do.
    """
    return EVALUATORS.get(task.name, measure)(model, tokenizer, task, settings, progress)


def measure(
    model: Any, tokenizer: Any, task: Task, settings: EvaluationSettings, progress: Watch | None = None
) -> dict[str, Any]:
    """The [`Evaluator`] of tasks whose rows have answers."""
    result: dict[str, Any] = {"split": settings.split}
    if settings.accuracy:
        result |= evaluate_task(
            model,
            tokenizer,
            task,
            split=settings.split,
            limit=settings.limit,
            seed=settings.seed,
            decoding=Decoding(settings.max_new_tokens or task.max_new_tokens, settings.beams),
            batch_size=settings.batch_size,
            output=settings.predictions_of(task),
            progress=progress,
        ).to_dict()
    if settings.perplexity:
        examples = task.examples(settings.split, settings.limit, settings.seed)
        found = completion_perplexity(
            model, tokenizer, examples, batch_size=settings.batch_size, progress=progress
        ).to_dict()
        names = {"rows": "perplexity_rows", "no_room": "perplexity_no_room", "loss": "loss", "tokens": "loss_tokens"}
        result |= {names.get(name, name): value for name, value in found.items()}
    return result


def mean_accuracy(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of the tasks' accuracies, each task with the same weight; `None` if none has one."""
    accuracies = [result["accuracy"] for result in results.values() if result.get("accuracy") is not None]
    return sum(accuracies) / len(accuracies) if accuracies else None


def check_rows(task: Task, settings: EvaluationSettings) -> None:
    """Reads a task's rows, so that what is wrong with them shows before a backbone is loaded.

    Raises:
        MiLoraError: If they cannot be read, or there are none.
    """
    if task.name not in EVALUATORS and not task.examples(settings.split, settings.limit, settings.seed):
        raise MiLoraError(f"{task.name} has no rows in its split {settings.split!r}.")
