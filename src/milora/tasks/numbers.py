"""Reading a number out of a generated text, and the one way in which a number is written in answers."""

from __future__ import annotations

import re
from fractions import Fraction

from milora.tasks.answers import CUE

_CURRENCY = r"(?:(?:US|A|C)?\$\s?|[€£¥₹]\s?|(?:USD|EUR|GBP|INR)\s?|Rs\.?\s?)"
_SIGN = r"(?:(?<![\w)\]%])[-+])"
_SPACE = "[ \u00a0\u202f]"
# Only where the whole run of digits and spaces has the form of a number, so that "12 345 67" remains a list.
_SPACED = rf"(?<![0-9]{_SPACE})[0-9]{{1,3}}(?:{_SPACE}[0-9]{{3}})+(?!{_SPACE}?[0-9])"
_DECIMAL = rf"(?:(?:{_SPACED}|[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?|(?<![0-9A-Za-z.])\.[0-9]+)"
_MIXED = "[0-9]+ [1-9][0-9]*/[0-9]+"
_VALUE = rf"(?:{_MIXED}|{_DECIMAL}(?:/{_DECIMAL})?)"
# Not inside a word ("x2"), a date, a time, a ratio or a version, and no ordinal.
_NUMBER = (
    rf"(?<!\w)(?<![0-9][.,/:])(?:{_SIGN}{_CURRENCY}?|{_CURRENCY}[-+]?)?{_VALUE}"
    r"(?![.,/:]?[0-9]|[eE][-+]?[0-9]|(?:st|nd|rd|th)\b)"
)
_AFFIRMED = re.compile(rf"(?<!not )(?<!n't )(?<!n\u2019t ){_NUMBER}")

_UNIT = r"(?: ?(?:%|°|[A-Za-z]+\.?)){0,2}"
_OPERATOR = r"\s*(?:[-\u2013+*/\u00d7\u00f7\u00b7^=]|x(?![A-Za-z]))\s*"
_EXPRESSION = re.compile(rf"{_NUMBER}{_UNIT}(?:{_OPERATOR}{_NUMBER}{_UNIT})+")
_QUANTITY = re.compile(rf"\s*({_NUMBER}){_UNIT}\s*")
_SENTENCE_END = re.compile(r"(?<!Rs)(?<!approx)[.!?](?=\s|$)|\n")
_IN_A_SENTENCE = re.compile(r"\b(?:is|are|be|was|equals)\b", re.IGNORECASE)
_NO_WORD = re.compile(r"[^A-Za-z]*(?:[A-Za-z]\s*=)?[^A-Za-z]*")

_MOST_DIGITS = 100  # more is no answer but a model that repeats itself, and costs time to calculate with
_LATEX = (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}", ","),
    (r"\\[,!]", ""),
    (r"\\([$%])", r"\1"),
    (r"\\(?:times|cdot)(?![a-z])", "*"),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])", ""),
    (r"[{}]|\*\*", " "),
    ("\u2212", "-"),
)


def find_number(text: str) -> str | None:
    """The number that a text gives, written as [`canonical`] writes it, or `None`.

    Of the cues ("the answer is", "Answer:", "####", a LaTeX box) the last one counts that has a number in its sentence
    (right behind it, where the cue is no sentence): the first number there, and of an equation its result ("the answer
    is 2 + 3 = 5"). A sum or a range is no answer there. Without such a cue it is the last number of the text.

    Thousands separators (commas, or spaces, U+00A0 or U+202F, before exactly three digits each), currency, units, per
    cent signs, LaTeX and bold do not matter, nor does the form of the value:
    `1,000.0` and `$1000` are equal, and `1/2`, `0.5` and `\\frac{1}{2}`. Words ("five", "million") and ordinals are not
    read, nor is a number after "not".
    """
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    for cue in reversed(list(CUE.finditer(text))):
        rest = text[cue.end() :].lstrip()
        end = _SENTENCE_END.search(rest)
        sentence = rest[: end.start()] if end else rest
        first = _AFFIRMED.search(sentence)
        if first and (_IN_A_SENTENCE.search(cue[0]) or _NO_WORD.fullmatch(sentence, 0, first.start())):
            expression = _EXPRESSION.match(sentence, first.start())
            return _result(expression[0]) if expression else number(first[0])
    numbers = _AFFIRMED.findall(text)
    return number(numbers[-1]) if numbers else None


def number(text: str) -> str | None:
    """The number that a text is, as [`canonical`] writes it; `None` where it is anything else."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*", text)
    if match is None or len(match[1]) > _MOST_DIGITS:
        return None
    digits = re.sub(r"[^0-9./ ]", "", match[1].replace("Rs.", "")).strip()
    whole, last = digits.split(" ") if re.fullmatch(_MIXED, digits) else ("0", digits.replace(" ", ""))
    numerator, _, denominator = last.partition("/")
    below = Fraction(denominator) if denominator else Fraction(1)
    if below == 0:
        return None
    value = Fraction(numerator) / below + Fraction(whole)
    return canonical(-value if "-" in match[1] else value)


def canonical(value: Fraction) -> str:
    """A number's one form: a whole number, else a decimal if that is exact, else a fraction in lowest terms."""
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


def _result(expression: str) -> str | None:
    """The side of an equation that is one number; the last, where several are."""
    sides = expression.split("=")
    quantities = (_QUANTITY.fullmatch(side) for side in reversed(sides)) if len(sides) > 1 else iter(())
    return next((number(quantity[1]) for quantity in quantities if quantity), None)
