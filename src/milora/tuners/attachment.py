"""Base of the baselines: a layer that is a child of the module it adapts, and its tuner.

A wrapper would have to imitate all attributes of the module that the backbone's code reads. An attached layer changes
the module's output in a forward hook, and the module, its name and its weights stay unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from milora.backbone.blocks import Block, find_blocks
from milora.tuners.adapter_file import CheckedFileConfig
from milora.tuners.bare_layer import BareTunerLayer
from milora.tuners.rollback import RevertibleTuner
from milora.tuners.targets import listed_modules, targeted_modules
from milora_core.errors import MiLoraError


@dataclass
class AttachmentConfig(CheckedFileConfig):
    """Base of the baselines' configurations.

    Args:
        target_modules: The modules to adapt inside the blocks: `None` for the method's default, `all-linear`, a list of
            name endings, or a regular expression.
        exclude_modules: Modules to exclude, in the same form.
        modules_to_save: Further modules to train and save with the adapter.
        blocks: Path of the list of Transformer blocks, for models where it is not found automatically.
        modules: Paths of the adapted modules relative to the block, or a mapping from block to such a list if blocks
            differ. Filled in when the adapter is created.
    """

    task_type: str | None = "CAUSAL_LM"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    blocks: str | None = None
    modules: list[str] | dict[str, list[str]] | None = None


class Attachment(BareTunerLayer):
    """A method's layer for one module. `ModuleDict`s hold the parameters by adapter name.

    Subclasses set `child_name` (the layer's name inside its module, which is also the method's prefix) and
    `adapter_layer_names`, and implement [`Attachment.update_layer`] and [`Attachment.adapt`].

    Args:
        path: Path of the adapted module in the backbone.
    """

    child_name: ClassVar[str]

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._handles: list[Any] = []

    def update_layer(self, adapter: str, module: nn.Module, config: Any) -> None:
        """Adds an adapter's parameters for `module`."""
        raise NotImplementedError(f"{type(self).__name__} does not define its parameters.")

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """Returns the module's output with an adapter.

        Args:
            adapter: The adapter's name.
            hidden: The module's input, (batch, tokens, d_in) or (batch * tokens, d_in).
            output: The module's output, (..., d_out).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define how it changes an output.")

    def attach(self, module: nn.Module) -> None:
        """Makes the layer a child of its module and registers its hook."""
        module.add_module(self.child_name, self)
        self._handles.append(module.register_forward_hook(self.after_forward, with_kwargs=True))

    def detach(self, module: nn.Module) -> None:
        """Undoes [`Attachment.attach`]."""
        for handle in self._handles:
            handle.remove()
        delattr(module, self.child_name)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook. If the module returns a tuple, its first element is adapted."""
        if self.disable_adapters:
            return None
        hidden = self.read_input(args, kwargs)
        result = output[0] if isinstance(output, tuple) else output
        for adapter in self.active_adapters:
            if adapter in self.adapters():
                # Keep the output's dtype: the adapter's may differ.
                result = self.adapt(adapter, hidden, result).to(result.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Returns the module's input for [`Attachment.adapt`]."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden


class AttachmentTuner(RevertibleTuner):
    """Base of tuners whose layers are [`Attachment`]s.

    Subclasses set `prefix`, `tuner_layer_cls` and `method` (the name in messages). They override
    [`AttachmentTuner.choose_modules`] if the default is not all linear modules of the blocks.
    """

    method: ClassVar[str]
    tuner_layer_cls: type[Attachment]
    target_module_mapping: Mapping[str, list[str]] = {}
    uses_shared_state = True

    def choose_modules(self, config: Any, block: Block) -> dict[str, nn.Module]:
        """Returns the modules of a block that the method may adapt, by relative path. The default is all linear
        modules."""
        return block.linears

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        blocks = find_blocks(self.model, peft_config.blocks)
        candidates = {block.path: self.choose_modules(peft_config, block) for block in blocks}
        listed = peft_config.modules
        chosen = listed_modules(listed, candidates) if listed else targeted_modules(peft_config, candidates)
        lists = list(chosen.values())
        peft_config.modules = lists[0] if all(of_block == lists[0] for of_block in lists) else chosen
        peft_config.target_modules = list(dict.fromkeys(name for of_block in lists for name in of_block))
        peft_config.module_paths = {f"{path}.{name}" for path, names in chosen.items() for name in names}
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.module_paths

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = getattr(target, self.tuner_layer_cls.child_name, None)
        if layer is None:
            layer = self.new_layer(current_key, target)
            layer.attach(target)
        layer.update_layer(adapter_name, target, peft_config)
        device = next(target.parameters()).device
        if device.type != "meta":
            layer._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)

    def new_layer(self, path: str, module: nn.Module) -> Attachment:
        """Creates the layer of a module."""
        return self.tuner_layer_cls(path)

    def layers(self) -> dict[str, Attachment]:
        """The method's layers by module path."""
        return {m.path: m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)}

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and removes layers that have no adapter left."""
        super().delete_adapter(adapter_name)
        # PEFT skips modules whose path contains the prefix, so it skips these layers.
        for path, layer in self.layers().items():
            layer.delete_adapter(adapter_name)
            if not layer.adapters():
                layer.detach(self.model.get_submodule(path))
        remaining = next((layer.active_adapters for layer in self.layers().values()), [])
        self.active_adapter = list(remaining)
        for layer in self.layers().values():
            # If the adapter was active, each layer has activated another one of its own.
            if layer.active_adapters != remaining:
                layer.set_adapter(self.active_adapter)

    def unload(self) -> nn.Module:
        """Returns the backbone without the method's layers and hooks."""
        layers = self.layers()
        model: nn.Module = super().unload()
        for path, layer in layers.items():
            layer.detach(model.get_submodule(path))
        return model

    def _check_merge_allowed(self) -> None:
        raise MiLoraError(f"{self.method} cannot be merged: it does not change the backbone's weights.")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise MiLoraError(
                f"{self.method} supports one adapter at a time: use set_adapter instead of adapter_names."
            )
        return nullcontext()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name in the last two parts of the key only, but these layers contain nested modules.
        part = rf"((?:^|\.){re.escape(cls.prefix)}\.[^.]+)\.{re.escape(adapter_name)}(?=\.|$)"
        shorter, found = re.subn(part, r"\1", key, count=1)
        return shorter if found else str(super()._remove_adapter_name_from_key(key, adapter_name))
