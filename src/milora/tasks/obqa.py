"""OpenBookQA (Mihaylov et al. 2018): elementary science questions with four choices, without the book of facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora.tasks.arc import choice_example
from milora.tasks.label import LabelTask
from milora.tasks.task import Example


class OpenBookQA(LabelTask):
    """OpenBookQA with LLM-Adapters' prompts. The answer is `answer1` to `answer4`, the choice's position."""

    name = "obqa"
    folder = "openbookqa"
    labels = tuple(f"answer{number}" for number in range(1, 5))
    hub_id = "allenai/openbookqa"
    hub_config = "main"
    hub_splits = {"train": "train", "dev": "validation", "test": "test"}  # noqa: RUF012
    hub_columns = {"question_stem": str, "choices": dict, "answerKey": str}  # noqa: RUF012

    @staticmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """The example for a row of `question_stem`, `choices` (`text`, `label`) and `answerKey` (A to D).

        Raises:
            DataError: `answerKey` is not a label of a choice.
        """
        return choice_example(row["question_stem"], row["choices"], row["answerKey"].strip())
