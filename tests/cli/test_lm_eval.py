import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.adapted import adapted
from support.tokenizer import save_backbone

from milora_cli.main import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'milora[eval]'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "mmlu_local"], "mmlu_local reads a folder: name it with --data-dir or MILORA_DATA_DIR"),
        (["--tasks", "x,bbh_local", "--data_dir", "."], "bbh_local needs bbh/boolean_expressions.json"),
        (["--tasks", "x", "--tasks", "bbh_local", "--data-dir=."], "bbh_local needs bbh/boolean_expressions.json"),
        (["--tasks", "x", "--data_dir"], "--data-dir"),
        (["--tasks", "x", "--limit", "many"], "--limit"),
        (["--tasks", "x", "--limit", "0"], "--limit must be more than 0; found 0"),
        (["--tasks", "x", "--log_samples"], "pass --output-path too"),
        (["--tasks", "x", "--output-path", "list.yaml/a"], "list.yaml"),
        (["--nonsense", "1"], "--nonsense"),
        ([], "pass --tasks"),
        (["--tasks", ","], "pass --tasks"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("MILORA_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("[1]")
    assert main(["lm-eval", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_without_lm_eval_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--tasks", "x", "--limit", "1"]) == 2
    assert 'pip install "milora[eval]"' in capsys.readouterr().err


@pytest.mark.slow
def test_names_of_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.original.jsonl").write_text("")
    assert main(["lm-eval", "--list-tasks", "--data-dir", str(tmp_path)]) == 0
    names = capsys.readouterr().out.split("\n")
    assert {"mmlu", "mmlu_anatomy", "gsm8k_local"} <= set(names)
    assert "mmlu_local" not in names


@pytest.mark.slow
def test_evaluates_an_adapter_on_local_and_own_tasks(tmp_path: Path) -> None:
    base = save_backbone(tmp_path / "base")
    model = adapted("llama").model
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / f"data/gsm8k/{split}.original.jsonl").write_text(
            '{"question": "One and one?", "answer": "#### 2"}\n'
        )
    (tmp_path / "own").mkdir()
    (tmp_path / "own/rows.jsonl").write_text('{"question": "Is iron a metal?", "answer": "yes"}\n')
    (tmp_path / "own/metal.yaml").write_text(
        f"""task: metal
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "own/rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["no", "yes"]
doc_to_target: answer
"""
    )
    flags = "--model_args peft=adapter,max_length=64 --tasks gsm8k_local,metal --num_fewshot 0 --batch_size 2"
    flags += " --gen_kwargs max_gen_toks=4 --include_path own --data_dir data --output_path results --log_samples"
    done = subprocess.run(
        [sys.executable, "-m", "milora", "lm-eval", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gsm8k_local" in done.stdout
    assert "Custom kwargs" not in done.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "milora"
    assert set(results["results"]) == {"gsm8k_local", "metal"}
    (samples,) = (tmp_path / "results").rglob("samples_metal_*.jsonl")
    assert json.loads(samples.read_text())["doc"]["question"] == "Is iron a metal?"
    assert results["configs"]["gsm8k_local"]["dataset_kwargs"]["files"]["test"].endswith("gsm8k/test.original.jsonl")


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", "--model_args", "pretrained=tiny", "--tasks", "mmlu_locl"]) == 2
    assert "no task mmlu_locl; did you mean 'mmlu_local'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("saved", "status"), [("{", 1), ("{}", 0)])
def test_results_that_could_not_be_saved_are_printed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: str, status: int
) -> None:
    def run(*_: object, **settings: object) -> dict[str, object]:
        (tmp_path / "results_2.json").write_text(saved)  # truncated, as on a full disk
        return {"results": {"x": {}}}

    (tmp_path / "results_1.json").write_text("{}")
    monkeypatch.setattr("milora.evaluation.lm_eval.run", run)
    assert main(["lm-eval", "--tasks", "x", "--output-path", str(tmp_path), "--json"]) == status
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"results": {"x": {}}}
    assert captured.err == ("" if status == 0 else f"milora: lm-eval could not save the results above in {tmp_path}.\n")
