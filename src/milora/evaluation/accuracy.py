"""Accuracy on a task: what a model generates, read as the task reads answers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milora.backbone.positions import positions_of
from milora.evaluation.fingerprint import model_fingerprint, run_fingerprint
from milora.evaluation.predictions import Predictions, Request
from milora.evaluation.progress import Watch
from milora.evaluation.scores import Score, Scores, score, score_as_llm_adapters
from milora.inference.generation import Decoding, encode_prompt, generate_texts
from milora.tasks.rows import Text
from milora.tasks.task import Split, Task
from milora_core.errors import MiLoraError


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on a task.

    Attributes:
        task: The task's name.
        split: Which of its rows.
        scores: Of all rows, and of each of the task's parts, where it has parts (MMLU's subjects).
        llm_adapters: The same outputs by the rule of LLM-Adapters' scripts, see [`milora.tasks.llm_adapters`]; `None`
            for tasks that it does not have.
        average: Whether the accuracy is the mean over `rows` or over `groups`, as the benchmark has it.
        generated: How many rows were generated now; the others were in the file.
        seconds: How long that took.
        predictions: The file of the rows, see [`milora.evaluation.predictions.Predictions`].
    """

    task: str
    split: str
    scores: Scores
    llm_adapters: Score | None = None
    average: str = "rows"
    generated: int = 0
    seconds: float = 0.0
    predictions: Path | None = None

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.scores.whole.rows

    @property
    def correct(self) -> int:
        """How many of them are right."""
        return self.scores.whole.correct

    @property
    def accuracy(self) -> float:
        """The benchmark's figure: the share of right rows, or the mean of the groups' shares."""
        macro = self.scores.macro_accuracy
        return self.correct / self.rows if macro is None or self.average == "rows" else macro

    @property
    def unparsed(self) -> int:
        """How many outputs give no answer that could be read."""
        return self.scores.whole.unparsed

    @property
    def no_room(self) -> int:
        """How many prompts leave no room for an answer."""
        return self.scores.whole.no_room

    def to_dict(self) -> dict[str, Any]:
        """For JSON. `interval` is that of `micro_accuracy`, the share of right rows.

        `accuracy` is strict; `llm_adapters` has the `accuracy` and its `interval` by LLM-Adapters' rule.
        """
        whole = self.scores.whole.to_dict()
        groups = {name: of_group.to_dict() for name, of_group in self.scores.groups.items()}
        return {
            "split": self.split,
            **whole,
            "accuracy": self.accuracy,
            "micro_accuracy": whole["accuracy"],
            "macro_accuracy": self.scores.macro_accuracy,
            "groups": groups,
            "llm_adapters": None if self.llm_adapters is None else self.llm_adapters.accuracy_to_dict(),
            "generated": self.generated,
            "seconds": round(self.seconds, 3),
            "predictions": None if self.predictions is None else str(self.predictions),
        }


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    output: str | os.PathLike[str] | None = None,
    progress: Watch | None = None,
) -> Evaluation:
    """Generates an answer to every row of a split and counts the right ones.

    A prompt that leaves no room for `max_new_tokens` tokens in the backbone's positions is not given to the model, nor
    cut: its row is wrong, and counted as `no_room`.

    Args:
        model: A causal language model with its active adapter, of any method, or none.
        tokenizer: The model's.
        task: The task.
        split: Which of its rows.
        limit: Takes the first rows only.
        seed: Of the rows' order.
        decoding: How texts are generated; by default beam search with 3 beams over the task's `max_new_tokens`.
        batch_size: Prompts a batch; prompts of similar length share one.
        output: A file of JSON lines, to which each row is added as soon as it is done. Rows that it holds are not
            generated again, so that an evaluation that was interrupted, or of fewer rows, is gone on with.
        progress: Shows progress.

    Raises:
        MiLoraError: If the split has no rows, `output` holds rows of another model, task or decoding, it cannot be
            written (what is done is kept), or the GPU's memory does not suffice.
        DataError: If the task's rows cannot be read.
    """
    decoding = decoding or Decoding(max_new_tokens=task.max_new_tokens)
    requests = [
        Request(example.prompt, example.answer, group=example.group) for example in task.examples(split, limit, seed)
    ]
    if not requests:
        raise MiLoraError(f"{task.name} has no rows in its split {split!r}.")
    path = None if output is None else Path(output)
    run = "" if path is None else _run(model, task, decoding, seed)
    predictions = Predictions(requests, task, path, run, routes=True)
    missing = predictions.missing()
    started = time.perf_counter()
    fitting = []
    for index in missing:
        if has_room(model, tokenizer, requests[index].prompt, decoding.max_new_tokens):
            fitting.append(index)
        else:
            predictions.add_without_room(index)
    prompts = [requests[index].prompt for index in fitting]
    texts: Iterable[Any] = generate_texts(model, tokenizer, prompts, decoding, batch_size=batch_size)
    for text in progress(texts, task.name, len(fitting)) if progress else texts:
        predictions.add(fitting[text.index], text)
    records = predictions.records()
    return Evaluation(
        task=task.name,
        split=split,
        scores=score(records),
        llm_adapters=score_as_llm_adapters(task.name, records),
        average=task.average,
        generated=len(missing),
        seconds=time.perf_counter() - started,
        predictions=path,
    )


def has_room(model: Any, tokenizer: Any, prompt: Text, new_tokens: int) -> bool:
    """Whether a backbone has positions for a prompt and the tokens to come; always, where it sets no limit."""
    positions = positions_of(model)
    return positions is None or len(encode_prompt(tokenizer, prompt)) + new_tokens <= positions


def _run(model: Any, task: Task, decoding: Decoding, seed: int) -> str:
    """What marks rows that can be gone on with: the same model answers the same task in the same way."""
    settings = {"task": task.name, "decoding": asdict(decoding), "seed": seed if decoding.samples else None}
    return run_fingerprint(settings, model_fingerprint(model))
