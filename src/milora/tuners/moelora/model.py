"""The tuner of MOELoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.blocks import find_blocks, hidden_size, in_features
from milora.tuners.attachment import Attachment, AttachmentTuner
from milora.tuners.context import Scope, caller_scope, entered, generating
from milora.tuners.generate_options import is_compiled_by_transformers, size_given
from milora.tuners.moelora.config import MoeLoraConfig
from milora.tuners.moelora.layer import MoeLoraLayer, MoeLoraOwner, MoeLoraPart, MoeLoraShared
from milora_core.errors import MiLoraError


class MoeLoraModel(AttachmentTuner):
    """A backbone with a mixture of LoRA experts in each linear module; created by `get_peft_model`."""

    method = "MOELoRA"
    prefix = "moelora_"
    tuner_layer_cls = MoeLoraPart
    owner: MoeLoraOwner

    def _pre_injection_hook(self, model: nn.Module, config: MoeLoraConfig, adapter_name: str) -> None:
        self.owner = MoeLoraOwner()

    def _prepare_adapter_config(self, peft_config: MoeLoraConfig, model_config: dict[str, Any]) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        blocks = find_blocks(self.model, config.blocks)
        self._hidden_sizes = {block.path: hidden_size(self.model, block) for block in blocks}
        for block in blocks:
            sizes, hidden = {n: in_features(m) for n, m in block.linears.items()}, self._hidden_sizes[block.path]
            adapted = [name for name in sizes if f"{block.path}.{name}" in config.module_paths]
            wide = [name for name in adapted if sizes[name] > hidden]
            if config.gate == "token" and wide and all(sizes[name] != hidden for name in adapted):
                readers = [name for name, size in sizes.items() if size == hidden]
                raise MiLoraError(
                    f"The routers of {wide} in {block.path} read what an adapted module before them is given, of the "
                    f"hidden states' size {hidden}, and there is none. Adapt one of {readers} as well."
                )
        return config

    def _create_and_replace(self, peft_config: MoeLoraConfig, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        shared = getattr(self.model, MoeLoraShared.child_name, None)
        if shared is None:
            shared = MoeLoraShared(self.owner, list(self._hidden_sizes))
            shared.attach(self.model)
        if adapter_name not in shared.adapters():
            shared.update_layer(adapter_name, self.model, peft_config)
            device = next(self.model.parameters()).device
            if device.type != "meta":
                shared._move_adapter_to_device_of_base_layer(adapter_name, device)
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)

    def new_layer(self, path: str, module: nn.Module) -> Attachment:
        """See [`AttachmentTuner.new_layer`]."""
        block = next(block for block in self._hidden_sizes if path.startswith(f"{block}."))
        return MoeLoraLayer(path, self.owner, block, in_features(module), self._hidden_sizes[block])

    def forward(self, *args: Any, task_ids: Tensor | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The backbone's forward; `task_ids`, (batch), are the rows' tasks for adapters with `gate="task"`.

        Raises:
            MiLoraError: If the active adapter needs `task_ids` and they are missing; see [`MoeLoraModel.use_tasks`].
        """
        with self._with_tasks(task_ids, entered):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, task_ids: Tensor | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The backbone's `generate`; `task_ids`, (batch), are the prompts' tasks for adapters with `gate="task"`.

        Beams and return sequences use the task of their prompt. With `gate="task"` decode steps are not compiled with
        any cache; see [`MoeLoraModel.why_not_compiled`].

        Raises:
            MiLoraError: If the active adapter needs `task_ids` and they are missing; see [`MoeLoraModel.use_tasks`].
        """
        model: Any = self.model
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if self.why_not_compiled() is not None and is_compiled_by_transformers(model, named):
            kwargs["disable_compile"] = True
        running = generating(self.owner, self.active_adapters, named.get("attention_mask"), size_given(named))
        with self._with_tasks(task_ids, entered), running:
            return model.generate(*args, **kwargs)

    def why_not_compiled(self) -> str | None:
        """Why transformers cannot compile the decode steps, or `None`."""
        if any(self.peft_config[name].gate == "task" for name in self.active_adapters):
            return "the rows' tasks are read where the model is called, which torch.compile does not see"
        return None

    def use_tasks(self, task_ids: Tensor | Sequence[int] | None) -> AbstractContextManager[None]:
        """`with model.use_tasks(task_ids):` sets the task of each row for calls to which you cannot pass `task_ids`.

        `generate` repeats each task for the beams and return sequences of its prompt.

        Args:
            task_ids: (batch), from 0 to `num_tasks - 1`. `None` sets no tasks.

        Raises:
            MiLoraError: If the active adapter has no task gate, or a task does not exist.
        """
        return self._with_tasks(task_ids, caller_scope)

    def _with_tasks(
        self, task_ids: Tensor | Sequence[int] | None, entering: Callable[[Scope], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        if task_ids is None:
            return nullcontext()
        tasks = torch.as_tensor(task_ids)
        gated = [config for name in self.active_adapters if (config := self.peft_config[name]).gate == "task"]
        if not gated:
            raise MiLoraError("task_ids is for gate='task', but the active adapter has gate='token'.")
        highest = min(config.num_tasks for config in gated) - 1
        if tasks.dim() != 1 or len(tasks) == 0 or tasks.is_floating_point():
            raise MiLoraError(f"task_ids must be whole numbers, (batch); found {tasks.dtype} of {tuple(tasks.shape)}.")
        if int(tasks.min()) < 0 or int(tasks.max()) > highest:
            raise MiLoraError(f"task_ids must lie between 0 and {highest}; found {sorted(set(tasks.tolist()))}.")
        return entering(Scope(self.owner, tasks=tasks))
