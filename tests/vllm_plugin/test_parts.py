"""The private parts of vLLM, the version check, and the plugin's cost per process."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
import vllm

import milora_vllm
from milora_vllm.patches import PARTS


def find(path: str) -> Any:
    names = path.split(".")
    for end in range(len(names), 0, -1):
        try:
            found: Any = import_module(".".join(names[:end]))
        except ModuleNotFoundError:
            continue
        for name in names[end:]:
            found = inspect.getattr_static(found, name)
        return found
    raise AssertionError(f"vLLM has no module for {path}")


@pytest.mark.parametrize("path", PARTS)
def test_vllm_has_the_parts_that_the_plugin_attaches_to(path: str) -> None:
    try:
        part = find(path)
    except AttributeError:
        pytest.fail(f"vLLM {vllm.__version__} has no {path} any more: adapt milora_vllm/patches.py")
    wanted = PARTS[path]
    if wanted is not None:
        part = getattr(part, "__func__", part)
        assert list(inspect.signature(part).parameters) == wanted.split(), f"{path} takes other arguments now"


def test_it_is_found_by_its_entry_point() -> None:
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found["milora"] == "milora_vllm:register"


def test_another_vllm_gets_one_line_and_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setattr("milora_vllm.patches.install", lambda: pytest.fail("vLLM was patched"))
    monkeypatch.setattr(milora_vllm._log, "warning", lambda message, *values: lines.append(message % values))
    milora_vllm.register()
    (line,) = lines
    assert "found 0.33.1" in line
    assert "\n" not in line


def test_it_imports_neither_peft_nor_milora() -> None:
    code = (
        "import sys, milora_vllm; milora_vllm.register(); "
        "print([name for name in ('peft', 'milora', 'trl', 'accelerate') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip().splitlines()[-1] == "[]"
