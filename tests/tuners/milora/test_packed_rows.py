"""How a packed pass gives its tokens to a device's kernel, with a kernel that only records its calls."""

from typing import Any

import pytest
import torch
from support.adapted import adapted
from support.architectures import EXPERTS
from torch import Tensor

from milora import MiLoraConfig
from milora.tuners.milora.packed import PackedPlan, PackedRoute, PackedTokens, Segment
from milora.tuners.milora.packed_rows import PackedModules
from milora_core.kernels.packed_lora import PackedOperator
from milora_core.routing import Decision

BLOCKS = [f"model.layers.{number}" for number in range(2)]


class Module:
    """Accepts all adapters."""

    most_rank = 4

    def __init__(self, capacity: int, column: int, *args: Any) -> None:
        self.column = column

    def set(self, *args: Any) -> bool:
        return True

    def clear(self, number: int) -> None:
        pass


class Lora:
    """Records what a pass was created with, and the columns of the modules that it was called for."""

    latest: "Lora"

    def __init__(self, spans: list[tuple[int, int]], adapters: list[int], gates: Tensor, most_rank: int) -> None:
        self.spans, self.adapters, self.gates = spans, adapters, gates
        self.columns: list[int] = []
        Lora.latest = self

    def add_to(self, module: Module, result: Tensor, x: Tensor) -> bool:
        self.columns.append(module.column)
        return True


@pytest.fixture
def model() -> Any:
    model = adapted("llama").model
    model.add_adapter("second", MiLoraConfig(r=4, top_k=2))
    return model


def modules_of(model: Any) -> PackedModules:
    operator = PackedOperator(Module, Lora, (torch.float32,))
    modules = PackedModules(model, 4, torch.device("cpu"), operator)
    for adapter in ("default", "second"):
        modules.add(adapter)
    return modules


def decision(*chosen: str) -> Decision:
    gates = torch.tensor([[float(expert in chosen) for expert in EXPERTS["llama"]]])
    return Decision(gates, gates / gates.sum(), gates != 0)


def route(adapter: str, *chosen: str) -> PackedRoute:
    found = PackedRoute(adapter)
    for block in BLOCKS:
        found.decided(block, tuple(EXPERTS["llama"]), decision(*chosen))
    return found


def run(model: Any, plan: PackedPlan, tokens: int) -> list[str]:
    """Calls all adapted layers, and returns the paths of those for which the kernel was called."""
    paths = []
    for path, layer in model.named_modules():
        if hasattr(layer, "expert_places"):
            before = len(Lora.latest.columns)
            plan.forward(layer, torch.zeros(1, tokens, layer.base_layer.in_features))
            if len(Lora.latest.columns) > before:
                paths.append(path.removeprefix("base_model.model."))
    return paths


def test_chunks_and_single_tokens_are_one_row_each(model: Any) -> None:
    segments = [
        Segment(0, 1, route("second", "self_attn.q_proj")),
        Segment(1, 1),
        Segment(2, 5, route("default", "mlp.up_proj"), bare=2),
        Segment(7, 3, route("second", "self_attn.q_proj"), bare=3),
    ]
    PackedTokens(segments, [0], modules_of(model))
    assert Lora.latest.spans == [(4, 3), (0, 1)]
    assert Lora.latest.adapters == [0, 1]


def test_modules_that_no_request_chose_are_not_launched(model: Any) -> None:
    segments = [Segment(0, 1, route("second", "self_attn.q_proj")), Segment(1, 4, route("default", "mlp.up_proj"))]
    tokens = PackedTokens(segments, [0], modules_of(model))
    wanted = {f"{block}.{expert}" for block in BLOCKS for expert in ("self_attn.q_proj", "mlp.up_proj")}
    with torch.inference_mode():
        assert set(run(model, tokens.plan, 5)) == wanted


def test_decisions_reach_their_rows_within_the_pass(model: Any) -> None:
    undecided = PackedRoute("second")
    segments = [Segment(0, 1, route("default", "mlp.up_proj")), Segment(1, 4, undecided, deciding=(0, 4))]
    modules = modules_of(model)
    tokens = PackedTokens(segments, [0], modules)
    before = Lora.latest.gates.clone()
    assert not before[1].any()
    undecided.decided(BLOCKS[1], tuple(EXPERTS["llama"]), decision("self_attn.q_proj"))
    tokens.plan.decided(undecided, BLOCKS[1], decision("self_attn.q_proj"))
    layer = model.get_submodule(f"base_model.model.{BLOCKS[1]}.self_attn.q_proj")
    found = modules.module(layer)
    assert found is not None
    assert Lora.latest.gates[1].nonzero().flatten().tolist() == [found[0]]
    assert torch.equal(Lora.latest.gates[0], before[0])
    with torch.inference_mode():
        assert len(run(model, tokens.plan, 5)) == len(BLOCKS) * len(EXPERTS["llama"])  # Any module may be chosen.
    # What a later pass reads is the same, and known when the other block has decided.
    assert modules.gates(undecided).chosen is None
    undecided.decided(BLOCKS[0], tuple(EXPERTS["llama"]), decision("mlp.up_proj"))
    assert len(modules.gates(undecided).chosen or ()) == 2
    assert modules.gates(undecided) is modules.gates(undecided)
