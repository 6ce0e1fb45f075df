"""The judge's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from milora.tasks.fields import check_fields
from milora.tasks.files import read_values
from milora_core.errors import DataError

FILE_NAME = "judge_prompts.jsonl"
"""FastChat's name for the file of judge prompts."""


@dataclass(frozen=True)
class JudgePrompt:
    """A question to the judge.

    Attributes:
        name: FastChat's name, which identifies the judgement.
        system: The system message.
        template: The user's message, with placeholders in braces for the questions, answers and references.
    """

    name: str
    system: str
    template: str

    def fill(self, parts: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages for one judgement.

        Raises:
            DataError: If the template has a placeholder that is not in `parts`.
        """
        try:
            text = self.template.format(**parts)
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"The judge prompt {self.name!r} has a place {error} that cannot be filled; there are "
                f"{', '.join(parts)}."
            ) from error
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]


def name_of(kind: str, *, with_reference: bool, second_turn: bool) -> str:
    """FastChat's name for a kind of judgement: `single` or `pair`."""
    version = {"single": "single-v1", "pair": "pair-v2"}
    with_math = {"single": "single-math-v1", "pair": "pair-math-v1"}
    return (with_math if with_reference else version)[kind] + ("-multi-turn" if second_turn else "")


def load(folder: Path | None) -> dict[str, JudgePrompt]:
    """The judge prompts by name: FastChat's if `folder` has its `judge_prompts.jsonl`, else MiLoRA's.

    Scores are comparable with published ones only with the same judge and the same prompts. MiLoRA's prompts ask for
    the same judgement in the same format, with different wording.

    Raises:
        DataError: If a line of the file is not a judge prompt.
    """
    prompts = dict(OWN)
    path = None if folder is None else folder / FILE_NAME
    if path is None or not path.is_file():
        return prompts
    fields = {"name": str, "system_prompt": str, "prompt_template": str}
    for where, record in read_values(path):
        row = check_fields(record, fields, where)
        prompts[row["name"]] = JudgePrompt(row["name"], row["system_prompt"], row["prompt_template"])
    return prompts


_GRADING = (
    "You grade the answers of an AI assistant. Be impartial. Weigh how helpful, relevant, accurate, deep, creative and "
    "detailed the answer is.{reference} Explain your judgement briefly first. Then give a grade from 1 (useless) to 10 "
    '(could not be better), in exactly this form: "[[rating]]", for example "Rating: [[5]]".'
)
_COMPARING = (
    "You compare the answers of two AI assistants, A and B. Be impartial. Weigh how well each follows the user's "
    "instructions, and how helpful, relevant, accurate, deep, creative and detailed it is.{reference} Neither the "
    "order in which the answers are shown, nor their length, nor the assistants' names may matter. Explain your "
    'judgement briefly first. Then give the verdict in exactly this form: "[[A]]" if A is better, "[[B]]" if B is '
    'better, "[[C]]" if they are equally good.'
)
_TO_REFERENCE = (
    " A reference answer is shown. Compare with it and look for mistakes; an answer that contradicts it is wrong, "
    "unless the reference is."
)
_SECOND = " The conversation has two turns; judge the answer to the second question."


def _own() -> dict[str, JudgePrompt]:
    prompts = {}
    for kind in ("single", "pair"):
        for with_reference in (False, True):
            for second_turn in (False, True):
                system = (_GRADING if kind == "single" else _COMPARING).format(
                    reference=(_SECOND if second_turn else "") + (_TO_REFERENCE if with_reference else "")
                )
                name = name_of(kind, with_reference=with_reference, second_turn=second_turn)
                template = _template(kind, with_reference=with_reference, second_turn=second_turn)
                prompts[name] = JudgePrompt(name, system, template)
    return prompts


def _template(kind: str, *, with_reference: bool, second_turn: bool) -> str:
    # The placeholders' names are FastChat's: one turn has no number.
    turns = ["_1", "_2"] if second_turn else [""]
    sides = {"": "the assistant"} if kind == "single" else {"_a": "assistant A", "_b": "assistant B"}
    parts = []
    if with_reference:
        parts += [
            f"# Reference answer{f' {turn}' if second_turn else ''}\n{{ref_answer_{turn}}}"
            for turn in range(1, len(turns) + 1)
        ]
    for side, title in sides.items():
        for turn in turns:
            number = f" {turn[1:]}" if turn else ""
            if turn or side in ("", "_a"):  # a conversation is repeated for each assistant
                parts.append(f"# The user's question{number}\n{{question{turn}}}")
            parts.append(f"# The answer{number} of {title}\n{{answer{side}{turn}}}")
    return "\n\n".join(parts)


OWN = _own()
