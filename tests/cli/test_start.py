"""The command line starts fast: before a command runs, it imports nothing of `milora`, which loads torch and PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milora_cli.main import COMMANDS, main

# Prints the libraries that a call loaded, after the call's own output.
LOADED = """
import sys
from milora_cli.__main__ import main
try:
    status = main()
except SystemExit as end:
    status = end.code
heavy = {"milora", "torch", "numpy", "transformers", "peft", "trl", "datasets", "matplotlib", "lm_eval"}
heavy |= {"fastapi", "uvicorn"}
print("loaded:", *sorted(heavy & set(sys.modules)))
sys.exit(status)
"""

WITH_JSON = [command for command in COMMANDS if command not in ("train", "bench", "serve")]


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOADED, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, input="", env={**os.environ, **variables}
    )


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["--help"], 0, "evaluate"),
        (["--version"], 0, "milora 0."),
        (["trian"], 2, "Did you mean 'train'?"),
        (["--frobnicate"], 2, "--frobnicate"),
        (["bench", "decod"], 2, "decode"),
        (["bench", "decode", "--beam"], 2, "--beams"),
        (["evaluate"], 2, "--task"),
        (["serve", "--help"], 0, "--keys"),
        (["serve"], 2, "--backbone"),
        *[([command, "--help"], 0, "--json") for command in COMMANDS if command not in ("train", "bench", "serve")],
        *[
            ([command, "--frobnicate"], 2, "--frobnicate")
            for command in COMMANDS
            if command not in ("train", "bench", "serve")
        ],
    ],
)
def test_help_and_mistakes_load_nothing(arguments: list[str], status: int, shown: str) -> None:
    done = start(*arguments)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.returncode == status
    assert shown in done.stdout + done.stderr
    if status == 2:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("milora ev", "evaluate"), ("milora evaluate --data", "--data-dir"), ("milora bench tr", "train\ntraffic")],
)
def test_the_shell_completes_and_loads_nothing(typed: str, offered: str) -> None:
    done = start(_MILORA_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1))
    assert done.stdout == f"{offered}\nloaded:\n"


def test_the_completion_script_is_for_milora() -> None:
    done = start("--show-completion", "bash")
    assert "complete -o default -F _milora_completion milora" in done.stdout


def test_without_typer_the_extra_is_named() -> None:
    code = f"import sys; sys.modules['typer'] = None\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'milora: the command line needs typer: pip install "milora[cli]"\n'


def test_without_tabulate_the_extra_is_named(tmp_path: Path) -> None:
    # transformers installs typer too, so the command starts without the extra.
    (tmp_path / "d.json").write_text(json.dumps({"command": "decode", "rows": []}))
    code = f"import sys; sys.modules['tabulate'] = None\n{LOADED}"
    arguments = [sys.executable, "-c", code, "bench", "markdown", str(tmp_path / "d.json")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'milora: A table in Markdown needs tabulate: pip install "milora[cli]"\n'


@pytest.mark.parametrize("option", ["--new-tokens", "--new_tokens"])
def test_underscores_spell_an_option_too(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", option, "few"]) == 2
    assert "'--new-tokens'" in capsys.readouterr().err
