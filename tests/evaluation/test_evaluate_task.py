import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapted import Adapted, adapted
from support.architectures import ARCHITECTURES
from support.methods import METHODS
from support.methods import adapted as adapted_by
from support.tokenizer import character_tokenizer

from milora.errors import MiLoraError
from milora.evaluation.generation import evaluate_task
from milora.evaluation.predictions import read_predictions
from milora.inference.generation import Decoding
from milora.tasks.task import Example, Split, Task

TOKENIZER = character_tokenizer()


@dataclass(frozen=True)
class Grouped(Example):
    group: str = ""


class FirstCharacter(Task):
    """What character comes first; letters are answers, all else cannot be read."""

    name = "first-character"
    max_new_tokens = 4

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        return self.rows[:count]

    def parse(self, output: str) -> str | None:
        return output[0].lower() if output[:1].isalpha() else None


PROMPTS = [f"{word} {number}" for number, word in enumerate(["Hello", "a longer question", "no", "what"] * 5)]


def by_hand(model: Any, prompt: str, **settings: Any) -> str:
    inputs = TOKENIZER(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, **{"max_new_tokens": 4, "num_beams": 3, "do_sample": False, **settings})
    return TOKENIZER.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def rows_with_answers(model: Any) -> tuple[list[Example], list[str], list[bool]]:
    """Rows of which every other has what the model says as its answer, the outputs, and which rows are right."""
    outputs = [by_hand(model, prompt) for prompt in PROMPTS]
    answers = [output[:1].lower() if index % 2 else "?" for index, output in enumerate(outputs)]
    right = [bool(index % 2) and output[:1].isalpha() for index, output in enumerate(outputs)]
    return [Example(prompt, "x", answer) for prompt, answer in zip(PROMPTS, answers, strict=True)], outputs, right


@pytest.fixture(scope="module")
def case() -> Adapted:
    return adapted("llama")


def test_every_row_is_judged_as_by_hand(case: Adapted, tmp_path: Path) -> None:
    rows, outputs, right = rows_with_answers(case.model)
    assert 0 < sum(right) < len(rows) / 2
    result = evaluate_task(
        case.model, TOKENIZER, FirstCharacter(rows), batch_size=3, output=tmp_path / "new" / "rows.jsonl"
    )
    written = read_predictions(tmp_path / "new" / "rows.jsonl")
    assert [row["prompt"] for row in written] == PROMPTS
    assert [row["output"] for row in written] == outputs
    assert [row["correct"] for row in written] == right
    assert [row["parsed"] for row in written] == [o[0].lower() if o[:1].isalpha() else None for o in outputs]
    assert (result.rows, result.correct, result.accuracy) == (len(rows), sum(right), sum(right) / len(rows))
    assert result.unparsed == sum(not output[:1].isalpha() for output in outputs) > 0
    assert result.predictions == tmp_path / "new" / "rows.jsonl"
    assert result.generated == len(rows)
    assert not result.groups
    for prompt, row in zip(PROMPTS, written, strict=True):
        route = case.reference.route(TOKENIZER(prompt, return_tensors="pt")["input_ids"])
        experts = case.reference.blocks[0].experts
        assert row["route"] == {
            expert: torch.nonzero(route.gates[:, column]).flatten().tolist() for column, expert in enumerate(experts)
        }
    line = json.dumps(written[0])
    assert len(line) < 600
