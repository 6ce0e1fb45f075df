"""The two layers of MOELoRA, a module's experts and the parts that all modules share, and the state of a pass."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora.backbone.blocks import in_features, out_features
from milora.tuners.attachment import Attachment
from milora.tuners.checkpointing import checkpoint_in_context, is_checkpointed, restore_checkpoint_function
from milora.tuners.context import (
    ContextOwner,
    ForwardContext,
    check_thread,
    drop_interrupted,
    enter,
    generation_of,
    leave,
    running,
    running_pass,
    said,
)
from milora.tuners.low_rank import LowRank
from milora.tuners.moelora.config import MoeLoraConfig
from milora.tuners.moelora.gates import TaskGate, for_input, for_rows, top_gates
from milora.tuners.prompt import arguments_of
from milora.tuners.prompt_hooks import source_of
from milora_core.errors import MiLoraError
from milora_core.routing import RouterProjection


@dataclass
class PassState:
    """The state of one forward pass.

    Attributes:
        task_gates: The adapters' task gates.
        tasks: (rows), the task of each row, or `None`.
        hidden: The last input of the hidden states' size, (..., hidden), that a module got, and the module's block.
    """

    task_gates: nn.ModuleDict | None = None
    tasks: Tensor | None = None
    hidden: tuple[str, Tensor] | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def gates(self, adapter: str) -> Tensor:
        """An adapter's gates of each row, (rows, experts)."""
        assert self.tasks is not None
        assert self.task_gates is not None
        if torch.is_grad_enabled():
            # Computed in each module: reentrant checkpointing allows no tensor with a graph from outside the block.
            return self.task_gates[adapter](self.tasks)  # type: ignore[no-any-return]
        if adapter not in self._kept:
            self._kept[adapter] = self.task_gates[adapter](self.tasks)
        return self._kept[adapter]

    def recall(self, block: str, path: str) -> Tensor:
        """The last input of the hidden states' size of a module of the block, for the module at `path`."""
        if self.hidden is None or self.hidden[0] != block:
            raise MiLoraError(
                f"The router of {path} reads what an adapted module before it in {block} was given, and none was "
                "called yet that reads the hidden states. Adapt one that is, or leave this one out of target_modules."
            )
        return self.hidden[1]


class MoeLoraOwner(ContextOwner):
    """Owns the contexts of a model with MOELoRA adapters."""

    def __init__(self) -> None:
        super().__init__()
        # torch.compile cannot read a context variable, so the modules of a traced step share this object.
        self.traced = PassState()

    def state(self, path: str) -> PassState:
        """The state of the running pass, for the module at `path`; raises a `RuntimeError` if none is running."""
        if torch.compiler.is_dynamo_compiling():
            return self.traced
        state: PassState = running_pass(self, path).prompts
        return state


class MoeLoraPart(Attachment):
    """Base of [`MoeLoraLayer`] and [`MoeLoraShared`]."""

    child_name = "moelora_"
    other_param_names = ("settings",)
    _handles: list[Any]

    def __init__(self, path: str, owner: MoeLoraOwner) -> None:
        super().__init__(path)
        self.owner = owner
        self.settings: dict[str, MoeLoraConfig] = {}


