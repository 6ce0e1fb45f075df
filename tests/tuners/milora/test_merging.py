"""A route merged into the backbone's weights: outputs, restored weights, and refused requests."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapted import adapted, add_adapter, assert_nothing_in_force
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, LogitsProcessor

from milora import MiLoraConfig, MiLoraError, Route
from milora.tuners.generate_options import ALL_DEVICES

NEW = 6
PROMPTS = random_prompts(3, (4, 8), seed=4)


def generate(model: PeftModel, prompts: list[list[int]] = PROMPTS[:1], **settings: Any) -> list[list[int]]:
    input_ids, attention_mask = pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)[
        :, input_ids.shape[1] :
    ].tolist()


class Weights:
    """Remembers the backbone's weights: storage and bits."""

    def __init__(self, model: PeftModel) -> None:
        self.places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
        self.values = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def assert_back(self, model: PeftModel) -> None:
        for name, tensor in model.named_parameters():
            assert tensor.data_ptr() == self.places[name], name
            assert torch.equal(tensor, self.values[name]), name
        assert_nothing_in_force(model)


class EachStep(LogitsProcessor):
    """Runs a function between the steps of a generation."""

    def __init__(self, then: Callable[[int], None]) -> None:
        self.then = then
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        self.then(self.step)
        return scores


def linears(model: PeftModel) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith("base_layer")}


class TestWhatIsComputed:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "falcon", "bloom", "gemma2"])
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("gate", ["hard", "softmax"])
    def test_tokens_and_logits_are_those_of_the_reference(self, name: str, use_dora: bool, gate: str) -> None:
        case = adapted(name, use_dora=use_dora, gate=gate)
        weights = Weights(case.model)
        prompt = torch.tensor(PROMPTS[:1])
        expected = case.reference.greedy(prompt, NEW)
        assert generate(case.model, merge_route=True) == [expected]
        weights.assert_back(case.model)
        route = case.model.route(prompt)
        with torch.no_grad(), case.model.merged_route(route):
            logits = case.model(prompt).logits
        torch.testing.assert_close(logits, case.reference.logits(prompt, prompt.shape[1]), rtol=1e-4, atol=1e-4)
        weights.assert_back(case.model)

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 3},
            {"cache_implementation": "static"},
            {"use_cache": False},
            {"prefill_chunk_size": 3},
            {"num_return_sequences": 2, "num_beams": 4},
        ],
        ids=str,
    )
    def test_ways_to_decode(self, settings: dict[str, Any]) -> None:
        model = adapted().model
        weights = Weights(model)
        assert generate(model, merge_route=True, **settings) == generate(model, **settings)
        weights.assert_back(model)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    def test_after_the_prefill_the_base_layers_alone_are_called(self, use_dora: bool) -> None:
        model = adapted(use_dora=use_dora).model
        before = {name: layer.weight.data_ptr() for name, layer in linears(model).items()}
        moved: list[int] = []
        called: list[int] = []
        calls: list[str] = []

        def look(step: int) -> None:
            moved.append(sum(layer.weight.data_ptr() != before[name] for name, layer in linears(model).items()))
            called.append(len(calls))

        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        generate(model, merge_route=True, logits_processor=[EachStep(look)])
        # Two blocks with two experts each, starting at the first decode step.
        assert moved == [0] + [4] * (NEW - 1)
        assert called[0] > 0
        assert set(called) == {len(calls)}

    def test_a_given_route_is_merged_before_the_prefill(self) -> None:
        model = adapted().model
        route = model.route(torch.tensor([PROMPTS[1]]))
        calls: list[str] = []
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
        found = generate(model, merge_route=True, route=route)
        assert not calls
        assert found == generate(model, route=route)
        assert found != generate(model)

    def test_rows_that_agree_are_served_together(self) -> None:
        model = adapted().model
        prompts = [PROMPTS[0], PROMPTS[0]]
        assert generate(model, prompts, merge_route=True) == generate(model, prompts)
        route = model.route(torch.tensor([PROMPTS[0]]))
        forced = Route.cat([route, route, route])
        assert generate(model, PROMPTS, merge_route=True, route=forced) == generate(model, PROMPTS, route=forced)

    def test_the_context_serves_any_batch_and_continues_a_cache(self) -> None:
        model = adapted().model
        route = model.route(torch.tensor([PROMPTS[1]]))
        expected = generate(model, PROMPTS, route=Route.cat([route] * 3))
        with model.merged_route(route):
            assert generate(model, PROMPTS) == expected
            assert generate(model, PROMPTS, merge_route=True) == expected
            assert model.route(torch.tensor([PROMPTS[2]])).gates.tolist() == route.gates.tolist()
            cache = DynamicCache(config=model.config)
            prompt = torch.tensor(PROMPTS[:1])
            with torch.no_grad():
                model(prompt[:, :-1], past_key_values=cache)
                inside = model(prompt[:, -1:], past_key_values=copy.deepcopy(cache)).logits
        # The cache outlives the merge; later tokens are adapted, and only once.
        with torch.no_grad():
            outside = model(prompt[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)

    def test_in_bf16_it_is_close_and_the_backbone_comes_back_bit_for_bit(self) -> None:
        model = adapted(dtype=torch.bfloat16).model
        weights = Weights(model)
        prompt = torch.tensor(PROMPTS[:1])
        route = model.route(prompt)
        with torch.no_grad(), model.use_route(route):
            expected = model(prompt).logits
        with torch.no_grad(), model.merged_route(route):
            found = model(prompt).logits
        assert found.dtype == torch.bfloat16
        assert (found - expected).float().norm() < 0.05 * expected.float().norm()
        weights.assert_back(model)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_under_either_mode_without_gradients(self, mode: Any) -> None:
        model = adapted(use_dora=True).model
        weights = Weights(model)
        with mode():
            found = generate(model, merge_route=True)
        assert found == generate(model)
        weights.assert_back(model)

    def test_the_biases_of_lora_go_into_the_biases(self) -> None:
        model = get_peft_model(ARCHITECTURES["gpt2"](), MiLoraConfig(r=4, top_k=2, lora_bias=True)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        weights = Weights(model)
        assert generate(model, merge_route=True) == generate(model)
        prompt = torch.tensor(PROMPTS[:1])
        route = model.route(prompt)
        with torch.no_grad(), model.use_route(route):
            expected = model(prompt).logits
        with torch.no_grad(), model.merged_route(route):
            torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
        weights.assert_back(model)


class TestWhatIsLeftBehind:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
    @pytest.mark.parametrize("step", [1, 3])
    def test_after_an_exception(self, step: int, settings: dict[str, Any], error: type[BaseException]) -> None:
        model = adapted().model
        weights = Weights(model)

        def fail(now: int) -> None:
            if now == step:
                raise error

        with pytest.raises(error):
            generate(model, merge_route=True, logits_processor=[EachStep(fail)], **settings)
        weights.assert_back(model)
        assert generate(model, merge_route=True) == generate(adapted().model)

    def test_after_an_exception_inside_a_layer(self) -> None:
        model = adapted().model
        weights = Weights(model)
        calls = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        handle = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model, merge_route=True)
        handle.remove()
        weights.assert_back(model)
        # Other threads can use the backbone again.
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(generate(model, merge_route=True)))
        thread.start()
        thread.join()
        assert results == [generate(model)]

    def test_a_refused_layer_leaves_the_others_as_they_were(self) -> None:
        model = adapted(top_k=7).model
        weights = Weights(model)
        route = model.route(torch.tensor(PROMPTS[:1]))
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        own, layer.base_layer.weight = (
            layer.base_layer.weight,
            nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False),
        )
        with pytest.raises(MiLoraError, match=r"layers\.1\.mlp\.down_proj is a .*Linear, into which a route cannot"):
            generate(model, merge_route=True, route=route)
        layer.base_layer.weight = own
        weights.assert_back(model)

    def test_a_model_is_copied_and_pickled_as_ever(self) -> None:
        model = adapted().model
        generate(model, merge_route=True)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert generate(copied, merge_route=True) == generate(model)


