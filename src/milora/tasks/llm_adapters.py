"""How LLM-Adapters (Hu et al. 2023) reads answers: the rules behind most published figures on its benchmarks.

Its scripts (github.com/AGI-Edgerunners/LLM-Adapters, `commonsense_evaluate.py` and `evaluate.py`) take the first label
that occurs in an output, or the last number. They do not look at what an output says of it: "it cannot be true" is
`true`, and the letter of "The answer is (C)" is `A` to `E` wherever one occurs first. [`milora.tasks.task.Task.parse`]
is the strict measure; this one is computed beside it, to compare with published figures.
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
"""The tasks that LLM-Adapters evaluates and this project has."""


def is_correct(task: str, output: str, answer: str) -> bool:
    """Whether LLM-Adapters' scripts count an output as right.

    Args:
        task: One of [`TASKS`].
        output: The generated text; anything behind a second "### Response:" is not read.
        answer: The gold answer. Numbers may differ by 0.001.
    """
    text = output.split(_NEXT_PROMPT)[0]
    if task in _NUMBERS:
        found = _NUMBER.findall(text.replace(",", ""))
        return bool(found) and abs(float(found[-1]) - Fraction(answer)) <= _TOLERANCE
    first = re.search(_LABELS[task], text)
    return first is not None and first[0] == answer
