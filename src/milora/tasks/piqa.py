"""PIQA (Bisk et al. 2020): which of two solutions reaches an everyday physical goal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora.tasks.label import LabelTask, labelled_example
from milora.tasks.task import Example
from milora_core.errors import DataError


class Piqa(LabelTask):
    """PIQA with LLM-Adapters' prompts. The answer is `solution1` or `solution2`.

    The test split is the public validation split of 1838 rows, because the answers of the more than 3000 test rows were
    never published (the paper says 3000 test rows). Dev is held out from the 16113 train rows (the paper says 16000).
    """

    name = "piqa"
    folder = "piqa"
    labels = ("solution1", "solution2")
    differs = (
        "Tested on the public validation split of 1838 rows: the answers of the test rows, of which the paper counts "
        "3000, were never published."
    )
    # The authors' ybisk/piqa is a loading script, which `datasets` no longer runs. This copy has the same rows as
    # Parquet files.
    hub_id = "baber/piqa"
    hub_splits = {"train": "train", "test": "validation"}  # noqa: RUF012
    hub_columns = {"goal": str, "sol1": str, "sol2": str, "label": int}  # noqa: RUF012

    @staticmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """The example for a row of `goal`, `sol1`, `sol2` and `label` (0 or 1).

        Raises:
            DataError: `label` is neither 0 nor 1 (-1 marks a row whose answer is not public).
        """
        if row["label"] not in (0, 1):
            raise DataError(f"the goal {row['goal']!r}: its `label` is {row['label']}, it must be 0 or 1")
        return labelled_example(
            f"Please choose the correct solution to the question: {row['goal']}\n\n"
            f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\nAnswer format: solution1/solution2",
            f"solution{row['label'] + 1}",
        )
