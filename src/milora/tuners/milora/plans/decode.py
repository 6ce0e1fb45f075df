"""The decode steps of a generation's chosen experts, prepared once from their route.

A decode step has one or a few tokens per row, so its cost is reading weights and the number of operations. Experts with
the same input (query, key and value; gate and up) use one product with stacked `lora_A`s. Scaling and a gate that all
rows share are folded into the factor of `lora_B`'s product. Rows that did not choose an expert, and rows with different
gates, are masked where tensors are as narrow as the rank. There is no synchronisation with the device.

`lora_B` is read in place, and `lora_A` is copied only to be stacked. Both keep the adapter's precision: the sum with
the base layer's output is rounded once, as PEFT's LoRA rounds it.

On a CPU with the native kernel, an expert's step is one call of it, which reads both in place: the overhead of torch's
products would be several times their cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import proxy, ref

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.nn import functional

from milora.tuners.milora.plans.formulas import add_expert, is_dora, is_plain
from milora.tuners.milora.routed import RoutedPrompts, Selection
from milora_core.kernels import KERNEL_DTYPES, Piece, RowLora

Step = Callable[[Tensor, Tensor], Tensor]
"""Maps a layer's input and the base layer's output, which it may overwrite, to the layer's output."""


class DecodePlan:
    """See [`milora.tuners.plan.Plan`]: the decode steps of a generation with one adapter.

    Args:
        steps: The generation's.
    """

    is_packed = False

    def __init__(self, steps: PreparedExperts) -> None:
        self.steps = steps

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        step = self.steps.step(layer)
        return result if step is None else step(x, result)

    def rows_of(self, rows: int) -> dict[str, list[int]]:
        """See [`milora.tuners.plan.Plan.rows_of`]."""
        return {self.steps.adapter: list(range(rows))}


class PreparedExperts:
    """The decode steps of one generation's experts; created at the prefill, freed with the generation.

    The prefill records which chosen experts got the same tensor; each step is created when the first decode step
    reaches its layer.

    Args:
        adapter: The adapter that serves all rows.
        prompts: The generation's decisions, which the prefill makes later.
    """

    def __init__(self, adapter: str, prompts: RoutedPrompts) -> None:
        self.adapter = adapter
        # The prompts keep this object.
        self._prompts = proxy(prompts)
        self._last_input: ref[Tensor] | None = None
        self._inputs = 0
        self._input_of: dict[LoraLayer, int] = {}
        self._steps: dict[LoraLayer, Step | None] = {}

    def note_input(self, layer: LoraLayer, x: Tensor) -> None:
        """Records in the prefill that a chosen expert got `x`."""
        if self._last_input is None or self._last_input() is not x:
            self._last_input = ref(x)
            self._inputs += 1
        self._input_of[layer] = self._inputs

    def step(self, layer: LoraLayer) -> Step | None:
        """What a layer adds to its base layer in a decode step; `None` for nothing.

        Raises:
            RuntimeError: If the layer's block has not been routed.
        """
        if layer not in self._steps:
            self._prepare(layer)
        return self._steps[layer]

    def _prepare(self, layer: LoraLayer) -> None:
        expert = self._chosen(layer)
        if expert is None:
            self._steps[layer] = None
            return
        if not expert.is_prepared:
            self._steps[layer] = expert.unprepared
            return
        if _RowStep.serves(expert):
            self._steps[layer] = _RowStep(expert)
            return
        mates = [mate for mate, number in self._input_of.items() if number == self._input_of.get(layer)]
        experts = [mate for mate in map(self._chosen, mates or [layer]) if mate is not None]
        experts = [mate for mate in experts if mate.is_prepared and mate.shares_with(expert)]
        down = _Down(experts)
        end = 0
        for mate in experts:
            start, end = end, end + mate.a.shape[0]
            step = _DoraStep if mate.is_dora else _LoraStep
            self._steps[mate.layer] = step(down, slice(start, end), mate)

    def _chosen(self, layer: Any) -> _Chosen | None:
        selection = self._prompts.selection(layer, self.adapter)
        if selection is None:
            return None
        # DoRA's sum is one product if all rows share a gate.
        is_shared = not is_dora(layer, self.adapter) or selection.common_weight is not None
        return _Chosen(layer, self.adapter, selection, self._prompts, is_shared and is_plain(layer, self.adapter))


class _Chosen(NamedTuple):
    """An expert that at least one row chose."""

    layer: Any
    adapter: str
    selection: Selection
    prompts: RoutedPrompts
    is_prepared: bool

    @property
    def a(self) -> Tensor:
        """(r, d_in)."""
        weight: Tensor = self.layer.lora_A[self.adapter].weight.detach()
        return weight

    @property
    def b(self) -> Tensor:
        """(d_out, r)."""
        weight: Tensor = self.layer.lora_B[self.adapter].weight.detach()
        return weight

    @property
    def is_dora(self) -> bool:
        """Whether it is MiDoRA's."""
        return is_dora(self.layer, self.adapter)

    def shares_with(self, other: _Chosen) -> bool:
        """Whether their `lora_A`s can be stacked."""
        return (self.a.dtype, self.a.device, self.a.shape[1]) == (other.a.dtype, other.a.device, other.a.shape[1])

    def unprepared(self, x: Tensor, result: Tensor) -> Tensor:
        """The step that computes it like the prefill."""
        shape, selection = result.shape, self.selection
        x, result = x.reshape(self.prompts.rows, -1, x.shape[-1]), result.reshape(self.prompts.rows, -1, shape[-1])
        summed = add_expert(
            self.layer, self.adapter, x, result, selection.rows, selection.gate(), self.prompts.dora_scale
        )
        return summed.to(result.dtype).reshape(shape)


