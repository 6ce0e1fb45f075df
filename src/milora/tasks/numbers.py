"""Parses a number from a generated text and writes it in canonical form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from milora.tasks.answers import CUE
from milora.tasks.denials import denied_before, is_asked
from milora.tasks.plain_text import plain

_SYMBOL = "[$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u20ba\u20b4\u20aa\u20ab\u0e3f\u20a6\u20b1\u00a2]"
_CURRENCY = rf"(?:[A-Z]{{0,3}}{_SYMBOL}\s?|[A-Z]{{3}}\s?|Rs\.?\s?)"
_SIGN = r"(?:(?<![\w)\]%])[-+])"
# Spaces separate thousands only if the whole run of digits and spaces is one number: "12 345 67" is a list.
_SPACED = r"(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])"
_WHOLE = (
    rf"(?:{_SPACED}|[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,2}}(?:,[0-9]{{2}})+,[0-9]{{3}}"  # 1,000,000 and 10,00,000
    r"|[0-9]{1,3}(?:['_][0-9]{3})+|[0-9]+)"
)
_CONTINENTAL = r"[0-9]{1,3}(?:(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|\.[0-9]{3},[0-9]+)"
_DECIMAL = rf"(?:{_CONTINENTAL}|{_WHOLE}(?:\.[0-9]+)?|(?<![0-9A-Za-z.])\.[0-9]+)"
_MIXED = "[0-9]+ [1-9][0-9]*/[0-9]+"
_EXPONENT = r"[-+]?[0-9]{1,3}"
_SCIENTIFIC = rf"(?:[eE]{_EXPONENT}|\s?[x*\u00d7\u00b7]\s?10\s?\^\s?{_EXPONENT})"
_VALUE = rf"(?:{_MIXED}|{_DECIMAL}(?:{_SCIENTIFIC}|\^\s?{_EXPONENT}|/[-+]?{_DECIMAL})?)"
# Excluded: a number inside a word ("x2"), a date, a time, a ratio or a version; an ordinal, an exponent, a root and a
# multiple of a root.
_NUMBER = (
    rf"(?<![\w^\u221a])(?<!\u221a )(?<!-\()(?<![0-9][.,/:'])(?:{_SIGN}{_CURRENCY}?|{_CURRENCY}[-+]?)?{_VALUE}"
    r"(?!\s?[x*\u00d7\u00b7]\s?10\s?\^|[.,/:'_]?[0-9]|/[-+]|[eE][-+]?[0-9]|(?:st|nd|rd|th)\b|\s?\^|\s?(?:[\u221a\u03c0]|\\pi)|'[0-9])"
)
_ANY = re.compile(_NUMBER)

_UNIT = r"(?: ?(?:%|°|[A-Za-z]+\.?)){0,2}"
_OPERATOR = r"\s*(?:[-+*/\u00d7\u00f7\u00b7^=]|x(?![A-Za-z]))\s*"
_EXPRESSION = re.compile(rf"{_NUMBER}{_UNIT}(?:{_OPERATOR}{_NUMBER}{_UNIT})+")
_QUANTITY = re.compile(rf"\s*({_NUMBER}){_UNIT}\s*")
_SENTENCE_END = re.compile(r"(?<!Rs)(?<!approx)[.!?](?=\s|$)|\n")
_IN_A_SENTENCE = re.compile(r"\b(?:is|are|be|was|equals)\b|'s$", re.IGNORECASE)
_NO_WORD = re.compile(r"[^A-Za-z]*(?:[A-Za-z]\s*=)?[^A-Za-z]*")

# "5 or 6", "5 to 7" and "5 apples and 6 pears" are several numbers.
_SECOND = re.compile(
    rf"{_UNIT}\s*(?:,\s*(?:or|and|nor|to)?|\b(?:or|and|nor|to)\b|&|/)\s*({_NUMBER}){_UNIT}[)\s]*(?=$|,|\bor\b|\band\b)"
)
_BOUND = re.compile(r"(?:\bthan|\u00b1|\+/-|[\u2264\u2265]|(?<![-=])[<>]=?)\s*$")
_WRONG = re.compile(
    rf"{_UNIT}[)\]\"'*\s]*(?:(?:is|was|are|were|would be|must be|seems)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false"
    r"|impossible|(?:not|never)\s+(?:\w+ly\s+)?(?:right|correct|true|possible|it\b|the\b|our\b|my\b))"
    r"|(?:isn't|wasn't|is not|can't be|cannot be|can not be|couldn't be|could not be)\s+(?:\w+ly\s+)?"
    r"(?:right|correct|true|possible|it\b|the\b))"
)

_MOST_DIGITS = 100  # longer numbers come from a model that repeats itself, and are slow to compute with
_REACH = 600  # maximum characters of a sentence read after a cue
_DIGIT = r"(?:-?[A-Z]{0,3}[$\u20ac\u00a3\u00a5\u20b9]\s?)?\.?[0-9]"
_SPELLINGS = (
    (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"\1/\2"),
    (r"\^\s*\{\s*([-+]?[0-9]+)\s*\}", r"^\1"),
    (r"\{,\}", ","),
    (r"\\[,!]", ""),
    (r"\\[;: ]|~", " "),
    (r"\\([$%])", r"\1"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "\u00f7"),
    (r"\\pm(?![A-Za-z])", "\u00b1"),
    (r"\\(?:leq?|geq?)(?![A-Za-z])", "\u2264"),
    (r"\\sqrt(?![A-Za-z])\s*\{?", "\u221a"),
    (r"[{}]", " "),
    (rf"\bplus\s+(?={_DIGIT})", "+ "),
    (rf"\b(?:times|multiplied by)\s+(?={_DIGIT})", "* "),
    (rf"\bdivided by\s+(?={_DIGIT})", "\u00f7 "),
    (rf"(?<=[0-9%])\s+(?:equals|is equal to)\s+(?={_DIGIT})", " = "),
    (rf"(?:(?<=[=(:])|(?<=\bis)|(?<=\bbe)|(?<=\bare)|(?<=\bwas)|(?<=\bequals))[^\S\n]*-[^\S\n]+(?={_DIGIT})", " -"),
)
_SPELLED = tuple((re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS)
_MINUS = re.compile(rf"\b(?:minus|negative)\s+(?={_DIGIT})", re.IGNORECASE)
# The text before a "minus" that means subtraction.
_TAKEN_FROM = re.compile(r"[0-9)\]%](?:\s*%|\s+(?!(?:is|was|are|be|equals|and|or|to|but|not|by)\b)[A-Za-z]+)?\s*$")


def find_number(text: str) -> str | None:
    """The number that a text gives as its answer, in [`canonical`] form, or `None`.

    The last cue ("the answer is", "Answer:", "####", a LaTeX box) with a number in its sentence counts. After a cue
    without a verb ("Answer:", "####", a box), no word may precede the number. The answer is the first number there, or
    the result of an equation ("the answer is 2 + 3 = 5"). A sum, a range or several numbers ("5 or 6") are not an
    answer. Without a cue, the answer is the last number of the text.

    Thousands separators (commas, apostrophes, or spaces before exactly three digits each), currency, units, per cent
    signs, LaTeX and bold are ignored. Equal values match in any form: `1,000.0`, `$1000` and `1e3`; `1/2`, `0.5`, `½`
    and `\\frac{1}{2}`; `-5`, `−5` and `minus 5`. Not counted: words ("five", "million"), ordinals, and a number that is
    negated, questioned or a bound ("not 5", "5 is wrong", "5?", "more than 5").
    """
    text = _spelled(text)
    for cue in reversed(list(CUE.finditer(text))):
        begin = re.compile(r"\s*").match(text, cue.end()).end()  # type: ignore[union-attr]  # an empty match at least
        end = _sentence_end(text, begin)
        first = next(_affirmed(text, _ANY.finditer(text, begin, end)), None)
        if first and (_IN_A_SENTENCE.search(cue[0]) or _NO_WORD.fullmatch(text, begin, first.start())):
            expression = _EXPRESSION.match(text, first.start(), end)
            if expression:
                return _result(expression[0])
            second = _SECOND.match(text, first.end(), end)
            if second and next(_affirmed(text, iter([second])), None) and number(second[1]) != number(first[0]):
                return None
            return number(first[0])
    last = next(_affirmed(text, reversed(list(_ANY.finditer(text)))), None)
    return number(last[0]) if last else None


def number(text: str) -> str | None:
    """The [`canonical`] form of a text that consists of one number, or `None` for any other text."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*", _spelled(text))
    if match is None or len(match[1]) > _MOST_DIGITS:
        return None
    value = _value(match[1])
    return None if value is None else canonical(value)


