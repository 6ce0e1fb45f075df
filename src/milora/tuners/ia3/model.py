"""The tuner of projected (IA)3."""

from __future__ import annotations

from typing import Any

from torch import nn

from milora.backbone.blocks import Block, find_blocks
from milora.tuners.attachment import AttachmentTuner
from milora.tuners.ia3.config import IA3ProjectedConfig
from milora.tuners.ia3.layer import IA3ProjectedLayer
from milora_core.errors import MiLoraError

QUERY_AND_KEY = frozenset(
    {
        "q_proj",
        "k_proj",
        # Fused query, key and value.
        "query_key_value",
        "qkv_proj",
        "c_attn",
        "Wqkv",
        # Multi-head latent attention: the projections to the heads' queries, and to their keys and values.
        "q_b_proj",
        "kv_b_proj",
    }
)
"""Names of the modules whose outputs are queries or keys."""

UP = frozenset({"up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w3"})
"""Names of the up-projection in the feed-forward layer."""


class IA3ProjectedModel(AttachmentTuner):
    """A backbone with learned factors on queries, keys and up-projections; created by `get_peft_model`."""

    method = "(IA)3"
    prefix = "ia3_projected_"
    tuner_layer_cls = IA3ProjectedLayer

    def choose_modules(self, config: IA3ProjectedConfig, block: Block) -> dict[str, nn.Module]:
        """See [`AttachmentTuner.choose_modules`]. The default is queries, keys and up-projections."""
        if config.modules or config.target_modules is not None:
            return block.linears
        return {name: module for name, module in block.linears.items() if _last(name) in QUERY_AND_KEY | UP}

    def _prepare_adapter_config(self, peft_config: IA3ProjectedConfig, model_config: dict[str, Any]) -> Any:
        if not peft_config.modules and peft_config.target_modules is None:
            self._check_names(peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_names(self, config: IA3ProjectedConfig) -> None:
        """Checks that the backbone has both kinds of modules that the method adapts.

        Raises:
            MiLoraError: If no module has a known name for queries and keys, or none for the up-projection.
        """
        names = list(dict.fromkeys(name for b in find_blocks(self.model, config.blocks) for name in b.linears))
        found = {_last(name) for name in names}
        if not (found & QUERY_AND_KEY and found & UP):
            missing = "the up-projection" if found & QUERY_AND_KEY else "queries and keys"
            raise MiLoraError(
                f"(IA)3 cannot find the modules of {type(self.model).__name__} for {missing}. Name the modules with "
                f"target_modules; the blocks have {names}."
            )


def _last(path: str) -> str:
    return path.rpartition(".")[2]
