"""A backbone's folder, as small as can be."""

from pathlib import Path

import pytest
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # What every vocabulary has, and what must not end a measured generation.
        eos_token_id=list(range(61)),
    ).save_pretrained(folder)
    return str(folder)