class MoeLoraLayer(MoeLoraPart):
    """`y = W x + s B (g(x) * A x)`: the experts of a module, computed as one LoRA.

    Expert i has the ranks `i r/E` to `(i + 1) r/E`, and `g` holds its weight at each of these ranks. A module therefore
    costs one down-projection, one up-projection and a router for any number of experts. The result equals the sum over
    the experts, `s sum_i g_i(x) B_i A_i x` (Liu et al. 2023; one gate for each module and token as in the MiLoRA
    paper's baseline).

    The router (no bias, inputs x experts, float32) reads the module's input. If this input is wider than the hidden
    states (the down-projection of a feed-forward layer), the router reads the input of an earlier adapted module of the
    block instead: the last one of the hidden states' size (the up-projection's). This gives the paper's 87.3M
    parameters on Llama-2 7B. A narrower input (latent attention, which also has tokens of the cache) is read directly.

    Args:
        path: Path of the module in the backbone.
        owner: The model's owner of contexts.
        block: Path of the module's block.
        input_size: Size of the module's input.
        hidden_size: Size of the block's hidden states.
    """

    adapter_layer_names = ("lora", "router")

    def __init__(self, path: str, owner: MoeLoraOwner, block: str, input_size: int, hidden_size: int) -> None:
        super().__init__(path, owner)
        self.block = block
        self.router_size = min(input_size, hidden_size)
        self.reads_own_input = input_size <= hidden_size
        self.is_read_by_others = input_size == hidden_size
        self.lora = nn.ModuleDict()
        self.router = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: MoeLoraConfig) -> None:
        """See [`Attachment.update_layer`]."""
        assert config.lora_alpha is not None
        self.settings[adapter] = config
        self.lora[adapter] = LowRank(in_features(module), out_features(module), config.r, config.lora_alpha)
        if config.gate == "token":
            self.router[adapter] = RouterProjection(self.router_size, config.num_experts)

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """See [`Attachment.adapt`]; raises a [`MiLoraError`] if tokens of `hidden` cannot be matched to gates."""
        config, state = self.settings[adapter], self.owner.state(self.path)
        lora = cast("LowRank", self.lora[adapter])
        if config.gate == "task":
            gates = for_rows(state.gates(adapter).to(hidden.device), hidden.shape[:-1], self.path)
        else:
            gates = self._token_gates(adapter, hidden, state)
        x = hidden.to(lora.lora_A.weight.dtype)
        if self.training and config.lora_dropout > 0:
            x = functional.dropout(x, config.lora_dropout)
        ranks = lora.lora_A(x).unflatten(-1, (config.num_experts, -1)) * gates.unsqueeze(-1)  # (..., experts, r / E)
        return torch.add(output, lora.lora_B(ranks.flatten(-2).to(x.dtype)), alpha=lora.scaling)

    def _token_gates(self, adapter: str, hidden: Tensor, state: PassState) -> Tensor:
        """(..., experts), float32."""
        if self.is_read_by_others:
            state.hidden = self.block, hidden
        read = hidden if self.reads_own_input else state.recall(self.block, self.path)
        device = read.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            gates = top_gates(self.router[adapter](read), self.settings[adapter].top_k)
        return gates if self.reads_own_input else for_input(gates, hidden.shape[:-1], self.path)


class MoeLoraShared(MoeLoraPart):
    """The child of the backbone. It begins and ends passes, and holds the parts that an adapter's modules share."""

    adapter_layer_names = ("task_gate",)

    def __init__(self, owner: MoeLoraOwner, blocks: list[str]) -> None:
        super().__init__("", owner)
        self.blocks = blocks
        self.task_gate = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: MoeLoraConfig) -> None:
        """See [`Attachment.update_layer`]."""
        self.settings[adapter] = config
        if config.gate == "task":
            assert config.num_tasks is not None
            self.task_gate[adapter] = TaskGate(config.num_tasks, config.task_embedding_dim, config.num_experts)

    def adapters(self) -> set[str]:
        """All adapters of the model, with or without parameters in this layer."""
        return set(self.settings)

    @property
    def weight(self) -> Tensor:
        """One of the layer's parameters; an empty tensor if it has none."""
        return next(self.parameters(), torch.empty(0))

    def attach(self, module: nn.Module) -> None:
        """See [`Attachment.attach`]."""
        module.add_module(self.child_name, self)
        self._handles = [
            module.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            module.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]

    def detach(self, module: nn.Module) -> None:
        """See [`Attachment.detach`]."""
        for block in self.blocks:
            restore_checkpoint_function(module.get_submodule(block))
        super().detach(module)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The backbone's pre-forward hook.

        Raises:
            MiLoraError: If an active adapter needs the rows' tasks, and they are missing or too few or too many.
        """
        if self.disable_adapters or torch.compiler.is_dynamo_compiling():
            return
        drop_interrupted(self.owner)
        check_thread(self.owner)
        tasks = None
        if any(name in self.task_gate for name in self.active_adapters):
            tasks = self._tasks_of_rows(arguments_of(module, args, kwargs))
        if self.training and torch.is_grad_enabled():
            # A recomputed block uses the state of its own forward pass, even if another pass ran since.
            for block in map(module.get_submodule, self.blocks):
                if is_checkpointed(block):
                    checkpoint_in_context(block, self.owner)
        enter(ForwardContext(self.owner, PassState(self.task_gate, tasks)))

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The backbone's forward hook. It also runs after an exception, without an output."""
        context = None if torch.compiler.is_dynamo_compiling() else running(self.owner)
        if context is not None:
            leave(context)
            context.prompts.hidden = None

    def _tasks_of_rows(self, arguments: dict[str, Any]) -> Tensor:
        tasks: Tensor | None = said(self.owner, "tasks")
        if tasks is None:
            raise MiLoraError(
                "The active adapter's experts are weighted by task: pass task_ids, a tensor (batch) of task numbers, "
                "to the model and to generate."
            )
        rows = source_of(arguments).shape[0]
        generation = generation_of(self.owner)
        if len(tasks) != (rows if generation is None else generation.inputs) or rows % len(tasks) != 0:
            raise MiLoraError(f"task_ids names the tasks of {len(tasks)} rows; the batch has {rows}.")
        # Generation repeats each prompt in consecutive rows, for beams and for several return sequences.
        return tasks.repeat_interleave(rows // len(tasks))
