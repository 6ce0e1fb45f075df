"""Where commands look for benchmark files: the flag, then the settings file, then MILORA_DATA_DIR."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from milora.tasks.folder import VARIABLE
from milora_cli.main import main
from milora_cli.train import parse

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'milora[eval]'"
)
COMMANDS = [
    ("--data-dir", ["evaluate", "--backbone", "tiny", "--task", "boolq"]),
    ("--data-dir", ["generate", "--backbone", "tiny", "--data", "boolq"]),
    ("--data-dir", ["route", "--adapter", "none", "--data", "boolq"]),
    (
        "--data-dir",
        ["train", "--backbone", "tiny", "--task", "boolq", "--use_cpu", "--report_to", "none", "--output_dir", "out"],
    ),
    pytest.param("--data_dir", ["lm-eval", "--tasks", "gsm8k_local"], marks=needs_lm_eval),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("flag", "command"), COMMANDS)
def test_the_environment_names_the_folder_where_no_flag_does(
    flag: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "~/of-variable")
    assert f"{tmp_path}/home/of-variable/" in complaint(capsys, command)
    assert "of-flag/" in complaint(capsys, [*command, flag, "of-flag"])


def test_a_training_s_file_comes_between_flag_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(["--backbone", "tiny", "--task", "boolq", "--use-cpu"])[0].data_dir is None
    monkeypatch.setenv(VARIABLE, "")
    assert parse(["--backbone", "tiny", "--task", "boolq", "--use-cpu"])[0].data_dir is None
    monkeypatch.setenv(VARIABLE, "of-variable")
    assert parse(["--backbone", "tiny", "--task", "boolq", "--use-cpu"])[0].data_dir == "of-variable"
    Path("file.yaml").write_text("backbone: tiny\ntask: boolq\ndata_dir: of-file\nuse_cpu: true\n")
    assert parse(["--config", "file.yaml"])[0].data_dir == "of-file"
    assert parse(["--config", "file.yaml", "--data-dir", "of-flag"])[0].data_dir == "of-flag"
