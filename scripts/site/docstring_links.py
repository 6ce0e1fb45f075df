"""A Griffe extension that turns the docstrings' [`Name`] references into links."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`([A-Za-z_][\w.]*)`\](?:\[([\w.]*)\])?(?!\()")
PACKAGES = ("milora", "milora_core", "milora_vllm")


class DocstringLinks(griffe.Extension):
    """Adds each reference's full path, which mkdocs-autorefs looks up.

    A name is looked up as in Python: in the object, its class, its module and the module's imports; then among the
    package's classes and functions, if only one of them has this name.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrites all docstrings of a package."""
        objects = list(_objects(pkg))
        by_name: dict[str, list[str]] = defaultdict(list)
        for found in objects:
            if found.parent is not None and found.parent.is_module and not found.is_module:
                by_name[found.name].append(found.path)
        for scope in objects:
            if scope.docstring is not None:
                scope.docstring.value = REFERENCE.sub(
                    lambda match, scope=scope: _linked(pkg, scope, match, by_name), scope.docstring.value
                )


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member)  # type: ignore[arg-type]


def _linked(package: griffe.Module, scope: griffe.Object, match: re.Match[str], by_name: dict[str, list[str]]) -> str:
    name = match[2] or match[1]
    first, dot, rest = name.partition(".")
    if first not in PACKAGES:
        try:
            name = scope.resolve(first) + dot + rest
        except griffe.NameResolutionError:
            if len(by_name[first]) == 1:
                name = by_name[first][0] + dot + rest
    return f"[`{match[1]}`][{_canonical(package, name)}]"


def _canonical(package: griffe.Module, path: str) -> str:
    """The path in the module that defines the object, instead of in a package that imports it."""
    try:
        return package[path.removeprefix(f"{package.name}.")].canonical_path
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return path  # a name of another package, or an unknown one, which the strict build reports
