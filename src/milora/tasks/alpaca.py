"""Alpaca (Taori et al. 2023): instructions and outputs written by a language model, for training only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from milora.tasks.fields import check_fields
from milora.tasks.files import read_values
from milora.tasks.hub import load_split
from milora.tasks.public import PublicTask, hold_out
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example, Split
from milora_core.errors import DataError, MiLoraError

HUB_ID = "tatsu-lab/alpaca"
FILES = ("alpaca/train.json", "alpaca/alpaca_data.json", "alpaca_data.json")


class Alpaca(PublicTask):
    """Alpaca's instructions. `dev` has 500 held-out rows for early stopping.

    The public data set has 52002 rows (the paper says 50000). A few dozen rows with an empty output are left out.
    `answer` is the output. A model's outputs are not compared with it.
    """

    name = "alpaca"
    max_new_tokens = 512
    splits: ClassVar[tuple[str, ...]] = ("train", "dev")

    def load(self, split: Split) -> list[Example]:
        """All rows of a split, in the source's order."""
        train, dev = hold_out(_examples(_from_hub() if self.data_dir is None else _from_folder(self.data_dir)))
        return dev if split == "dev" else train

    def parse(self, output: str) -> str | None:
        """Alpaca has no parser.

        Raises:
            MiLoraError: always.
        """
        raise MiLoraError(
            "alpaca is for training only, its answers cannot be graded; evaluate on mt-bench, mmlu, bbh or another task"
        )


def _from_hub() -> Iterable[tuple[str, object]]:
    dataset = load_split(HUB_ID, "train")
    return ((f"{HUB_ID} (train), row {number}", row) for number, row in enumerate(dataset, start=1))


def _from_folder(data_dir: Path) -> Iterable[tuple[str, object]]:
    path = next(filter(Path.is_file, (data_dir / name for name in FILES)), None)
    if path is None:
        raise DataError(
            f"{data_dir / FILES[0]}: no such file, nor {' or '.join(FILES[1:])}; without a data folder, alpaca comes "
            f"from the hub ({HUB_ID})"
        )
    return read_values(path)


def _examples(records: Iterable[tuple[str, object]]) -> list[Example]:
    examples = []
    for where, record in records:
        row = check_fields(record, {"instruction": str, "output": str}, where)
        context = check_fields({"input": row.get("input") or ""}, {"input": str}, where)["input"]
        if not row["instruction"].strip():
            raise DataError(f"{where}: `instruction` is empty")
        if row["output"].strip():
            examples.append(Example(instruction_prompt(row["instruction"], context), row["output"], row["output"]))
    if not examples:
        raise DataError(f"{HUB_ID}: no row has an output")
    return examples
