"""Imports between modules: no cycles, and only within the layers of CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import milora_core

SOURCE = Path(milora_core.__file__).parents[1]
REPRODUCTION = Path(__file__).parents[1] / "reproduction"
FLOORS = [
    ["milora_core.errors", "milora_core.encoding", "milora_core.interruption"],
    ["milora_core.files"],
    ["milora.markdown", "milora.records", "milora.locks", "milora.plugins"],
    ["milora_core.kernels"],
    ["milora_core.routing"],
    ["milora_vllm"],
    ["milora.backbone"],
    ["milora.tuners"],
    ["milora.methods"],
    ["milora.tasks"],
    ["milora.plots"],
    ["milora.training", "milora.inference"],
    ["milora.evaluation", "milora.benchmark", "milora.serving"],
    ["milora.demo"],
    ["milora_cli"],
    ["reproduction"],
]
"""From the lowest layer up. A module imports from its own package and from lower layers."""


def name_of(file: Path) -> str:
    root = SOURCE if file.is_relative_to(SOURCE) else REPRODUCTION.parent
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for folder in (SOURCE, REPRODUCTION) for file in folder.rglob("*.py")}


def imported(file: Path) -> set[str]:
    """The project's modules that a file imports: at module level, for types only, or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` also imports a module.
            names |= inner & set(FILES) or {node.module}
    return names & set(FILES)


def first_column(header: str) -> list[list[str]]:
    """The names in the first column of a table of CONTRIBUTING.md, by row."""
    text = (REPRODUCTION.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition(f"| {header} | contents |\n|---|---|\n")[2].partition("\n\n")[0]
    return [re.findall(r"`([^`]+)`", row.split(" | ")[0]) for row in table.splitlines()]


def test_the_documented_layers_are_these() -> None:
    assert first_column("layer") == FLOORS


def test_the_documented_folders_are_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPRODUCTION.parent, capture_output=True, text=True, check=True)
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for row in first_column("folder") for name in row} == folders


def floor_of(name: str) -> int | None:
    for height, packages in enumerate(FLOORS):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            return height
    return None


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {name: imported(file) for name, file in FILES.items()}
    assert "milora_core.routing" in graph["milora.tuners.milora.model"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_imports_go_down() -> None:
    upward = [
        f"{name} imports {other}"
        for name, file in FILES.items()
        for other in imported(file)
        if (own := floor_of(name)) is not None and (height := floor_of(other)) is not None and height > own
    ]
    assert not upward


def test_every_module_has_a_floor() -> None:
    tops = {"milora", "milora.__main__", "milora_core"}
    assert [name for name in FILES if floor_of(name) is None and name not in tops] == []


@pytest.mark.parametrize("module", ["milora_core.kernels", "milora_core.routing", "milora_core.files"])
def test_the_core_loads_neither_transformers_nor_peft(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('transformers', 'peft', 'accelerate', 'trl') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
