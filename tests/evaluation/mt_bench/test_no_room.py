"""MT-Bench conversations that do not fit a backbone: partly answered, counted, and judged without a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.adapted import adapted
from support.tokenizer import character_tokenizer

from milora.evaluation.mt_bench import judge_prompts, judging
from milora.evaluation.mt_bench import model_answers as module
from milora.evaluation.mt_bench.benchmark import run
from milora.evaluation.mt_bench.model_answers import Answer, answer_questions, read_answers
from milora.tasks.mt_bench import Question
from milora.tasks.rows import instruction_prompt

NEW_TOKENS = 6
FITS = Question(1, "math", ("ab?", "cd?"))
SECOND_TOO_LONG = Question(2, "math", ("gh?", "i" * 100))
FIRST_TOO_LONG = Question(3, "math", ("j" * 200, "k?"))
QUESTIONS = [SECOND_TOO_LONG, FITS, FIRST_TOO_LONG]
# One character per token: the conversation that fits, with the longest possible first answer, fits exactly.
POSITIONS = (
    len(instruction_prompt("ab?")) + NEW_TOKENS + len("\n\n### Instruction:\ncd?\n\n### Response:\n") + NEW_TOKENS
)


def model_and_tokenizer() -> tuple[Any, Any]:
    model = adapted("llama").model
    model.config.max_position_embeddings = POSITIONS
    return model, character_tokenizer()


def alone(question: Question, path: Path) -> Answer:
    """The question's answer with enough positions for everything."""
    model, tokenizer = model_and_tokenizer()
    model.config.max_position_embeddings = 4096
    return answer_questions(model, tokenizer, [question], path, "m", max_new_tokens=NEW_TOKENS)[0]


def test_what_fits_is_answered_and_the_rest_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    path = tmp_path / "m.jsonl"
    found = answer_questions(model, tokenizer, QUESTIONS, path, "m", max_new_tokens=NEW_TOKENS)
    assert [answer.no_room for answer in found] == [(2,), (), (1, 2)]
    assert found[0].turns == (alone(SECOND_TOO_LONG, tmp_path / "a").turns[0], "")
    assert found[1].turns == alone(FITS, tmp_path / "b").turns
    assert found[2].turns == ("", "")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("no_room") for row in rows] == [[2], None, [1, 2]]
    assert rows[2]["choices"] == [{"index": 0, "turns": ["", ""]}]
    assert [route is None for row in rows for route in row["routes"]] == [False, True, False, False, True, True]
    assert read_answers(path, QUESTIONS) == found
    monkeypatch.setattr(module, "generate_texts", None)
    assert answer_questions(model, tokenizer, QUESTIONS, path, "m", max_new_tokens=NEW_TOKENS) == found


def test_a_conversation_without_its_first_answer_is_not_gone_on_with(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    # The second turn alone would fit a template that drops earlier turns.
    tokenizer.chat_template = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    long = Question(3, "math", ("j" * POSITIONS, "k?"))
    found = answer_questions(model, tokenizer, [long], tmp_path / "m", "m", max_new_tokens=NEW_TOKENS)
    assert (found[0].turns, found[0].no_room) == (("", ""), (1, 2))


class Judge:
    """Prefers the first position, and grades it as excellent."""

    model = "j"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def complete(self, messages: Any, *, temperature: float, max_tokens: int) -> str:
        self.asked.append(messages[1]["content"])
        return "[[9]] [[A]]"


def fastchat_mean(path: Path) -> float:
    """The mean as in FastChat's `show_result.py`: over all grades except -1."""
    grades = [json.loads(line)["score"] for line in path.read_text().splitlines()]
    return sum(grade for grade in grades if grade != -1) / len([grade for grade in grades if grade != -1])


def test_the_whole_counts_them_as_fastchats_reader_does(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    judge = Judge()
    found = run(model, tokenizer, QUESTIONS, tmp_path, "m", judge=judge, max_new_tokens=NEW_TOKENS)
    assert (found["no_room"], found["judgements"], found["unparsed"], found["failed"]) == (3, 6, 0, 0)
    assert found["score"] == (3 * 9 + 3 * 1) / 6 == fastchat_mean(tmp_path / "model_judgment" / "j_single.jsonl")
    assert len(judge.asked) == 3
    assert not any("i" * 100 in asked or "j" * 200 in asked for asked in judge.asked)
    assert run(model, tokenizer, QUESTIONS, tmp_path, "m", judge=judge, max_new_tokens=NEW_TOKENS) == found
    assert len(judge.asked) == 3


def test_pairs(tmp_path: Path) -> None:
    judge = Judge()
    pairs = judging.JudgeRun(judge, judge_prompts.OWN, tmp_path / "pair.jsonl")
    ours = [Answer(1, "ours", ("x", ""), no_room=(2,)), Answer(3, "ours", ("", ""), no_room=(1, 2))]
    theirs = [Answer(1, "theirs", ("y", "y")), Answer(3, "theirs", ("z", ""), no_room=(2,))]
    outcome = judging.compare(pairs, [FITS, FIRST_TOO_LONG], ours, theirs)
    winners = [(r["question_id"], r["turn"], r["g1_winner"], r["g2_winner"]) for r in outcome.records]
    # Only the first turn of the first question reached the judge, twice.
    assert winners == [
        (1, 1, "model_1", "model_2"),
        (1, 2, "model_2", "model_2"),
        (3, 1, "model_2", "model_2"),
        (3, 2, "tie", "tie"),
    ]
    assert len(judge.asked) == 2
