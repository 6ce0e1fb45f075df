"""One route for a whole batch, temporarily merged into the backbone's weights: its experts then cost nothing per
token."""

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
from milora.tuners.milora.forward import MERGED, Merged, RoutingHooks
from milora.tuners.milora.plans.formulas import dora_scale, is_dora
from milora.tuners.milora.router import chosen_modules
from milora_core.errors import MiLoraError
from milora_core.routing import Route


@contextmanager
def merged_route(hooks: RoutingHooks, adapter: str, route: Route, generation: Generation | None) -> Iterator[None]:
    """Inside this context the backbone's weights contain a route; see
    [`milora.tuners.milora.model.MiLoraModel.merged_route`]. `generation` is the one that merges it, if one does."""
    owner, model = hooks.owner, hooks.backbone
    if model.training:
        raise MiLoraError("Merging a route is for inference; call model.eval() first.")
    if hooks.is_off():
        raise MiLoraError("The adapters are disabled, so there is nothing to merge.")
    if said(owner, "adapter_names") is not None:
        raise MiLoraError("Rows with different adapters have no common route to merge; leave out adapter_names.")
    if generation is None and hooks.late([adapter]):
        raise MiLoraError(
            "merged_route would also change the prompts, which go through the bare backbone with "
            "adapted_tokens='completion'. Use model.generate(..., merge_route=True)."
        )
    # Probabilities may differ, because they have no effect.
    if not len(route) or not bool((route.gates == route.gates[:, :1]).all()):
        raise MiLoraError(
            f"Only one route can be merged, but the {len(route)} rows of this batch have different ones. Generate "
            "without merge_route, generate one prompt at a time, or pass one route for all rows with route=."
        )
    route = route[0]
    gates = chosen_modules(model, route, adapter)
    own = [scope.generation.use for scope in scopes(owner) if scope.generation is not None]
    with owner.identities.lock:
        if hooks.merged is not None:
            raise MiLoraError(MERGED)
        if owner.identities.others_running(own):
            raise MiLoraError(
                "Another request is using this backbone, and merging a route would change its weights. Merge after it"
                " has ended, or generate without merge_route."
            )
        hooks.merged = merged = Merged(route, generation)
    scope = Scope(owner, route=route, merged=merged)
    try:
        with changed_weights(model, gates, adapter), caller_scope(scope) if generation is None else entered(scope):
            yield
    finally:
        hooks.merged = None


@contextmanager
def changed_weights(backbone: nn.Module, gates: Mapping[str, float], adapter: str) -> Iterator[None]:
    """Inside this context modules of the backbone have their experts merged into their weights: `W + g (W' - W)`.

    `W'` is `W + s B A`, and of MiDoRA `m / ||W + s B A|| * (W + s B A)`. Each affected weight is computed in float32,
    rounded once, and replaces the backbone's own weight. The original is not written to and is restored bit for bit at
    the end, also if it is memory-mapped or shared with other processes. Until then there are two copies of the affected
    weights in memory.

    Args:
        backbone: The model with PEFT's layers.
        gates: Path of a LoRA layer -> its gate `g`.
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
    # PEFT gives quantised layers classes of their own, and those name their weights differently.
    is_plain = getattr(layer, "kind", None) is Linear and isinstance(base, (nn.Linear, Conv1D))
    if not is_plain or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise MiLoraError(
            f"{path} is a {type(base).__module__}.{type(base).__name__}, into which a route cannot be merged and "
            "restored (quantised weights). Generate without merge_route."
        )
    if weight.is_meta or layer.lora_A[adapter].weight.is_meta:
        raise MiLoraError(f"{path} is offloaded, so a route cannot be merged into it. Generate without merge_route.")
    if uses[id(weight)] > 1:
        raise MiLoraError(f"{path} shares its weight with another module, which merging would also change.")
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
