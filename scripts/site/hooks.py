"""MkDocs hooks: pages generated from the code, pages from files outside docs/, and links to files of the checkout."""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COPIED = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "results/reproduce.md": "reproduction/README.md",
}
"""Pages from files outside docs/."""

API_INDEX = "reference/api/index.md"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def packages() -> list[str]:
    """The packages, public ones first. Each has a page in the reference."""
    found = []
    for layer in ("milora", "milora_core", "milora_vllm"):
        for marker in sorted((ROOT / "src" / layer).rglob("__init__.py")):
            found.append(".".join(marker.parent.relative_to(ROOT / "src").parts))
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API's pages to the navigation, after their index."""
    pages: list[Any] = [API_INDEX, *({name: f"reference/api/{name}.md"} for name in packages())]
    for section in config.nav or []:
        if isinstance(section, dict) and "Reference" in section:
            section["Reference"] = [entry for entry in section["Reference"] if entry != API_INDEX] + [{"API": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    made = {f"reference/api/{name}.md": _api_page(name) for name in packages()}
    sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads hooks as single files
    made["reference/commands.md"] = importlib.import_module("command_reference").page()
    for page, source in COPIED.items():
        made[page] = _moved((ROOT / source).read_text(encoding="utf-8"), source, page)
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Copies files of the checkout that a page links to into the site, and points the links at the copies."""
    folder = posixpath.dirname(page.file.src_uri)

    def copied(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target or files.get_file_from_path(posixpath.normpath(posixpath.join(folder, target))):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/") or not (ROOT / path).is_file():
            return match[0]  # the strict build reports it
        copy = f"checkout/{path}.txt"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, content=(ROOT / path).read_text(encoding="utf-8")))
        return f"[{match[1]}]({posixpath.relpath(copy, folder or '.')})"

    return LINK.sub(copied, markdown)


def _api_page(package: str) -> str:
    """The page of a package's modules. Its sub-packages have separate pages."""
    folder = ROOT / "src" / package.replace(".", "/")
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    own = "    options: {show_root_heading: false, show_root_toc_entry: false, members: false}"
    parts = [f"# {package}", f"::: {package}\n{own}"]
    parts += [f"::: {package}.{module}" for module in modules]
    return "\n\n".join(parts) + "\n"


def _moved(text: str, source: str, page: str) -> str:
    """A file's Markdown with its relative links adjusted to the page's location."""
    home = {source: page for page, source in COPIED.items()}

    def relinked(match: re.Match[str]) -> str:
        if ":" in match[2]:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        path = f"docs/{home[path]}" if path in home else path
        return f"[{match[1]}]({posixpath.relpath(path, posixpath.dirname(f'docs/{page}'))}{match[3] or ''})"

    return LINK.sub(relinked, text)
