"""ARC (Clark et al. 2018): school science questions with three to five choices, in an easy and a challenge set.

Two of ARC-Easy's test questions are also in its public train set. They are kept so that results are comparable with
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora.tasks.fields import check_fields
from milora.tasks.label import LabelTask, chosen, labelled_example
from milora.tasks.task import Example


class Arc(LabelTask):
    """Base of the two sets; the answer is `answer1` to `answer5`, the choice's position."""

    labels = tuple(f"answer{number}" for number in range(1, 6))
    hub_id = "allenai/ai2_arc"
    hub_splits = {"train": "train", "dev": "validation", "test": "test"}  # noqa: RUF012
    hub_columns = {"question": str, "choices": dict, "answerKey": str}  # noqa: RUF012

    @staticmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """The example for a row of `question`, `choices` (`text`, `label`) and `answerKey` (A to E, or 1 to 5).

        Raises:
            DataError: `answerKey` is not a label of a choice.
        """
        return choice_example(row["question"], row["choices"], row["answerKey"])


class ArcEasy(Arc):
    """Questions that word co-occurrence or retrieval can answer."""

    name = "arc-easy"
    folder = "ARC-Easy"
    hub_config = "ARC-Easy"


class ArcChallenge(Arc):
    """Questions that neither word co-occurrence nor retrieval answered."""

    name = "arc-challenge"
    folder = "ARC-Challenge"
    hub_config = "ARC-Challenge"


def choice_example(question: str, choices: Mapping[str, Any], key: str) -> Example:
    """The example for a question with `choices` (parallel lists `text` and `label`) and the `key` of the correct one.

    Raises:
        DataError: a choice has no label or no text, or `key` is not one of the labels.
    """
    fields = check_fields(choices, {"text": list, "label": list}, f"the question {question!r}, `choices`")
    texts, keys = fields["text"], fields["label"]
    labels = [f"answer{number}" for number in range(1, len(texts) + 1)]
    listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(texts, start=1))
    return labelled_example(
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {'/'.join(labels)}",
        labels[chosen(question, keys, key)],
    )
