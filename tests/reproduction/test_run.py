"""`python -m reproduction`: small grids that really run, are killed and resume; one-line errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reproduction import adapter_tests, run
from reproduction.__main__ import main
from reproduction.store import Store

SETTINGS = """
backbone: tiny
sections: [table1, figure2]
only_methods: [milora]
tasks: [bundled-choice]
seeds: [0]
budget: paper
threads: 1
training: {max_steps: 10, learning_rate: 1e-3, per_device_train_batch_size: 2, total_train_batch_size: 2,
           gradient_checkpointing: false, use_cpu: true, eval_steps: 2, save_steps: 2, eval_on_start: false}
data: {train_rows: 20, dev_rows: 4}
evaluation: {test_rows: 4, beams: 1}
"""


def flags(folder: Path, *more: str) -> list[str]:
    path = folder.parent / "settings.yaml"
    path.write_text(SETTINGS)
    return ["--settings", str(path), "--output", str(folder), "--json", *more]


def only_record(folder: Path) -> dict[str, Any]:
    (found,) = Store(folder).read()
    return found


def folder_of_the_run(folder: Path) -> Path | None:
    return next((folder / ".working" / "runs").glob("*"), None)


def test_a_dry_run_lists_runs_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("milora.tasks.registry.get", "transformers.AutoConfig.from_pretrained"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("touched"))
    output = ["--output", str(tmp_path / "out"), "--dry-run"]
    assert main(["--table", "1", "--backbone", "meta-llama/Llama-2-7b-hf", *output, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 13 * 7 * 5
    assert {one["state"] for one in plan["runs"]} == {"open"}
    assert main(["--table", "2", "--set", "seeds=0", "--set", "tune.learning_rate=1,2", *output]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Two tries per method and task set; one of them is the first seed's run.
    assert lines[-1] == f"0 runs have finished, {4 * (5 + 1) * 2} are left."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "9"], "no section 'table9'"),
        (["--set", "tasks=bolq"], "no task 'bolq'"),
        (["--set", "training.max_step=3", "--dry-run"], "max_steps"),
        (["--set", "training.max_steps"], "--set takes NAME=VALUE"),
        (["--settings", "nowhere.yaml"], "nowhere.yaml"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--backbone", "nowhere/at/all/here", "--table", "1", "--no-run", "--output", "pyproject.toml"], "is a file"),
        (["--table", "1", "--set", "training.eval_steps=300"], "settings of training are refused"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert len([line for line in error if "runs have finished" not in line]) == 1


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "reproduction", *flags(killed)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not ((found := folder_of_the_run(killed)) and (found / "checkpoint-4" / "trainer_state.json").exists()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Store(killed).read()
    assert main(flags(killed)) == 0
    assert main(flags(tmp_path / "whole")) == 0
    resumed, whole = only_record(killed), only_record(tmp_path / "whole")
    assert resumed["resumed_from_step"] >= 2
    assert whole["resumed_from_step"] is None
    same = ("run", "tests", "dev_perplexity", "steps", "epochs", "rows", "expert_shares", "fingerprints")
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    assert folder_of_the_run(killed) is None, "adapters are not kept"
    # The contents of a record.
    assert whole["parameters"]["tunable"] == 539_696
    assert whole["tests"]["bundled-choice"]["rows"] == 4
    assert (whole["settings"]["top_k"], whole["settings"]["router_norm"]) == (3, "tokens"), "defaults are recorded"
    # Each prompt uses three experts in each of the four blocks.
    assert [round(sum(row), 3) for row in whole["expert_shares"]["bundled-choice"]["share"]] == [3.0] * 4
    assert str(tmp_path) not in (killed / "results.jsonl").read_text()
    assert {"report.md", "report.json", "table1.csv", "figure2.png"} <= {path.name for path in killed.iterdir()}
    before = (killed / "results.jsonl").read_bytes()
    assert main(flags(killed)) == 0
    assert (killed / "results.jsonl").read_bytes() == before, "nothing was run again"
    (tmp_path / "whole" / "table4.json").write_text("{")
    capsys.readouterr()
    assert main(flags(tmp_path / "whole", "--table", "1", "--table", "4", "--no-run")) == 1
    result = json.loads(capsys.readouterr().out)
    assert "table4.json" in result["errors"][0]
    assert "table1.csv" in result["files"], "a broken Table 4 leaves the report"


@pytest.mark.slow
def test_a_complete_adapter_is_tested_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "interrupted"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adapter_tests, "share_record", interrupt)
        assert main(flags(folder)) == 130
    found = folder_of_the_run(folder)
    assert found is not None
    assert len((found / "predictions" / "bundled-choice.test.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained again"))
    assert main(flags(folder)) == 0
    record = only_record(folder)
    assert (record["steps"], record["resumed_from_step"]) == (10, 10)
    assert record["tests"]["bundled-choice"]["rows"] == 4
