import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted import Adapted, adapted
from support.architectures import ARCHITECTURES
from support.methods import adapted as adapted_by
from support.tokenizer import character_tokenizer

from milora.evaluation.accuracy import evaluate_task
from milora.evaluation.predictions import read_predictions
from milora.inference.generation import Decoding
from milora.tasks.task import Example, Split, Task
from milora_core.errors import MiLoraError

TOKENIZER = character_tokenizer()


class FirstCharacter(Task):
    """The answer is the first character. Only letters can be parsed."""

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
    """Rows, the model's outputs, and which rows are right; every second answer is the model's own output."""
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
    assert not result.scores.groups
    for prompt, row in zip(PROMPTS, written, strict=True):
        route = case.reference.route(TOKENIZER(prompt, return_tensors="pt")["input_ids"])
        experts = case.reference.blocks[0].experts
        assert row["route"] == {
            expert: torch.nonzero(route.gates[:, column]).flatten().tolist() for column, expert in enumerate(experts)
        }
    line = json.dumps(written[0])
    assert len(line) < 600


@pytest.mark.parametrize("method", ["none", "bitfit", "ptuning-v2", "moelora"])
def test_other_methods_have_no_route(method: str) -> None:
    model = ARCHITECTURES["llama"]() if method == "none" else adapted_by(method, "llama")
    rows, _, right = rows_with_answers(model)
    result = evaluate_task(model, TOKENIZER, FirstCharacter(rows), batch_size=8)
    assert (result.correct, result.predictions) == (sum(right), None)


def test_the_routes_of_other_methods_are_null(tmp_path: Path) -> None:
    evaluate_task(ARCHITECTURES["llama"](), TOKENIZER, FirstCharacter([Example("a", "b", "b")]), output=tmp_path / "x")
    assert read_predictions(tmp_path / "x")[0]["route"] is None


def test_a_prompt_without_room_is_wrong_and_counted_and_never_cut(case: Adapted, tmp_path: Path) -> None:
    fits, too_long = "x" * 124, "y" * 125
    rows = [Example(fits, "x", "?"), Example(too_long, "x", "?"), Example("no", "x", "?")]
    result = evaluate_task(case.model, TOKENIZER, FirstCharacter(rows), output=tmp_path / "rows")
    assert (result.rows, result.correct, result.no_room) == (3, 0, 1)
    written = read_predictions(tmp_path / "rows")
    assert [row["prompt"] for row in written] == [fits, too_long, "no"]
    assert [row.get("no_room", False) for row in written] == [False, True, False]
    judged = [written[1][field] for field in ("output", "parsed", "correct", "route")]
    assert judged == ["", None, False, None]
    assert written[0]["output"] == by_hand(case.model, fits)
    assert result.unparsed == sum(row["parsed"] is None for row in (written[0], written[2]))
    again = evaluate_task(case.model, TOKENIZER, FirstCharacter(rows), output=tmp_path / "rows")
    assert (again.no_room, again.generated) == (1, 0)


def test_groups_have_their_own_accuracy(case: Adapted) -> None:
    rows, _, right = rows_with_answers(case.model)
    # Only odd rows can be right; the two groups have different accuracies.
    groups = ["anatomy" if index < 4 else "law" for index in range(len(rows))]
    grouped = [Example(row.prompt, "x", row.answer, group) for row, group in zip(rows, groups, strict=True)]
    task = FirstCharacter(grouped)
    result = evaluate_task(case.model, TOKENIZER, task, batch_size=3)
    first, second = sum(right[:4]) / 4, sum(right[4:]) / (len(rows) - 4)
    assert first != second
    assert result.accuracy == sum(right) / len(rows)
    printed = result.to_dict()
    assert {name: group["accuracy"] for name, group in printed["groups"].items()} == {"anatomy": first, "law": second}
    assert printed["macro_accuracy"] == pytest.approx((first + second) / 2)
    task.average = "groups"
    result = evaluate_task(case.model, TOKENIZER, task, batch_size=3)
    assert result.accuracy == pytest.approx((first + second) / 2)
    assert result.to_dict()["micro_accuracy"] == sum(right) / len(rows)


