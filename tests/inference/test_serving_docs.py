"""The code of docs/how-to/generate.md runs as it stands there."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from support.adapted import ALL_ARCHITECTURES, saved
from support.architectures import pad, random_prompts
from transformers import CompileConfig

from milora.tuners import generate_options as compiling

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "generate.md"


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several, together, compiled, plain_compiled, merged = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL
    )
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
    expected = names["output"]
    # The compiler's own code is not what is on trial, and takes minutes.
    monkeypatch.setattr(compiling, "CompileConfig", partial(CompileConfig, backend="eager", mode=None))
    names["names"] = ["ada", "bo", "__base__", "plain"]
    exec(compiled, names)
    assert names["output"].tolist() == expected.tolist()
    exec(merged, names)
    assert names["output"].tolist() == names["model"].generate(**names["one"], max_new_tokens=20).tolist()
    of_plain = {**names, "model": plain, "names": ["default", "__base__"] * 2}
    exec(together, of_plain)
    assert hasattr(plain.base_model, "owner")
    exec(plain_compiled, of_plain)
    assert of_plain["output"].shape[0] == 4