class TestRefusals:
    def test_rows_that_differ(self) -> None:
        model = adapted().model
        weights = Weights(model)
        with pytest.raises(MiLoraError, match="the 3 rows of this batch have different ones"):
            generate(model, PROMPTS, merge_route=True)
        weights.assert_back(model)
        with pytest.raises(MiLoraError, match="the 3 rows"), model.merged_route(model.route(*pad(PROMPTS, "left"))):
            pass
        assert_nothing_in_force(model)

    def test_soft_gates_differ_where_experts_agree(self) -> None:
        model = adapted(gate="softmax", top_k=7).model
        with pytest.raises(MiLoraError, match="different ones"):
            generate(model, PROMPTS, merge_route=True)

    def test_another_route_another_merge_and_disabled_adapters_under_a_merged_one(self) -> None:
        model = adapted().model
        first, second = (model.route(torch.tensor([prompt])) for prompt in PROMPTS[:2])
        prompt = torch.tensor(PROMPTS[:1])
        with model.merged_route(first):
            with pytest.raises(MiLoraError, match="A route is merged"), model.use_route(second):
                model(prompt)
            with pytest.raises(MiLoraError, match="A route is merged"):
                generate(model, route=second)
            with pytest.raises(MiLoraError, match="A route is merged"), model.merged_route(second):
                pass
            with pytest.raises(MiLoraError, match="A route is merged"), model.disable_adapter():
                model(prompt)
            assert generate(model) == generate(model, route=None)
        assert_nothing_in_force(model)

    def test_training_disabled_adapters_and_rows_with_their_own(self) -> None:
        model = adapted().model
        route = model.route(torch.tensor([PROMPTS[0]]))
        with pytest.raises(MiLoraError, match=r"model\.eval"), model.train().merged_route(route):
            pass
        model.eval()
        with pytest.raises(MiLoraError, match="nothing to merge"), model.disable_adapter(), model.merged_route(route):
            pass
        with pytest.raises(MiLoraError, match="Rows with different adapters"):
            generate(model, PROMPTS, merge_route=True, adapter_names=["default", "__base__", "default"])
        assert_nothing_in_force(model)

    def test_a_weight_that_two_modules_share(self) -> None:
        model = adapted(top_k=7).model
        layers = model.base_model.model.model.layers
        layers[1].self_attn.q_proj.base_layer.weight = layers[0].self_attn.q_proj.base_layer.weight
        with pytest.raises(MiLoraError, match=r"q_proj shares its weight"):
            generate(model, merge_route=True)

    def test_a_route_of_another_model(self) -> None:
        model = adapted().model
        route = adapted("phi3").model.route(torch.tensor([PROMPTS[0]]))
        with pytest.raises(MiLoraError, match="Use a route of the same adapter"), model.merged_route(route):
            pass
        assert_nothing_in_force(model)

    def test_compiled_steps(self) -> None:
        model = adapted().model
        with pytest.raises(MiLoraError, match="Compiled steps do not support a merged route"):
            generate(model, merge_route=True, compiled=True)
        with (
            model.merged_route(model.route(torch.tensor(PROMPTS[:1]))),
            pytest.raises(MiLoraError, match="Compiled steps do not support a merged route"),
        ):
            generate(model, compiled=True)
        assert_nothing_in_force(model)

    def test_steps_that_transformers_would_compile_are_run_eagerly(self) -> None:
        """Simulates a GPU, where transformers compiles as soon as the cache is static."""
        model = adapted().model
        own = CompileConfig(backend=lambda graph, inputs: pytest.fail("a step was compiled"), mode=None)
        setattr(own, ALL_DEVICES, True)
        static = {"cache_implementation": "static"}
        expected = generate(model, **static)
        with model.merged_route(model.route(torch.tensor(PROMPTS[:1]))):
            assert generate(model, compile_config=own, **static) == expected

    def test_rows_with_adapters_of_their_own_and_another_adapter(self) -> None:
        model = adapted().model
        add_adapter(model, "other", seed=7)
        prompt = torch.tensor(PROMPTS[:1])
        expected = generate(model)
        with model.merged_route(model.route(prompt)):
            for name in ("other", "__base__", "default"):
                with pytest.raises(MiLoraError, match="A route is merged"):
                    generate(model, adapter_names=[name])
                with pytest.raises(MiLoraError, match="A route is merged"):
                    model(prompt, adapter_names=[name])
            with pytest.raises(MiLoraError, match=r"other.* cannot be made active.*merged_route"):
                model.set_adapter("other")
            model.set_adapter("default")
            assert generate(model) == expected
        model.set_adapter("other")
        assert generate(model) != expected
        assert_nothing_in_force(model)


