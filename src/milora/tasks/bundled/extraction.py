"""Extraction of a field's value from a record."""

from __future__ import annotations

import random

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import FIELDS
from milora.tasks.task import Example


def draw_record(rng: random.Random, fields: int) -> dict[str, str]:
    """A record: fields in random order, with distinct values."""
    record: dict[str, str] = {}
    for field in rng.sample(sorted(FIELDS), fields):
        record[field] = rng.choice([value for value in FIELDS[field] if value not in record.values()])
    return record


def listing(record: dict[str, str]) -> str:
    """A record as text: each field is followed by its value."""
    return ", ".join(f"{field} {value}" for field, value in record.items())


class ExtractionTask(GeneratedTask):
    """Records with a question about the value of one field."""

    name = "bundled-extraction"
    max_new_tokens = 8

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`GeneratedTask.draw`]."""
        record = draw_record(rng, 5)
        asked = rng.choice(list(record))
        prompt = f"Record: {listing(record)}.\nFind: {asked}\nAnswer:"
        return Example(prompt, f" correct: {asked} {record[asked]}", record[asked]), listing(record)

    def parse(self, output: str) -> str | None:
        """The value after the field's name."""
        return self.said(output, r"\w+ (\w+)")
