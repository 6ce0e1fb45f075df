"""The LoRA of a module as an expert of its block's router: it runs for the rows that chose it, and for no others."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional

from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.dora import dora_scale, forget_dora_scales
from milora.tuners.milora.gradient import expert_sum
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.milora.selection import Selection, selection_of
from milora_core.errors import MiLoraError

NO_MERGE = (
    "A MiLoRA adapter cannot be merged for good: which modules it changes depends on the prompt. For the length of a "
    "generation, model.generate(..., merge_route=True) does; to merge one route for good, export it as a plain LoRA "
    "adapter (milora export) and merge that."
)


class ExpertLayer:
    """Mixed into a LoRA layer of PEFT by [`as_expert`]: a call that has nothing to adapt is one of the base layer.

    PEFT's `forward` casts its input, asks each variant and casts the result, whether or not there is anything to add.
    It is left to serve what is not this tuner's own case: disabled adapters and the chosen experts of quantised layers.
    """

    kind: type[LoraLayer]
    dispatcher: Dispatcher
    base_layer: nn.Module
    lora_variant: dict[str, LoraVariant]
    _disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's LoRA layer; see [`ExpertVariant`] for what is computed."""
        running: RoutingPass | None = self.dispatcher.current
        if running is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if running.is_merged:
            return self.base_layer(x)
        if self._disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if running.adapter is None:
            return self._by_adapter(running, x, *args, **kwargs)
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        prepared = running.prepared
        if running.is_decode_step and prepared is not None:
            step = prepared.step(self)
            result = self.base_layer(x)
            return result if step is None else step(x, result)
        variant = self.lora_variant.get(running.adapter)
        if not isinstance(variant, ExpertVariant):
            return self.base_layer(x)
        selection = selection_of(running.routings, running.adapter, variant.block, variant.expert)
        if selection is None:
            return self.base_layer(x)
        if prepared is not None:
            prepared.note_input(self, x)
        if not isinstance(self, Linear):
            return super().forward(x)  # type: ignore[misc]
        result = self.base_layer(x)
        return variant.adapt(self, running.adapter, selection, x, result).to(result.dtype)

    def _by_adapter(self, running: RoutingPass, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each row with its own adapter, one adapter after the other; for what no stack serves, DoRA above all.

        Raises:
            MiLoraError: If the input does not have the batch's rows.
        """
        running.check_rows(x)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        # A base layer may return its input, or a view of it.
        is_own = result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and not torch.is_grad_enabled()
        for adapter in running.adapter_rows:
            variant = self.lora_variant.get(adapter)
            if not isinstance(variant, ExpertVariant):
                continue
            selection = selection_of(running.routings, adapter, variant.block, variant.expert)
            if selection is None:
                continue
            places = running.places(adapter, x.device)
            part = variant.adapt(self, adapter, selection, x.index_select(0, places), result.index_select(0, places))
            if is_own:
                result.index_copy_(0, places, part.to(result.dtype))
            else:
                result = result.index_copy(0, places, part.to(result.dtype))
        return result

    def train(self, mode: bool = True) -> Any:
        """As any module's; training forgets what [`dora_scale`] keeps."""
        if mode:
            forget_dora_scales(self)
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the one it is made of.
        return _blank, (self.kind,), self.__getstate__()


@cache
def _expert_class(kind: Any) -> Any:
    return type(kind.__name__, (ExpertLayer, kind), {"kind": kind, "__doc__": kind.__doc__, "__module__": __name__})


def _blank(kind: Any) -> Any:
    made = _expert_class(kind)
    return made.__new__(made)


def as_expert(layer: LoraLayer, dispatcher: Dispatcher) -> None:
    """Makes a LoRA layer of PEFT, of whatever kind, an [`ExpertLayer`] of that kind; done once, it does nothing."""
    if not isinstance(layer, ExpertLayer):
        kind: Any = type(layer)
        layer.__class__ = _expert_class(kind)
        layer.dispatcher = dispatcher


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether `lora_A` and `lora_B` are bare matrices, which may be used without calling the modules that hold them.

    They are not where something listens to those modules or keeps their weights elsewhere between calls (hooks, FSDP,
    DeepSpeed, accelerate's offloading, which replaces their forward), nor with `lora_bias`.
    """
    modules: tuple[Any, ...] = (layer.lora_A[adapter], layer.lora_B[adapter])
    return all(
        type(module) is nn.Linear
        and getattr(module, "bias", None) is None
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and "forward" not in module.__dict__
        for module in modules
    )


class ExpertVariant(LoraVariant):  # type: ignore[misc]
    """Makes any LoRA layer of PEFT an expert: it runs for the rows that chose it, weighted by their gates.

    `x W + g_i (x A B) * scaling` for the rows with gate `g_i`, and `x W`, nothing computed, for the others. Another
    variant inside (DoRA) gives `y` in place of LoRA's sum, of which `x W + g_i (y - x W)` is made.

    Args:
        dispatcher: Where the decisions are read.
        block: The block's path.
        expert: The module's place among the block's experts.
        inner: The variant that the layer had, `None` for plain LoRA.
    """

    def __init__(self, dispatcher: Dispatcher, block: str, expert: int, inner: LoraVariant | None) -> None:
        self.dispatcher = dispatcher
        self.block = block
        self.expert = expert
        self.inner = inner

    def supports_lora_conversion(self) -> bool:
        """No: a module's change depends on the prompt; `milora export` freezes a route."""
        return False

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, as PEFT's `forward` asks for it; see [`LoraVariant.forward`].

        Args:
            module: The LoRA layer.
            active_adapter: The adapter that serves these rows.
            x: (batch, tokens, d_in), or (batch * tokens, d_in) as some blocks flatten it.
            result: The base layer's output for `x`.
            **kwargs: Passed on to the inner variant.
        """
        selection = self.dispatcher.current_selection(active_adapter, self.block, self.expert)
        return result if selection is None else self.adapt(module, active_adapter, selection, x, result, **kwargs)

    def adapt(
        self, module: LoraLayer, adapter: str, selection: Selection, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's output for rows of which some chose it; the arguments are those of [`ExpertVariant.forward`].

        Without gradients `result` may be written into.
        """
        shape = result.shape
        if x.shape[0] != selection.batch or x.dim() == 2:
            x, result = (_by_row(tensor, selection.batch, self.block) for tensor in (x, result))
        gate = selection.gate()
        gate = None if gate is None else gate.to(x.device)
        rows = selection.rows
        if self.inner is None and self._is_linear_in(module, adapter, x):
            a, b, scaling = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]
            return expert_sum(x, result, a, b, gate, rows, scaling).reshape(shape)
        if rows is None:
            return self._adapt(module, adapter, x, result, gate, kwargs).reshape(shape)
        part = self._adapt(module, adapter, x.index_select(0, rows), result.index_select(0, rows), gate, kwargs)
        # Rounded as the layer's output will be, so that a row's result does not depend on its neighbours' routes.
        return result.index_copy(0, rows, part.to(result.dtype)).reshape(shape)

    def can_be_prepared(self, module: LoraLayer, adapter: str, selection: Selection) -> bool:
        """Whether decode steps may compute it from its matrices; DoRA's where all rows share a gate."""
        is_shared = isinstance(self.inner, DoraLinearVariant) and selection.common_weight is not None
        return (self.inner is None or is_shared) and is_plain(module, adapter)

    @staticmethod
    def _is_linear_in(module: LoraLayer, adapter: str, x: Tensor) -> bool:
        """Whether an expert is the product of two matrices and no more: nothing dropped, nothing cast by autocast."""
        dropout = module.lora_dropout[adapter]
        return (
            (isinstance(dropout, nn.Identity) or not module.training)
            and not torch.is_autocast_enabled(x.device.type)
            and is_plain(module, adapter)
        )

    def _adapt(
        self, module: LoraLayer, adapter: str, x: Tensor, result: Tensor, gate: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """The same for rows that all chose it, whatever the expert consists of."""
        if gate is not None:
            gate = gate.reshape(-1, *[1] * (x.dim() - 1))
        lora_a, lora_b = module.lora_A[adapter], module.lora_B[adapter]
        x = module._cast_input_dtype(x, lora_a.weight.dtype)
        if self.inner is None:
            inner = lora_a(module.lora_dropout[adapter](x))
            if gate is not None and lora_b.bias is None:
                # Where it is narrow: autograd keeps what a gate with a gradient is multiplied with.
                inner, gate = inner * gate.to(inner.dtype), None
            delta: Tensor = lora_b(inner) * module.scaling[adapter]
            return result + delta if gate is None else result + gate.to(delta.dtype) * delta
        if isinstance(self.inner, DoraLinearVariant) and not torch.is_grad_enabled() and is_plain(module, adapter):
            adapted = _dora(module, adapter, x, result)
        else:
            adapted = self.inner.forward(module, active_adapter=adapter, x=x, result=result, **kwargs)
        return adapted if gate is None else result + gate.to(adapted.dtype) * (adapted - result)

    @staticmethod
    def _refuse_merging(*args: Any, **kwargs: Any) -> Any:
        raise MiLoraError(NO_MERGE)

    merge_safe = merge_unsafe = unmerge = _refuse_merging


def _dora(module: LoraLayer, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """`f x (W + s A B)` and the base layer's bias as it is, `f` DoRA's factor; summed in PEFT's order."""
    scale = dora_scale(module, adapter)
    bias = getattr(module.get_base_layer(), "bias", None)
    inner = functional.linear(x, module.lora_A[adapter].weight)
    delta = functional.linear(inner, module.lora_B[adapter].weight)
    bare = result if bias is None else result - bias
    adapted: Tensor = result + ((scale - 1) * bare + scale * delta * module.scaling[adapter])
    return adapted


def _by_row(tensor: Tensor, batch: int, block: str) -> Tensor:
    if tensor.dim() > 2 or tensor.shape[0] % batch != 0:
        raise MiLoraError(
            f"A module of {block} was given an input of shape {tuple(tensor.shape)} for a batch of {batch} prompts, "
            "and which token belongs to which prompt cannot be told. Leave that module out of target_modules."
        )
    return tensor.reshape(batch, -1, tensor.shape[-1])
