"""The candidates of a linear module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from milora.backbone.blocks import in_features, out_features
from milora.tuners.attachment import Attachment
from milora.tuners.low_rank import LowRank
from milora.tuners.projected_vector import ProjectedVector
from milora.tuners.ssp.config import BITFIT, KINDS, LORA, SSPConfig


class GateLogits(nn.Module):
    """The gate logits alpha of a module's candidates, (candidates of the module), initially zero."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))


class SSPLayer(Attachment):
    """`y = W x + b + z_lora (alpha / r) B A x + z_bitfit v`. In a fixed structure z is 1, or the term is absent.

    Args:
        path: Path of the adapted module in the backbone.
        gates: The gates of the running pass: searching adapter -> module path -> one gate for each of `KINDS`.
    """

    child_name = "ssp_"
    adapter_layer_names = (LORA, BITFIT, "gate")

    def __init__(self, path: str, gates: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(path)
        self.lora = nn.ModuleDict()
        self.bitfit = nn.ModuleDict()
        self.gate = nn.ModuleDict()
        self._gates = gates

    def update_layer(self, adapter: str, module: nn.Module, config: SSPConfig) -> None:
        """See [`Attachment.update_layer`]."""
        for kind in KINDS:
            if config.structure is None or [self.path, kind] in config.structure:
                getattr(self, kind)[adapter] = new_candidate(kind, module, config)
        if config.structure is None:
            self.gate[adapter] = GateLogits(len(KINDS))

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """See [`Attachment.adapt`]."""
        gates = self._gates[adapter][self.path].to(output.device) if adapter in self.gate else None
        for index, kind in enumerate(KINDS):
            candidates = getattr(self, kind)
            if adapter not in candidates:
                continue
            change: Tensor = candidates[adapter](hidden) if kind == LORA else candidates[adapter]()
            output = output + (change if gates is None else gates[index] * change)
        return output

    def gate_logits(self, adapter: str) -> nn.Parameter:
        """A searching adapter's gate logits in this layer, one for each of `KINDS`."""
        return self.gate[adapter].logits  # type: ignore[return-value]

    def parameter_counts(self, adapter: str) -> list[int]:
        """The number of parameters of each of an adapter's candidates in this layer, in the order of `KINDS`."""
        candidates = [getattr(self, kind)[adapter] for kind in KINDS if adapter in getattr(self, kind)]
        return [sum(p.numel() for p in candidate.parameters()) for candidate in candidates]

    def keep(self, adapter: str, kinds: set[str], module: nn.Module, config: SSPConfig) -> None:
        """Ends the search in this layer. Kept candidates are initialised again in place, others are deleted."""
        del self.gate[adapter]
        for kind in KINDS:
            candidates = getattr(self, kind)
            if kind in kinds:
                candidates[adapter].load_state_dict(new_candidate(kind, module, config).state_dict())
            else:
                del candidates[adapter]


def new_candidate(kind: str, module: nn.Module, config: SSPConfig) -> nn.Module:
    """Creates a candidate for a module. Its initial output is zero."""
    if kind == LORA:
        assert config.lora_alpha is not None
        return LowRank(in_features(module), out_features(module), config.r, config.lora_alpha)
    return ProjectedVector(out_features(module), config.projection_dim)
