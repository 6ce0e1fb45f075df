"""`milora.benchmark.compiling`: graphs are counted per method, and every method gets separate graphs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from milora.benchmark import DecodeSettings, decode, generating
from milora.benchmark.compiling import Compilations
from milora.benchmark.generating import generation_arguments, random_prompts
from milora.benchmark.methods import build_backbone, build_method
from milora.benchmark.tables import markdown, notes
from milora.tuners.generate_options import compiled_settings, is_compiled_by_transformers

CPU = torch.device("cpu")


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
    model = SimpleNamespace(device=CPU)
    assert is_compiled_by_transformers(model, generation_arguments(CPU, 1, 4, compiled=True))
    assert not is_compiled_by_transformers(model, generation_arguments(CPU, 1, 4, compiled=False))


def traced(beams: int = 1, new_tokens: int = 4, compiled: bool = True) -> dict[str, Any]:
    """Arguments of `generate` that compile steps quickly: dynamo traces them, and torch runs them eagerly."""
    settings = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False}
    config = CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=False)
    return settings | (compiled_settings({"compile_config": config}) if compiled else {})


@pytest.mark.slow
def test_each_method_has_steps_of_its_own(tiny_shape: str) -> None:
    torch._dynamo.reset()
    settings = DecodeSettings(backbone=tiny_shape, device="cpu", dtype="float32").resolved()
    backbone = build_backbone(settings)
    prompts = random_prompts(backbone, 2, 5, seed=0)
    counted = Compilations()
    # torch.compile does not guard on hooks, which MOELoRA uses; each method is built after the previous one compiled.
    for name in ("base", "moelora", "lora", "milora"):
        model = build_method(name, backbone, settings).model
        expected = model.generate(**prompts, **traced(compiled=False))
        found = counted.during(name, lambda model=model: model.generate(**prompts, **traced()))
        assert torch.equal(found, expected), name
        assert (counted.of(name), counted.breaks(name)) == (1, 0), name


@pytest.mark.slow
def test_rows_say_what_is_not_compiled(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(generating, "generation_arguments", lambda device, *settings: traced(*settings))
    settings = DecodeSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", compile=True, methods=("base", "moelora", "midora", "iapt"),
        beams=(1, 2), prompt_tokens=5, new_tokens=3, rounds=1,
    )  # fmt: skip
    result = decode(settings).to_dict()
    rows = {(row["method"], row["beam"]): row for row in result["rows"]}
    for name in ("base", "moelora"):
        assert (rows[name, 1]["compiled_in_warm_up"], rows[name, 1]["compiled_later"]) == (1, 0)
        assert rows[name, 1]["not_compiled"] is None
    for name in ("midora", "iapt"):
        assert rows[name, 1]["compiled_in_warm_up"] == 0
    assert "q_proj cannot be part of a compiled decode step" in rows["midora", 1]["not_compiled"]
    assert "which torch.compile does not see" in rows["iapt", 1]["not_compiled"]
    assert {row["not_compiled"] for (_, beam), row in rows.items() if beam == 2} == {
        "transformers compiles no step of a beam search"
    }
    assert notes(result)[-1] == (
        "Not compiled: base (beam 2), moelora (beam 2), midora (beam 2), iapt (beam 2): transformers compiles no step "
        "of a beam search."
    )
    assert markdown(result).count("\n\nNot compiled: ") == 3
