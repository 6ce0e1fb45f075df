"""Rows of T0's training mixture (P3, Sanh et al. 2022): many tasks, each in many wordings."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from milora.tasks.rows import Row

FEWEST_WORDS = 6
"""Shorter completions are left out. Most of them are a class or an option, which says little about a method."""


def t0_rows(split: str, data: str) -> list[Row]:
    """The rows of a split in a fixed random order: 85 % `train`, 5 % `dev`, 10 % `test`.

    Rows with the same completion are in the same split, because they are often the same example in other words.

    Args:
        split: `train`, `dev` or `test`.
        data: A folder with `t0/pretrain.jsonl.gz`, JSON lines with `prompt` and `completion`.
    """
    with gzip.open(Path(data) / "t0" / "pretrain.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = {(row["prompt"], row["completion"]) for row in map(json.loads, file)}
    found = [pair for pair in pairs if len(pair[1].split()) >= FEWEST_WORDS and split_of(pair[1]) == split]
    return [Row(prompt, completion) for prompt, completion in sorted(found, key=lambda pair: _number("".join(pair)))]


def split_of(completion: str) -> str:
    """The split of all rows with this completion."""
    share = _number(completion) % 20
    return "dev" if share == 0 else "test" if share <= 2 else "train"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
