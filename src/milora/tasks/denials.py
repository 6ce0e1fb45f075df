"""Detects negation: "it cannot be true" contains "true" but negates it."""

from __future__ import annotations

import re

_AUXILIARY = "is|are|was|were|do|does|did|ca|can|could|wo|would|should|must|has|have|had|ai|might|need"
# A plain "no" is not a negator, because it answers a question: "no, it is true".
_NEGATOR = (
    r"(?:\b(?:not|cannot|never|neither|nor|hardly|scarcely|rarely|seldom|nowhere|nothing|nobody|no one|none|lie|myth"
    r"|misconception|unlikely|impossible|improbable|doubt(?:s|ed|ful|ing)?|disagree[sd]?|fails?|refuse[sd]?|except|unless"
    r"|if|whether|exclud(?:e|es|ed|ing)|eliminat\w+|reject\w*|avoid\w*|deny|denies|denied|disprov\w+|refut\w+|far from"
    r"|rather than|instead of|other than|opposed to|rul(?:e|ed|es|ing) out|no way|no longer|no reason|by no means|in no"
    rf"|under no|(?:{_AUXILIARY}|\s)n'?t)\b"
    r"|\bno (?=case|means|circumstances?|evidence|proof|chance)"
    r"|\b(?:wrong|incorrect|mistaken|mistake|error|erroneous|untrue|false|misleading)"
    r"\s+(?:answers?|options?|choices?|ones?|labels?|solutions?|statements?|that|to)\b)"
)
_NEGATION = re.compile(_NEGATOR)
_EXCEPT = re.compile(r"\b(?:anything|all|everything|any|every one|everyone)\s+but\b")
# Phrases with a negator that negate nothing.
_NO_NEGATION = re.compile(
    r"\bnothing (?:but|other than|except)\b"
    r"|\b(?:no|without|beyond|never|not|cannot|can't|don't)\s+(?:an?\s+|any\s+)?doubt\b"
    r"|\bnot only\b|\bwhy not\b|\bnot surprisingly\b|\bif (?:anything|so)\b|\bif i(?:'m| am) not (?:mistaken|wrong)\b"
    r"|\bcan(?:not|'t| not) (?:help but|be denied that|deny that)\b|\b(?:never|not) fails? to\b"
    r"|\bwhether or not\b[^,]*,"
)
_QUOTED = re.compile(r"\"[^\"\n]*\"|(?<!\w)'[^'\n]*(?:\w'\w[^'\n]*)*'(?!\w)")
# The end of a clause, except a comma or colon right after a negator: "it is not, however, true".
_CLAUSE_END = re.compile(
    r"[.!?](?=[\s\"')\]]|$)|[;\n]|(?P<soft>[,:])|\s-+\s|--"
    r"|\b(?:but|however|though|although|so|therefore|thus|hence|because|since|while|whereas|then|yet|meaning|implies"
    r"|making|leaving|leaves)\b"
    r"|\band\s+(?=(?:it|the|this|that|so|therefore|thus|hence|i|we)\b)"
)
_ENDS_IN_NEGATOR = re.compile(rf"{_NEGATOR}\s*$")
_PARENTHESIS = re.compile(rf"({_NEGATOR})\s*,[^,.;\n]{{1,40}},")
# The negation belongs to the subject: "the one that is not a mammal is B".
_OF_THE_SUBJECT = re.compile(
    r"^\W*(?:\w+\s+){0,3}?(?:the|an?|only|one|this|these|all|every|which|what)\s+[^,]*?"
    rf"(?:\b(?:that|which|who|whose|where|what)\b[^,]*?{_NEGATOR}"
    r"|(?<!is )(?<!are )(?<!was )(?<!be )(?<!do )(?<!does )(?<!did )(?<!can )(?<!could )(?<!must )(?<!may )(?<!might )"
    r"(?<!will )(?<!would )(?<!should )(?<!shall )(?<!need )(?<!has )(?<!have )\bnot\b)"
    r"[^,]*\b(?:is|are|was|be)\W*(?:(?:the|option|choice|answer|letter|number|therefore|clearly)\W*){0,3}$"
)
_OPINION = re.compile(rf"{_NEGATOR}\s+(?:\w+\s+){{0,2}}?(?:think|believe|say|claim|mean|case|agree|sure|clear)\b")
_LAST_AND = re.compile(r"\b(?:and|or)\s+(?:(?:the|option|choice|answer|label|letter|solution)\s+)*\W*$")
_NEITHER = re.compile(r"\b(?:neither|nor)\b")

