"""BIG-Bench Hard (Suzgun et al. 2023): 27 hard tasks with free answers.

The task asks the questions without the authors' prompts (three solved examples per task with a chain of thought), which
are not part of the data. lm-eval has these prompts: to compare with published figures, run its `bbh_cot_fewshot` and
`bbh_fewshot` with `milora lm-eval`.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from milora.tasks.answers import CUE, find_letter
from milora.tasks.denials import denied_before, denied_behind, is_asked
from milora.tasks.fields import check_fields
from milora.tasks.files import read_json
from milora.tasks.hub import load_split
from milora.tasks.numbers import number
from milora.tasks.plain_text import plain
from milora.tasks.public import PublicTask
from milora.tasks.rows import json_type
from milora.tasks.task import Example, Split
from milora_core.errors import DataError, MiLoraError

FOLDER = "bbh"
# lukaemon/bbh is a loading script, which `datasets` no longer runs. This copy has the same rows as Parquet files.
HUB_ID = "SaylorTwift/bbh"
TASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip

_FIELDS: dict[str, type] = {"input": str, "target": str}
_OPTION = re.compile(r"\(\s*([a-z])\s*\)|([a-z])(?:[.):](?=\s|$)|$)")
_OPTIONS = "ABCDEFGHIJKLMNOPQR"
_WORDS = "yes|no|true|false|valid|invalid"
_VERDICT = re.compile(rf"({_WORDS})(?=[.,;:!]|$| because\b)")
# "(A) or (B)", "yes, or no" and "no, yes" are two answers.
_TWO = re.compile(
    r"[.)]?\s*(?:\b(?:or|and)\b|/|&|,)+\s*(?:(?:or|and|perhaps|maybe)\s+)*"
    rf"(?:\([a-z]\)|(?:{_WORDS}|[a-z])\s*(?:$|[.,;]))"
)
_NEXT_QUESTION = re.compile(r"\n\s*Q:")
_BOX = re.compile(r"\$*\\boxed\s*\{(?:\\text\s*\{)?([^{}\n]*)\}{1,2}\$*")
_COUNT = re.compile(r"(-?[0-9][0-9,.]*) [a-z][a-z ]*")


class Bbh(PublicTask):
    """BBH's rows as `Q: ...` and `A:`. An output is correct if it matches exactly after [`parse`][Bbh.parse].

    The benchmark's accuracy is the mean of the accuracies of its 27 tasks. An example's `group` is its task.

    Args:
        data_dir: A folder that contains `bbh/{task}.json`; the hub if `None`.
        shots: Number of solved rows of the task before each question. These rows are fixed and are not tested, so each
            task has that many fewer test rows.
    """

    name = "bbh"
    max_new_tokens = 128
    splits: ClassVar[tuple[str, ...]] = ("test",)
    average: ClassVar[Literal["rows", "groups"]] = "groups"
    differs = (
        f"Asked for the answer alone, without solved examples, and in at most {max_new_tokens} new tokens. Figures "
        "with its authors' three examples and chains of thought, which `milora lm-eval` has, are others."
    )

    def __init__(self, data_dir: str | os.PathLike[str] | None = None, shots: int = 0):
        super().__init__(data_dir)
        if shots < 0:
            raise MiLoraError(f"shots is {shots}, it must be 0 or more")
        self.shots = shots

    def load(self, split: Split) -> list[Example]:
        """All tested rows, task by task."""
        return [example for task in TASKS for example in self._of_task(task)]

    def parse(self, output: str) -> str | None:
        """The answer of a text in the form of the gold answers, or `None`.

        The answer is the rest of the line after the last "answer is" (or another cue of
        [`milora.tasks.answers.CUE`]), else the first line. Case, whitespace, quotation marks, bold, a final full stop
        and commas between words are ignored. An option is reduced to its letter ("(B) robin", "B.", "b"), also inside a
        sentence ("not (A) but (B)"). A yes, no, true, false, valid or invalid may be followed by a comma, a full stop
        or "because" and more text. A number is reduced to its value without the unit. An answer that is negated,
        questioned or one of two ("(B) is wrong", "yes?", "(A) or (B)") does not count. The text after the next question
        ("Q:") is ignored.
        """
        text = _NEXT_QUESTION.split(plain(_BOX.sub(r"answer is \1", output)))[0]
        for cue in reversed(list(CUE.finditer(text))):
            if found := _answer(text, cue.end()):
                return found
        return _answer(text, 0)

    def _of_task(self, task: str) -> list[Example]:
        rows = _read(self.data_dir, task)
        if len(rows) <= self.shots:
            raise MiLoraError(f"shots is {self.shots}, but {task} has {len(rows)} rows in all")
        drawn = random.Random(task).sample(range(len(rows)), self.shots)
        solved = "".join(f"Q: {rows[place][0]}\nA: {rows[place][1]}\n\n" for place in drawn)
        shown = {rows[place][0] for place in drawn}
        return [
            Example(f"{solved}Q: {question}\nA:", f" {target}", _normalised(target), task)
            for question, target in rows
            if question not in shown
        ]


def read_task(path: Path) -> list[dict[str, str]]:
    """The unchanged `input` and `target` of each row of a task's file, `{"examples": [...]}` or a plain list.

    Raises:
        DataError: the file cannot be read, has no rows, or a row lacks a field. The message gives the row, counted from
            1.
    """
    value = read_json(path)
    found = value.get("examples") if isinstance(value, dict) else value
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: `examples` is {json_type(found)}, it must be a list of rows, at least one")
    return _checked(found, str(path))


def _read(data_dir: Path | None, task: str) -> list[tuple[str, str]]:
    """The questions and answers of a task."""
    if data_dir is None:
        rows = _checked(load_split(HUB_ID, "test", task), f"{HUB_ID} ({task})")
    else:
        path = data_dir / FOLDER / f"{task}.json"
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; the data folder must hold {FOLDER}/TASK.json for each of the {len(TASKS)} "
                f"tasks; without a data folder, bbh comes from the hub ({HUB_ID})"
            )
        rows = read_task(path)
    return [(row["input"].strip(), row["target"].strip()) for row in rows]


def _checked(records: Iterable[object], source: str) -> list[dict[str, str]]:
    rows = []
    for place, record in enumerate(records, start=1):
        row = check_fields(record, _FIELDS, f"{source}, row {place}")
        if not _normalised(row["target"]):
            raise DataError(f"{source}, row {place}: `target` is empty")
        rows.append({field: row[field] for field in _FIELDS})
    return rows


def _answer(text: str, start: int) -> str | None:
    """The answer of the first line after `start`, or `None` if it is empty, negated or questioned."""
    line = _first_line(text[start:])
    begin = text.find(line, start) + len(line) - len(line.lstrip(" \t*:\"'("))
    end = begin + len(line.lstrip(" \t*:\"'(").rstrip(" \t.?!"))
    if not line.strip() or denied_before(text, begin, end) or is_asked(text, begin, end):
        return None
    found = _normalised(line)
    if re.search(r"\([A-Za-z]\)", line) and not re.fullmatch(r"\([a-z]\)", found):
        letter = find_letter(line, _OPTIONS)
        return f"({letter.lower()})" if letter else found
    return found or None


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip(" \t*:")), "")


def _normalised(text: str) -> str:
    """The normalised form in which gold answers and outputs are compared."""
    text = plain(text).casefold().strip().strip("\"'")
    text = " ".join(text.split()).removesuffix(".").strip()
    option, verdict, count = _OPTION.match(text), _VERDICT.match(text), _COUNT.fullmatch(text)
    end = max([found.end(1) for found in (option, verdict, count) if found and found[1]], default=0)
    end = option.end() if option else end
    if end and (denied_behind(text, end) or _TWO.match(text, end)):
        return " ".join(text.split())
    if option:
        return f"({option[1] or option[2]})"
    if verdict:
        return verdict[1]
    if value := number(count[1].rstrip(".,") if count else text):
        return value
    if not re.search(r"\w", text):
        return "".join(text.split())  # the closing brackets of `dyck_languages`
    return " ".join(text.replace(",", " ").split())
