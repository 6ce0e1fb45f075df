"""BoolQ (Clark et al. 2019): yes/no questions that people asked a search engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora.tasks.label import LabelTask, labelled_example
from milora.tasks.task import Example


class BoolQ(LabelTask):
    """BoolQ without its passages, with LLM-Adapters' prompts. The answer is `true` or `false`.

    The test split is the public validation split, because the answers of the original test split are not public. The
    hub has no other dev split, so dev is held out from train.
    """

    name = "boolq"
    folder = "boolq"
    labels = ("true", "false")
    hub_id = "google/boolq"
    hub_splits = {"train": "train", "test": "validation"}  # noqa: RUF012
    hub_columns = {"question": str, "answer": bool}  # noqa: RUF012

    @staticmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """The example for a row of `question` (in lower case, without its question mark) and `answer` (a bool)."""
        question = row["question"].rstrip("?")
        return labelled_example(
            f"Please answer the following question with true or false, question: {question}?\n\n"
            "Answer format: true/false",
            "true" if row["answer"] else "false",
        )