_VERB = (
    r"(?:is|are|was|were|be|being|seems?|looks?|appears?|sounds?|must|can|could|would|will|should|may|might|has|have|had"
    r"|do|does|did|becomes?)"
)
_ADVERB = r"(?:\s+(?:\w+ly|just|also|both|all|then|thus|too|quite|the|an?|be|been|to be|seem|look|therefore))"
_WRONG = (
    r"(?:wrong|incorrect|false|untrue|out\b(?! of)|impossible|mistaken|inaccurate|invalid|ruled out|eliminated|excluded"
    r"|rejected|unlikely|improbable|too\s+\w+|bad|worse|worst|distractors?|irrelevant|unrelated|implausible|nonsense"
    r"|never|neither|none|no\b(?!\s+doubt)|not\b(?!\s+only)|far from)"
)
_CLOSING = r"[)\]\"'*\s]*"
_DENIED_BEHIND = re.compile(
    rf"{_CLOSING}(?:\([^()]*\)\s*)?(?:"
    rf":\s*(?:wrong|incorrect|false|no)\b|{_VERB}{_ADVERB}{{0,3}}\s+{_WRONG}|{_VERB}(?:n'?t|not)\b|(?:ca|wo)n'?t\b"
    r"|cannot\b|(?:the\s+)?(?:wrong|incorrect)\b|fails?\b|makes? no sense|contradicts?\b"
    r"|[.,;\s-]{1,5}(?:no,|no wait\b|or rather\b|i mean\b)"
    r"|,?\s*but\s+(?:it|that|this)(?:'s|\s+is)?(?:n't|\s+not|\s+wrong|\s+incorrect)\b(?!\s+(?:always|only|just|all)))"
)
_SINGULAR = re.compile(rf"{_CLOSING}(?:is|was|seems|looks|has|does)(?:n't)?\b")
_VERB_BEHIND = re.compile(rf"{_CLOSING}{_VERB}\b")
_ASKED_BEHIND = re.compile(rf"{_CLOSING}\?")
_REST_OF_QUESTION = re.compile(r"[^.!?:;\n]*\?")
_QUESTION_START = re.compile(
    r"(?:^|[.!?:;,\n])\W*(?:so |but |and |then )?"
    r"(?:is|are|was|were|could|can|would|should|does|do|did|will|why|how|what|which|who)\b[^.!?:;\n]*$"
)

_WINDOW = 300
"""Maximum characters read on either side. A longer "clause" is a model that repeats itself."""


def is_denied(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is negated, doubted, questioned, or a condition.

    The check reads the clause before it ("it is not true", "I doubt that it is B", "rather than C", "if it is 5") and
    the words right after it ("B is wrong", "A can't be right", "true?"). A negation inside the subject of the clause
    does not count ("the one that is not a mammal is B"). `text` must come from [`milora.tasks.plain_text.plain`].
    """
    return denied_before(text, start, end) or denied_behind(text, end) or is_asked(text, start, end)


def denied_before(text: str, start: int, end: int) -> bool:
    """Whether a negator in the clause before `start` applies to `text[start:end]`."""
    before = text[max(0, start - _WINDOW) : start].lower()
    if not _NEGATION.search(before) and not _EXCEPT.search(before):
        return False
    before = _EXCEPT.sub("other than", _NO_NEGATION.sub(" ", _QUOTED.sub(" ", before)))
    before = _PARENTHESIS.sub(r"\1 ", before)
    begin = 0
    for found in _CLAUSE_END.finditer(before):
        if not (found["soft"] and _ENDS_IN_NEGATOR.search(before[: found.start()])):
            begin = found.end()
    clause = before[begin:]
    joint = _LAST_AND.search(clause)
    if joint and _VERB_BEHIND.match(text, end) and not _NEITHER.search(clause):
        clause = clause[joint.start() :]  # "A is not right and B is": the second has its own verb
    negators = len(_NEGATION.findall(clause))
    is_of_the_subject = negators == 1 and _OF_THE_SUBJECT.match(clause) and not _OPINION.search(clause)
    return negators > 0 and not is_of_the_subject


def denied_behind(text: str, end: int) -> bool:
    """Whether the text after `end` negates the word: "B is wrong"."""
    return _DENIED_BEHIND.match(text[end : end + _WINDOW].lower()) is not None


def denied_together(text: str, end: int, start: int, last: int) -> bool:
    """Whether the text after a list of two words negates both: one ends at `end`, the other is `text[start:last]`.

    "A and B are wrong" negates both, "A, and B is wrong" only the second.
    """
    if _ASKED_BEHIND.match(text, last):
        return True
    if not denied_behind(text, last):
        return False
    return re.search(r"\bn?or\b", text[end:start]) is not None or not _SINGULAR.match(text, last)


def is_asked(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is in a question, or right before a question mark."""
    if _ASKED_BEHIND.match(text, end):
        return True
    if not _REST_OF_QUESTION.match(text[end : end + _WINDOW]):
        return False
    return _QUESTION_START.search(text[max(0, start - _WINDOW) : start].lower()) is not None
