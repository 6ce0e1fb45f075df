"""The compiled decode step: the same tokens, compiled once for all prompts, routes and tenants."""

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import adapted, add_adapter, assert_nothing_in_force
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessor, StaticCache

from milora import MiLoraError
from milora.inference.together import serve_together
from milora.tuners.generate_options import ALL_DEVICES, compiled_settings, is_compiled_by_transformers

BACKEND = "aot_eager"
PROMPTS = [random_prompts(4, (3, 9), seed=seed) for seed in (1, 2)]
BATCHES = [dict(zip(("input_ids", "attention_mask"), pad(prompts, "left"), strict=True)) for prompts in PROMPTS]
NAMES = ["default", "other", "__base__", "other"]


def config(backend: str = BACKEND) -> CompileConfig:
    return CompileConfig(fullgraph=True, backend=backend, mode=None)


def generate(model: PeftModel, batch: dict[str, Tensor] = BATCHES[0], **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", **settings}
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()


def compiled(model: PeftModel, batch: dict[str, Tensor] = BATCHES[0], **settings: Any) -> list[list[int]]:
    return generate(model, batch, compiled=True, **{"compile_config": config(), **settings})


@pytest.fixture
def counters() -> dict[str, Counter[str]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def two_adapters(name: str = "llama", **settings: Any) -> PeftModel:
    model = adapted(name, **settings).model
    add_adapter(model, "other", name, seed=7, top_k=3, r=6)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_once_for_all_prompts_routes_and_tenants(name: str, counters: dict[str, Counter[str]]) -> None:
    model = two_adapters(name)
    settings: list[dict[str, Any]] = [
        {},
        {"adapter_names": NAMES},
        {"adapter_names": NAMES[::-1]},
        {"route": model.route(**BATCHES[1])},
    ]
    expected = [[generate(model, batch, **each) for each in settings] for batch in BATCHES]
    assert len({str(tokens) for of_batch in expected for tokens in of_batch}) > 6
    assert compiled(model) == expected[0][0]
    model.set_adapter("other")
    others = [generate(model, batch) for batch in BATCHES]
    assert [compiled(model, batch) for batch in BATCHES] == others
    model.set_adapter("default")
    for batch, of_batch in zip(BATCHES, expected, strict=True):
        for each, tokens in zip(settings, of_batch, strict=True):
            assert compiled(model, batch, **each) == tokens
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # Compiled steps do not affect eager ones.
    assert generate(model) == expected[0][0]
    assert counters["stats"]["unique_graphs"] == 1
    assert_nothing_in_force(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_transformers_own_way_to_compile(counters: dict[str, Counter[str]]) -> None:
    """Simulates a GPU, where transformers compiles as soon as the cache is static."""
    model = two_adapters()
    own = config()
    setattr(own, ALL_DEVICES, True)
    assert generate(model, compile_config=own) == generate(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert generate(model, compile_config=own, compiled=False) == generate(model)
    add_adapter(model, "midora", seed=3, use_dora=True)
    model.set_adapter("midora")
    assert generate(model, compile_config=own) == generate(model)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_cache_of_the_callers(counters: dict[str, Counter[str]]) -> None:
    model = two_adapters()
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    expected = generate(model, past_key_values=caches[0], cache_implementation=None)
    assert compiled(model, past_key_values=caches[1], cache_implementation=None) == expected
    assert counters["stats"]["unique_graphs"] == 1


class Pausing(LogitsProcessor):
    """Runs a function during a generation."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.function()
        return scores


def in_another_thread(function: Any) -> Any:
    """Runs a function to its end, and returns what it returned or raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


class TestBesideEagerThreads:
    """One thread decodes with routes at the addresses of the compiled step, while others run eagerly."""

    @pytest.mark.parametrize("others", [{"adapter_names": NAMES[::-1]}, {}], ids=["named rows", "one adapter"])
    def test_each_has_its_own_routes(self, others: dict[str, Any]) -> None:
        model = two_adapters()
        own = {"adapter_names": NAMES}
        expected = [generate(model, **own), generate(model, BATCHES[1], **others)]
        begin, go_on = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
        steps = iter(range(100))

        def pause() -> None:
            if next(steps) == 0:  # in the prefill; on a CPU the operands of decode steps are made at the first one
                begin.wait()
                go_on.wait()

        def owner() -> list[list[int]]:
            # No torch.compile, but with slots and gates where a compiled step would read them.
            with model.base_model.owner.compiled():
                return generate(model, **own, logits_processor=[Pausing(pause)])

        def other() -> list[list[int]]:
            begin.wait()
            try:
                return generate(model, BATCHES[1], **others)
            finally:
                go_on.wait()

        found: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: found.update(owner=owner()))
        thread.start()
        found["other"] = in_another_thread(other)
        thread.join(60)
        assert [found["owner"], found["other"]] == expected

    def test_what_cannot_be_compiled_is_served_eagerly(self) -> None:
        targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
        model = get_peft_model(ARCHITECTURES["gpt2"](), LoraConfig(init_lora_weights=False, **targets))
        model.add_adapter("biased", LoraConfig(init_lora_weights=False, lora_bias=True, **targets))
        serve_together(model.eval())
        names = ["biased", "default", "__base__", "biased"]
        alone = generate(model, adapter_names=names)
        with model.base_model.owner.compiled():
            assert in_another_thread(lambda: generate(model, adapter_names=names)) == alone
            with pytest.raises(MiLoraError, match="cannot be part of a compiled decode step"):
                generate(model, adapter_names=names)

    @pytest.mark.slow
    @pytest.mark.parametrize("others", [{"adapter_names": NAMES[::-1]}, {}], ids=["named rows", "one adapter"])
    def test_while_the_step_is_being_compiled(self, others: dict[str, Any]) -> None:
        """torch's `is_compiling()` is true in every thread during compilation."""
        model = two_adapters()
        torch._dynamo.reset()
        expected = [generate(model, adapter_names=NAMES), generate(model, BATCHES[1], **others)]
        found: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            found.append(in_another_thread(lambda: generate(model, BATCHES[1], **others)))
            return graph.forward

        own = CompileConfig(fullgraph=True, backend=backend, mode=None)
        assert compiled(model, adapter_names=NAMES, compile_config=own) == expected[0]
        assert found == [expected[1]]


class TestTheAdaptersAreDisabled:
    """Then the compiled step is the backbone's."""

    @pytest.mark.slow
    def test_compiled_steps_are_the_backbones(self, counters: dict[str, Counter[str]]) -> None:
        model = two_adapters()
        backbone = generate(ARCHITECTURES["llama"]())
        for _ in range(2):
            with model.disable_adapter():
                assert compiled(model) == backbone
            # The adapters get a separate step, whose inputs must not affect the backbone's.
            expected = generate(model)
            assert compiled(model) == expected != backbone
        assert not counters["graph_break"]


class TestLeftToTransformers:
    """Simulates a GPU, where a static cache compiles: a generation that did not request that is never refused."""

    def test_a_second_thread_generates_eagerly(self) -> None:
        model = two_adapters()
        own = CompileConfig(backend=lambda graph, inputs: pytest.fail("a step was compiled"), mode=None)
        setattr(own, ALL_DEVICES, True)
        expected = generate(model)
        with model.base_model.owner.compiled():
            assert in_another_thread(lambda: generate(model, compile_config=own)) == expected

    def test_two_threads_at_once(self) -> None:
        """One thread gets the compiled step, in any order of requests."""
        model = two_adapters()
        serving = model.base_model.owner
        found: list[bool] = []
        inside = threading.Barrier(2, timeout=60)

        def run() -> None:
            with serving.compiled(["default"], required=False) as is_possible:
                found.append(is_possible)
                inside.wait()

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [False, True]
        assert in_another_thread(lambda: compiled(model, max_new_tokens=1))

    def test_only_the_generations_own_adapters_count(self) -> None:
        model = two_adapters()
        add_adapter(model, "midora", seed=3, use_dora=True)
        serving = model.base_model.owner
        for adapters, is_compiled in ((["default"], True), (["default", "midora"], False)):
            with serving.compiled(adapters, required=False) as is_possible:
                assert is_possible is is_compiled
        assert "cannot be part of a compiled decode step" in str(serving.why_not_compiled())


class TestRefusals:
    def test_a_second_thread(self) -> None:
        model = two_adapters()
        found: list[BaseException | None] = []

        def run() -> None:
            try:
                compiled(model)
            except MiLoraError as error:
                found.append(error)

        def meanwhile() -> None:
            if not found:
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()

        compiled(model, max_new_tokens=1, logits_processor=[Pausing(meanwhile)])
        assert "Another compiled generation" in str(found[0])
        assert not model.base_model.owner.is_compiled

    def test_midora(self) -> None:
        model = adapted(use_dora=True).model
        with pytest.raises(MiLoraError, match=r"cannot be part of a compiled decode step.*DoRA.*compiled=False"):
            compiled(model)
        assert not model.base_model.owner.is_compiled
        assert generate(model)

    def test_midora_beside_others(self) -> None:
        model = two_adapters()
        add_adapter(model, "midora", seed=3, use_dora=True)
        with pytest.raises(MiLoraError, match="cannot be part of a compiled decode step"):
            compiled(model, adapter_names=["midora"] * 4)
        assert not model.base_model.owner.is_compiled

    @pytest.mark.parametrize(
        "settings",
        [{"use_cache": False}, {"disable_compile": True}, {"past_key_values": DynamicCache()}],
        ids=lambda settings: next(iter(settings)),
    )
    def test_what_rules_it_out(self, settings: dict[str, Any]) -> None:
        with pytest.raises(MiLoraError, match="compiled=True needs"):
            compiled(two_adapters(), **settings)


def test_the_callers_config_stays_as_it_was() -> None:
    own = config()
    settings = compiled_settings({"compile_config": own})
    assert settings["compile_config"].to_dict() == own.to_dict()
    assert getattr(settings["compile_config"], ALL_DEVICES)
    assert not getattr(own, ALL_DEVICES)


def test_which_generations_transformers_compiles() -> None:
    model = adapted().model.base_model.model
    own = compiled_settings({})
    assert is_compiled_by_transformers(model, own)
    assert not is_compiled_by_transformers(model, {})
    assert not is_compiled_by_transformers(model, {"cache_implementation": "static"})  # on a CPU
    assert not is_compiled_by_transformers(model, {**own, "disable_compile": True})
    assert not is_compiled_by_transformers(model, {**own, "past_key_values": DynamicCache()})
    assert hasattr(CompileConfig(), ALL_DEVICES), "transformers has another way to compile on a CPU now"
