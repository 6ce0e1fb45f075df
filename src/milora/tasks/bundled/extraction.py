"""Information extraction: the value of one field of a record."""

from __future__ import annotations

import random
import re

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import invented_record
from milora.tasks.task import Example


class ExtractionTask(GeneratedTask):
    """A record of six fields, one of which is asked for."""

    name = "bundled-extraction"
    max_new_tokens = 16

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """One record with a question; the record decides the split."""
        record = invented_record(rng, size=6)
        field = rng.choice(sorted(record))
        listing = "\n".join(f"{key}: {value}" for key, value in record.items())
        prompt = f"Record:\n{listing}\nFind: {field}\nAnswer:"
        return Example(prompt, f" {self.completion_start} {record[field]}", record[field]), listing

    def parse(self, output: str) -> str | None:
        """The rest of the line after "the correct answer is"."""
        found = re.search(rf"{self.completion_start}:? ([^\n]*[^\n\s.])", output, re.IGNORECASE)
        return found[1].strip() if found else None
