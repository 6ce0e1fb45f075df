"""A run that a process was killed in: the next one goes on with it, to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from milora.paper import adapter_tests, execution
from milora.paper.store import ResultStore
from milora_cli.main import main

SETTINGS = {
    "max_steps": 10,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "total_train_batch_size": 2,
    "gradient_checkpointing": "false",
    "use_cpu": "true",
    "eval_steps": 2,
    "save_steps": 2,
    "eval_on_start": "false",
}
FLAGS = ["report", "--table", "1", "--methods", "milora", "--tasks", "bundled-choice", "--seeds", "0"]
FLAGS += ["--test-rows", "4", "--beams", "1", "--threads", "1", "--budget", "paper"]
FLAGS += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]


def settings_file(folder: Path) -> Path:
    path = folder / "report.yaml"
    path.write_text("data: {train_rows: 20, dev_rows: 4}\n")
    return path


def flags(folder: Path) -> list[str]:
    return [*FLAGS, "--settings", str(settings_file(folder.parent)), "--output", str(folder)]


def only_record(folder: Path) -> dict[str, Any]:
    records = list(ResultStore(folder).read().finished.values())
    assert len(records) == 1
    return records[0]


def folder_of_the_run(folder: Path) -> Path | None:
    return next((folder / ".working" / "runs").glob("*"), None)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "milora", *flags(killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not ((run := folder_of_the_run(killed)) and (run / "checkpoint-4" / "trainer_state.json").exists()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not ResultStore(killed).read().finished
    assert main(flags(killed)) == 0
    assert main(flags(tmp_path / "whole")) == 0
    resumed, whole = only_record(killed), only_record(tmp_path / "whole")
    assert resumed["resumed_from_step"] >= 2
    assert whole["resumed_from_step"] is None
    same = ("run", "tests", "dev_perplexity", "steps", "epochs", "rows", "expert_shares")
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    assert resumed["steps"] == 10
    assert "resume_from_checkpoint" not in resumed["full_training"]
    assert folder_of_the_run(killed) is None


@pytest.mark.slow
def test_an_adapter_that_is_complete_is_tested_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "interrupted"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adapter_tests.AdapterTests, "dev", interrupt)
        assert main(flags(folder)) == 130
    run = folder_of_the_run(folder)
    assert run is not None
    assert len((run / "predictions" / "bundled-choice.test.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(execution, "train", lambda *_: pytest.fail("trained again"))
    assert main(flags(folder)) == 0
    record = only_record(folder)
    assert (record["steps"], record["resumed_from_step"]) == (10, 10)
    assert record["full_training"]["max_steps"] == 10
    assert record["tests"]["bundled-choice"]["rows"] == 4