def canonical(value: Fraction) -> str:
    """Writes a number as an integer, else as an exact decimal, else as a fraction in lowest terms."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    places = 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        places = max(places, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _spelled(text: str) -> str:
    """The text with LaTeX and arithmetic words replaced by digits and signs."""
    text = plain(text)
    for pattern, replacement in _SPELLED:
        text = pattern.sub(replacement, text)

    def sign(found: re.Match[str]) -> str:
        return "- " if _TAKEN_FROM.search(text[max(0, found.start() - 40) : found.start()]) else "-"

    return _MINUS.sub(sign, text)


def _affirmed(text: str, matches: Iterator[re.Match[str]]) -> Iterator[re.Match[str]]:
    for match in matches:
        start, end = match.span(match.lastindex or 0)
        is_bound = _BOUND.search(text[max(0, start - 10) : start])
        if not (is_bound or _WRONG.match(text, end) or denied_before(text, start, end) or is_asked(text, start, end)):
            yield match


def _value(written: str) -> Fraction | None:
    """The value of a match of `_NUMBER`, or `None` if it is undefined or has too many digits."""
    head = re.match(r"(?:Rs\.?|[^0-9.])*", written)
    assert head is not None
    body = written[head.end() :]
    sign = -1 if "-" in head[0] else 1
    if re.fullmatch(_MIXED, body):
        whole, fraction = body.split(" ")
        over, under = fraction.split("/")
        return sign * (int(whole) + Fraction(int(over), int(under))) if int(under) else None
    parts = re.fullmatch(rf"({_DECIMAL})(?:({_SCIENTIFIC})|\^\s?({_EXPONENT})|/([-+]?)({_DECIMAL}))?", body)
    if parts is None:
        return None
    value = _decimal(parts[1])
    if parts[2] or parts[3]:
        exponent = int(re.search(rf"{_EXPONENT}$", body)[0])  # type: ignore[index]  # the pattern ends in one
        base = value if parts[3] else Fraction(10)
        if abs(exponent) * max(1, len(str(base.numerator)), len(str(base.denominator))) > _MOST_DIGITS or (
            base == 0 and exponent < 0
        ):
            return None
        value = base**exponent * (1 if parts[3] else value)
    if parts[5]:
        under_line = _decimal(parts[5]) * (-1 if parts[4] == "-" else 1)
        if under_line == 0:
            return None
        value /= under_line
    return sign * value


def _decimal(written: str) -> Fraction:
    if re.fullmatch(_CONTINENTAL, written):
        written = written.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[ ,'_]", "", written))


def _result(expression: str) -> str | None:
    """The side of an equation that is a single number (the last such side)."""
    sides = expression.split("=")
    quantities = (_QUANTITY.fullmatch(side) for side in reversed(sides)) if len(sides) > 1 else iter(())
    return next((number(quantity[1]) for quantity in quantities if quantity), None)


def _sentence_end(text: str, start: int) -> int:
    end = _SENTENCE_END.search(text, start, start + _REACH)
    return end.start() if end else min(start + _REACH, len(text))
