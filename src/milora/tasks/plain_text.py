"""Normalises the characters of a generated text and removes markup before parsing."""

from __future__ import annotations

import re
import unicodedata

_DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2796\ufe58\ufe63\uff0d", "-")
_SPELLINGS = {
    **_DASHES,
    **dict.fromkeys("\u2018\u2019\u02bc\u02b9\u2032\uff07\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u2033\uff02\u00ab\u00bb", '"'),
    "\u2260": " not ",
    "\u2044": "/",
    "\u2215": "/",
    "\u2062": "*",
    "\u066b": ".",
    "\u066c": ",",
    "\u3002": ". ",
    "\uff61": ". ",
    **dict.fromkeys("\u3010\u3014\u3016", "("),
    **dict.fromkeys("\u3011\u3015\u3017", ")"),
}
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_MARKUP = (
    (re.compile(r"~~[^~\n]*~~"), " "),  # struck out
    (re.compile(r"<(?:final_)?answer>"), " Answer: "),
    (re.compile(r"</?(?:b|i|u|em|strong|p|br|span|div|code|sup|sub|(?:final_)?answer) ?/?>"), " "),
    (re.compile(r"\\n(?:eq?|ot ?=)(?![A-Za-z])|!=|=/="), " not "),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|textit|emph|bm|underline)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|[()\[\]])(?![A-Za-z])"), ""),
    (re.compile(r"\*\*|__|`"), " "),
    (re.compile(r"(?<![\w*])\*(?=[\w(])([^*\n]{1,80})(?<=[\w.)!])\*(?![\w*])"), r"\1"),  # *emphasis*, no product
    (re.compile(r"(?<!\w)_(?=\w)([^_\n]{1,80})_(?!\w)"), r"\1"),
)
_DASH_BETWEEN_WORDS = re.compile("(?<=[^\\W\\d])[\u2013\u2014](?=[^\\W\\d])")


# A further prompt of the instruction template, or a token that ends a reply and was not skipped when it was decoded.
_REPLY_END = re.compile(
    r"\n#{2,3} (?:Instruction|Input|Response):|</s>|<eos>|<end_of_turn>"
    r"|<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>"
)


def plain(text: str) -> str:
    """Converts a text to ASCII where possible and removes Markdown, HTML tags and LaTeX fonts.

    Digits and letters of other widths, fonts and scripts become ASCII (`５` and `٥` are `5`, `𝐁` and `Ⓑ` are `B`).
    Every dash and minus becomes `-`, every space a plain space, `½` is `1/2`, `10³` is `10^3`, `≠` is `not`. Struck-out
    text (`~~A~~`) is removed. The text ends before a further prompt of the instruction template.
    """
    text = _REPLY_END.split(text.strip(), maxsplit=1)[0]
    text = _FOREIGN.sub(_in_ascii, _DASH_BETWEEN_WORDS.sub(" - ", text))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _in_ascii(found: re.Match[str]) -> str:
    before = found.string[found.start() - 1 : found.start()]
    spelled: list[str] = []
    raised = False
    for character in found[0]:
        kind = unicodedata.decomposition(character).partition(" ")[0]
        is_raised = kind == "<super>"
        if is_raised and not raised:
            spelled.append("^")
        elif kind == "<fraction>" and (spelled[-1] if spelled else before).isdigit():
            spelled.append(" ")
        raised = is_raised
        spelled.append(_spelling(character))
    return "".join(spelled)


def _spelling(character: str) -> str:
    if character in _SPELLINGS:
        return _SPELLINGS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""  # joiners and direction marks
    if category in ("Zl", "Zp"):
        return "\n"
    if unicodedata.decomposition(character).startswith("<"):
        return "".join(_SPELLINGS.get(part, part) for part in unicodedata.normalize("NFKC", character))
    return character
