"""The operations of a decode step, counted and compared with the bare backbone's."""

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapted import adapted, assert_nothing_in_force, fill, tensors_for
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from milora import Route
from milora.tuners.milora import routed
from milora.tuners.milora.plans.decode import DecodePlan
from milora_core.kernels import native

NEW = 5
PROMPTS = random_prompts(3, (4, 8), seed=4)
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "alias",
    "detach",
    "expand",
    "unsqueeze",
    "select",
    "permute",
}
ASKS_THE_DEVICE = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select"}


def generate(model: nn.Module, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    input_ids, attention_mask = pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)[
        :, input_ids.shape[1] :
    ].tolist()


class Operations(TorchDispatchMode):
    """Counts the operations of each of a model's forward passes, including all hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.passes: list[Counter[str]] = []
        self.inside = False
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.passes.append(Counter())
        self.inside = True

    def _end(self, *_: Any) -> None:
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.inside and name not in VIEWS:
            self.passes[-1][name] += 1
        return func(*args, **(kwargs or {}))


def decode_step(model: Any, prompts: list[list[int]] = PROMPTS[:1], **settings: Any) -> Counter[str]:
    """The operations of a generation's third decode step."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    with Operations(inner) as operations:
        generate(model, prompts, **settings)
    return operations.passes[3]


