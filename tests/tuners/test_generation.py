"""Generation with an adapted model, compared with the reference and with each row alone."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.adapted import ALL_ARCHITECTURES, Adapted, adapted, assert_nothing_in_force
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from milora import MiLoraError, Route
from milora.tuners.caches import made_by
from milora.tuners.milora.router import RouterLayer
from milora_core.routing import GATES, POOLERS, ROUTER_NORMS

NEW = 6
PROMPTS = random_prompts(4, (3, 9), seed=1)


def generate(model: PeftModel, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    """Continuations of left-padded prompts, greedy by default."""
    input_ids, attention_mask = pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
    return output[:, input_ids.shape[1] :].tolist()


def reference_route(case: Adapted, prompt: list[int]) -> Tensor:
    return case.reference.route(torch.tensor([prompt])).gates


def assert_route_is_the_references(case: Adapted, route: Route, prompts: list[list[int]] = PROMPTS) -> None:
    blocks = case.reference.blocks
    assert list(route.blocks) == [block.path for block in blocks]
    for row, prompt in enumerate(prompts):
        decision = case.reference.route(torch.tensor([prompt]))
        for index, block in enumerate(blocks):
            # If blocks differ, the route's experts are the union over blocks.
            columns = [route.experts.index(expert) for expert in block.experts]
            width = len(block.experts)
            others = [column for column in range(len(route.experts)) if column not in columns]
            torch.testing.assert_close(route.gates[index, row, columns], decision.gates[index, :width])
            torch.testing.assert_close(
                route.probabilities[index, row, columns], decision.probabilities[index, :width], rtol=1e-4, atol=1e-5
            )
            assert not route.gates[index, row, others].any()
            assert not route.probabilities[index, row, others].any()


@contextmanager
def counted(model: PeftModel) -> Iterator[Counter[str]]:
    """Counts routing decisions and calls of `lora_A`, by block."""
    counts: Counter[str] = Counter()
    handles = []
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, RouterLayer):
            projection = module.projection["default"]
            handles.append(
                projection.register_forward_hook(lambda *_, key=f"router {module.block}": counts.update([key]))
            )
        elif isinstance(module, LoraLayer):
            key = f"expert {path[: path.index('.', path.index('layers.') + 7)]}"
            handles.append(module.lora_A["default"].register_forward_hook(lambda *_, key=key: counts.update([key])))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class TestAgainstTheReference:
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("name", ALL_ARCHITECTURES)
    def test_every_architecture(self, name: str, use_dora: bool) -> None:
        case = adapted(name, use_dora=use_dora, seed=1)
        input_ids, attention_mask = pad(PROMPTS, "left")
        route = case.model.route(input_ids, attention_mask)
        assert_route_is_the_references(case, route)
        assert any(not torch.equal(route.gates[:, 0], route.gates[:, row]) for row in range(1, 4))
        found = generate(case.model)
        assert found == [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in PROMPTS]
        with case.model.disable_adapter():
            assert found != generate(case.model)

    @pytest.mark.usefixtures("either_way")
    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("pooler", POOLERS)
    def test_every_gate_and_pooler(self, gate: str, pooler: str) -> None:
        case = adapted(gate=gate, pooler=pooler, use_dora=pooler == "max")
        assert_route_is_the_references(case, case.model.route(*pad(PROMPTS, "left")))
        assert generate(case.model) == [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in PROMPTS]

    @pytest.mark.usefixtures("either_way")
    @pytest.mark.parametrize("router_norm", ROUTER_NORMS)
    @pytest.mark.parametrize("pooler", POOLERS)
    def test_every_norm_and_pooler(self, router_norm: str, pooler: str) -> None:
        case = adapted(router_norm=router_norm, pooler=pooler)
        assert_route_is_the_references(case, case.model.route(*pad(PROMPTS, "left")))
        assert generate(case.model) == [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in PROMPTS]

    @pytest.mark.parametrize("settings", [{"router_activation": "tanh"}, {"router_activation": ["relu", "rational"]}])
    def test_activations(self, settings: dict[str, Any]) -> None:
        case = adapted(**settings)
        assert_route_is_the_references(case, case.model.route(*pad(PROMPTS, "left")))

    @pytest.mark.usefixtures("either_way")
    @pytest.mark.parametrize("top_k", [1, 3, 7])
    def test_every_k(self, top_k: int) -> None:
        case = adapted(top_k=top_k)
        assert (case.model.route(*pad(PROMPTS, "left")).gates.sum(dim=-1) == top_k).all()
        assert generate(case.model) == [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in PROMPTS]

    def test_logits_of_a_plain_forward(self) -> None:
        case = adapted(gate="softmax", use_dora=True)
        for prompt in map(torch.tensor, PROMPTS):
            logits = case.reference.logits(prompt[None], len(prompt))
            torch.testing.assert_close(case.model(prompt[None]).logits, logits, rtol=1e-4, atol=1e-4)


class TestBatches:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2", "falcon_alibi"])
    def test_a_route_is_that_of_generate_whatever_the_padding(self, name: str) -> None:
        case = adapted(name)
        assert_route_is_the_references(case, case.model.route(*pad(PROMPTS, "left")))
        assert_route_is_the_references(case, case.model.route(*pad(PROMPTS, "right")))

    @pytest.mark.usefixtures("either_way")
    @pytest.mark.parametrize("gate", GATES)
    def test_a_batch_is_its_rows_alone(self, gate: str) -> None:
        model = adapted(gate=gate).model
        assert generate(model) == [generate(model, [prompt])[0] for prompt in PROMPTS]

    def test_more_padding_changes_nothing(self) -> None:
        model = adapted().model
        input_ids, attention_mask = pad([*PROMPTS, [1] * 20], "left")
        wide = model.generate(input_ids=input_ids[:4], attention_mask=attention_mask[:4], max_new_tokens=NEW)
        assert wide[:, 20:].tolist() == generate(model)

    def test_gpt2_routes_under_left_padding_as_it_generates(self) -> None:
        # A plain forward of GPT-2 counts positions from the padding; generate counts them from the prompt.
        model = adapted("gpt2").model
        input_ids, attention_mask = pad(PROMPTS, "left")
        route = model.route(input_ids, attention_mask)
        assert generate(model, route=route) == generate(model)
        output = model(input_ids, attention_mask=attention_mask)
        plain = made_by(output.past_key_values).route()
        assert not torch.equal(route.chosen, plain.chosen)

    def test_labels_say_what_the_prompt_is(self) -> None:
        case = adapted()
        completed = [[*prompt, 5, 6] for prompt in PROMPTS]
        input_ids, attention_mask = pad(completed, "right")
        labels = input_ids.clone()
        for row, prompt in enumerate(PROMPTS):
            labels[row, : len(prompt)] = -100
        labels[attention_mask == 0] = -100
        assert_route_is_the_references(case, case.model.route(input_ids, attention_mask, labels=labels))

    def test_a_prompt_of_one_token(self) -> None:
        case = adapted()
        assert generate(case.model, [[7]]) == [case.reference.greedy(torch.tensor([[7]]), NEW)]
        assert_route_is_the_references(case, case.model.route(torch.tensor([[7]])), [[7]])

    def test_input_embeddings(self) -> None:
        model = adapted().model
        input_ids, attention_mask = pad(PROMPTS, "left")
        embeddings = model.get_input_embeddings()(input_ids)
        output = model.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, max_new_tokens=NEW, do_sample=False
        )
        assert output.tolist() == generate(model)
        embedded = model.route(inputs_embeds=embeddings, attention_mask=attention_mask)
        assert embedded == model.route(input_ids, attention_mask)

    def test_positional_input(self) -> None:
        model = adapted().model
        input_ids = torch.tensor(random_prompts(2, 5))
        output = model.generate(input_ids, max_new_tokens=NEW, do_sample=False)
        assert output[:, 5:].tolist() == generate(model, input_ids.tolist())


class TestWaysToDecode:
    @pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "opt"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"cache_implementation": "static"},
            {"cache_implementation": "dynamic"},
            {"use_cache": False},
            {"prefill_chunk_size": 3},
        ],
        ids=str,
    )
    def test_caches(self, name: str, settings: dict[str, Any]) -> None:
        model = adapted(name).model
        assert generate(model, **settings) == generate(model)
        assert_nothing_in_force(model)

    def test_prompt_lookup(self) -> None:
        model = adapted().model
        # The prompt repeats itself, so candidates are found.
        prompt = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]
        plain = generate(model, prompt, max_new_tokens=12)
        assert generate(model, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3) == plain

    @pytest.mark.parametrize("positional", [False, True])
    def test_a_pass_of_its_own_finds_the_prompt(self, positional: bool) -> None:
        model = adapted().model
        prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
        config = GenerationConfig(max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
        named = {"inputs": prompt, "generation_config": config}
        output = model.generate(*named.values()) if positional else model.generate(**named)
        assert output[:, 10:].tolist() == generate(model, prompt.tolist(), max_new_tokens=8)

    def test_an_assistant_model(self) -> None:
        model = adapted().model
        for prompt in PROMPTS:
            found = generate(model, [prompt], assistant_model=ARCHITECTURES["llama"](), max_new_tokens=12)
            assert found == generate(model, [prompt], max_new_tokens=12)

    def test_an_adapted_model_as_assistant(self) -> None:
        model, assistant = adapted().model, adapted(seed=5).model
        prompt = PROMPTS[:1]
        # The assistant generates its candidates in several generations on one cache.
        with pytest.raises(MiLoraError, match="route="):
            generate(model, prompt, assistant_model=assistant)
        assert_nothing_in_force(model)
        with assistant.use_route(assistant.route(torch.tensor(prompt))):
            assert generate(model, prompt, assistant_model=assistant) == generate(model, prompt)
        assert_nothing_in_force(assistant)

    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
    def test_the_inner_model_generates_the_same(self, settings: dict[str, Any]) -> None:
        model = adapted().model
        assert generate(model.base_model.model, **settings) == generate(model, **settings)
        assert_nothing_in_force(model)

    def test_beams_are_the_rows_alone(self) -> None:
        model = adapted().model
        beams = {"num_beams": 3, "num_return_sequences": 2}
        together = generate(model, **beams)
        assert together == [row for prompt in PROMPTS for row in generate(model, [prompt], **beams)]
        assert together[::2] != generate(model)

    def test_beams_follow_the_route_of_their_prompt(self) -> None:
        model = adapted().model
        route = model.route(*pad(PROMPTS, "left"))
        assert generate(model, num_beams=3, route=route) == generate(model, num_beams=3)
        with model.use_route(route):
            assert generate(model, num_beams=3) == generate(model, num_beams=3, route=route)

    def test_sampling_with_several_return_sequences(self) -> None:
        model = adapted().model
        settings = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7}

        def sample(**more: Any) -> list[list[int]]:
            torch.manual_seed(3)
            return generate(model, **settings, **more)

        found = sample()
        assert len(found) == 12
        assert len({tuple(row) for row in found}) > 4
        # The same random draws, with each row's route fixed to its prompt's.
        assert found == sample(route=model.route(*pad(PROMPTS, "left")))
        other = model.route(*pad(PROMPTS[::-1], "left"))
        assert found != sample(route=other)


class TestState:
    def test_a_second_generation_has_its_own_route(self) -> None:
        case = adapted()
        for prompt in PROMPTS:
            assert generate(case.model, [prompt]) == [case.reference.greedy(torch.tensor([prompt]), NEW)]
            assert_nothing_in_force(case.model)

    @pytest.mark.parametrize("step", [1, 3])
    def test_an_exception_in_the_middle_leaves_nothing_behind(self, step: int) -> None:
        class Failing(LogitsProcessor):
            calls = 0

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                self.calls += 1
                if self.calls == step:
                    raise RuntimeError("interrupted")
                return scores

        case = adapted()
        with pytest.raises(RuntimeError, match="interrupted"):
            generate(case.model, logits_processor=[Failing()])
        assert_nothing_in_force(case.model)
        prompt = random_prompts(1, 6, seed=9)
        assert generate(case.model, prompt) == [case.reference.greedy(torch.tensor(prompt), NEW)]

    def test_an_exception_inside_a_block_leaves_nothing_behind(self) -> None:
        model = adapted().model

        def fails(*args: Any) -> None:
            raise RuntimeError("inside")

        handle = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="inside"):
            model(torch.tensor(PROMPTS[:1]))
        with pytest.raises(RuntimeError, match="inside"):
            generate(model)
        handle.remove()
        assert_nothing_in_force(model)
        assert generate(model) == generate(adapted().model)

    @pytest.mark.parametrize(
        "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
    )
    def test_each_router_runs_once_a_generation(self, settings: dict[str, Any]) -> None:
        model = adapted().model
        with counted(model) as counts:
            generate(model, **settings)
        routers = {key: count for key, count in counts.items() if key.startswith("router")}
        assert routers == {"router model.layers.0": 1, "router model.layers.1": 1}

    @pytest.mark.parametrize("top_k", [1, 2, 7])
    def test_a_pass_computes_the_k_chosen_experts_alone(self, top_k: int) -> None:
        model = adapted(top_k=top_k).model
        with counted(model) as counts:
            generate(model, PROMPTS[:1] * 2)
        experts = {key: count for key, count in counts.items() if key.startswith("expert")}
        assert experts == {"expert model.layers.0": top_k * NEW, "expert model.layers.1": top_k * NEW}

    def test_a_forced_route_asks_no_router(self) -> None:
        model = adapted().model
        route = model.route(*pad(PROMPTS, "left"))
        with counted(model) as counts:
            found = generate(model, route=route)
        assert found == generate(model)
        assert not [key for key in counts if key.startswith("router")]

    def test_two_threads_have_their_own_routes(self) -> None:
        model = adapted().model
        batches = [random_prompts(2, (4, 8), seed) for seed in range(8)]
        alone = [generate(model, batch) for batch in batches]
        assert len({str(tokens) for tokens in alone}) == len(batches)
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(lambda batch: generate(model, batch), batches)) == alone

    def test_a_block_on_its_own_is_refused(self) -> None:
        model = adapted().model
        block = model.base_model.model.model.layers[0]
        with pytest.raises(RuntimeError, match=r"model\.layers\.0 was called directly"):
            block(torch.zeros(1, 3, 32))


class TestForcedRoutes:
    def test_another_prompts_route(self) -> None:
        case = adapted()
        route = case.model.route(torch.tensor([PROMPTS[1]]))
        decision = case.reference.route(torch.tensor([PROMPTS[1]]))
        prompt = torch.tensor([PROMPTS[0]])
        expected = case.reference.logits(prompt, 0, decision)
        with case.model.use_route(route):
            torch.testing.assert_close(case.model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
        forced = generate(case.model, PROMPTS[:1], route=route)
        assert forced != generate(case.model, PROMPTS[:1])
        assert_nothing_in_force(case.model)

    def test_a_route_survives_a_file(self, tmp_path: Any) -> None:
        model = adapted(gate="softmax").model
        model.route(*pad(PROMPTS, "left")).save(tmp_path / "route.safetensors")
        assert generate(model, route=Route.load(tmp_path / "route.safetensors")) == generate(model)

    def test_the_innermost_route_counts_and_the_outer_returns(self) -> None:
        model = adapted().model
        outer, inner = (model.route(torch.tensor([prompt])) for prompt in PROMPTS[:2])
        prompt = PROMPTS[2:3]
        with model.use_route(outer):
            first = generate(model, prompt)
            with model.use_route(inner):
                assert generate(model, prompt) == generate(model, prompt, route=inner)
            assert generate(model, prompt, route=inner) != first
            assert generate(model, prompt) == first

    def test_under_a_route_in_force_that_is_the_route(self) -> None:
        model = adapted().model
        route = model.route(torch.tensor([PROMPTS[0]]))
        with model.use_route(route):
            assert model.route(torch.tensor([PROMPTS[1]])).gates.tolist() == route.gates.tolist()

    @pytest.mark.parametrize("rows", [3, 8])
    def test_another_number_of_rows_is_refused(self, rows: int) -> None:
        model = adapted().model
        route = model.route(torch.tensor(random_prompts(rows, 4)))
        with pytest.raises(MiLoraError, match=f"for {rows} prompts; the batch has 4 rows"):
            generate(model, route=route)
        with pytest.raises(MiLoraError, match=f"for {rows} prompts; the batch has 4 rows"), model.use_route(route):
            model(*pad(PROMPTS, "left"))
        assert_nothing_in_force(model)

    def test_a_route_of_another_model_is_refused(self) -> None:
        model = adapted().model
        route = adapted("phi3").model.route(torch.tensor([PROMPTS[0]]))
        with pytest.raises(MiLoraError, match="Use a route of the same adapter and backbone"):
            generate(model, PROMPTS[:1], route=route)


class TestCachesOfTheCaller:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
    def test_a_loop_of_plain_forwards_keeps_the_route(self, name: str) -> None:
        case = adapted(name)
        for prompt in PROMPTS:
            cache, tokens, found = DynamicCache(config=case.model.config), torch.tensor([prompt]), []
            for _ in range(NEW):
                with torch.no_grad():
                    logits = case.model(tokens, past_key_values=cache, use_cache=True).logits
                tokens = logits[:, -1:].argmax(dim=-1)
                found.append(tokens.item())
            assert found == case.reference.greedy(torch.tensor([prompt]), NEW)

    def test_the_model_makes_the_cache(self) -> None:
        case = adapted()
        tokens, cache, found = torch.tensor(PROMPTS[:1]), None, []
        for _ in range(NEW):
            with torch.no_grad():
                output = case.model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            found.append(tokens.item())
        assert found == case.reference.greedy(torch.tensor(PROMPTS[:1]), NEW)
        del cache, output
        assert_nothing_in_force(case.model)

    def test_two_caches_in_turn(self) -> None:
        case = adapted()
        caches = [DynamicCache(config=case.model.config) for _ in PROMPTS]
        tokens = [torch.tensor([prompt]) for prompt in PROMPTS]
        found: list[list[int]] = [[] for _ in PROMPTS]
        for _ in range(NEW):
            for row, cache in enumerate(caches):
                with torch.no_grad():
                    logits = case.model(tokens[row], past_key_values=cache).logits
                tokens[row] = logits[:, -1:].argmax(dim=-1)
                found[row].append(tokens[row].item())
        assert found == [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in PROMPTS]

    def test_generate_continues_a_filled_cache_with_its_route_alone(self) -> None:
        case = adapted()
        prompt = torch.tensor(PROMPTS[:1])
        whole = case.reference.greedy(prompt, 2 * NEW)
        route = case.model.route(prompt)
        cache = DynamicCache(config=case.model.config)
        settings = {"do_sample": False, "past_key_values": cache, "max_new_tokens": NEW}
        first = case.model.generate(prompt, **settings)
        with pytest.raises(MiLoraError, match="route="):
            case.model.generate(first, **settings)
        second = case.model.generate(first, route=route, **settings)
        assert second[0, prompt.shape[1] :].tolist() == whole
        assert_nothing_in_force(case.model)

    def test_a_plain_forward_on_a_cache_of_unknown_route_is_refused(self) -> None:
        case = adapted()
        prompt, token = torch.tensor(PROMPTS[:1]), torch.tensor([[5]])
        cache = DynamicCache(config=case.model.config)
        with case.model.disable_adapter():
            case.model(prompt, past_key_values=cache)
        with pytest.raises(MiLoraError, match=r"an unknown route.*use_route"):
            case.model(token, past_key_values=cache)
        with case.model.use_route(case.model.route(prompt)):
            case.model(token, past_key_values=cache)
        assert cache.get_seq_length() == prompt.shape[1] + 1
