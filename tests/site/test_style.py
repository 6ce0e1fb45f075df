"""Documentation, docstrings, comments and messages avoid phrases that are hard to read."""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INSTEAD = {
    r"\b(?:is|are|was|be) gone on with\b": "resumes, continues",
    r"\bgo(?:es)? on (?:from|with|to the same|where)\b": "continues, resumes",
    r"\btold apart\b|\btell (?:them )?apart\b|\btells \w+ apart\b": "distinguished, identified",
    r"\bcannot be told\b|\bcould not tell\b": "is unknown, could not find",
    r"\bin force\b": "active, current",
    r"\brules of the house\b": "rules",
    r"\bof its own accord\b": "automatically",
    r"\bby way of\b": "with, through",
    r"\bfor good\b": "permanently",
    r"\bwhat there is to know\b": "facts",
    r"\bevery how-many\w*\b": "one in N",
    r"\bnobody (?:knows|waits|reads|asked|chose)\b": "say what happens",
    r"\b(?:can|could|to) be had\b": "is available",
    r"\bleaves? it away\b": "omits it",
    r"\bno matter what\b": "always",
    r"\bas ever\b": "as before",
    r"\bput(?:s)? to work\b": "registers, starts",
    r"\bseen to\b": "handled",
    r"\bstands? on PEFT\b": "is based on PEFT",
    r"\bdoes not take\b|\bdo not take\b": "does not accept, is not supported",
    r"\bof whatever kind\b": "of any kind",
    r"\bthe one place that meets\b": "the only file that changes",
    r"\bwork(?:s|ed|ing)? (?:\w+ )?out\b": "computes",
    r"\b(?:lets?|letting) go\b": "releases",
    r"\bgives? (?:\w+ )?back\b": "returns, restores",
    r"\bhands? (?:\w+ )?(?:on|over)\b": "passes",
    r"\bstands? in for\b": "replaces",
    r"\bshared out\b": "divided",
    r"\bat any rate\b": "always",
    r"\bbut for\b": "except",
    r"\bnothing but\b": "only",
    r"\banew\b": "again, from scratch",
}
"""Phrases that we avoid, and the replacements."""


def _documents() -> Iterator[tuple[str, str]]:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "reproduction/README.md")]
    for page in [*pages, *(ROOT / "docs").rglob("*.md")]:
        yield str(page.relative_to(ROOT)), re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        yield str(notebook.relative_to(ROOT)), "\n".join(texts)
    for folder in ("src", "reproduction", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), _words(file.read_text(encoding="utf-8"))
    for pattern in ("src/**/*.[ch]", "reproduction/**/*.yaml", "recipes/**/*.yaml", "deploy/*", "Makefile", "*.toml"):
        for file in sorted(ROOT.glob(pattern)):
            yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8").replace("*", " ")


def _words(source: str) -> str:
    """The docstrings, other strings and comments of a module."""
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return "\n".join(
        token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type in kinds
    )


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return {name: re.sub(r"[\s#]+", " ", text) for name, text in _documents()}


@pytest.mark.parametrize("phrase", INSTEAD)
def test_phrase(phrase: str, documents: dict[str, str]) -> None:
    found = [
        f"{name}: ...{text[max(match.start() - 30, 0) : match.end() + 30]}..."
        for name, text in documents.items()
        for match in re.finditer(phrase, text, flags=re.IGNORECASE)
    ]
    assert not found, f"write instead: {INSTEAD[phrase]}\n" + "\n".join(found)


def test_troubleshooting_quotes_messages_that_exist(documents: dict[str, str]) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = " ".join(text for name, text in documents.items() if name.endswith(".py"))
    messages = re.sub(r"\{[^{}]*\}|[\"']", "", re.sub(r'" f?"', "", source))
    for entry in re.findall(r"^\*\*(.*?)\*\*", page, flags=re.MULTILINE):
        if entry.startswith("PEFT:"):
            continue
        for quoted in re.findall(r"`([^`]{20,})`", entry):
            for part in quoted.split("..."):
                words = re.sub(r"[\"']|\s+$|^\s+", "", part)
                if len(words) > 12 and "pip install" not in words:
                    assert words in messages or f"{words[0].lower()}{words[1:]}" in messages, words
