"""The decode steps of a generation's chosen experts, prepared once from their route.

A decode step has one or a few tokens per row, so its cost is reading weights and the number of operations. On a CPU
with the native kernel, an expert's step is one call of it. Otherwise it is two products: scaling and a gate that all
rows share are folded into the factor of `lora_B`'s. Rows that did not choose an expert, and rows with different gates,
are masked where tensors are as narrow as the rank. There is no synchronisation with the device.

Weights are read in place and keep the adapter's precision: the sum with the base layer's output is rounded once, as
PEFT's LoRA rounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.nn import functional

from milora.tuners.milora.plans.formulas import add_expert, is_dora, is_plain
from milora.tuners.milora.routed import RoutedPrompts, Selection
from milora_core.kernels import KERNEL_DTYPES, Piece, RowLora


class DecodePlan:
    """See [`milora.tuners.plan.Plan`]: the decode steps of a generation whose rows have the same adapter.

    The generation keeps it; the step of an expert is prepared when the first decode step reaches its layer.
    """

    is_packed = False

    def __init__(self, adapter: str, prompts: RoutedPrompts) -> None:
        self._adapter = adapter
        self._prompts = prompts
        self._steps: dict[LoraLayer, _Step | None] = {}

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if layer not in self._steps:
            self._steps[layer] = self._prepared(layer)
        step = self._steps[layer]
        return result if step is None else step(x, result)

    def rows_of(self, rows: int) -> dict[str, list[int]]:
        """See [`milora.tuners.plan.Plan.rows_of`]."""
        return {self._adapter: list(range(rows))}

    def _prepared(self, layer: Any) -> _Step | None:
        selection = self._prompts.selection(layer, self._adapter)
        if selection is None:
            return None
        expert = layer, self._adapter, selection, self._prompts
        step = _Step(*expert)
        # DoRA's sum is one product only if all rows share a gate.
        if not is_plain(layer, self._adapter) or (step.is_dora and selection.common_weight is None):
            return step
        if _NativeStep.serves(step):
            return _NativeStep(*expert)
        return _DoraStep(*expert) if step.is_dora else _LoraStep(*expert)


class _Step:
    """The step of an expert that at least one row chose, computed as in the prefill.

    It maps a layer's input and the base layer's output, which it may overwrite, to the layer's output.
    """

    def __init__(self, layer: Any, adapter: str, selection: Selection, prompts: RoutedPrompts) -> None:
        self.layer, self.adapter, self.selection, self.prompts = layer, adapter, selection, prompts
        self.a: Tensor = layer.lora_A[adapter].weight.detach()  # (r, d_in)
        self.b: Tensor = layer.lora_B[adapter].weight.detach()  # (d_out, r)
        self.is_dora = is_dora(layer, adapter)

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        shape, rows, selection = result.shape, self.prompts.rows, self.selection
        x, result = x.reshape(rows, -1, x.shape[-1]), result.reshape(rows, -1, shape[-1])
        summed = add_expert(
            self.layer, self.adapter, x, result, selection.rows, selection.gate(), self.prompts.dora_scale
        )
        return summed.to(result.dtype).reshape(shape)

    def piece(self, tokens: int) -> Piece:
        """The kernel's arguments for rows of so many tokens each."""
        weights = self.selection.weights
        return Piece(
            [row * tokens + token for row in weights for token in range(tokens)],
            [weight for weight in weights.values() for _ in range(tokens)],
            self.layer.scaling[self.adapter],
            self.a,
            self.b,
            self.prompts.dora_scale(self.layer, self.adapter) if self.is_dora else None,
        )

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return getattr(self.layer.get_base_layer(), "bias", None)


class _NativeStep(_Step):
    """The native kernel's step for the rows that chose the expert, for LoRA and DoRA."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._of_tokens: dict[int, RowLora | None] = {}
        self._tokens_to_features = self.prompts.rows * self.a.shape[1]

    @staticmethod
    def serves(step: _Step) -> bool:
        """Whether there is a kernel for the expert and its layer's input, with one token per row."""
        # Quantised layers may have no tensor of this name (HQQ); their output is checked instead.
        weight = getattr(step.layer.get_base_layer(), "weight", None)
        is_known = weight is None or weight.dtype in KERNEL_DTYPES or not weight.dtype.is_floating_point
        return is_known and RowLora.serves([step.piece(1)])

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        tokens = x.numel() // self._tokens_to_features
        if tokens not in self._of_tokens:
            piece = self.piece(tokens)
            served = RowLora.serves([piece])
            self._of_tokens[tokens] = RowLora([piece], self.bias if self.is_dora else None) if served else None
        kernel = self._of_tokens[tokens]
        if kernel is not None and kernel.add_to(result, x):
            return result
        return super().__call__(x, result)


class _LoraStep(_Step):
    """`result + s g (x A) B`, written into `result`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        common = self.selection.common_weight
        self._factor = self.layer.scaling[self.adapter] * (1.0 if common is None else common)
        self._not_chosen: Tensor | None = None  # (rows, 1, 1)
        self._gates: Tensor | None = None  # (rows, 1, 1)
        if common is None:
            gates = [self.selection.weights.get(row, 0.0) for row in range(self.prompts.rows)]
            of_rows = torch.tensor(gates, dtype=self.a.dtype, device=self.a.device)[:, None, None]
            self._not_chosen = of_rows == 0 if len(self.selection.weights) < len(gates) else None
            self._gates = of_rows if set(gates) - {0.0, 1.0} else None

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        rank = self.a.shape[0]
        inner, flat = functional.linear(x.to(self.a.dtype), self.a), result.reshape(-1, result.shape[-1])
        if self._gates is not None:
            inner.view(self.prompts.rows, -1, rank).mul_(self._gates)
        if self._not_chosen is not None:
            # Masked, not multiplied by zero: another row's infinity would become NaN.
            inner.view(self.prompts.rows, -1, rank).masked_fill_(self._not_chosen, 0)
        inner = inner.view(-1, rank)
        if flat.dtype == inner.dtype:
            flat.addmm_(inner, self.b.T, alpha=self._factor)
        else:
            flat.add_(inner @ self.b.T, alpha=self._factor)
        return flat.view(result.shape)


class _DoraStep(_Step):
    """`(1 - g) result + g (f (result - bias + s (x A) B) + bias)`, for a gate `g` that all rows share."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        scale, gate, bias = self.prompts.dora_scale(self.layer, self.adapter), self.selection.common_weight, self.bias
        assert gate is not None
        self._of_result = 1 + gate * (scale - 1)
        self._up = self.b.T * (gate * self.layer.scaling[self.adapter] * scale)  # (r, d_out)
        self._constant = None if bias is None else (gate * (1 - scale) * bias).to(scale.dtype)

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        flat = result.reshape(-1, result.shape[-1])
        inner = functional.linear(x.to(self.a.dtype), self.a).view(-1, self.a.shape[0])
        adapted = torch.addcmul(inner @ self._up, flat, self._of_result)
        if self._constant is not None:
            adapted.add_(self._constant)
        return flat.copy_(adapted).view(result.shape)
