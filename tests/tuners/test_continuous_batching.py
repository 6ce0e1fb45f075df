"""transformers' continuous batching logs errors in a thread and returns empty texts, so it is refused early."""

import pytest
from peft import get_peft_model
from support.adapted import adapted
from support.architectures import ARCHITECTURES
from transformers import GenerationConfig

from milora import IAPTConfig
from milora_core.errors import MiLoraError


@pytest.mark.parametrize("method", ["milora", "iapt"])
def test_continuous_batching_is_refused(method: str) -> None:
    model = adapted().model if method == "milora" else get_peft_model(ARCHITECTURES["llama"](), IAPTConfig())
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(MiLoraError, match="packs several prompts into one row"):
            call(inputs=[[5, 6, 7], [8, 9]], generation_config=GenerationConfig(max_new_tokens=2))
