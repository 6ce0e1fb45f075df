"""`milora.benchmark.compiling`: what is counted of a method's graphs."""

from types import SimpleNamespace
from typing import Any

import torch

from milora.benchmark.compiling import Compilations
from milora.benchmark.generating import generation_arguments
from milora.tuners.grouped.compiling import is_compiled_by_transformers


def whole(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def broken(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


def test_graphs_and_breaks_are_counted_by_method() -> None:
    torch._dynamo.reset()
    counted = Compilations()
    for name, function in (("whole", whole), ("broken", broken)):
        step: Any = torch.compile(function, backend="eager")
        for _ in range(2):
            assert counted.during(name, lambda step=step: step(torch.ones(2))).tolist() == [3, 3]
    assert [(counted.of(name), counted.breaks(name)) for name in ("whole", "broken", "other")] == [
        (1, 0),
        (2, 1),
        (0, 0),
    ]


def test_steps_are_compiled_on_a_cpu_too() -> None:
    cpu = torch.device("cpu")
    model = SimpleNamespace(device=cpu)
    assert is_compiled_by_transformers(model, generation_arguments(cpu, 1, 4, compiled=True))
    assert not is_compiled_by_transformers(model, generation_arguments(cpu, 1, 4, compiled=False))