class TestThreads:
    def meanwhile(self, model: PeftModel, other: Callable[[], Any], **settings: Any) -> list[Any]:
        """The result or error of another thread's call during a generation in this thread."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(other())
            except MiLoraError as error:
                results.append(error)

        def at_step_three(step: int) -> None:
            if step == 3:
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()

        expected = generate(model)
        assert generate(model, logits_processor=[EachStep(at_step_three)], **settings) == expected
        return results

    def test_others_are_refused_under_a_merged_route(self) -> None:
        model = adapted().model
        prompt = torch.tensor(PROMPTS[1:2])

        for other in (lambda: generate(model), lambda: model(prompt), lambda: model.route(prompt)):
            (error,) = self.meanwhile(model, other, merge_route=True)
            assert isinstance(error, MiLoraError)
            assert "A route is merged into" in str(error)
        (error,) = self.meanwhile(
            model, lambda: model.base_model.model.generate(prompt, max_new_tokens=2), merge_route=True
        )
        assert isinstance(error, MiLoraError)
        assert_nothing_in_force(model)

    def test_merging_is_refused_while_another_generates(self) -> None:
        model = adapted().model
        (error,) = self.meanwhile(model, lambda: generate(model, merge_route=True))
        assert isinstance(error, MiLoraError)
        assert "Another request is using this backbone" in str(error)
        (tokens,) = self.meanwhile(model, lambda: generate(model))
        assert tokens == generate(model)

    def test_merging_is_refused_while_another_is_in_a_forward_pass(self) -> None:
        model = adapted().model
        results: list[Any] = []

        def merge() -> None:
            try:
                results.append(generate(model, merge_route=True))
            except MiLoraError as error:
                results.append(str(error))

        def inside(*_: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                return
            thread = threading.Thread(target=merge)
            thread.start()
            thread.join()

        handle = model.base_model.model.model.layers[0].mlp.register_forward_pre_hook(inside)
        prompt = torch.tensor(PROMPTS[:1])
        model(prompt)
        handle.remove()
        assert len(results) == 1
        assert "Another request is using this backbone" in results[0]
        assert generate(model, merge_route=True) == generate(model)
