"""The code of docs/serving.md runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from support.adapted import ALL_ARCHITECTURES, saved
from support.architectures import pad, random_prompts

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_many_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several, together = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    saved(Path("tenants/ada"))
    saved(Path("tenants/bo"), seed=3, r=6, top_k=3)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plain = get_peft_model(ALL_ARCHITECTURES["llama"](), config).eval()
    plain.save_pretrained("tenants/plain")
    input_ids, attention_mask = pad(random_prompts(4, (3, 9), seed=8), "left")
    names: dict[str, Any] = {
        "backbone": ALL_ARCHITECTURES["llama"](),
        "inputs": {"input_ids": input_ids, "attention_mask": attention_mask},
    }
    exec(several, names)
    assert names["output"].shape == (4, input_ids.shape[1] + 20)
    exec(together, {"model": plain})
    assert hasattr(plain.base_model, "grouped")
