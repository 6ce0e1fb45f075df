"""A small demo: every part runs and writes the files that it announces."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from milora.backbone.bundled import TINY_BACKBONE
from milora.demo import ASSISTANT, BRISK, DemoSettings, run_demo
from milora.locks import writing_alone
from milora.tasks.bundled import BUNDLED_TASKS
from milora.tasks.shop import SHOP_TASKS
from milora_cli.main import main
from milora_core.errors import MiLoraError


@pytest.mark.slow
def test_every_part_of_the_demo(tmp_path: Path) -> None:
    said: list[str] = []
    settings = DemoSettings(steps=2, brisk_steps=2, test_rows=2, beams=2)
    result = run_demo(tmp_path, settings, said.append)
    assert result.tasks.keys() == BUNDLED_TASKS.keys()
    assert all(0 <= value <= 1 for accuracy in result.tasks.values() for value in accuracy.values())
    assert result.tenants["answers"].keys() == {ASSISTANT, BRISK, "__base__"}
    assert Path(result.heat_map).read_bytes().startswith(b"\x89PNG")
    for tenant in (ASSISTANT, BRISK):
        assert json.loads((tmp_path / tenant / "adapter_config.json").read_text())["peft_type"] == "MILORA"
    assert len(said) == 3
    json.dumps(result.to_dict())


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MiLoraError, match="is a file; use a folder"):
        run_demo(tmp_path / "file", DemoSettings())
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().out == ""


def test_two_demos_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writing_alone(tmp_path):
        assert main(["demo", "--output", str(tmp_path)]) == 2
    assert f"milora: {tmp_path} is in use by process" in capsys.readouterr().err


@pytest.mark.slow
def test_another_backbone_learns_the_shop_s_tasks(tmp_path: Path) -> None:
    """The bundled backbone, given by its path, stands for any model folder."""
    backbone = str(TINY_BACKBONE)
    settings = DemoSettings.for_backbone(backbone, steps=2, test_rows=2)
    assert (settings.batch_size, settings.learning_rate) == (8, 1e-3)
    result = run_demo(tmp_path, dataclasses.replace(settings, brisk_steps=1, beams=1))
    assert result.tasks.keys() == SHOP_TASKS.keys()
    assert "Departments:" in result.tenants["prompt"]
    assert Path(result.heat_map).read_bytes().startswith(b"\x89PNG")


def test_settings_that_are_given_stay() -> None:
    assert DemoSettings.for_backbone("tiny", steps=None) == DemoSettings()
    assert DemoSettings.for_backbone("folder", steps=7, seed=None).steps == 7