def test_what_is_in_the_file_is_not_generated_again(
    case: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _, right = rows_with_answers(case.model)
    path = tmp_path / "rows.jsonl"
    task = FirstCharacter(rows)
    first = evaluate_task(case.model, TOKENIZER, task, output=path, limit=5)
    assert (first.rows, first.generated) == (5, 5)
    more = evaluate_task(case.model, TOKENIZER, task, output=path)
    assert (more.rows, more.generated, more.correct) == (len(rows), len(rows) - 5, sum(right))
    whole = path.read_bytes()
    fewer = evaluate_task(case.model, TOKENIZER, task, output=path, limit=3)
    assert (fewer.rows, fewer.generated, fewer.correct) == (3, 0, sum(right[:3]))
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    again = evaluate_task(case.model, TOKENIZER, task, output=path)
    assert (again.generated, again.correct) == (len(rows) - 2, sum(right))
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    # A truncated write can leave half a UTF-8 character.
    path.write_bytes(b"".join(lines[:-1]) + '{"prompt": "\u00e9'.encode()[:-1])
    assert evaluate_task(case.model, TOKENIZER, task, output=path).generated == 1


def test_rows_of_another_run_are_refused_and_kept(case: Adapted, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    task = FirstCharacter([Example("no", "x", "x"), Example("yes", "x", "x")])
    evaluate_task(case.model, TOKENIZER, task, output=path)
    before = path.read_bytes()

    def refused(model: Any, other: Task = task, match: str = "another adapter", **settings: Any) -> None:
        with pytest.raises(MiLoraError, match=f"line 1 is .*{match}.*another output"):
            evaluate_task(model, TOKENIZER, other, output=path, **settings)
        assert path.read_bytes() == before

    refused(adapted("llama", seed=1).model)
    refused(ARCHITECTURES["llama"]())
    refused(case.model, decoding=Decoding(4, 1))
    refused(case.model, FirstCharacter([Example("other", "x", "x")] * 2), "another prompt")
    top_1 = adapted("llama").model
    top_1.peft_config["default"].top_k = 1
    refused(top_1)
    with torch.no_grad():
        moved = adapted("llama").model
        moved.get_base_model().model.norm.weight[0] += 1e-3
    refused(moved)
    path.write_text("[1]\n")
    with pytest.raises(MiLoraError, match=r"line 1: not a JSON object: give another output"):
        evaluate_task(case.model, TOKENIZER, task, output=path)


def test_an_empty_split_is_refused(case: Adapted) -> None:
    with pytest.raises(MiLoraError, match="first-character has no rows"):
        evaluate_task(case.model, TOKENIZER, FirstCharacter([]))


def test_progress_counts_what_is_generated(case: Adapted, tmp_path: Path) -> None:
    seen: list[Any] = []

    def watch(items: Any, what: str, count: int) -> Any:
        seen.append((what, count))
        yield from items

    task = FirstCharacter([Example(prompt, "x", "x") for prompt in PROMPTS])
    evaluate_task(case.model, TOKENIZER, task, limit=2, output=tmp_path / "x", progress=watch)
    evaluate_task(case.model, TOKENIZER, task, limit=5, output=tmp_path / "x", progress=watch)
    assert seen == [("first-character", 2), ("first-character", 3)]


@pytest.mark.parametrize("limit", [0, 900])
def test_a_full_disk_is_said_and_what_was_done_is_kept(case: Adapted, tmp_path: Path, limit: int) -> None:
    task = FirstCharacter([Example(prompt, "x", "x") for prompt in PROMPTS[:4]])
    path = tmp_path / "rows.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writes beyond this file size fail, in the middle of a line.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MiLoraError, match=r"cannot be written: .* rows are kept, and the same command"):
            evaluate_task(case.model, TOKENIZER, task, output=path, batch_size=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = path.read_bytes().count(b"\n")
    assert kept == (0 if limit == 0 else 2)
    result = evaluate_task(case.model, TOKENIZER, task, output=path, batch_size=2)
    assert (result.rows, result.generated) == (4, 4 - kept)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_device_that_is_full_is_said(case: Adapted) -> None:
    with pytest.raises(MiLoraError, match="/dev/full cannot be written: No space left on device, make room; its 0"):
        evaluate_task(case.model, TOKENIZER, FirstCharacter([Example("a", "b", "b")]), output="/dev/full")
