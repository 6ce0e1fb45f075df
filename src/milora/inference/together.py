"""Many tenants in one batch: plain LoRA adapters of a PEFT model, and LoRA adapters beside MiLoRA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from milora.tuners.context import ForwardContext, Scope, drop_interrupted, enter, entered, leave, running, said, scopes
from milora.tuners.generate_options import compiled_settings, is_compiled_by_transformers, prompts_given, size_given
from milora.tuners.grouped import (
    GroupedOwner,
    GroupedPlan,
    Share,
    check_names,
    checked_names,
    names_of_rows,
    rows_by_adapter,
)
from milora.tuners.grouped.wrappers import PlannedWrapper
from milora.tuners.identity import BASE_ROW, Use
from milora.tuners.milora.model import MiLoraModel
from milora.tuners.plan import PlannedLayer, plan_module
from milora.tuners.prompt import arguments_of
from milora.tuners.prompt_hooks import source_of
from milora_core.errors import MiLoraError

NAMED_ROWS = "_enable_peft_forward_hooks"
"""PEFT's method that applies `adapter_names` to a forward pass or a generation."""


def serve_together(model: PeftModel, *, capacity: int = 0) -> None:
    """Makes `adapter_names` fast: one operator per module for all rows instead of PEFT's loop over adapters.

    Call it once, before or after loading the adapters. A MiLoRA model uses the operator by default; there this only
    sets the capacity. Unsupported layers are computed one adapter after the other: in a plain PEFT model by PEFT's own
    loop (quantised layers, gradients), which refuses DoRA rows; in a MiLoRA model also for MiDoRA rows. In a plain
    model, steps that transformers compiles are compiled around that loop, for these names only.

    The adapters' A and B move into one tensor per module, and the parameters become views of it, so they are in memory
    once. Smaller ranks are padded to the largest; reserved places have the largest rank too.

    Args:
        model: A PEFT model with LoRA or MiLoRA adapters.
        capacity: Number of adapters to reserve memory for, so loading another one moves and recompiles nothing.

    Raises:
        MiLoraError: If the model's method is neither LoRA nor MiLoRA.
    """
    tuner: Any = getattr(model, "base_model", None)
    if isinstance(tuner, MiLoraModel):
        tuner.owner.capacity = capacity
    elif type(tuner) is LoraModel:
        serving = tuner.__dict__.get("owner")
        if isinstance(serving, LoraServing):
            serving.capacity = capacity
            return
        tuner.owner = LoraServing(tuner, capacity)
        setattr(tuner, NAMED_ROWS, tuner.owner.naming_rows)
        tuner.delete_adapter = tuner.owner.delete_adapter
    else:
        found = type(tuner).__name__ if isinstance(model, PeftModel) else type(model).__name__
        raise MiLoraError(f"serve_together needs a PEFT model with LoRA or MiLoRA adapters; found {found}.")


def compiled_step(**settings: Any) -> dict[str, Any]:
    """Arguments of `generate` that compile its decode steps for LoRA, like `compiled=True` for MiLoRA.

    `model.generate(**inputs, adapter_names=names, **compiled_step())`

    Args:
        **settings: `cache_implementation`, `compile_config` or `past_key_values`, to override the defaults.
    """
    return settings | compiled_settings(settings)


@dataclass
class NamedRows:
    """The rows of a request by adapter name.

    Attributes:
        names: The adapter of each prompt.
        prompts: Prompts of `generate`; `None` for a single forward pass.
        use: The adapters, while the request runs.
        kept: Data that modules keep for its passes.
    """

    names: tuple[str, ...]
    prompts: int | None
    use: Use
    kept: dict[Any, Any] = field(default_factory=dict)


class PeftLoop:
    """See [`milora.tuners.plan.Plan`]: PEFT's own loop over the adapters of the rows.

    Args:
        names: The adapter of each prompt.
    """

    is_packed = False

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        kwargs["adapter_names"] = names_of_rows(self.names, x.shape[0])
        return layer.pefts_forward(x, *args, **kwargs)  # type: ignore[no-any-return]

    def rows_of(self, rows: int) -> dict[str, list[int]]:
        """See [`milora.tuners.plan.Plan.rows_of`]."""
        return rows_by_adapter(self.names, rows)

    def shares(self, layer: Any, rows: int) -> Iterator[Share]:
        """Each adapter's share of a module's rows; where batch and tokens are flattened, each token is a row."""
        for adapter, own in self.rows_of(rows).items():
            yield Share(adapter, own, None)


