"""`milora train` with accelerate's launcher, in two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tokenizer import save_backbone
from transformers import AutoModelForCausalLM


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    """Without `--multi_gpu` the launcher starts only one process, even with `--cpu`."""
    backbone = save_backbone(tmp_path / "backbone")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) + "\n" for i in range(40)))
    launch = (
        f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        f"--dynamo_backend no --main_process_port {27500 + os.getpid() % 1000} -m milora train"
    )
    flags = (
        f"--backbone {backbone} --data {rows} --output_dir {tmp_path / 'out'} --r 4 --max_steps 4 --eval_steps 2 "
        "--save_steps 2 --per_device_train_batch_size 2 --total_train_batch_size 8 --activation_learning_rate 1e-3 "
        "--learning_rate 1e-2 --use_cpu --report_to none --logging_steps 1 --json"
    )
    environment = {**os.environ, "WANDB_MODE": "offline"}
    command = [sys.executable, *launch.split(), *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # One object, printed by one of the processes.
    assert result["steps"] == 4
    record = json.loads((tmp_path / "out" / "training_result.json").read_text())
    assert record["device"] == {"type": "cpu", "processes": 2}
    assert record["training"]["gradient_accumulation_steps"] == 2
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "rng_state_1.pth").is_file()
    state = torch.load(checkpoint / "milora_state.pt", weights_only=True)
    assert state["BilevelActivations"]["dev_step"]["steps"] == 4
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "out")
    again = [*command, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["dev_perplexity_best"] == pytest.approx(result["dev_perplexity_best"], rel=1e-6)
