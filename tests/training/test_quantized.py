"""A backbone in 4 or 8 bits by bitsandbytes on a CPU: it trains from the lowest block on, and the adapter works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft.utils import load_peft_weights
from support.tokenizer import save_backbone
from torch import nn

from milora.training.quantized import PACKS, keep_trainable
from milora_cli.main import main


def test_what_has_no_such_attribute_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    keep_trainable(layer)
    assert not hasattr(layer, PACKS)


def test_bitsandbytes_packs_by_this_attribute() -> None:
    """A private attribute of bitsandbytes, which may be renamed."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    assert hasattr(layer, PACKS)
    keep_trainable(layer)
    assert getattr(layer, PACKS) is False


@pytest.mark.slow
@pytest.mark.parametrize("width", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantised_backbone_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], width: str) -> None:
    """The evaluation before the first step packs 4-bit weights, and packed weights pass no gradients on."""
    pytest.importorskip("bitsandbytes")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) + "\n" for i in range(12)))
    output = tmp_path / "out"
    flags = (
        f"train --backbone {save_backbone(tmp_path / 'backbone')} --data {rows} --output_dir {output} --r 4 --top_k 7 "
        "--max_steps 2 --eval_steps 2 --save_steps 2 --per_device_train_batch_size 4 --total_train_batch_size 4 "
        f"--warmup_steps 0 --learning_rate 1e-2 --use_cpu --report_to none --json {width}"
    )
    assert main(flags.split()) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    # They start at zero; the lowest block's learn only if gradients flow through all blocks above.
    learned = {name: bool(value.any()) for name, value in load_peft_weights(str(output)).items() if "lora_B" in name}
    assert learned
    assert all(learned.values()), [name for name, has in learned.items() if not has]
    assert main(["generate", "--adapter", str(output), "--prompt", "say 3:", "--max-new-tokens", "2"]) == 0
