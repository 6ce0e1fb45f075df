"""LLM-Adapters' rules, on cases computed by hand from its scripts."""

from __future__ import annotations

import pytest

from milora.tasks import registry
from milora.tasks.llm_adapters import TASKS, is_correct


@pytest.mark.parametrize(
    ("task", "output", "answer", "right"),
    [
        ("boolq", "the correct answer is true", "true", True),
        ("boolq", "It cannot be true.", "true", True),  # the first label, regardless of context
        ("boolq", "True", "true", False),  # case matters
        ("boolq", "untrue", "true", True),
        ("boolq", "false, true", "true", False),
        ("boolq", "", "true", False),
        ("piqa", "solution1 or solution2", "solution1", True),
        ("piqa", "Solution2", "solution2", False),
        ("arc-easy", "the correct answer is answer3", "answer3", True),
        ("arc-challenge", "answer12", "answer1", True),
        ("obqa", "answer5, no: answer4", "answer4", False),
        ("aqua", "The answer is (C).", "C", True),
        ("aqua", "An apple: (C)", "A", True),  # the first capital A to E, even as a word
        ("aqua", "c", "C", False),
        ("gsm8k", "She has 1,072 clips.", "1072", True),
        ("gsm8k", "The answer is 5. 3 are red", "5", False),  # the last number
        ("gsm8k", "The answer is 5.", "5", True),
        ("gsm8k", "7-5", "-5", True),
        ("gsm8k", "0.3333", "0.333", True),
        ("gsm8k", "0.335", "0.333", False),
        ("gsm8k", "none", "5", False),
        ("gsm8k", "5\n\n### Response: 6", "5", True),
    ],
)
def test_what_counts(task: str, output: str, answer: str, right: bool) -> None:
    assert is_correct(task, output, answer) is right


def test_tasks_are_ours() -> None:
    assert set(registry.names()) >= TASKS
