"""Many tenants in one batch: plain LoRA adapters of a PEFT model, and LoRA adapters beside MiLoRA's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from milora.tuners.grouped import BASE_ROW, GroupedServing, ModuleStack, Share, names_of_rows, rows_by_adapter
from milora.tuners.grouped.compiling import compiled_settings, is_compiled_by_transformers
from milora.tuners.milora.model import MiLoraModel
from milora_core.errors import MiLoraError, did_you_mean

NAMED_ROWS = "_enable_peft_forward_hooks"
"""PEFT's method that puts `adapter_names` in force for a forward pass or a generation."""


def serve_together(model: PeftModel, *, capacity: int = 0) -> None:
    """Makes `adapter_names` fast: the LoRA of all rows in one operator a module, in place of PEFT's loop over adapters.

    To be called once, before or after the adapters are loaded. A MiLoRA model does this of itself, and is given the
    capacity only. What the operator cannot serve is computed for one adapter after the other: in a plain PEFT model by
    PEFT's own loop (quantised layers, gradients), which refuses DoRA rows; in a MiLoRA model also MiDoRA rows. In a
    plain model, steps that transformers compiles are then compiled around that loop, for these names alone.

    The adapters' A and B move into one tensor a module, of which the parameters become views: in memory they are once.
    Smaller ranks are padded to the largest, and places kept free for adapters to come count as the largest too.

    Args:
        model: A PEFT model with LoRA or MiLoRA adapters.
        capacity: How many adapters to keep room for, so that loading one more moves nothing and compiles nothing anew.

    Raises:
        MiLoraError: If the model's method is neither LoRA nor MiLoRA.
    """
    tuner: Any = getattr(model, "base_model", None)
    if isinstance(tuner, MiLoraModel):
        tuner.grouped.set_capacity(capacity)
    elif type(tuner) is LoraModel:
        serving = tuner.__dict__.get("grouped")
        if isinstance(serving, LoraServing):
            serving.set_capacity(capacity)
            return
        tuner.grouped = LoraServing(tuner, capacity)
        setattr(tuner, NAMED_ROWS, tuner.grouped.naming_rows)
    else:
        found = type(tuner).__name__ if isinstance(model, PeftModel) else type(model).__name__
        raise MiLoraError(f"serve_together needs a PEFT model with LoRA or MiLoRA adapters; found {found}.")


def compiled_step(**settings: Any) -> dict[str, Any]:
    """Arguments of `generate` with which its decode steps are compiled, for LoRA as `compiled=True` is for MiLoRA.

    `model.generate(**inputs, adapter_names=names, **compiled_step())`

    Args:
        **settings: `cache_implementation`, `compile_config` or `past_key_values`, where they are not to be the default.
    """
    return settings | compiled_settings(settings)


class _NamedBatch(NamedTuple):
    names: list[str]
    kept: dict[Any, Any]


class _InForce(threading.local):
    batch: _NamedBatch | None = None


class LoraServing(GroupedServing):
    """Serves rows by their adapters' names, for PEFT's own `LoraModel`.

    Args:
        tuner: The model's tuner.
        capacity: See [`serve_together`].
    """

    eagerly = "disable_compile=True"

    def __init__(self, tuner: LoraModel, capacity: int = 0) -> None:
        self.tuner = tuner
        self._in_force = _InForce()
        super().__init__(tuner.model, capacity)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_in_force"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._in_force = _InForce()
        super().__setstate__(state)

    def batch(self) -> _NamedBatch | None:
        """See [`GroupedServing.batch`]."""
        return self._in_force.batch

    def kept(self, batch: _NamedBatch) -> dict[Any, Any]:
        """See [`GroupedServing.kept`]."""
        return batch.kept

    def rows(self, batch: _NamedBatch, x: Tensor) -> int:
        """See [`GroupedServing.rows`]; where batch and tokens are flattened, each token is a row."""
        return x.shape[0]

    def has_fixed_rows(self, batch: _NamedBatch, x: Tensor) -> bool:
        """See [`GroupedServing.has_fixed_rows`]."""
        return x.dim() > 2

    def names(self, batch: _NamedBatch, x: Tensor) -> list[str]:
        """See [`GroupedServing.names`]; beams and tokens of a row follow each other."""
        return names_of_rows(batch.names, x.shape[0])

    def adapter_rows(self, batch: _NamedBatch, x: Tensor) -> Mapping[str, list[int]]:
        """See [`GroupedServing.adapter_rows`]."""
        return rows_by_adapter(batch.names, x.shape[0])

    def names_rows(self) -> bool:
        """See [`GroupedServing.names_rows`]."""
        return self._in_force.batch is not None

    def shares(self, batch: _NamedBatch, module: ModuleStack, x: Tensor) -> Iterator[Share]:
        """See [`GroupedServing.shares`]."""
        for adapter, rows in self.adapter_rows(batch, x).items():
            yield Share(adapter, rows, None)

    @contextmanager
    def naming_rows(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In place of PEFT's own: in force, an adapter for each row."""
        names = kwargs.get("adapter_names")
        own: Callable[..., AbstractContextManager[None]] = partial(getattr(type(self.tuner), NAMED_ROWS), self.tuner)
        if names is None or kwargs.get("alora_offsets") is not None:
            with own(*args, **kwargs):
                yield
            return
        self._check(list(names))
        with ExitStack() as stack:
            outer, self._in_force.batch = self._in_force.batch, _NamedBatch(list(names), {})
            stack.callback(setattr, self._in_force, "batch", outer)
            if is_compiled_by_transformers(self.model, kwargs):
                stack.enter_context(self.alone())
                if self.why_not_compiled(names) is not None:
                    # The loop is traced with the names in it: it can be of no other batch.
                    self._in_force.batch = None
                    stack.enter_context(own(*args, **kwargs))
                    yield
                    return
                stack.enter_context(self.compiled_steps())
            stack.enter_context(self.serving())
            for layer in self.stacks.left_out.values():
                handle = layer.register_forward_pre_hook(partial(_name_rows, self), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _check(self, names: list[str]) -> None:
        if self.tuner.training:
            raise MiLoraError("adapter_names is for inference; call model.eval() first.")
        if not names:
            raise MiLoraError("adapter_names is empty; it names an adapter for each row.")
        known = sorted(self.tuner.peft_config)
        for name in names:
            if name != BASE_ROW and name not in known:
                raise MiLoraError(f"No adapter named {name!r}; there are {known}{did_you_mean(name, known) or '.'}")


def _name_rows(serving: LoraServing, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = None if torch.compiler.is_dynamo_compiling() else serving.batch()
    return None if batch is None else (args, {**kwargs, "adapter_names": serving.names(batch, args[0])})
