"""One route for a whole batch, merged into the backbone's weights for a while: its experts cost nothing a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.dora import dora_scale
from milora.tuners.milora.routers import chosen_modules, routers_of
from milora.tuners.milora.shared_weights import SharedWeights
from milora.tuners.prompt_pass import PromptTuner
from milora_core.errors import MiLoraError
from milora_core.routing import Route

MERGED = "a route is merged into the backbone's weights, which serve it and no other; leave merged_route first"
"""What to say of calls that a merged route rules out."""


class MergingTuner(PromptTuner):
    """What the tuner needs to merge a route: at once, or in the generation that finds it.

    The tuner sets `dispatcher` and `_shared_weights` before its first adapter is in place.
    """

    active_adapters: list[str]
    dispatcher: Dispatcher
    _shared_weights: SharedWeights

    @contextmanager
    def merged_route(self, route: Route) -> Iterator[None]:
        """`with model.merged_route(route):` has a route in force as `use_route` has, merged into the weights.

        Its experts then cost nothing a token. The weights that it changes are there twice for as long; the backbone's
        own come back at the end bit for bit, however that comes. Merged weights are rounded to the backbone's type, so
        in bfloat16 the outputs are close to those of `use_route`, and not the same. Meanwhile other threads that call
        the backbone are refused.

        Raises:
            MiLoraError: If the route's rows differ or it is not of this adapter, the model is in training mode or its
                adapters are disabled, a chosen layer is quantised, offloaded or shares its weight, another thread is
                generating, or a route is merged already.
        """
        with self._shared_weights.owned(), self._merge(route):
            yield

    @contextmanager
    def _merging_when_known(self) -> Iterator[None]:
        """In force: the generation that begins merges its route as soon as it is known."""
        if self.dispatcher.merged is not None:
            yield
            return
        with self._shared_weights.owned(), ExitStack() as stack, self.dispatcher.merging(stack):
            yield

    @contextmanager
    def _merge(self, route: Route) -> Iterator[None]:
        if self.training:
            raise MiLoraError("A route is merged for inference; call model.eval() first.")
        if self.prompt_tuning_is_off():
            raise MiLoraError("The adapters are disabled, so there is nothing to merge.")
        if self.dispatcher.adapter_names is not None:
            raise MiLoraError("Rows with adapters of their own have no one route to merge; leave out adapter_names.")
        route = common_route(route)
        adapter = self.active_adapters[0]
        gates = chosen_modules(self.model, route, adapter)
        with (
            merged(self.model, gates, adapter),
            self.dispatcher.forcing(route),
            self.dispatcher.following_merged(route),
        ):
            yield

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            super()._before_forward(module, args, kwargs)
            return
        self._shared_weights.begin_forward()
        follows = self.passes.following() is not None
        # Looks at all modules, so not in every step of a generation, in which adapters stay as they are.
        if self.dispatcher.merged is not None and not follows and self.prompt_tuning_is_off():
            raise MiLoraError("The adapters are disabled while a route is merged: the backbone's weights contain it.")
        super()._before_forward(module, args, kwargs)
        stack, running = self.dispatcher.merge_into, self.dispatcher.current
        if stack is None or running is None or running.is_merged:
            return
        if running.forced is not None or follows:
            route = running.forced if running.forced is not None else running.route(tuple(routers_of(self.model)))
            stack.enter_context(self._merge(route))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        try:
            return super()._after_forward(module, args, kwargs, output)
        finally:
            if not torch.compiler.is_dynamo_compiling():
                self._shared_weights.end_forward()


def common_route(route: Route) -> Route:
    """The one row that all rows of a route are equal to; probabilities may differ, for they change nothing.

    Raises:
        MiLoraError: If rows have different gates. Asks the device, once.
    """
    if not len(route) or not bool((route.gates == route.gates[:, :1]).all()):
        raise MiLoraError(
            f"Only one route can be merged, and the {len(route)} rows of this batch have different ones. Generate "
            "without merge_route, one prompt at a time, or give a route for all: route=, with merge_route=True."
        )
    return route[0]


@contextmanager
def merged(backbone: nn.Module, gates: Mapping[str, float], adapter: str) -> Iterator[None]:
    """While in force, modules of the backbone have their experts in their weights: `W + g (W' - W)`.

    `W'` is `W + s B A`, and of MiDoRA `m / ||W + s B A|| * (W + s B A)`. Each affected weight is computed in float32,
    rounded once and put in the place of the backbone's own, which is not written to and comes back at the end: bit for
    bit, and also where it lies in a file or is shared with other processes. So there is a second copy of the affected
    weights in memory for as long.

    Args:
        backbone: The model with PEFT's layers in it.
        gates: Path of a LoRA layer -> its weight.
        adapter: The adapter's name.

    Raises:
        MiLoraError: If a layer is quantised, offloaded, shares its weight with another module, or has a bias in
            `lora_B` and none of its own. Nothing is changed then.
    """
    uses = Counter(id(parameter) for _, parameter in backbone.named_parameters(remove_duplicate=False))
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for path, gate in gates.items():
            layer: Any = backbone.get_submodule(path)
            _check(path, layer, adapter, uses)
            for parameter, changed in _changed(layer, adapter, gate):
                kept.append((parameter, parameter.data))
                parameter.data = changed
        yield
    finally:
        for parameter, own in reversed(kept):
            parameter.data = own


def _check(path: str, layer: Any, adapter: str, uses: Counter[int]) -> None:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    # PEFT gives quantised layers classes of their own, and they their weights.
    is_plain = getattr(layer, "kind", None) is Linear and isinstance(base, (nn.Linear, Conv1D))
    if not is_plain or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise MiLoraError(
            f"{path} is a {type(base).__module__}.{type(base).__name__}, into which a route cannot be merged and taken "
            "out again (quantised weights have no place for it). Generate without merge_route."
        )
    if weight.is_meta or layer.lora_A[adapter].weight.is_meta:
        raise MiLoraError(f"{path} is offloaded, so a route cannot be merged into it. Generate without merge_route.")
    if uses[id(weight)] > 1:
        raise MiLoraError(f"{path} shares its weight with another module, which the route would change too.")
    if layer.lora_B[adapter].bias is not None and base.bias is None:
        raise MiLoraError(f"{path} has no bias that the adapter's (lora_bias) could be merged into.")


@torch.inference_mode(False)
@torch.no_grad()
def _changed(layer: Any, adapter: str, gate: float) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of the base layer that an expert changes, with what they become."""
    base, up = layer.get_base_layer(), layer.lora_B[adapter]
    scaling, device = layer.scaling[adapter], base.weight.device
    delta = up.weight.to(device, torch.float32) @ layer.lora_A[adapter].weight.to(device, torch.float32)
    own = transpose(base.weight, layer.fan_in_fan_out)  # (d_out, d_in)
    if _is_dora(layer, adapter):
        # g (f (W + s B A) - W) = g f s B A + g (f - 1) W
        factor = dora_scale(layer, adapter).to(device, torch.float32)[:, None]
        delta.mul_(gate * scaling * factor).addcmul_(own.float(), gate * (factor - 1))
    else:
        delta.mul_(gate * scaling)
    changed = delta.add_(own).to(base.weight.dtype)
    parameters = [(base.weight, transpose(changed, layer.fan_in_fan_out).contiguous())]
    if up.bias is not None:
        parameters.append((base.bias, (base.bias + gate * scaling * up.bias.to(device)).to(base.bias.dtype)))
    return parameters


def _is_dora(layer: LoraLayer, adapter: str) -> bool:
    return isinstance(layer.lora_variant[adapter].inner, DoraLinearVariant)
