"""Measures a model on one task with the settings of `milora evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from milora.evaluation.accuracy import evaluate_task
from milora.evaluation.mt_bench import benchmark as mt_bench
from milora.evaluation.mt_bench.model_answers import read_opponent
from milora.evaluation.perplexity import completion_perplexity
from milora.evaluation.progress import Watch
from milora.evaluation.results import shots_of
from milora.inference.generation import Decoding
from milora.tasks.mt_bench import MtBench, question_folder
from milora.tasks.task import Split, Task
from milora_core.errors import MiLoraError, importing

if TYPE_CHECKING:
    from milora.evaluation.mt_bench.client import ChatEndpoint

BEAMS = 3


@dataclass(frozen=True)
class Judging:
    """The judge of MT-Bench's answers, and the model's name in the files.

    Attributes:
        model_id: The model's name in the files.
        url: The root URL of an OpenAI-compatible API. With `None` the answers are not judged.
        model: The judge's model name at this API.
        opponent: A file of another model's answers to compare with.
        workers: Number of concurrent requests.
    """

    model_id: str = "model"
    url: str | None = None
    model: str = "gpt-4"
    opponent: Path | None = None
    workers: int = 4


@dataclass(frozen=True)
class EvaluationSettings:
    """Measurement settings.

    Attributes:
        split: The split of the rows.
        limit: Number of rows; all with `None`.
        seed: Seed of the rows' order and of sampling.
        beams: Number of beams; by default 3. By default MT-Bench samples at FastChat's temperatures instead.
        max_new_tokens: Maximum length of an answer; by default the task's.
        batch_size: Rows per batch.
        accuracy: Whether to generate answers.
        perplexity: Whether to measure the perplexity of the gold completions.
        output_dir: Folder for predictions, one file per task. With `None` none are written.
        judging: The settings of MT-Bench's judge.

    Raises:
        MiLoraError: If neither accuracy nor perplexity is selected.
    """

    split: Split = "test"
    limit: int | None = None
    seed: int = 0
    beams: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    accuracy: bool = True
    perplexity: bool = False
    output_dir: Path | None = None
    judging: Judging = field(default_factory=Judging)

    def __post_init__(self) -> None:
        if not self.accuracy and not self.perplexity:
            raise MiLoraError("Nothing to measure: select accuracy, perplexity, or both.")

    def to_dict(self) -> dict[str, Any]:
        """The settings that results depend on, for JSON."""
        values = asdict(self)
        return {name: values[name] for name in ("split", "limit", "seed", "beams", "max_new_tokens")}

    @property
    def figures(self) -> set[str]:
        """The [`milora.evaluation.results.FIGURES`] to measure. Not every task has every figure."""
        measured = {
            "accuracy": self.accuracy,
            "perplexity": self.perplexity,
            "score": self.judging.url is not None,
            "pairwise": self.judging.opponent is not None,
        }
        return {name for name, is_measured in measured.items() if is_measured}

    def predictions_of(self, task: Task) -> Path | None:
        """The file for a task's predictions."""
        name = task.name if self.split == "test" else f"{task.name}-{self.split}"
        return None if self.output_dir is None else self.output_dir / f"{name}.jsonl"


Evaluator: TypeAlias = Callable[[Any, Any, Task, EvaluationSettings, Watch | None], dict[str, Any]]
"""Maps a model, its tokenizer, a task, settings and progress to results for JSON. `accuracy` enters the mean."""


def hold_conversations(
    model: Any, tokenizer: Any, task: Task, settings: EvaluationSettings, progress: Watch | None = None
) -> dict[str, Any]:
    """The [`Evaluator`] of MT-Bench; see [`milora.evaluation.mt_bench.benchmark.run`].

    Raises:
        MiLoraError: If there is no folder for the answers, or a comparison with another model has no judge.
    """
    assert isinstance(task, MtBench)
    _check_conversations(task, settings)
    assert settings.output_dir is not None
    judging = settings.judging
    return mt_bench.run(
        model,
        tokenizer,
        task.questions()[: settings.limit],
        settings.output_dir / task.name,
        judging.model_id,
        judge=_judge(judging),
        opponent=judging.opponent,
        prompts_folder=None if task.data_dir is None else question_folder(task.data_dir),
        workers=judging.workers,
        progress=progress,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        beams=settings.beams,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


EVALUATORS: dict[str, Evaluator] = {MtBench.name: hold_conversations}
"""Evaluators, by task name, of tasks that are not graded by comparison with gold answers."""


def evaluate(
    model: Any, tokenizer: Any, task: Task, settings: EvaluationSettings, progress: Watch | None = None
) -> dict[str, Any]:
    """The results of a model on a task, in the form of [`Evaluation.to_dict`] and [`Perplexity.to_dict`].

    Raises:
        MiLoraError: See [`evaluate_task`] and [`completion_perplexity`].
    """
    return EVALUATORS.get(task.name, measure)(model, tokenizer, task, settings, progress)


def measure(
    model: Any, tokenizer: Any, task: Task, settings: EvaluationSettings, progress: Watch | None = None
) -> dict[str, Any]:
    """The [`Evaluator`] of tasks whose rows have answers."""
    result: dict[str, Any] = {"split": settings.split}
    if (shots := shots_of(task)) is not None:
        result["shots"] = shots
    if settings.accuracy:
        result |= evaluate_task(
            model,
            tokenizer,
            task,
            split=settings.split,
            limit=settings.limit,
            seed=settings.seed,
            decoding=Decoding(settings.max_new_tokens or task.max_new_tokens, settings.beams or BEAMS),
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


def check_rows(task: Task, settings: EvaluationSettings) -> None:
    """Reads a task's rows, so that errors in them appear before a backbone is loaded.

    Raises:
        MiLoraError: If the rows cannot be read, there are none, or the settings are not valid for MT-Bench.
    """
    if isinstance(task, MtBench):
        _check_conversations(task, settings)
    elif not task.examples(settings.split, settings.limit, settings.seed):
        raise MiLoraError(f"{task.name} has no rows in its split {settings.split!r}.")


def _check_conversations(task: MtBench, settings: EvaluationSettings) -> None:
    judging = settings.judging
    if not settings.accuracy:
        raise MiLoraError(f"{task.name} has no gold completions for perplexity: remove --no-generate or the task.")
    if settings.output_dir is None:
        raise MiLoraError("MT-Bench's answers must be saved for the judge: pass --output-dir.")
    if judging.opponent is not None and judging.url is None:
        raise MiLoraError("A comparison with another model's answers needs a judge: pass --judge-url.")
    _judge(judging)
    questions = task.questions()[: settings.limit]
    if judging.opponent is not None:
        read_opponent(judging.opponent, questions)


def _judge(judging: Judging) -> ChatEndpoint | None:
    if judging.url is None:
        return None
    with importing("judge", "A judge"):
        from milora.evaluation.mt_bench.client import ChatEndpoint

    return ChatEndpoint(judging.url, judging.model)