class LoraServing(GroupedOwner):
    """Serves rows by their adapters' names, for PEFT's own `LoraModel`.

    Args:
        tuner: The model's tuner.
        capacity: See [`serve_together`].
    """

    eagerly = "disable_compile=True"

    def __init__(self, tuner: LoraModel, capacity: int = 0) -> None:
        self.tuner = tuner
        super().__init__(tuner.model, capacity)
        tuner.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        tuner.model.register_forward_hook(self.after_forward, always_call=True)

    @contextmanager
    def naming_rows(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Replaces PEFT's method: inside, each row has its own adapter."""
        names = kwargs.get("adapter_names")
        own: Callable[..., AbstractContextManager[None]] = partial(getattr(type(self.tuner), NAMED_ROWS), self.tuner)
        if names is None or kwargs.get("alora_offsets") is not None:
            with own(*args, **kwargs):
                yield
            return
        if BASE_ROW in self.tuner.peft_config:
            raise MiLoraError(f"An adapter has the name {BASE_ROW!r}, which means no adapter; give it another name.")
        names = checked_names(names, self.tuner.peft_config, training=self.tuner.training)
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        prompts = size_given(named)[0] if prompts_given(named) else None
        if prompts is not None:
            check_names(names, prompts, prompts)
        use = self._use_of(set(names) - {BASE_ROW})
        with ExitStack() as stack:
            stack.callback(self.identities.end, use)
            if is_compiled_by_transformers(self.model, kwargs):
                stack.enter_context(self.alone())
                if self.why_not_compiled(names, named_rows=True) is not None:
                    # The loop is traced with these names, so it is valid only for this batch.
                    stack.enter_context(own(*args, **kwargs))
                    yield
                    return
                stack.enter_context(self.compiled_steps())
            self._plan_modules()
            stack.enter_context(entered(Scope(self, batch=NamedRows(names, prompts, use))))
            yield

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The backbone's pre-forward hook."""
        if torch.compiler.is_dynamo_compiling():
            return
        drop_interrupted(self)
        batch: NamedRows | None = said(self, "batch")
        if batch is None:
            return
        arguments = arguments_of(module, args, kwargs)
        rows = source_of(arguments).shape[0]
        if batch.prompts is None:
            check_names(batch.names, rows, None)
        elif rows % len(batch.names) != 0:
            raise MiLoraError(f"adapter_names names {len(batch.names)} rows; the batch has {rows}.")
        loop = PeftLoop(batch.names)
        plan = GroupedPlan(self, loop.shares, loop, batch.kept, rows=None, is_compiled=self.is_compiled_for(batch))
        enter(ForwardContext(self, batch, plan=plan))

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The backbone's forward hook."""
        context = None if torch.compiler.is_dynamo_compiling() else running(self)
        if context is not None:
            leave(context)

    def delete_adapter(self, adapter_name: str) -> None:
        """Replaces PEFT's method: waits for the requests that use the adapter.

        Raises:
            MiLoraError: If it is called from inside one of them.
        """
        own = [scope.batch.use for scope in scopes(self) if scope.batch is not None]
        with self.identities.changing(adapter_name, own):
            type(self.tuner).delete_adapter(self.tuner, adapter_name)
            self.identities.forget(adapter_name)

    def _use_of(self, names: set[str]) -> Use:
        """Registers a use of adapters, which PEFT may have added since the last one."""
        with self.identities.lock:
            for name in names & set(self.tuner.peft_config):
                if not self.identities.has(name):
                    self.identities.renew(name)
            return self.identities.begin(names)

    def _plan_modules(self) -> None:
        """Makes all layers request their rows' plan: adapters may have been added to modules that had none."""
        self.refresh()
        for module in [*self.stacks.values()]:
            plan_module(module.layer, PlannedLayer, self)
            module.layer.stack = module
        for layer in self.left_out.values():
            plan_module(layer, PlannedLayer, self)
        for wrapper in self.wrappers.values():
            plan_module(wrapper, PlannedWrapper, self)
