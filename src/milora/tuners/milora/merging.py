"""One route for a whole batch, merged into the backbone's weights for a while: its experts cost nothing a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.tuners.context import Generation, Scope, caller_scope, entered, said, scopes
from milora.tuners.milora.forward import RoutingHooks
from milora.tuners.milora.plans.formulas import dora_scale, is_dora
from milora.tuners.milora.router import chosen_modules
from milora_core.errors import MiLoraError
from milora_core.routing import Route

MERGED = "a route is merged into the backbone's weights, which serve it and no other; leave merged_route first"
"""What to say of calls that a merged route rules out."""


class Merged:
    """The route that the backbone's weights contain.

    Args:
        route: Of one row.
        generation: The generation that merged it; `None` for `merged_route`.
    """

    def __init__(self, route: Route, generation: Generation | None) -> None:
        self.route = route
        self.generation = generation

    def check(self, hooks: RoutingHooks) -> None:
        """Refuses calls that did not enter the merged route's context, and such as disabled the adapters.

        Raises:
            MiLoraError: Saying why.
        """
        if said(hooks.owner, "merged") is not self:
            raise MiLoraError(
                "A route is merged into the backbone's weights by another request, so this one cannot use them until "
                "that has ended. Generate one after the other, or there without merge_route."
            )
        if hooks.is_off():
            raise MiLoraError("The adapters are disabled while a route is merged: the backbone's weights contain it.")

    def check_prompts(self, generation: Generation | None) -> None:
        """Refuses other prompts inside the generation that merged its own route.

        Raises:
            MiLoraError: If it is another's.
        """
        if self.generation is not None and generation is not self.generation:
            raise MiLoraError(
                "The running generation has merged its route into the backbone's weights, so other prompts cannot be "
                "served from inside it. Generate without merge_route."
            )


@contextmanager
def merged_route(hooks: RoutingHooks, adapter: str, route: Route, generation: Generation | None) -> Iterator[None]:
    """Inside, the backbone's weights contain a route; see [`milora.tuners.milora.routes.Routes.merged_route`].

    Args:
        hooks: The model's.
        adapter: The adapter whose route it is.
        route: All its rows are alike.
        generation: The generation that merges it.
    """
    owner, model = hooks.owner, hooks.backbone
    if model.training:
        raise MiLoraError("A route is merged for inference; call model.eval() first.")
    if hooks.is_off():
        raise MiLoraError("The adapters are disabled, so there is nothing to merge.")
    if said(owner, "adapter_names") is not None:
        raise MiLoraError("Rows with adapters of their own have no one route to merge; leave out adapter_names.")
    if generation is None and hooks.configs[adapter].adapted_tokens == "completion":
        raise MiLoraError(
            "merged_route would change the prompts too, which adapted_tokens='completion' leaves to the bare backbone. "
            "Use model.generate(..., merge_route=True)."
        )
    route = common_route(route)
    gates = chosen_modules(model, route, adapter)
    own = [scope.generation.use for scope in scopes(owner) if scope.generation is not None]
    with owner.identities.lock:
        if hooks.merged is not None:
            raise MiLoraError("A route is merged into the backbone already; leave it before another is merged.")
        if owner.identities.others_running(own):
            raise MiLoraError(
                "Another request is using this backbone, and merging a route would change the weights under it. Merge "
                "when it has ended, or generate without merge_route."
            )
        hooks.merged = merged = Merged(route, generation)
    scope = Scope(owner, route=route, merged=merged)
    try:
        with changed_weights(model, gates, adapter), caller_scope(scope) if generation is None else entered(scope):
            yield
    finally:
        hooks.merged = None


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
def changed_weights(backbone: nn.Module, gates: Mapping[str, float], adapter: str) -> Iterator[None]:
    """Inside, modules of the backbone have their experts in their weights: `W + g (W' - W)`.

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
            for parameter, changed in _changed_parameters(layer, adapter, gate):
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
def _changed_parameters(layer: Any, adapter: str, gate: float) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of the base layer that an expert changes, with what they become."""
    base, up = layer.get_base_layer(), layer.lora_B[adapter]
    scaling, device = layer.scaling[adapter], base.weight.device
    delta = up.weight.to(device, torch.float32) @ layer.lora_A[adapter].weight.to(device, torch.float32)
    own = transpose(base.weight, layer.fan_in_fan_out)  # (d_out, d_in)
    if is_dora(layer, adapter):
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
