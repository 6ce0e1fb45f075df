"""Answers to MT-Bench: two turns, FastChat's format, resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted import adapted
from support.architectures import ARCHITECTURES
from support.tokenizer import character_tokenizer

from milora.evaluation.mt_bench import model_answers as module
from milora.evaluation.mt_bench.benchmark import run
from milora.evaluation.mt_bench.model_answers import answer_questions, read_answers
from milora.tasks.mt_bench import Question, load_questions
from milora.tasks.rows import instruction_prompt
from milora_core.errors import DataError, MiLoraError

DATA = Path(os.environ.get("MILORA_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))
QUESTIONS = [
    Question(1, "math", ("ab?", "cd?")),
    Question(2, "math", ("abcde?", "f?")),
    Question(3, "coding", ("gh?", "ij?")),
]


def model_and_tokenizer() -> tuple[Any, Any]:
    model = adapted("llama").model
    # Rotary positions also work beyond the tiny model's configured limit.
    model.config.max_position_embeddings = 1024
    return model, character_tokenizer()


def by_hand(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_both_turns_against_a_loop_of_single_prompts(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    # Routes depend on the prompt: a second turn that kept the first turn's route would differ.
    path = tmp_path / "folder" / "m.jsonl"
    steps: list[int] = []

    def progress(items: Any, what: str, count: int) -> Any:
        for item in items:
            yield item
            steps.append(count)

    found = answer_questions(model, tokenizer, QUESTIONS, path, "m", max_new_tokens=6, batch_size=2, progress=progress)
    assert steps == [2, 2]
    for question, answer in zip(QUESTIONS, found, strict=True):
        first = instruction_prompt(question.turns[0])
        reply = by_hand(model, tokenizer, first, 6)
        second = f"{first}{reply}\n\n### Instruction:\n{question.turns[1]}\n\n### Response:\n"
        assert answer.turns == (reply, by_hand(model, tokenizer, second, 6))
    assert read_answers(path, QUESTIONS) == found
    row = json.loads(path.read_text().splitlines()[0])
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp", "run", "routes"}
    assert row["choices"] == [{"index": 0, "turns": list(found[0].turns)}]


def test_the_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    assert module.conversation_prompt(tokenizer, ["a", "b"], ["x"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]


def test_what_is_answered_is_not_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    path = tmp_path / "m.jsonl"
    settings: dict[str, Any] = {"max_new_tokens": 4, "beams": 2}
    whole = answer_questions(model, tokenizer, QUESTIONS, path, "m", **settings)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30])
    asked: list[str] = []
    generate = module.generate_texts
    monkeypatch.setattr(module, "generate_texts", lambda *a, **k: asked.extend(a[2]) or generate(*a, **k))
    assert answer_questions(model, tokenizer, QUESTIONS, path, "m", **settings) == whole
    assert len(asked) == 4
    with pytest.raises(DataError, match=r"answers of 'm', not of 'other'"):
        answer_questions(model, tokenizer, QUESTIONS, path, "other", **settings)


def test_answers_of_other_weights_or_decoding_are_refused(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    path = tmp_path / "m.jsonl"
    answer_questions(model, tokenizer, QUESTIONS[:1], path, "m", max_new_tokens=2, beams=1)
    with pytest.raises(DataError, match="other decoding"):
        answer_questions(model, tokenizer, QUESTIONS[:1], path, "m", max_new_tokens=3, beams=1)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
    with pytest.raises(DataError, match="other weights"):
        answer_questions(model, tokenizer, QUESTIONS[:1], path, "m", max_new_tokens=2, beams=1)


def test_answers_of_another_seed_or_to_other_words_are_refused(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    path = tmp_path / "m.jsonl"
    drawn, greedy = Question(1, "writing", ("ab?", "cd?")), Question(2, "math", ("ef?", "gh?"))
    first = answer_questions(model, tokenizer, [greedy, drawn], path, "m", max_new_tokens=2)
    # Mathematics is decoded greedily, so the seed has no effect.
    assert answer_questions(model, tokenizer, [greedy], path, "m", max_new_tokens=2, seed=1) == first[:1]
    with pytest.raises(DataError, match=r"question 1: .*from another seed"):
        answer_questions(model, tokenizer, [greedy, drawn], path, "m", max_new_tokens=2, seed=1)
    edited = [greedy, Question(1, "writing", ("ab?", "cd!"))]
    with pytest.raises(DataError, match=r"question 1: .*other words of the question: name another folder"):
        answer_questions(model, tokenizer, edited, path, "m", max_new_tokens=2)
    assert answer_questions(model, tokenizer, [greedy, drawn], path, "m", max_new_tokens=2) == first


def test_each_turn_has_the_route_of_its_own_prompt(tmp_path: Path) -> None:
    case, tokenizer = adapted("llama", seed=1), character_tokenizer(chat=True)
    case.model.config.max_position_embeddings = 1024
    questions = [Question(1, "math", ("ab?", "ZZZZ%%%9999" * 3)), Question(2, "math", ("abcde?", "f?"))]
    path = tmp_path / "m.jsonl"
    found = answer_questions(case.model, tokenizer, questions, path, "m", max_new_tokens=3)
    experts = case.reference.blocks[0].experts
    for question, answer in zip(questions, found, strict=True):
        first = f"user: {question.turns[0]}\nassistant: "
        second = f"{first}{answer.turns[0]}\nuser: {question.turns[1]}\nassistant: "
        for prompt, route in zip((first, second), answer.routes, strict=True):
            gates = case.reference.route(tokenizer(prompt, return_tensors="pt")["input_ids"]).gates
            assert route == {
                expert: torch.nonzero(gates[:, column]).flatten().tolist() for column, expert in enumerate(experts)
            }
    # Routes differ by turn and by question, so a swapped one would be noticed.
    assert found[0].routes[0] not in (found[0].routes[1], found[1].routes[0])
    lines = {line["question_id"]: line["routes"] for line in map(json.loads, path.read_text().splitlines())}
    assert [lines[answer.question] for answer in found] == [list(answer.routes) for answer in found]


def test_no_router_no_route(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]()
    model.config.max_position_embeddings = 1024
    found = answer_questions(model, character_tokenizer(), QUESTIONS[:1], tmp_path / "m", "m", max_new_tokens=2)
    assert found[0].routes == (None, None)


def test_creative_questions_are_drawn_from_seeds(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    question = [Question(1, "writing", ("ab?", "cd?"))]
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        answers = answer_questions(model, tokenizer, question, tmp_path / name, "m", max_new_tokens=8, seed=seed)
        texts.append(answers[0].turns)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("line", ["[]", "{}", '{"question_id": 1, "model_id": "m", "choices": [{"turns": ["a"]}]}'])
def test_files_that_hold_no_answers(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        read_answers(tmp_path / "m.jsonl", QUESTIONS)


class FakeJudge:
    model = "org/judge"

    def complete(self, messages: Any, *, temperature: float, max_tokens: int) -> str:
        return "[[3]] [[A]]"


class FailingJudge:
    """Grades answers but fails on comparisons."""

    model = "j"

    def complete(self, messages: Any, *, temperature: float, max_tokens: int) -> str:
        if "assistant B" in messages[1]["content"]:
            raise MiLoraError("The judge sleeps.")
        return "[[3]]"


def test_grades_are_kept_where_no_comparison_could_be_had(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    settings: dict[str, Any] = {"max_new_tokens": 2, "beams": 1}
    other = Path(run(model, tokenizer, QUESTIONS, tmp_path, "base", **settings)["answers"])
    result = run(model, tokenizer, QUESTIONS, tmp_path, "m", judge=FailingJudge(), opponent=other, **settings)
    assert (result["score"], result["failed"]) == (3, 0)
    pairwise = [result["pairwise"][name] for name in ("judge", "failed", "reason", "win_rate")]
    assert pairwise == ["j", 6, "The judge sleeps.", None]


def test_an_opponent_that_lacks_an_answer_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    settings: dict[str, Any] = {"max_new_tokens": 2, "beams": 1}
    other = Path(run(model, tokenizer, QUESTIONS[:1], tmp_path, "base", **settings)["answers"])
    monkeypatch.setattr(module, "generate_texts", None)
    with pytest.raises(DataError, match=r"base\.jsonl has no answer to question 2, and to 2 of the 3 questions in all"):
        run(model, tokenizer, QUESTIONS, tmp_path, "m", judge=FakeJudge(), opponent=other, **settings)


def test_from_questions_to_scores(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    settings: dict[str, Any] = {"max_new_tokens": 3, "beams": 1}
    other = run(model, tokenizer, QUESTIONS, tmp_path, "base", **settings)
    steps: dict[str, list[int]] = {}

    def progress(items: Any, what: str, count: int) -> Any:
        found = list(items)
        steps.setdefault(what, []).append(count)
        assert len(found) == count
        return found

    result = run(
        model,
        tokenizer,
        QUESTIONS,
        tmp_path,
        "ours",
        judge=FakeJudge(),
        opponent=Path(other["answers"]),
        progress=progress,
        **settings,
    )
    assert (result["score"], result["prompts"], result["failed"]) == (3, "own", 0)
    assert result["pairwise"]["ties"] == 6
    assert (result["pairwise"]["opponent"], result["pairwise"]["judge"]) == ("base", "org/judge")
    assert steps == {"MT-Bench": [2], "judgements": [6, 6]}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")} == {
        "model_answer/base.jsonl",
        "model_answer/ours.jsonl",
        "model_judgment/org--judge_single.jsonl",
        "model_judgment/org--judge_pair.jsonl",
    }


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}")
def test_the_published_references_are_a_model_s_answers() -> None:
    questions = load_questions(DATA)
    answers = read_answers(DATA / "mt_bench" / "reference_answer_gpt-4.jsonl", questions)
    assert len(answers) == 30
    assert {answer.model for answer in answers} == {"gpt-4"}
