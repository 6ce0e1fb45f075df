"""A context belongs to its request in every thread or task; a cache belongs to its adapter, route and rows."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import adapted, add_adapter, assert_nothing_in_force
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from milora import MiLoraConfig, MiLoraError, Route
from milora.inference.together import serve_together
from milora.tuners import identity

NEW = 5
PROMPTS = random_prompts(4, (3, 9), seed=3)
NAMES = ["default", "other", "__base__", "other"]


def two_adapters(**settings: Any) -> PeftModel:
    model = adapted(**settings).model
    add_adapter(model, "other", seed=7, top_k=3, r=6)
    return model


def generate(model: PeftModel, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    input_ids, attention_mask = pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)[
        :, input_ids.shape[1] :
    ].tolist()


class EachStep(LogitsProcessor):
    """Runs a function between the steps of a generation."""

    def __init__(self, then: Any) -> None:
        self.then, self.step = then, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        self.then(self.step)
        return scores


class TestNestedCalls:
    """A call of the model during a generation uses the call's own prompt."""

    @pytest.mark.parametrize(
        "settings",
        [{}, {"use_cache": False}, {"num_beams": 2}, {"adapter_names": NAMES}, {"cache_implementation": "static"}],
        ids=str,
    )
    @pytest.mark.parametrize("nested", ["forward", "same size", "route", "generate", "disabled"])
    def test_both_are_as_if_alone(self, nested: str, settings: dict[str, Any]) -> None:
        model = two_adapters()
        other = torch.tensor(random_prompts(4 if nested == "same size" else 2, 5, seed=8))

        def call() -> Any:
            if nested == "route":
                return model.route(other).gates
            if nested == "generate":
                return model.generate(other, max_new_tokens=2, do_sample=False)
            if nested == "disabled":
                with model.disable_adapter(), torch.no_grad():
                    return model(other).logits
            with torch.no_grad():
                return model(other).logits

        alone, expected, seen = call(), generate(model, **settings), []
        found = generate(model, logits_processor=[EachStep(lambda step: seen.append(call()))], **settings)
        assert found == expected
        assert len(seen) >= NEW - 1
        for each in seen:
            torch.testing.assert_close(each, alone)
        assert_nothing_in_force(model)

    def test_a_given_route_is_for_its_generation(self) -> None:
        model = two_adapters()
        route = model.route(torch.tensor(PROMPTS[:1]))
        other = torch.tensor(PROMPTS[1:2])
        alone, seen = model(other).logits, []
        generate(model, PROMPTS[2:3], route=route, logits_processor=[EachStep(lambda _: seen.append(model(other)))])
        for output in seen:
            torch.testing.assert_close(output.logits, alone)

    def test_other_prompts_under_a_merged_route_are_refused(self) -> None:
        model = two_adapters()
        with pytest.raises(MiLoraError, match="cannot run other prompts"):
            generate(
                model,
                PROMPTS[:1],
                merge_route=True,
                logits_processor=[EachStep(lambda s: s > 2 and model(torch.tensor(PROMPTS[1:2])))],
            )
        assert_nothing_in_force(model)


