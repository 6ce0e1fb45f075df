"""Parses a label or the letter of a choice from a generated text.

The parsers accept many forms of an answer. A negated or ambiguous answer does not count.
[`milora.tasks.numbers`] parses numbers, [`milora.tasks.denials`] detects negation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from milora.tasks.denials import denied_behind, denied_together, is_denied
from milora.tasks.plain_text import plain

CUE = re.compile(
    r"\b(?:answers?|option|choice)\b[^.:=\n]{0,40}?\b(?:is|are|be|was|equals)\b\s*[:=]?"
    r"|\bans(?:wers?)?\s*[:=]|\banswer's(?!\w)|####|\\(?:boxed|fbox)(?![A-Za-z])"
    r"|(?<=[.!?]\s)(?:wait|no|oops|sorry|actually|correction|i mean)\b[^.:=\n0-9]{0,20}?"
    r"\bit(?:'s| is| must be| should be)(?!\w)",
    re.IGNORECASE,
)
"""Cues of an answer ("the answer is", "the answer to this would be:", "Answer:", "####", a LaTeX box) and of a
correction ("no, it is")."""

# A label may begin with "answer", so this cue is narrower than the one for letters and numbers.
_NO_LABEL = r"no (?:doubt|question|longer|one|matter|idea)\b"
_LABEL_CUE = re.compile(r"\banswer ?(?:is\b|:)")
_REACH = 400
"""Maximum characters read after a cue: a model that repeats itself never ends a sentence."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")

_MARKS = r"[\s*_`\"'$:,>=#-]*"
_FILLERS = (
    "the|most|likely|correct|right|best|option|choice|answer|letter|therefore|thus|indeed|still|then|to be|going"
    "|[a-z]+ly"
)
_LEAD = rf"{_MARKS}(?:(?:{_FILLERS})\b{_MARKS}){{0,6}}"
_BRACKETED = r"[(\[]\s*([A-Za-z])\s*[)\]]"
_FOLLOWED = (
    r"(?=\s+(?:because|since|as|and|or|nor|but|not|is|are|was|which|rather|instead|if|when|for|by|with|in|due)\b)"
)
_END = r"(?=\s*(?:$|[.,;:!?)\]\n*\"`/&-]|'(?!\w)|\(not\b))"
# "A" and "I" are words too.
_CAPITAL = rf"(?:([B-HJ-Z])(?!\w|'\w)|(A)(?:{_END}|{_FOLLOWED})|(I){_END})"
_AFTER_CUE = re.compile(rf"(?:(?i:{_LEAD}))(?:{_BRACKETED}|{_CAPITAL}|([a-z]){_END})")
_AT_START = re.compile(rf"(?:(?i:{_LEAD}))(?:{_BRACKETED}|([A-Za-z]){_END}|([A-H])(?!\s+(?:is|are|was)\b){_FOLLOWED})")
_NEXT_LINE = re.compile(rf"[.)\]]?[ \t]*\n\s*(?:{_BRACKETED}|([A-Z]))[.)]?[ \t]*(?:$|\n)")
_STATED = re.compile(
    r"(?i:\b(?:(?:it|that|this|which|one)(?:'s| is| must be| has to be| should be| would be| can only be)"
    r"|but|so|therefore|thus|hence|choose|chose|pick|picked|select|selected|go with|going with|went with|no|think"
    r"|believe|guess|say|option|choice|answer|letter)\b)"
    rf"(?:(?i:{_LEAD}))(?:{_BRACKETED}|(?:([B-HJ-Z])|([AI]))(?:{_END}|{_FOLLOWED}))"
    rf"|\b(?:is|must be)(?:{_BRACKETED}|\s+([B-HJ-Z]))(?=\s*[.!]?\s*(?:$|\n))"
    r"|(?:;|\b(?:wrong|incorrect|right|correct|possible|false)[,.])"
    rf"\s+(?:{_BRACKETED}|([A-HJ-Z]))(?=\s*[.!]?\s*$)"
    rf"|(?:{_BRACKETED}|(?<![\w'])([A-H])(?!\w|'\w)[)\]]?)"
    r"(?=\s+(?:is|must be|has to be|would be|seems)\s+(?:(?:the|clearly|probably|definitely)\s+)*"
    r"(?i:correct|right|best|answer|true)\b)"
)
_IN_BRACKETS = re.compile(r"(?<![/\w])\(([A-Z])\)(?!\s*/)")
_JOINT = (
    rf"{_MARKS}(?:/|\band/or\b|\bor\b|\band\b|\bnor\b|,|&)"
    rf"(?:{_MARKS}(?:\b(?:or|and|nor|perhaps|maybe|possibly)\b))?{_MARKS}"
)
_ANOTHER = re.compile(rf"(?i:{_JOINT}(?:(?:option|choice|answer|letter)\s+)?)(?:{_BRACKETED}|([A-Z])(?![\w']))")
_BESIDE = re.compile(rf"[)\]]?{_JOINT}[(\[]?")
_THAT = re.compile(r"\s+that\b[^.!?;\n]{0,80}$")
_ENUMERATION = re.compile(r"[)\]]?\s*(?:\bor\b|\band\b|\bnor\b|,)+\s*(?:(?:or|and|nor)\b\s*)?[(\[]?")


