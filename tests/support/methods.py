"""The baselines on tiny backbones, for tests that every method must pass. Add a line to `METHODS` for a new one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from milora.tuners.bitfit import BitFitConfig
from milora.tuners.ia3 import IA3ProjectedConfig
from milora.tuners.iapt import IAPTConfig
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.moelora import MoeLoraConfig
from milora.tuners.parallel_adapter import ParallelAdapterConfig
from milora.tuners.ptuning_v2 import PTuningV2Config
from milora.tuners.ssp import SSPConfig
from support.architectures import ARCHITECTURES


@dataclass(frozen=True)
class Method:
    """A method in a size for tiny backbones.

    Attributes:
        config: Creates its configuration.
        arguments: For a number of rows, the inputs that the model and `generate` need besides the tokens, one per row.
        spread: Standard deviation of the noise that makes an adapter's effect visible.
        starts_as_backbone: Whether a new adapter changes nothing.
        refuses: Backbones that it cannot adapt.
    """

    config: Callable[[], PeftConfig]
    arguments: Callable[[int], dict[str, Tensor]] = lambda rows: {}
    spread: float = 0.2
    starts_as_backbone: bool = True
    refuses: frozenset[str] = frozenset()


def _tasks(rows: int) -> dict[str, Tensor]:
    return {"task_ids": torch.arange(rows) % 3}


# A prefix gets a share of every softmax, so a new adapter changes the output. Falcon's attention is not supported.
_PREFIX: dict[str, Any] = {"starts_as_backbone": False, "refuses": frozenset({"falcon"})}

METHODS: dict[str, Method] = {
    "bitfit": Method(lambda: BitFitConfig(projection_dim=4)),
    "ia3": Method(lambda: IA3ProjectedConfig(projection_dim=4)),
    "iapt": Method(lambda: IAPTConfig(num_virtual_tokens=3, bottleneck=8), **_PREFIX),
    # While searching, with all candidates; test_adapter_formulas.py covers the result.
    "learned-adapter": Method(lambda: LearnedAdapterConfig(bottleneck=8)),
    "moelora": Method(lambda: MoeLoraConfig(r=8, num_experts=4, top_k=2)),
    "moelora-task": Method(
        lambda: MoeLoraConfig(r=8, num_experts=4, gate="task", num_tasks=3, task_embedding_dim=6), _tasks
    ),
    "parallel-adapter": Method(lambda: ParallelAdapterConfig(bottleneck=8)),
    "ptuning-v2": Method(lambda: PTuningV2Config(num_virtual_tokens=3, projection_dim=4), **_PREFIX),
    # While searching; methods/test_ssp.py covers the result.
    "ssp": Method(lambda: SSPConfig(r=4, projection_dim=4)),
}


def fresh(method: str, family: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny backbone with a new adapter `default`, with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(ARCHITECTURES[family]().to(dtype), METHODS[method].config())


def randomize(model: PeftModel, method: str, seed: int = 0) -> None:
    """Moves the trainable tensors of the active adapter off their start, so the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(METHODS[method].spread * torch.randn(parameter.shape, generator=generator))


def adapted(method: str, family: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny backbone in eval mode with an adapter `default` that changes its output."""
    model = fresh(method, family, dtype)
    randomize(model, method)
    # A search draws its gates in training mode: two models under comparison must draw the same ones.
    torch.manual_seed(0)
    return model.eval()


def forward(model: Any, method: str, tokens: Tensor, **arguments: Any) -> Any:
    """The model's output."""
    return model(input_ids=tokens, **METHODS[method].arguments(len(tokens)), **arguments)
