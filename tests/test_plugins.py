"""Tasks and methods from another distribution: once installed, they work by name as the built-in ones do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel

from milora import methods
from milora.backbone.loading import load_for_inference
from milora.benchmark.methods import variant
from milora.plugins import plugins
from milora.tasks import registry
from milora.tasks.bundled import BUNDLED_TASKS
from milora_cli.main import main
from milora_core.errors import MiLoraError

MODULE = """
from peft import VeraConfig

from milora.methods import Method
from milora.tasks.task import Example, Task


class Echo(Task):
    name = "echo"
    max_new_tokens = 4

    def __init__(self, data_dir=None, words=2):
        self.words = words

    def examples(self, split, count=None, seed=0):
        return [Example(f"say {letter}: ", letter, letter) for letter in "abcdefgh"][:count]

    def parse(self, output):
        return " ".join(output.split()[: self.words]) or None


def settings(backbone, overrides):
    return {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


VERA = Method("VeRA", VeraConfig, settings)
"""
ENTRY_POINTS = """
[milora.tasks]
echo = someones_milora_plugin:Echo
boolq = someones_milora_plugin:Echo
[milora.methods]
vera = someones_milora_plugin:VERA
"""


def install(folder: Path, entry_points: str) -> None:
    """Writes the files that pip would leave in site-packages."""
    (folder / "someones_milora_plugin.py").write_text(MODULE)
    metadata = folder / "someones_milora_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-milora-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    plugins.cache_clear()
    yield folder
    plugins.cache_clear()
    sys.modules.pop("someones_milora_plugin", None)


def test_an_installed_task_is_evaluated_by_name(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, ENTRY_POINTS)
    assert main(["evaluate", "--backbone", "tiny", "--task", "echo", "--limit", "3", "--beams", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["echo"]["rows"] == 3
    assert registry.get("echo", words=1).words == 1  # type: ignore[attr-defined]
    assert type(registry.get("boolq")).__name__ == "BoolQ", "ours wins"
    assert registry.names().count("boolq") == 1


def test_an_installed_method_is_trained_and_loaded_by_name(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, ENTRY_POINTS)
    assert variant("vera").method == "vera"
    counts = methods.parameter_counts("vera", "tiny")
    # Vectors of the rank's and the output's size, for each of 4 blocks.
    assert counts.tunable == 4 * (4 + 224)
    output = tmp_path / "out"
    flags = ["--method", "vera", "--task", "echo", "--max-steps", "1", "--output-dir", str(output), "--use-cpu"]
    assert main(["train", "--backbone", "tiny", *flags, "--report-to", "none", "--dev-rows", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "vera"
    # A process that only loads the adapter must load the plugin too, because PEFT may not know the method.
    plugins.cache_clear()
    del sys.modules["someones_milora_plugin"]
    model, _ = load_for_inference({"default": str(output)}, "tiny")
    assert "someones_milora_plugin" in sys.modules
    assert isinstance(model, PeftModel)


def test_a_broken_distribution_is_named(site: Path) -> None:
    install(site, "[milora.tasks]\necho = someones_milora_plugin:Nothing\n")
    with pytest.raises(MiLoraError, match=r"'echo' \(milora.tasks\) of someones-milora-plugin cannot be loaded"):
        registry.get("boolq")


def test_a_task_is_registered_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BENCHMARKS", dict(registry._BENCHMARKS))
    task = BUNDLED_TASKS["bundled-yesno"]
    registry.register("mine", lambda data_dir=None: task)
    assert registry.get("mine") is task
    with pytest.raises(MiLoraError, match="there is a task 'mine' already"):
        registry.register("mine", lambda data_dir=None: task)