class _RowStep:
    """The native kernel's step for the rows that chose the expert, for LoRA and DoRA."""

    def __init__(self, expert: _Chosen) -> None:
        self._expert = expert
        self._of_tokens: dict[int, RowLora | None] = {}
        self._tokens_to_features = expert.prompts.rows * expert.a.shape[1]

    @staticmethod
    def serves(expert: _Chosen) -> bool:
        """Whether there is a kernel for the expert and its layer's input, with one token per row."""
        # Quantised layers may have no tensor of this name (HQQ); their output is checked instead.
        weight = getattr(expert.layer.get_base_layer(), "weight", None)
        is_known = weight is None or weight.dtype in KERNEL_DTYPES or not weight.dtype.is_floating_point
        return is_known and RowLora.serves([_piece(expert, 1)])

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        tokens = x.numel() // self._tokens_to_features
        if tokens not in self._of_tokens:
            self._of_tokens[tokens] = self._prepared(tokens)
        prepared = self._of_tokens[tokens]
        if prepared is not None and prepared.add_to(result, x):
            return result
        return self._expert.unprepared(x, result)

    def _prepared(self, tokens: int) -> RowLora | None:
        piece = _piece(self._expert, tokens)
        bias = getattr(self._expert.layer.get_base_layer(), "bias", None) if self._expert.is_dora else None
        return RowLora([piece], bias) if RowLora.serves([piece]) else None


def _piece(expert: _Chosen, tokens: int) -> Piece:
    """An expert's rows, with so many tokens each."""
    weights = expert.selection.weights
    return Piece(
        [row * tokens + token for row in weights for token in range(tokens)],
        [weight for weight in weights.values() for _ in range(tokens)],
        expert.layer.scaling[expert.adapter],
        expert.a,
        expert.b,
        expert.prompts.dora_scale(expert.layer, expert.adapter) if expert.is_dora else None,
    )


class _Down:
    """`x A` of the experts with the same input, computed by the first of them in the pass."""

    def __init__(self, experts: list[_Chosen]) -> None:
        # A single one is used in place.
        self._weight = experts[0].a if len(experts) == 1 else torch.cat([expert.a for expert in experts])
        self._batch = experts[0].prompts.rows
        self._not_chosen, self._gates = self._by_row(experts)
        self._input: ref[Tensor] | None = None
        self._output = self._weight

    def _by_row(self, experts: list[_Chosen]) -> tuple[Tensor | None, Tensor | None]:
        """(batch, 1, ranks): which rows did not choose, and the gates of those that did; `None` if all are equal."""
        selections = [expert.selection for expert in experts]
        if all(selection.common_weight is not None for selection in selections):
            return None, None
        weight = self._weight
        ranks = [expert.a.shape[0] for expert in experts]
        rows = range(self._batch)

        def table(values: list[list[Any]], dtype: torch.dtype) -> Tensor:
            of_ranks = [[value for value, rank in zip(row, ranks, strict=True) for _ in range(rank)] for row in values]
            return torch.tensor(of_ranks, dtype=dtype, device=weight.device)[:, None]

        idle = [[row not in selection.weights for selection in selections] for row in rows]
        # A weight that all rows share is folded into the step's factor.
        gates = [
            [selection.weights.get(row, 1.0) if selection.common_weight is None else 1.0 for selection in selections]
            for row in rows
        ]
        return (
            table(idle, torch.bool) if any(map(any, idle)) else None,
            table(gates, weight.dtype) if any(gate != 1 for of_row in gates for gate in of_row) else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(batch * tokens, ranks), of the adapter's type."""
        if self._input is not None and self._input() is x:
            return self._output
        output = functional.linear(x.to(self._weight.dtype), self._weight)
        if self._not_chosen is not None or self._gates is not None:
            output = output.view(self._batch, -1, output.shape[-1])
            if self._gates is not None:
                output.mul_(self._gates)
            if self._not_chosen is not None:
                # Masked, not multiplied by zero: another row's infinity would become NaN.
                output.masked_fill_(self._not_chosen, 0)
        self._input, self._output = ref(x), output.view(-1, output.shape[-1])
        return self._output


class _LoraStep:
    """`result + s g (x A) B`, written into `result`."""

    def __init__(self, down: _Down, columns: slice, expert: _Chosen) -> None:
        self._down = down
        self._columns = columns
        self._up = expert.b.T  # (r, d_out)
        common = expert.selection.common_weight
        self._factor = expert.layer.scaling[expert.adapter] * (1.0 if common is None else common)

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        inner = self._down(x)[:, self._columns]
        flat = result.reshape(-1, result.shape[-1])
        if flat.dtype == inner.dtype:
            flat.addmm_(inner, self._up, alpha=self._factor)
        else:
            flat.add_(inner @ self._up, alpha=self._factor)
        return flat.view(result.shape)


class _DoraStep:
    """`(1 - g) result + g (m / n (result - bias + s (x A) B) + bias)`, for a gate that all rows share."""

    def __init__(self, down: _Down, columns: slice, expert: _Chosen) -> None:
        self._down = down
        self._columns = columns
        scale, gate = expert.prompts.dora_scale(expert.layer, expert.adapter), expert.selection.common_weight
        assert gate is not None
        bias = getattr(expert.layer.get_base_layer(), "bias", None)
        self._of_result = 1 + gate * (scale - 1)
        self._up = expert.b.T * (gate * expert.layer.scaling[expert.adapter] * scale)  # (r, d_out)
        self._constant = None if bias is None else (gate * (1 - scale) * bias).to(scale.dtype)

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        flat = result.reshape(-1, result.shape[-1])
        adapted = torch.addcmul(self._down(x)[:, self._columns] @ self._up, flat, self._of_result)
        if self._constant is not None:
            adapted.add_(self._constant)
        return flat.copy_(adapted).view(result.shape)
