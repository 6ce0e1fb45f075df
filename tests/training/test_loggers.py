"""Values logged to TensorBoard, read from its files, and to wandb, read from its process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer import save_backbone

from milora_cli.main import main

EXPECTED = ("train/load_balancing_loss", "train/expert_share/mlp.up_proj", "train/dev_step_loss", "eval/perplexity")


def train(folder: Path, logger: str) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) + "\n" for i in range(12)))
    flags = (
        f"train --backbone {save_backbone(folder / 'backbone')} --data {rows} --output_dir {folder / 'out'} --r 4 "
        "--max_steps 2 --eval_steps 2 --save_steps 2 --per_device_train_batch_size 4 --total_train_batch_size 4 "
        f"--logging_steps 1 --use_cpu --report_to {logger}"
    )
    assert main(flags.split()) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = reader.EventAccumulator(str(folder)).Reload()
    for name in EXPECTED:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == ([0, 2] if name.startswith("eval") else [1, 2]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    train(tmp_path, "wandb")
    # The last values, requested from wandb's own process, because its offline files have no reader.
    received = dict(wandb.run.summary)
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    for name in EXPECTED:
        key = name.removeprefix("train/").replace("eval/", "eval_")
        assert received[name] == pytest.approx([entry[key] for entry in logged if key in entry][-1]), name
