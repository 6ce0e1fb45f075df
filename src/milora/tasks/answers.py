"""Reading an answer in words out of a generated text: one label of a few, or the letter of a choice.

Both are strict about what counts and tolerant of form. [`milora.tasks.numbers`] reads numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CUE = re.compile(
    r"\b(?:answers?|option|choice)\b[^.:=\n]{0,40}?\b(?:is|are|be|was|equals)\b\s*[:=]?"
    r"|\banswers?\s*[:=]|####|\\(?:boxed|fbox)\b",
    re.IGNORECASE,
)
"""Where an answer is announced: "the answer is", "the answer to this would be:", "Answer:", "####", a LaTeX box."""

_DENIED = r"(?<!not )(?<!n't )(?<!n\u2019t )"

# A label may itself begin with "answer", so that this cue is narrower than the one of letters and numbers.
_LABEL_CUE = re.compile(r"\banswer ?(?:is\b|:)")

_MARKS = r"[\s*_`\"'$:,>-]*"
_FILLERS = "the|most|likely|correct|best|option|choice|answer|letter|therefore|thus|clearly|definitely|probably"
_LEAD = rf"{_MARKS}(?:(?:{_FILLERS})\b{_MARKS})*"
_BRACKETED = r"[(\[]\s*([A-Za-z])\s*[)\]]"
_WHOLE = r"(?![\w'\u2019])"
_END = r"(?=\s*(?:$|[.,;:!?)\]\n*\"'`]))"
_AFTER_CUE = re.compile(rf"(?:(?i:{_LEAD}))(?:{_BRACKETED}|([A-Z]){_WHOLE}|([a-z]){_END})")
_AT_START = re.compile(rf"(?:(?i:{_LEAD}))(?:{_BRACKETED}|([A-Za-z]){_END})")
_IN_BRACKETS = re.compile(rf"{_DENIED}(?<![/\w])\(([A-Z])\)(?!\s*/)")
_JOINT = rf"{_MARKS}(?:/|\bor\b|\band\b|,|&){_MARKS}"
_ANOTHER = re.compile(rf"{_JOINT}(?:{_BRACKETED}|([A-Z]){_WHOLE})")
_BESIDE = re.compile(rf"[)\]]?{_JOINT}[(\[]?")


class Labels:
    """The labels of a task, and how they are found in a text.

    Args:
        labels: The labels, in lower case, such as `answer2`, `true` or `high school physics`.
    """

    def __init__(self, labels: Iterable[str]):
        self._labels = {_letters(label): label for label in labels}
        # "answer2" is also written "answer 2" or "answer-2", and a space in a label also as an underscore.
        words = (re.findall(r"[^\W\d_]+|\d+", label) for label in self._labels.values())
        forms = sorted(("[ _-]?".join(parts) for parts in words), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<![\w/]){_DENIED}(?:{'|'.join(forms)})(?![\w/])")

    def find(self, text: str) -> str | None:
        """The label that a text gives, or `None`.

        It is the first label after "answer is" (or "answer:"). Where nothing follows such words, it is the only label
        in the text; several different ones are no answer, nor are two different ones side by side ("true or false")
        after such words. Neither is a label after "not", nor one in a list such as "true/false". Case, punctuation and
        a space in the label ("Answer 2") do not matter.
        """
        text = re.sub(r"\s*/\s*", "/", " ".join(text.casefold().split()))
        cue = _LABEL_CUE.search(text)
        match = self._pattern.search(text, cue.end()) if cue else None
        found = {_letters(m[0]) for m in (self._side_by_side(match) if match else self._pattern.finditer(text))}
        return self._labels[found.pop()] if len(found) == 1 else None

    def _side_by_side(self, first: re.Match[str]) -> list[re.Match[str]]:
        """A label that was found, and the one that "or", "and", a comma or the like joins to it."""
        joint = _BESIDE.match(first.string, first.end())
        second = self._pattern.match(first.string, joint.end()) if joint else None
        return [first, second] if second else [first]


def find_letter(text: str, letters: str) -> str | None:
    """The letter of the choice that a text gives, in upper case, or `None`.

    Of the cues ("the answer is", "Answer:", "####", a LaTeX box) the last one counts that a letter follows: in
    brackets, with a full stop or bracket after it, in bold, after "option" or "choice". Without any, it is the letter
    that the text consists of or begins with ("C", "(c)", "C. Paris", "C) Paris"), else the only one that stands in
    brackets anywhere in the text. A small letter counts in brackets or where nothing but punctuation follows it, so
    that "a" remains an article. Two letters side by side ("A or B", "A/B") are no answer, nor is the list of the
    choices, nor a letter that is none of them, nor one after "not".

    Args:
        text: The generated text.
        letters: The choices' letters in upper case, such as `ABCDE`.
    """
    plain = _without_latex(text)
    for cue in reversed(list(CUE.finditer(plain))):
        if found := _AFTER_CUE.match(plain, cue.end()):
            return _one_letter(found, plain, letters)
    if found := _AT_START.match(plain):
        return None if _lists_choices(plain, letters) else _one_letter(found, plain, letters)
    bracketed = {letter.upper() for letter in _IN_BRACKETS.findall(plain)}
    return bracketed.pop() if len(bracketed) == 1 and bracketed <= set(letters) else None


def _one_letter(found: re.Match[str], text: str, letters: str) -> str | None:
    letter = _group(found)
    other = _ANOTHER.match(text, found.end())
    if letter not in letters or (other and _group(other) in letters):
        return None
    return letter


def _lists_choices(text: str, letters: str) -> bool:
    return all(re.search(rf"(?<!\w){letter}\s*[.):\]]", text) for letter in letters[:2])


def _group(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def _without_latex(text: str) -> str:
    """A text without the LaTeX around a letter: `\\boxed{\\text{(C)}}` becomes `\\boxed (C)`, spaces aside."""
    return re.sub(r"[{}$]|\\(?:text|mathrm|mathbf|textbf|left|right)(?![a-z])", " ", text)


def _letters(label: str) -> str:
    return re.sub(r"[ _-]", "", label)
