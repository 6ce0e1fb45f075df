"""`milora report`: what it lists, what it refuses, and a small grid that is really run, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_cli import report as report_command
from milora_cli.main import main

SMALL = [
    "report", "--table", "2", "--methods", "lora,milora", "--tasks", "bundled-choice,bundled-extraction", "--seeds",
    "0,1", "--budget", "paper",
]  # fmt: skip
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "total_train_batch_size": 2,
    "gradient_checkpointing": "false",
    "use_cpu": "true",
    "eval_steps": 2,
    "eval_on_start": "false",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "early_stopping_patience": 0,
}


def test_a_dry_run_lists_runs_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main([*SMALL, "--output", str(output), "--dry-run", "--seconds-per-run", "7", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 2 * 2 * 2 + 2 * 2
    assert plan["seconds"] == 12 * 7
    assert "7 s a run" in plan["basis"]
    assert {run["state"] for run in plan["runs"]} == {"open"}
    assert not output.exists()
    assert main([*SMALL, "--output", str(output), "--dry-run", "--shard", "1/2"]) == 0
    assert "6 are to be made" in capsys.readouterr().out


def test_what_is_not_at_hand_is_listed_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["report", "--table", "3", "--table", "7", "--seeds", "0", "--data-dir", str(tmp_path), "--budget", "paper"]
    assert main([*flags, "--output", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["runs"] == []
    missing = "\n".join(plan["missing"])
    assert "gemma-2b is a shape without weights" in missing
    assert "bbh on tiny" in missing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "9"], "no section '9'"),
        (["--figure", "1"], "no section 'figure1'"),
        (["--tasks", "bolq"], "no task 'bolq'"),
        (["--methods", "lorra"], "'lorra'"),
        (["--set", "max_step=3"], "max_steps"),
        (["--set", "max_steps"], "--set takes name=value"),
        (["--tune", "learning_rate"], "--tune takes name=value"),
        (["--seeds", "a"], "--seeds takes whole numbers"),
        (["--shard", "3"], "--shard takes I/N"),
        (["--settings", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--backbone", "nowhere/at/all", "--table", "1", "--dry-run"], "no such backbone"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_report_shows_what_makes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--seconds-per-run=3", "--output", "there", "--shard=1/2", "--no-run", "--data-dir=here", "--json"]
    monkeypatch.setattr("sys.argv", ["milora", "report", "--table", "2", *own, "--set", "max_steps=3"])
    assert report_command._command() == "milora report --table 2 --set max_steps=3"


def test_a_broken_table_4_leaves_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table4.json").write_text("{")
    flags = ["report", "--table", "2", "--table", "4", "--methods", "milora", "--tasks", "bundled-choice"]
    flags += ["--seeds", "0", "--budget", "paper", "--output", str(tmp_path), "--no-run", "--json"]
    assert main(flags) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "table4.json cannot be read" in result["errors"][0]
    assert captured.err.count("table4.json cannot be read") == 1
    text = Path(result["report"]).read_text()
    assert "## Table 2" in text
    assert "Not measured: " in text.partition("## Table 4")[2]


@pytest.mark.slow
def test_a_small_grid_is_run_once_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for name, value in TRAINING.items() for part in ("--set", f"{name}={value}")]
    output = ["--output", str(tmp_path), "--json"]
    flags = [
        "report",
        "--table",
        "1",
        "--figure",
        "2",
        "--methods",
        "milora",
        "--tasks",
        "bundled-choice",
        "--seeds",
        "0",
    ]
    run = [*flags, *settings, "--tune", "learning_rate=1e-3,1e-2", "--test-rows", "4", "--beams", "1", *output]
    assert main(run) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["finished"], result["failed"]) == (2, 0)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["training"]["learning_rate"] for record in records] == [1e-3, 1e-2]
    first = records[0]
    assert first["tests"]["bundled-choice"]["rows"] == 4
    assert first["dev_perplexity"] > 1
    assert first["parameters"]["tunable"] == 539_696
    assert first["steps"] == 2
    shares = first["expert_shares"]["bundled-choice"]
    # Three experts serve each prompt in each of the four blocks.
    assert [round(sum(row), 3) for row in shares["share"]] == [3.0] * 4
    assert str(tmp_path) not in (tmp_path / "results.jsonl").read_text()
    assert not list((tmp_path / ".working" / "runs").iterdir()), "adapters are not kept"
    assert (tmp_path / "figure2.png").exists()
    before = (tmp_path / "results.jsonl").read_bytes()
    assert main(run) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before, "nothing was run again"
