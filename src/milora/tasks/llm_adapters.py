"""Grading with the rules of LLM-Adapters (Hu et al. 2023), used for most published figures on its benchmarks.

Its scripts (github.com/AGI-Edgerunners/LLM-Adapters, `commonsense_evaluate.py` and `evaluate.py`) use the first label
in an output, or the last number. They ignore the context: "it cannot be true" counts as `true`, and a letter is the
first capital `A` to `E` anywhere in the output. [`milora.tasks.task.Task.parse`] is the strict measure. This measure is
reported in addition, to compare with published figures.
"""

from __future__ import annotations

import re
from fractions import Fraction

_LABELS = {
    "arc-easy": "answer1|answer2|answer3|answer4|answer5",
    "arc-challenge": "answer1|answer2|answer3|answer4|answer5",
    "obqa": "answer1|answer2|answer3|answer4|answer5",
    "piqa": "solution1|solution2",
    "boolq": "true|false",
    "aqua": "A|B|C|D|E",
}
_NUMBERS = frozenset({"gsm8k"})
_NUMBER = re.compile(r"-?\d+\.?\d*")
_NEXT_PROMPT = "### Response:"
_TOLERANCE = 0.001

TASKS = frozenset(_LABELS) | _NUMBERS
"""The tasks of this project that LLM-Adapters evaluates."""


def is_correct(task: str, output: str, answer: str) -> bool:
    """Whether LLM-Adapters' scripts count an output as correct.

    Args:
        task: One of [`TASKS`].
        output: The generated text. Text from another "### Response:" on is ignored.
        answer: The gold answer. Numbers may differ by 0.001.
    """
    text = output.split(_NEXT_PROMPT)[0]
    if task in _NUMBERS:
        found = _NUMBER.findall(text.replace(",", ""))
        return bool(found) and abs(float(found[-1]) - Fraction(answer)) <= _TOLERANCE
    first = re.search(_LABELS[task], text)
    return first is not None and first[0] == answer