class TestThreadsAndTasks:
    def routes(self, model: PeftModel) -> tuple[list[Route], list[Any]]:
        routes = [model.route(torch.tensor([prompt])) for prompt in PROMPTS[1:3]]
        return routes, [generate(model, PROMPTS[:1], route=route) for route in routes]

    def test_what_inherits_the_context_follows(self) -> None:
        model = two_adapters()
        routes, wanted = self.routes(model)

        async def request(which: int, seconds: float) -> Any:
            with model.use_route(routes[which]):
                await asyncio.sleep(seconds)
                here = generate(model, PROMPTS[:1])
                await asyncio.sleep(seconds)
                return here, await asyncio.to_thread(generate, model, PROMPTS[:1])

        async def plain() -> Any:
            await asyncio.sleep(0.002)
            return await asyncio.to_thread(generate, model, PROMPTS[:1])

        async def main() -> list[Any]:
            return await asyncio.gather(request(0, 0.001), request(1, 0.003), plain())

        own = generate(model, PROMPTS[:1])
        found = asyncio.run(main())
        assert found == [(wanted[0], wanted[0]), (wanted[1], wanted[1]), own]
        with model.use_route(routes[0]):
            context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(context.run, generate, model, PROMPTS[:1]).result() == wanted[0]
        assert generate(model, PROMPTS[:1]) == own
        assert_nothing_in_force(model)

    @pytest.mark.parametrize("kind", ["route", "prompt", "record", "merged"])
    def test_a_thread_that_cannot_know_is_refused(self, kind: str) -> None:
        model = two_adapters()
        routes, _ = self.routes(model)
        scopes = {
            "route": lambda: model.use_route(routes[0]),
            "prompt": lambda: model.base_model.use_prompt(torch.ones(1, len(PROMPTS[0]), dtype=torch.bool)),
            "record": model.record_routes,
            "merged": lambda: model.merged_route(routes[0]),
        }
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(generate, model, PROMPTS[:1]).result()  # start the thread first
            with scopes[kind]():
                for call in (lambda: generate(model, PROMPTS[:1]), lambda: model(torch.tensor(PROMPTS[:1]))):
                    with pytest.raises(MiLoraError, match=r"Another thread has a context open|A route is merged"):
                        pool.submit(call).result()
            assert pool.submit(generate, model, PROMPTS[:1]).result() == own

    def test_a_thread_that_says_what_it_wants_is_served(self) -> None:
        model = two_adapters()
        routes, wanted = self.routes(model)
        own = generate(model, PROMPTS[:1])

        def other() -> Any:
            with model.use_route(routes[1]):
                mine = generate(model, PROMPTS[:1])
            with model.use_route(None):
                return mine, generate(model, PROMPTS[:1])

        with ThreadPoolExecutor(1) as pool, model.use_route(routes[0]):
            assert pool.submit(other).result() == (wanted[1], own)
            assert generate(model, PROMPTS[:1]) == wanted[0]

    def test_generators_may_end_in_another_order(self) -> None:
        model = two_adapters()
        routes, wanted = self.routes(model)
        own = generate(model, PROMPTS[:1])

        def stream(which: int) -> Any:
            with model.use_route(routes[which]):
                while True:
                    yield generate(model, PROMPTS[:1])

        first, second = stream(0), stream(1)
        assert next(first) == wanted[0]
        assert next(second) == wanted[1]
        first.close()
        assert next(second) == wanted[1]
        second.close()
        assert generate(model, PROMPTS[:1]) == own
        assert_nothing_in_force(model)