class Labels:
    """Finds the labels of a task in a text.

    Args:
        labels: The labels, in lower case, such as `answer2`, `true` or `high school physics`.
    """

    def __init__(self, labels: Iterable[str]):
        self._labels = {_letters(label): label for label in labels}
        # "answer2" may be written "answer 2" or "answer-2", and a space in a label as an underscore.
        words = (re.findall(r"[^\W\d_]+|\d+", label) for label in self._labels.values())
        forms = sorted(("[ _-]?".join(parts) for parts in words), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<![\w/])(?<!\bnon-)(?<!\bun-)(?!{_NO_LABEL})(?:{'|'.join(forms)})(?![\w/])")

    def find(self, text: str) -> str | None:
        """The label that a text gives as its answer, or `None`.

        The answer is the first label in the sentence after "answer is" (or "answer:"), or else the only label in the
        text. Not counted: several different labels, two different labels side by side ("true or false") after a cue, a
        negated or questioned label ("not true", "it can't be true", "true is wrong", "true?"; see
        [`milora.tasks.denials`]), and a label in a list such as "true/false". Case, punctuation and a space in the
        label ("Answer 2") are ignored.
        """
        text = re.sub(r"[^\S\n]*/[^\S\n]*", "/", re.sub(r"[^\S\n]+", " ", plain(text).casefold()))
        for cue in _LABEL_CUE.finditer(text):
            begin = cue.end() + len(text[cue.end() :]) - len(text[cue.end() :].lstrip())
            sentence = self._pattern.finditer(text, begin, _sentence_end(text, begin))
            if first := next(self._affirmed(text, sentence), None):
                joint = _BESIDE.match(text, first.end())
                second = self._pattern.match(text, joint.end()) if joint else None
                both = {_letters(first[0]), _letters(second[0]) if second else _letters(first[0])}
                return self._labels[both.pop()] if len(both) == 1 else None
        matches = list(self._pattern.finditer(text))
        if any(_of_another(text, one.end(), other.start()) for one, other in pairwise(matches)):
            return None
        listed = {_letters(match[0]) for match in matches if text.startswith(":", match.end())}
        found = {_letters(match[0]) for match in self._affirmed(text, matches)}
        if len(listed) > 1:  # the text lists the choices
            found |= listed
        return self._labels[found.pop()] if len(found) == 1 else None

    def _affirmed(self, text: str, matches: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
        """Labels that the text affirms; a negation of the first in a list ("neither true nor false") applies to all."""
        matches = list(matches)
        denied = [is_denied(text, match.start(), match.end()) for match in matches]
        for place in range(1, len(matches)):
            if denied[place - 1] and not denied_behind(text, matches[place - 1].end()):
                denied[place] |= _joined(text, matches[place - 1].end(), matches[place].start())
        for place in range(len(matches) - 1, 0, -1):
            end, (start, last) = matches[place - 1].end(), matches[place].span()
            denied[place - 1] |= _joined(text, end, start) and denied_together(text, end, start, last)
        return (match for match, is_out in zip(matches, denied, strict=True) if not is_out)


def find_letter(text: str, letters: str) -> str | None:
    """The letter of the choice that a text gives as its answer, in upper case, or `None`.

    The last cue ("the answer is", "Answer:", "####", a LaTeX box) with a letter after it counts. The letter may be in
    brackets, before a full stop or bracket, in bold, or after "option" or "choice". Without a cue, the answer is the
    letter that the text consists of or begins with ("C", "(c)", "C. Paris", "C) Paris"), else a stated letter ("it is
    C", "C is right"), else the only letter in brackets. A lower-case letter counts only in brackets or before
    punctuation, so the article "a" does not. Not counted: two letters side by side ("A or B", "A/B"), the list of the
    choices, a letter that is not a choice, and a negated or questioned letter ("not C", "it can't be C", "C is wrong",
    "C?"; see [`milora.tasks.denials`]).

    Args:
        text: The generated text.
        letters: The choices' letters in upper case, such as `ABCDE`.
    """
    text = re.sub(r"[{}$]", " ", plain(text))
    for cue in reversed(list(CUE.finditer(text))):
        found = _AFTER_CUE.match(text, cue.end())
        if found and not _is_denied(text, found):
            return _one_letter([found], text, letters)
        sentence = _affirmed(text, _STATED.finditer(text, cue.end(), _sentence_end(text, cue.end())))
        if sentence:
            return _one_letter(sentence, text, letters)
    found = _AT_START.match(text)
    if found and not _is_denied(text, found):
        return None if _lists_choices(text, letters) else _one_letter([found], text, letters)
    stated = _affirmed(text, _STATED.finditer(text))
    if not stated and not _lists_choices(text, letters):
        stated = _affirmed(text, _IN_BRACKETS.finditer(text))
    return _one_letter(stated, text, letters) if stated else None


def _affirmed(text: str, matches: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Letters that the text affirms, without lists whose first letter is negated ("not (A) or (B)")."""
    kept: list[re.Match[str]] = []
    denied_end: int | None = None
    for match in matches:
        start, end = _span(match)
        if is_denied(text, start, end) or (denied_end is not None and _joined(text, denied_end, start)):
            denied_end = end
            if kept and _joined(text, kept[-1].end(), start) and denied_together(text, kept[-1].end(), start, end):
                kept.pop()  # "(A) and (B) are wrong"
        else:
            denied_end = None
            kept.append(match)
    return kept


def _is_denied(text: str, found: re.Match[str]) -> bool:
    """Whether a letter is negated, alone or with its list ("A, B and C are wrong")."""
    start, end = _span(found)
    last = _ANOTHER.match(text, end)
    while last and (further := _ANOTHER.match(text, last.end())):
        last = further
    return is_denied(text, start, end) or (last is not None and denied_together(text, end, *_span(last)))


def _of_another(text: str, end: int, start: int) -> bool:
    """Whether a label refers to a clause with another label: "it is false that it is not true"."""
    return _THAT.match(text, end, start) is not None


def _sentence_end(text: str, start: int) -> int:
    end = _SENTENCE_END.search(text, start, start + _REACH)
    return end.start() if end else min(start + _REACH, len(text))


def _joined(text: str, end: int, start: int) -> bool:
    """Whether only "or", "and", a comma or brackets are between two candidates."""
    return _ENUMERATION.fullmatch(text, end, start) is not None


def _one_letter(found: list[re.Match[str]], text: str, letters: str) -> str | None:
    """The common letter of the matches; `None` if they differ or are joined to another letter."""
    given = {_group(match) for match in found}
    for match in found:
        other = _ANOTHER.match(text, match.end()) or _NEXT_LINE.match(text, match.end())
        if other and _group(other) in letters and not is_denied(text, *_span(other)):
            given.add(_group(other))
    letter = given.pop()
    return letter if not given and letter in letters else None


def _lists_choices(text: str, letters: str) -> bool:
    """Whether the first two letters appear in order, as in "(A) 21 (B) 20", but not "(A), not (B)"."""
    first, second = (re.compile(rf"(?<!\w){letter}\s*[.):\]]") for letter in letters[:2])
    found = first.search(text)
    other = second.search(text, found.end()) if found else None
    return other is not None and not is_denied(text, other.start(), other.end())


def _group(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def _span(found: re.Match[str]) -> tuple[int, int]:
    """The span of the letter of a match, including its brackets."""
    place = next(number for number, group in enumerate(found.groups(), start=1) if group)
    start, end = found.span(place)
    bracket = re.compile(r"\s*[)\]]").match(found.string, end)
    return start, bracket.end() if bracket else end


def _letters(label: str) -> str:
    return re.sub(r"[ _-]", "", label)