def route_of(model: PeftModel, chosen: dict[int, list[str]], rows: int = 1) -> Route:
    """A route that chooses these experts by block, for all rows."""
    like = model.route(torch.tensor(PROMPTS[:1]))
    gates = torch.zeros_like(like.gates)
    for block, experts in chosen.items():
        for expert in experts:
            gates[block, 0, like.experts.index(expert)] = 1
    return Route(gates, like.probabilities, like.experts, like.blocks).expand(rows)


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")
class TestNativeOperations:
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rows", [1, 3])
    def test_torch_does_what_it_does_for_the_backbone(self, rows: int, dtype: torch.dtype, use_dora: bool) -> None:
        model = adapted(use_dora=use_dora, dtype=dtype).model
        prompts = [PROMPTS[0]] * rows
        route = route_of(model, {0: [*ATTENTION, "mlp.down_proj"], 1: ["mlp.up_proj"]}, rows)
        assert decode_step(model, prompts, route=route) == decode_step(ARCHITECTURES["llama"]().to(dtype), prompts)

    def test_what_the_kernel_does_not_take_is_computed_as_in_the_prefill(self) -> None:
        model = adapted().model
        expected = generate(model)

        def with_gaps(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.repeat_interleave(2, dim=-1)[..., ::2]

        _each_layer(model, lambda layer: layer.base_layer.register_forward_hook(with_gaps))
        assert generate(model) == expected


@pytest.mark.usefixtures("torchs_products")
class TestOperations:
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    def test_where_nothing_is_chosen_it_is_the_backbones_step(self, use_dora: bool) -> None:
        model = adapted(use_dora=use_dora).model
        found = decode_step(model, route=route_of(model, {}))
        assert found == decode_step(ARCHITECTURES["llama"]())

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize(
        "chosen",
        [
            {0: ["mlp.down_proj"]},
            {1: ATTENTION},
            {0: [*ATTENTION, "self_attn.o_proj", "mlp.up_proj"], 1: ["mlp.gate_proj", "mlp.down_proj"]},
        ],
    )
    def test_two_products_for_each_chosen_expert(self, chosen: dict[int, list[str]], rows: int) -> None:
        model = adapted().model
        experts = sum(map(len, chosen.values()))
        prompts = [PROMPTS[0]] * rows
        found = decode_step(model, prompts, route=route_of(model, chosen, rows))
        base = decode_step(ARCHITECTURES["llama"](), prompts)
        # `lora_B`'s product, the scaling and the sum are one operation.
        assert found - base == Counter({"mm": experts, "addmm_": experts})
        assert not base - found

    def test_on_a_bf16_backbone_the_sum_is_rounded_once(self) -> None:
        model = adapted(dtype=torch.bfloat16).model
        found = decode_step(model, route=route_of(model, {0: ATTENTION}))
        base = decode_step(ARCHITECTURES["llama"]().to(torch.bfloat16))
        assert found - base == Counter({"_to_copy": 3, "mm": 6, "add_": 3})

    def test_rows_on_different_routes_add_an_operation_for_each_expert_that_some_chose(self) -> None:
        model = adapted().model
        first, second = route_of(model, {0: ATTENTION[:2]}), route_of(model, {0: ATTENTION[1:]})
        found = decode_step(model, PROMPTS[:2], route=Route.cat([first, second]))
        base = decode_step(ARCHITECTURES["llama"](), PROMPTS[:2])
        assert found - base == Counter({"mm": 3, "addmm_": 3, "masked_fill_": 2})

    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("gate", ["hard", "softmax"])
    @pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
    def test_nothing_is_asked_of_the_device(self, gate: str, use_dora: bool, settings: dict[str, Any]) -> None:
        model, backbone = adapted(gate=gate, use_dora=use_dora).model, ARCHITECTURES["llama"]()
        with Operations(model.base_model.model) as operations:
            generate(model, **settings)
        with Operations(backbone) as own:
            generate(backbone, **settings)
        asked, by_the_backbone = (
            [sum(each.passes[step][name] for name in ASKS_THE_DEVICE) for step in range(NEW)]
            for each in (operations, own)
        )
        # The prefill does check, which shows that the counter works.
        assert asked[0] > by_the_backbone[0]
        assert asked[1:] == by_the_backbone[1:]

    def test_scales_of_midora_are_computed_once_a_generation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted(use_dora=True, top_k=7).model
        computed: list[Any] = []
        compute = routed.dora_scale

        def count(layer: Any, adapter: str) -> Tensor:
            computed.append(layer)
            return compute(layer, adapter)

        monkeypatch.setattr(routed, "dora_scale", count)
        generate(model)
        assert len(computed) == len(set(computed)) == 14
        generate(model, PROMPTS[1:])
        assert len(computed) == 28


@pytest.mark.usefixtures("either_way")
class TestRows:
    def test_a_row_that_did_not_choose_an_expert_is_safe_from_its_infinities(self) -> None:
        model = adapted().model
        routes = [route_of(model, {0: ATTENTION}), route_of(model, {1: ["mlp.up_proj"]})]
        alone = generate(model, PROMPTS[1:2], route=routes[1])
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.k_proj.lora_A["default"].weight.fill_(float("inf"))
        assert generate(model, PROMPTS[:2], route=Route.cat(routes))[1] == alone[0]

    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("gate", ["hard", "softmax"])
    def test_decode_steps_give_the_logits_of_one_long_pass(self, gate: str, dtype: torch.dtype, use_dora: bool) -> None:
        model = adapted(gate=gate, dtype=dtype, use_dora=use_dora).model
        input_ids, attention_mask = pad(PROMPTS, "left")
        route = model.route(input_ids, attention_mask)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mask = torch.cat([attention_mask, torch.ones(len(PROMPTS), NEW, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad(), model.use_route(route):
            expected = model(output.sequences, attention_mask=mask, position_ids=positions).logits
        found = torch.stack(output.logits, dim=1)
        expected = expected[:, input_ids.shape[1] - 1 : -1].to(found.dtype)
        tolerance = 1e-4 if dtype == torch.float32 else 0.03 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)

    def test_what_is_prepared_keeps_the_adapters_precision(self) -> None:
        # Adapters are float32 on a bf16 backbone: LoRA's sum is computed in float32 and rounded once.
        model = adapted(dtype=torch.bfloat16, top_k=7).model
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen.append((args[0].clone(), module.base_layer(args[0]), output.clone()))

        layer.register_forward_hook(look)
        generate(model, PROMPTS[:1])
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == torch.float32
        for x, base, output in seen[1:]:
            expected = (base + 2 * (x.float() @ a.T @ b.T)).to(torch.bfloat16)
            assert (output.view(torch.int16) - expected.view(torch.int16)).abs().max() <= 1


@contextmanager
def _prepared() -> Iterator[list[weakref.ref[DecodePlan]]]:
    made: list[weakref.ref[DecodePlan]] = []
    init = DecodePlan.__init__

    def remember(self: DecodePlan, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(self))

    DecodePlan.__init__ = remember  # type: ignore[method-assign]
    try:
        yield made
    finally:
        DecodePlan.__init__ = init  # type: ignore[method-assign]


@pytest.mark.usefixtures("either_way")
class TestWhatIsKept:
    def test_freed_with_the_generation(self) -> None:
        model = adapted().model
        with _prepared() as made:
            generate(model)
            failing = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(_FailsThird())
            with pytest.raises(RuntimeError, match="third"):
                generate(model)
            failing.remove()
        gc.collect()
        assert len(made) == 2
        assert not [each for each in made if each() is not None]
        assert_nothing_in_force(model)

    @pytest.mark.parametrize(
        ("change", "use_dora"),
        [
            *itertools.product(["lora_A", "lora_B", "base_layer", "loaded", "scale"], [False, True]),
            ("magnitude", True),  # only MiDoRA has magnitudes
        ],
    )
    def test_never_stale(self, change: str, use_dora: bool) -> None:
        changes: dict[str, Callable[[PeftModel], None]] = {
            "loaded": lambda model: fill(model, tensors_for("llama", 7, use_dora=use_dora)),
            "scale": lambda model: _each_layer(model, lambda layer: layer.set_scale("default", 3.0)),
        }
        apply = changes.get(change, lambda model: _scale(model, change))
        model, fresh = adapted(use_dora=use_dora).model, adapted(use_dora=use_dora).model
        before = generate(model)
        apply(model)
        apply(fresh)
        assert generate(model) == generate(fresh)
        assert generate(model) != before

    def test_an_adapter_added_anew_under_its_name(self) -> None:
        model = adapted(use_dora=True).model
        before = generate(model)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        fill(model, tensors_for("llama", 7, use_dora=True), "other")
        other = generate(model)
        assert other == generate(adapted(use_dora=True, seed=7).model)
        model.set_adapter("default")
        model.delete_adapter("other")
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        fill(model, tensors_for("llama", 9, use_dora=True), "other")
        assert generate(model) == generate(adapted(use_dora=True, seed=9).model)
        model.set_adapter("default")
        assert generate(model) == before


class _FailsThird:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("third")


def _each_layer(model: PeftModel, then: Callable[[Any], None]) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "set_scale"):
            then(module)


@torch.no_grad()
def _scale(model: PeftModel, part: str) -> None:
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if part in name:
            parameter.mul_(1.3 + 0.1 * (index % 5))