class TestRowsAndNames:
    @pytest.mark.parametrize("names", [NAMES[:2], NAMES[:1], NAMES * 2, NAMES[:3]], ids=len)
    def test_one_name_for_each_prompt(self, names: list[str]) -> None:
        model = two_adapters()
        lora = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(task_type="CAUSAL_LM"), adapter_name="default")
        lora.add_adapter("other", LoraConfig(task_type="CAUSAL_LM"))
        serve_together(lora.eval())
        input_ids, attention_mask = pad(PROMPTS, "left")
        for each in (model, lora):
            with pytest.raises(MiLoraError, match=f"adapter_names names {len(names)} rows"):
                each(input_ids, attention_mask=attention_mask, adapter_names=names)
            for settings in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
                with pytest.raises(MiLoraError, match=f"adapter_names names {len(names)} rows"):
                    generate(each, adapter_names=names, **settings)
        with pytest.raises(MiLoraError, match=f"adapter_names names {len(names)} rows"):
            model.route(input_ids, attention_mask, adapter_names=names)

    def test_a_route_has_a_row_for_each_prompt_or_one_for_all(self) -> None:
        model = two_adapters()
        route = model.route(*pad(PROMPTS, "left"))
        for call in (
            lambda: model(*pad(PROMPTS, "left")),
            lambda: generate(model),
            lambda: generate(model, num_beams=2),
        ):
            with pytest.raises(MiLoraError, match="is for 2 prompts"), model.use_route(route[:2]):
                call()
        assert generate(model, route=route[0]) == generate(model, route=route[[0, 0, 0, 0]])

    @pytest.mark.parametrize("method", ["get", "add", "load"])
    def test_no_adapter_is_called_base(self, method: str, tmp_path: Any) -> None:
        model = two_adapters()
        model.save_pretrained(tmp_path)
        calls = {
            "get": lambda: get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=4), adapter_name="__base__"),
            "add": lambda: model.add_adapter("__base__", MiLoraConfig(r=4)),
            "load": lambda: model.load_adapter(tmp_path, "__base__"),
        }
        with pytest.raises(MiLoraError, match="cannot be named '__base__'"):
            calls[method]()
        assert sorted(model.peft_config) == ["default", "other"]


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
class TestIdentities:
    def in_the_middle(self, model: PeftModel, change: Any, **settings: Any) -> tuple[Any, Any]:
        """A generation's text or error, and the result of a change that another thread makes while it runs."""
        reached, changed, found = threading.Event(), threading.Event(), {}

        def pause(step: int) -> None:
            if step == 2:
                reached.set()
                changed.wait(0.3)  # the change can wait for this generation

        def run() -> None:
            try:
                found["text"] = generate(model, logits_processor=[EachStep(pause)], **settings)
            except MiLoraError as error:
                found["text"] = error

        thread = threading.Thread(target=run)
        thread.start()
        assert reached.wait(60)
        try:
            found["change"] = change()
        except MiLoraError as error:
            found["change"] = error
        changed.set()
        thread.join(60)
        return found["text"], found.get("change")

    def replace(self, model: PeftModel, name: str) -> None:
        model.delete_adapter(name)
        add_adapter(model, name, seed=21, top_k=7)
        generate(model, adapter_names=[name] * 4, max_new_tokens=2)

    @pytest.mark.parametrize("change", ["delete", "replace", "load", "weights", "switch", "disable"])
    @pytest.mark.parametrize("settings", [{"adapter_names": NAMES}, {}, {"use_cache": False}], ids=str)
    def test_a_running_text_stays_its_adapters(self, change: str, settings: dict[str, Any], tmp_path: Any) -> None:
        model = two_adapters()
        donor = adapted(seed=33).model
        donor.save_pretrained(tmp_path)
        expected = generate(model, **settings)
        used = "other" if settings.get("adapter_names") else "default"

        def disable() -> None:
            with model.disable_adapter():
                model(torch.tensor(PROMPTS[:1]))

        changes = {
            "delete": lambda: model.delete_adapter(used),
            "replace": lambda: self.replace(model, used),
            "load": lambda: model.load_adapter(tmp_path, "default"),
            "weights": lambda: fill_with(model, donor, "default"),
            "switch": lambda: model.set_adapter("other"),
            "disable": disable,
        }
        text, _ = self.in_the_middle(model, changes[change], **settings)
        assert text == expected

    def test_other_settings_under_a_name_in_use_are_refused(self, tmp_path: Any) -> None:
        model = two_adapters()
        adapted(seed=33, top_k=1, gate="softmax").model.save_pretrained(tmp_path / "other")
        adapted(seed=33).model.save_pretrained(tmp_path / "same")
        before = generate(model)
        with pytest.raises(MiLoraError, match=r"loaded with other settings \(gate, top_k\)"):
            model.load_adapter(tmp_path / "other", "default")
        assert generate(model) == before
        model.load_adapter(tmp_path / "same", "default")
        assert generate(model) == generate(adapted(seed=33).model)

    def test_deleting_from_inside_is_refused(self) -> None:
        model = two_adapters()
        with pytest.raises(MiLoraError, match="in use by the generation that made this call"):
            generate(model, logits_processor=[EachStep(lambda _: model.delete_adapter("default"))])
        assert_nothing_in_force(model)
        model.delete_adapter("default")

    def test_patience_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(identity, "PATIENCE", 0.05)
        model = two_adapters()
        expected = generate(model)
        text, error = self.in_the_middle(model, lambda: model.delete_adapter("default"))
        assert text == expected
        assert "still in use by running generations" in str(error)
        assert "default" in model.peft_config

    @pytest.mark.parametrize("change", ["switch", "replace", "weights"])
    @pytest.mark.parametrize("copied", [False, True])
    def test_a_cache_is_not_continued_by_other_weights(self, change: str, copied: bool) -> None:
        model = two_adapters()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor(PROMPTS[:1]), past_key_values=cache)
        cache = copy.deepcopy(cache) if copied else cache
        if change == "switch":
            model.set_adapter("other")
        elif change == "replace":
            model.set_adapter("other")
            model.delete_adapter("default")
            add_adapter(model, "default", seed=5)
            model.set_adapter("default")
        else:
            fill_with(model, adapted(seed=33).model, "default")
        with pytest.raises(MiLoraError, match=r"filled by the adapters|deleted or replaced"):
            model(torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(MiLoraError, match=r"filled by the adapters|deleted or replaced|route="):
            model.generate(torch.tensor([[*PROMPTS[0], 5]]), past_key_values=cache, max_new_tokens=1)

    def test_plain_lora_too(self) -> None:
        model = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        serve_together(model.eval())
        expected = generate(model, adapter_names=NAMES)

        def replace() -> None:
            model.delete_adapter("other")
            model.add_adapter("eve", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
            model.eval()
            generate(model, adapter_names=["eve"] * 4, max_new_tokens=2)

        text, _ = self.in_the_middle(model, replace, adapter_names=NAMES)
        assert text == expected


class TestRowsOfACache:
    """A caller's own loop reorders, selects and repeats rows between steps."""

    def loop(self, model: PeftModel, prompts: Tensor, mask: Tensor, change: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompts, attention_mask=mask, past_key_values=cache, use_cache=True)
            rows = change(cache)
            mask = torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            return model(
                torch.full((len(rows), 1), 9), attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("change", ["reorder", "select", "mask", "repeat", "crop"])
    def test_they_keep_their_routes(self, change: str, train: bool) -> None:
        model = adapted(top_k=1).model
        model.train(train)
        prompts = torch.tensor(random_prompts(4, 6, seed=5))
        mask = torch.ones_like(prompts)
        changes = {
            "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 3, 1])), [2, 0, 3, 1]),
            "select": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
            "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, False])), [0, 2]),
            "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
            "crop": (lambda cache: cache.crop(0), [0, 1, 2, 3]),
        }
        apply, rows = changes[change]
        with model.use_route(None):
            found = self.loop(model, prompts, mask, lambda cache: apply(cache) or rows)
        for place, row in enumerate(rows):
            alone = self.loop(model, prompts[row : row + 1], mask[row : row + 1], lambda cache: [0])
            torch.testing.assert_close(found[place], alone[0], rtol=1e-4, atol=1e-5)

    def test_rows_that_cannot_be_told_are_refused(self) -> None:
        model = adapted(top_k=1).model
        prompts, cache = torch.tensor(random_prompts(4, 6, seed=5)), DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompts, past_key_values=cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:2], layer.values[:2]
            with pytest.raises(MiLoraError, match="cannot be matched to prompts"):
                model(torch.full((2, 1), 9), past_key_values=cache)


def fill_with(model: PeftModel, donor: PeftModel, adapter: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(model, get_peft_model_state_dict(donor), adapter)
