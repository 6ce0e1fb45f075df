"""One route for a whole batch, merged into the backbone's weights for a while: its experts cost nothing a token."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.errors import MiLoraError
from milora.routing import Route
from milora.tuners.milora.dora import dora_scale


class SharedWeights:
    """Which threads are computing with the backbone's weights, and which one has changed them.

    A thread with a merged route has the backbone for itself: others are refused and not made to wait, for how long its
    caller holds on to the route is not known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generations: Counter[int] = Counter()
        self._forwards: set[int] = set()
        self._owner: int | None = None

    # A copied or pickled model is used by nobody.
    def __getstate__(self) -> dict[str, Any]:
        return {"in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)

    def begin_forward(self) -> None:
        """A forward pass of this thread begins.

        Raises:
            MiLoraError: If another thread has merged a route.
        """
        with self._lock:
            self._refuse_under_another()
            self._forwards.add(threading.get_ident())

    def end_forward(self) -> None:
        """It has ended."""
        with self._lock:
            self._forwards.discard(threading.get_ident())

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While in force, this thread generates, and none may merge a route but this one.

        Raises:
            MiLoraError: If another thread has merged a route.
        """
        thread = threading.get_ident()
        with self._lock:
            self._refuse_under_another()
            self._generations[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._generations[thread] -= 1
                self._generations += Counter()  # drops what has come to zero
                if thread not in self._generations:
                    # A forward that a KeyboardInterrupt ended has not said so.
                    self._forwards.discard(thread)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """While in force, this thread alone may use the weights, and may change them.

        Raises:
            MiLoraError: If another thread is using them, or this one has merged a route already.
        """
        thread = threading.get_ident()
        with self._lock:
            self._refuse_under_another()
            if self._owner is not None:
                raise MiLoraError("A route is merged into the backbone already; leave it before another is merged.")
            alive = {each.ident for each in threading.enumerate()}
            if ({*self._generations, *self._forwards} & alive) - {thread}:
                raise MiLoraError(
                    "Another thread is generating with this backbone, and merging a route would change the weights "
                    "under it. Merge when it has ended, or generate without merge_route."
                )
            self._owner = thread
        try:
            yield
        finally:
            with self._lock:
                self._owner = None

    def _refuse_under_another(self) -> None:
        if self._owner not in (None, threading.get_ident()):
            raise MiLoraError(
                "Another thread has merged a route into the backbone's weights, so this one cannot use them until "
                "that thread has ended. Generate one after the other, or there without merge_route."
            )


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
