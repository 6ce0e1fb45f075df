"""Late adaptation and the router window against the reference: adapted tokens, router inputs, shared prompts."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapted import ALL_ARCHITECTURES, Adapted, adapted, add_adapter, assert_nothing_in_force
from support.architectures import pad, random_prompts
from torch import Tensor
from transformers import DynamicCache, StaticCache

from milora import MiLoraConfig, MiLoraError, Route

NEW = 5
PROMPTS = random_prompts(4, (3, 9), seed=1)
LATE = {"adapted_tokens": "completion"}


def generate(model: PeftModel, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    input_ids, attention_mask = pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)[
        :, input_ids.shape[1] :
    ].tolist()


def expected(case: Adapted, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [case.reference.greedy(torch.tensor([prompt]), NEW) for prompt in prompts]


def fill_bare(model: PeftModel, tokens: Tensor, cache: Any = None) -> Any:
    """A cache filled by the bare backbone."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with model.disable_adapter(), torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


class TestAgainstTheReference:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "qwen3", "phi3", "mixtral"])
    @pytest.mark.parametrize("pooler", ["attention", "last"])
    def test_generation(self, name: str, pooler: str) -> None:
        case = adapted(name, pooler=pooler, **LATE)
        found = generate(case.model)
        assert found == expected(case)
        assert found != generate(adapted(name, pooler=pooler).model)
        assert_nothing_in_force(case.model)

    @pytest.mark.parametrize("gate", ["hard", "softmax", "renormalized"])
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    def test_gates_and_dora(self, gate: str, use_dora: bool) -> None:
        case = adapted(gate=gate, use_dora=use_dora, **LATE)
        assert generate(case.model) == expected(case)

    @pytest.mark.parametrize("window", [1, 3, 6, 100])
    @pytest.mark.parametrize("pooler", ["attention", "mean", "max", "last"])
    def test_the_window(self, window: int, pooler: str) -> None:
        case = adapted(pooler=pooler, router_window=window)
        assert generate(case.model) == expected(case)
        route = case.model.route(*pad(PROMPTS, "left"))
        whole = adapted(pooler=pooler).model.route(*pad(PROMPTS, "left"))
        for row, prompt in enumerate(PROMPTS):
            if len(prompt) <= window:
                assert route[row] == whole[row]

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"num_beams": 1, "num_return_sequences": 1},
            {"prefill_chunk_size": 2},
            {"prompt_lookup_num_tokens": 3},
        ],
        ids=str,
    )
    def test_ways_to_decode(self, settings: dict[str, Any]) -> None:
        case = adapted(**LATE)
        for prompt in [*PROMPTS[:2], [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]:
            assert generate(case.model, [prompt], **settings) == expected(case, [prompt])
        assert_nothing_in_force(case.model)

    def test_beams(self) -> None:
        model = adapted(**LATE).model
        together = generate(model, num_beams=3)
        assert together == [row for prompt in PROMPTS for row in generate(model, [prompt], num_beams=3)]
        assert together == generate(model, num_beams=3, use_cache=False)

    def test_a_given_route_and_a_merged_one(self) -> None:
        case = adapted(**LATE)
        prompt = torch.tensor(PROMPTS[:1])
        other = case.model.route(torch.tensor(PROMPTS[1:2]))
        decision = case.reference.route(torch.tensor(PROMPTS[1:2]))
        text = case.reference._decode(prompt, NEW, decision)
        assert generate(case.model, PROMPTS[:1], route=other) == [text]
        assert generate(case.model, PROMPTS[:1], merge_route=True) == expected(case, PROMPTS[:1])
        with pytest.raises(MiLoraError, match="would also change the prompts"), case.model.merged_route(other):
            pass

    def test_logits_and_gradients_of_training(self) -> None:
        case = adapted(**LATE, gate="softmax")
        completed = [[*prompt, 5, 6, 7] for prompt in PROMPTS]
        input_ids, attention_mask = pad(completed, "right")
        labels = input_ids.clone()
        for row, prompt in enumerate(PROMPTS):
            labels[row, : len(prompt)] = -100
        labels[attention_mask == 0] = -100
        case.model.requires_grad_(True)
        loss = case.model(input_ids, attention_mask=attention_mask, labels=labels).loss
        for tensor in case.reference.tensors.values():
            tensor.requires_grad_(True)
        rows = [
            case.reference.loss(torch.tensor([row]), len(prompt))
            for row, prompt in zip(completed, PROMPTS, strict=True)
        ]
        mean = torch.stack(rows).mean()  # three tokens each
        torch.testing.assert_close(loss, mean, rtol=1e-4, atol=1e-5)
        loss.backward()
        mean.backward()
        for path, parameter in case.model.named_parameters():
            key = path.replace(".default", "")
            if key in case.reference.tensors and case.reference.tensors[key].grad is not None:
                found, wanted = parameter.grad, case.reference.tensors[key].grad
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5, msg=key)

    def test_gradient_checkpointing(self) -> None:
        def gradients(**kwargs: Any) -> dict[str, Tensor]:
            model = adapted(**LATE).model.train()
            if kwargs:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
                model.enable_input_require_grads()
            input_ids, attention_mask = pad(PROMPTS, "right")
            labels = input_ids.clone()
            labels[:, :2] = -100
            labels[attention_mask == 0] = -100
            model(input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        plain = gradients()
        for reentrant in (True, False):
            for name, gradient in gradients(use_reentrant=reentrant).items():
                torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_a_prompt_of_one_token_is_adapted(self) -> None:
        case = adapted(**LATE)
        assert generate(case.model, [[7]]) == expected(case, [[7]])
        assert generate(case.model, [[7]]) == generate(adapted().model, [[7]])


class TestMixedBatches:
    def test_rows_of_both_kinds_side_by_side(self) -> None:
        case = adapted(**LATE)
        whole = add_adapter(case.model, "whole", seed=7, top_k=3, r=6)
        late = add_adapter(case.model, "late", seed=8, pooler="last", **LATE)
        names = ["default", "whole", "late", "__base__"]
        found = generate(case.model, adapter_names=names)
        prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
        assert found[0] == case.reference.greedy(prompts[0], NEW)
        assert found[1] == whole.greedy(prompts[1], NEW)
        assert found[2] == late.greedy(prompts[2], NEW)
        assert found[3] == case.reference.backbone_greedy(prompts[3], NEW)
        assert_nothing_in_force(case.model)

    def test_an_adapter_that_was_replaced(self) -> None:
        """The batch's prompt needs no stacks, but later steps do, and must use the new adapter's."""
        case = adapted(**LATE)
        add_adapter(case.model, "whole", seed=7, top_k=3, r=6)
        names = ["default", "whole", "whole", "__base__"]
        generate(case.model, adapter_names=["whole"] * 4)  # creates the stacks
        case.model.delete_adapter("whole")
        whole = add_adapter(case.model, "whole", seed=8, top_k=3, r=6)
        found = generate(case.model, adapter_names=names)
        assert found[1] == whole.greedy(torch.tensor(PROMPTS[1:2]), NEW)
        assert found[2] == whole.greedy(torch.tensor(PROMPTS[2:3]), NEW)


class TestSharedPrompts:
    """A prompt's keys and values are the bare backbone's, so any model on that backbone can compute them."""

    @pytest.mark.parametrize("cut", [1, 3, -1])
    def test_a_cache_that_the_backbone_filled(self, cut: int) -> None:
        case = adapted(pooler="last", **LATE)
        for prompt in map(torch.tensor, [[prompt] for prompt in PROMPTS]):
            wanted = case.reference.greedy(prompt, NEW)
            cache = fill_bare(case.model, prompt[:, :cut])
            for each in (cache, copy.deepcopy(cache)):
                found = case.model.generate(prompt, past_key_values=each, max_new_tokens=NEW, do_sample=False)
                assert found[0, prompt.shape[1] :].tolist() == wanted

    def test_tenants_share_one_cache(self) -> None:
        case = adapted(pooler="last", **LATE)
        other = add_adapter(case.model, "other", seed=9, pooler="last", **LATE)
        prompt = torch.tensor(PROMPTS[:1])
        cache = fill_bare(case.model, prompt[:, :-1])
        for name, reference in (("default", case.reference), ("other", other)):
            case.model.set_adapter(name)
            text = case.model.generate(
                prompt, past_key_values=copy.deepcopy(cache), max_new_tokens=NEW, do_sample=False
            )
            assert text[0, prompt.shape[1] :].tolist() == reference.greedy(prompt, NEW)

    def test_keys_and_values_of_the_prompt_are_the_backbones(self) -> None:
        model = adapted(**LATE).model
        prompt = torch.tensor(PROMPTS[:1])
        own, bare = DynamicCache(config=model.config), fill_bare(model, prompt)
        with torch.no_grad():
            model(prompt, past_key_values=own)
        for layer, other in zip(own.layers, bare.layers, strict=True):
            torch.testing.assert_close(layer.keys[:, :, :-1], other.keys[:, :, :-1])
            torch.testing.assert_close(layer.values[:, :, :-1], other.values[:, :, :-1])
        assert not torch.allclose(own.layers[-1].values[:, :, -1], bare.layers[-1].values[:, :, -1])

    def test_cropped_into_the_prompt_it_is_a_shared_prefix(self) -> None:
        case = adapted(pooler="last", **LATE)
        prompt, cache = torch.tensor(PROMPTS[:1]), DynamicCache(config=case.model.config)
        case.model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        with pytest.raises(MiLoraError, match="tokens that an adapter has changed"):
            case.model.generate(torch.cat([prompt, prompt], dim=1), past_key_values=cache, max_new_tokens=1)
        cache.crop(2 - cache.get_seq_length())
        longer = torch.cat([prompt[:, :2], torch.tensor([[9, 11, 4]])], dim=1)
        found = case.model.generate(longer, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert found[0, longer.shape[1] :].tolist() == case.reference.greedy(longer, NEW)

    def test_a_router_that_reads_the_cached_tokens_is_refused_without_a_route(self) -> None:
        case = adapted(**LATE)
        prompt = torch.tensor(PROMPTS[:1])
        cache = fill_bare(case.model, prompt[:, :-1])
        with pytest.raises(MiLoraError, match="routers of 'default' must read it"):
            case.model.generate(prompt, past_key_values=copy.deepcopy(cache), max_new_tokens=1)
        route = case.model.route(prompt)
        found = case.model.generate(prompt, past_key_values=cache, route=route, max_new_tokens=NEW, do_sample=False)
        assert found[0, prompt.shape[1] :].tolist() == case.reference.greedy(prompt, NEW)

    def test_a_loop_of_plain_forwards(self) -> None:
        case = adapted(pooler="last", **LATE)
        for prompt in map(torch.tensor, [[prompt] for prompt in PROMPTS]):
            cache, tokens, found = fill_bare(case.model, prompt[:, :-1]), prompt[:, -1:], []
            for _ in range(NEW):
                with torch.no_grad():
                    logits = case.model(tokens, past_key_values=cache).logits
                tokens = logits[:, -1:].argmax(dim=-1)
                found.append(tokens.item())
            assert found == case.reference.greedy(prompt, NEW)

    def test_a_cache_that_was_reset_belongs_to_who_filled_it_last(self) -> None:
        case = adapted(pooler="last", **LATE)
        cache = StaticCache(config=case.model.config, max_cache_len=32)
        case.model.generate(torch.tensor(PROMPTS[1:2]), past_key_values=cache, max_new_tokens=3, do_sample=False)
        cache.reset()
        prompt = torch.tensor(PROMPTS[:1])
        fill_bare(case.model, prompt[:, :-1], cache)
        found = case.model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert found[0, prompt.shape[1] :].tolist() == case.reference.greedy(prompt, NEW)

    def test_a_static_cache(self) -> None:
        case = adapted(pooler="last", **LATE)
        prompt = torch.tensor(PROMPTS[:1])
        cache = fill_bare(case.model, prompt[:, :-1], StaticCache(config=case.model.config, max_cache_len=32))
        found = case.model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert found[0, prompt.shape[1] :].tolist() == case.reference.greedy(prompt, NEW)


class TestConfig:
    @pytest.mark.parametrize(
        "settings",
        [{"adapted_tokens": "prompt"}, {"router_window": 0}, {"router_window": True}, {"router_window": 1.5}],
    )
    def test_values_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(MiLoraError, match=next(iter(settings))):
            MiLoraConfig(**settings)

    def test_on_disk(self, tmp_path: Any) -> None:
        model = adapted(router_window=5, **LATE).model
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(ALL_ARCHITECTURES["llama"](), tmp_path)
        config = loaded.peft_config["default"]
        assert (config.adapted_tokens, config.router_window) == ("completion", 5)
        assert generate(loaded.eval()) == generate(model)
        assert isinstance(loaded.base_model.route(torch.tensor(PROMPTS[:1])), Route)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.parametrize(
    "own", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 4]}, {"bias": "all"}], ids=str
)
def test_a_prompt_with_own_embeddings_is_not_the_backbones(own: dict[str, Any]) -> None:
    """The bare backbone's keys and values of the prompt are others, so its cache is refused."""
    config = MiLoraConfig(r=4, top_k=2, pooler="last", **LATE, **own)
    assert not config.leaves_prompt_bare
    name = "gpt2" if "bias" in own else "llama"
    model = get_peft_model(ALL_ARCHITECTURES[name](), config).eval()
    tokens = torch.tensor([[3, 4, 5, 6, 3, 8]])
    cache = fill_bare(model, tokens[:, :4])
    with pytest.raises(MiLoraError, match="own embeddings, norms or biases"), torch.no_grad():
        model(input_ids=tokens[:, 4:], past_key_values=cache)
    with pytest.raises(MiLoraError, match="own embeddings, norms or biases"):
        model.generate(input_ids=tokens, past_key_values=fill_bare(model, tokens[:, :4]), max_new_tokens=2)
    assert MiLoraConfig(pooler="last", **LATE).leaves_prompt_bare
    assert not MiLoraConfig().leaves_prompt_bare
