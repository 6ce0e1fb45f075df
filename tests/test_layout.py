"""How modules may import each other: one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import milora

ROOT = Path(milora.__file__).parent


def name_of(file: Path) -> str:
    parts = ("milora", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in ROOT.rglob("*.py")}


def imported(file: Path) -> set[str]:
    """The modules of the project that a file names: at its top, for types only, or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # From a package, modules come as names too.
            names |= inner & set(FILES) or {node.module}
    return names & set(FILES)


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {name: imported(file) for name, file in FILES.items()}
    assert "milora.routing" in graph["milora.tuners.milora.model"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
