"""`milora train`: from files to an adapter, its flags and files, and killed runs that resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support.full_disk import largest_file
from support.tokenizer import save_backbone

from milora.training.checkpoints import last_checkpoint
from milora_cli.main import main
from milora_cli.train import parse


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One character per token: prompts of the tasks are longer than the default 128 positions.
    return save_backbone(tmp_path_factory.mktemp("backbone"), positions=1024)


def rows_file(folder: Path, count: int = 24) -> Path:
    path = folder / "rows.jsonl"
    letters = "abcdefgh"
    rows = [
        {"prompt": f"repeat {letters[i % 8]}{letters[i // 8]}: ", "completion": f"{letters[i % 8]}{letters[i // 8]}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(backbone: Path, data: Path, output: Path, /, **settings: Any) -> list[str]:
    values = {
        "backbone": backbone,
        "data": data,
        "output_dir": output,
        "r": 4,
        "per_device_train_batch_size": 4,
        "total_train_batch_size": 4,
        "max_steps": 6,
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 9,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        **settings,
    }
    return ["train", *[part for name, value in values.items() for part in (f"--{name}", str(value))]]


def test_files_to_adapter(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(backbone, rows_file(tmp_path), tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["train_rows"], result["dev_rows"], result["skipped_rows"], result["steps"]) == (22, 2, 0, 6)
    assert result["dev_perplexity_best"] < result["dev_perplexity_before"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("MILORA", 4, 8)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("load_balancing_loss" in entry for entry in history)
    assert (
        main(["generate", "--adapter", str(tmp_path / "out"), "--prompt", "repeat ab: ", "--max-new-tokens", "4"]) == 0
    )


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_a_training_that_diverges(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """The results are valid JSON, and the adapter with NaN is reported once everything is saved."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    command = flags(backbone, rows_file(tmp_path), tmp_path / "out", learning_rate=1e20, method=method)
    assert main([*command, "--json"]) == 2
    shown = capsys.readouterr()
    result = json.loads(shown.out, parse_constant=refuse)
    assert result["dev_perplexity_best"] is None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    broken = sum(bool((tensor != tensor).any() or (tensor.abs() == float("inf")).any()) for tensor in tensors.values())
    assert result["nonfinite_tensors"] == broken > 0
    assert f"NaN or infinity in {broken} tensors. Lower --learning-rate." in shown.err.splitlines()[-1]
    saved = json.loads((tmp_path / "out" / "training_result.json").read_text(), parse_constant=refuse)
    assert saved["results"] == result
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_yaml_file_and_flags_that_override_it(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"backbone": str(backbone), "data": [str(rows_file(tmp_path))], "top_k": 2, "r": 2})
    )
    command = ["train", "--config", str(recipe), "--top_k", "1", "--max_steps", "1", "--use_cpu", "True"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--eval_on_start", "False", "--json"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["top_k"], config["r"]) == (1, 2)
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_a_yaml_file_with_a_method_and_its_settings(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {
        "model_name_or_path": str(backbone),
        "task": "bundled-choice",
        "train_rows": 8,
        "dev_rows": 4,
        "method": "moelora",
        "settings": {"r": 8, "num_experts": 4, "top_k": 2},
        "max_steps": 1,
        "use_cpu": True,
        "eval_on_start": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    recipe.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "bundled-choice: 8 training rows, 4 dev rows, 0 left out for their length" in shown
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"], config["r"]) == ("MOELORA", 4, 8)
    recipe.write_text(yaml.safe_dump({**values, "num_expert": 4}))
    assert main(["train", "--config", str(recipe)]) == 2
    assert "num_expert" in capsys.readouterr().err


def test_rows_that_do_not_fit_are_counted_and_never_cut(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_file(tmp_path)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 40, "completion": "x"}) + "\n")
    assert main([*flags(backbone, data, tmp_path / "out", max_steps=1, max_length=32), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["skipped_rows"] == 1
    assert result["rows"][str(data)]["no_room"] == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pooler": "median"}, "Unknown pooler 'median'"),
        ({"top_k": 9}, "top_k must lie between 1 and"),
        ({"max_length": 3}, "fits max_length=3"),
        ({"max_steps": "many"}, "max_steps"),
        ({"topk": 2}, "--topk; did you mean 'top-k'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"backbone": "nowhere/nothing/here"}, "nowhere/nothing/here"),
        ({"packing": True}, "packing"),
        ({"resume_from_checkpoint": "nowhere"}, "No checkpoint at nowhere"),
        ({"method": "milrao"}, "did you mean 'milora'"),
        ({"method": "bitfit"}, "--r is not a setting of bitfit"),
        ({"method": "adalora", "settings": "{"}, "settings is not JSON"),
        ({"task": "arc-esy"}, "did you mean 'arc-easy'"),
        ({"activation_training": "both"}, "invalid choice: 'both'"),
        ({"dev_fraction": 0.0}, "--activation_training joint or frozen"),
    ],
)
def test_a_mistake_is_one_line(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], complaint: str
) -> None:
    assert main(flags(backbone, rows_file(tmp_path), tmp_path / "out", **change)) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("milora: ")
    assert complaint in last
    assert captured.out == ""


def test_missing_bitsandbytes_is_named(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    assert main(flags(backbone, rows_file(tmp_path), tmp_path / "out", load_in_4bit=True)) == 2
    said = capsys.readouterr().err
    assert said.endswith("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes.\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--r=4", "--topk", "2"], "Unknown flag --topk; did you mean 'top-k'?"),
        (["--data-dir", "d", "--top-kk=2"], "Unknown flag --top-kk; did you mean 'top-k'?"),
        (["--config=FILE", "--topk", "2"], "Unknown flag --topk; did you mean 'top-k'?"),
        (["--r", "4", "--config"], "--config needs a file"),
        (["--config", "--r", "4"], "--config needs a file"),
        (["--config="], "--config needs a file"),
        (["--task", "bundled-choice"], "No --backbone given: pass a model folder, a hub id, or 'tiny'"),
    ],
)
def test_the_flag_that_is_wrong_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("r: 2\n")
    assert main(["train", *[argument.replace("FILE", str(recipe)) for argument in arguments]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"milora: {complaint}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"r: [1, 2\ntop_k: 3\n", ", line 2: not YAML that can be read: expected ',' or ']'"),
        (b"r: 1\n\xe9: 1\n", ", line 2: byte 0xe9 is not UTF-8"),
        (b"r: 2\ntop_k: 3\nr: 4\n", ", line 3: not YAML that can be read: the key 'r' is given twice"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert main(["train", "--config", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"milora: {recipe}{complaint}")


def test_flags_and_the_file_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("top_k: 2\nr: 2\n")
    data, method, arguments = parse(
        [f"--config={recipe}", "--backbone=tiny", "--r=4", "--data-dir", str(tmp_path), "--use_cpu=True"]
    )
    assert (data.data_dir, method.top_k, method.r, arguments.use_cpu) == (str(tmp_path), 2, 4, True)


def test_help_lists_our_flags_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--top-k" in shown
    assert "--deepspeed" not in shown
    assert main(["train", "--help-all"]) == 0
    assert "--deepspeed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_before(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """One file is written by Rust, the other by C++, whose error does not mention the disk."""
    data, output = rows_file(tmp_path), tmp_path / "out"
    assert main(flags(backbone, data, output, max_steps=2)) == 0
    resumed = [*flags(backbone, data, output), "--resume_from_checkpoint", "last"]
    capsys.readouterr()
    with largest_file((output / "checkpoint-2" / file).stat().st_size - 1):
        assert main(resumed) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"milora: {output} cannot be written: ")
    assert said.endswith("; earlier checkpoints are kept: resume with --resume-from-checkpoint last\n")
    assert last_checkpoint(output) == output / "checkpoint-2"
    assert main([*resumed, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["resumed_from"], result["steps"]) == (str(output / "checkpoint-2"), 6)


@pytest.mark.slow
def test_a_resumed_run_counts_on_with_its_callbacks_restored_by_transformers(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing learns, so the first evaluation stays the best; the third one after it, at step 4, ends the run."""
    settings = {"learning_rate": 0.0, "activation_learning_rate": 0.0, "eval_steps": 1, "save_steps": 1}
    patience = {"early_stopping_patience": 3, "eval_on_start": False, **settings}
    run = [rows_file(tmp_path), tmp_path / "out"]
    assert main(flags(backbone, *run, max_steps=2, **patience)) == 0
    capsys.readouterr()
    resumed = flags(backbone, *run, max_steps=9, restore_callback_states_from_checkpoint=True, **patience)
    assert main([*resumed, "--resume_from_checkpoint", "last", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["stopped_early"]) == (4, True)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(backbone: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path)
    command = [sys.executable, "-m", "milora"]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    settings = {"max_steps": 12, "seed": 3, "lora_dropout": 0.1, "activation_learning_rate": 1e-2}
    whole = flags(backbone, data, tmp_path / "whole", **settings)
    subprocess.run([*command, *whole], env=environment, check=True, capture_output=True, timeout=300)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, *flags(backbone, data, killed, **settings)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (killed / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter_model.safetensors").exists()

    resumed = [*flags(backbone, data, killed, **settings), "--resume_from_checkpoint", "last", "--json"]
    done = subprocess.run([*command, *resumed], env=environment, check=True, capture_output=True, timeout=300)
    assert "checkpoint-" in json.loads(done.stdout)["resumed_from"]
    expected, actual = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", killed))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.equal(actual[name]), name


def test_yaml_reads_no_as_a_boolean_and_we_do_not(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"backbone: tiny\noutput_dir: {tmp_path}\nuse_cpu: true\nreport_to: no\n"
        "eval_strategy: no\nsave_strategy: off\nlogging-strategy: No\n",
        encoding="utf-8",
    )
    arguments = parse(["--config", str(file)])[2]
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        assert getattr(arguments, name) == "no", name
    assert arguments.report_to == []
    assert not arguments.eval_on_start


def test_without_evaluation_no_perplexity_is_measured_or_told(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 1, "eval_strategy": "no"}
    assert main(flags(backbone, rows_file(tmp_path), tmp_path / "out", **settings)) == 0
    assert "perplexity" not in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "training_result.json").read_text())["results"]
    assert results["dev_perplexity_before"] is None
    assert results["dev_perplexity_best"] is None


def test_help_says_what_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["train", "--help-all"]) == 0
    everything = " ".join(capsys.readouterr().out.split())
    for name in ("eval_on_start", "load_best_model_at_end"):
        flag = name.replace("_", "-")
        line = next(line for line in lines if line.startswith(f"  --{flag}"))
        assert line.startswith(f"  --{flag}, --no-{flag}  ")
        assert line.endswith("(default: True)")
        on, off = everything.split(f"--{name} [{name.upper()}], ")[1].split(f"--no_{name}, ")
        assert on.endswith("(default: True) ")
        assert off.startswith(f"--no-{flag} Turn --{name} off. --")
