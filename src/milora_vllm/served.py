"""State of a model that serves MiLoRA adapters: blocks, linear modules, the running step, routes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from milora_core.errors import MiLoraError
from milora_vllm.adapter import AdapterFile
from milora_vllm.batch import Chunk, Routes, Rows, Step
from milora_vllm.buffers import BufferedLinear, Buffers
from milora_vllm.linear import GatedLinear, IdleSkipped
from milora_vllm.routers import PREFIX, LayerRouter, Route, read_routers

BLOCK = re.compile(r"(.*?\.\d+)\.")
"""A block's path: the prefix of a module's path up to the first number."""


def uses_buffers(device: torch.device) -> bool:
    """Whether a step's slots and gates are in device buffers, so the host does not wait for the device."""
    return device.type != "cpu"


class ServedModel:
    """Applies all LoRA adapters of a model. Created when a worker loads its first MiLoRA adapter.

    Args:
        manager: vLLM's `LoRAModelManager`.
        config: The `VllmConfig`.
    """

    def __init__(self, manager: Any, config: Any) -> None:
        self.manager = manager
        self.step: Step | None = None
        self._config = config
        self._device = torch.device(manager.device)
        self._blocks: dict[str, int] = {}
        self.places: dict[str, tuple[int, int]] = {}
        """Path of each linear module -> its layer and its column in a route."""
        modules = self._find_modules()
        columns = 1 + max((column for _, column in self.places.values()), default=-1)
        self._shape = (len(self._blocks), columns)
        self._plain = Route(torch.ones(self._shape, device=self._device))
        self._routes = Routes(lambda: Route(torch.zeros(self._shape, device=self._device)))
        self._rows: list[Rows] = []
        self._prepared: dict[Any, Any] = {}
        self._loaded: tuple[Any, ...] = ()
        self._outside: set[str] = set()
        self.buffers: Buffers | None = None
        if uses_buffers(self._device):
            scheduler = config.scheduler_config
            tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
            self.buffers = Buffers(*self._shape, tokens, scheduler.max_num_seqs, self._device)
        self._attach(modules)

    # ------------------------------------------------------------------ the model

    def _find_modules(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Path of each linear LoRA module in vLLM's model -> its layer and the columns of its slices."""
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        modules: dict[str, tuple[int, tuple[int, ...]]] = {}
        counts: dict[int, int] = {}
        for path, module in self.manager.modules.items():
            block = BLOCK.match(path)
            parent, _, name = path.rpartition(".")
            slices = self.manager.packed_modules_mapping.get(name) or [name]
            if block is None or not isinstance(module, BaseLinearLayerWithLoRA) or len(slices) != module.n_slices:
                continue
            layer = self._blocks.setdefault(block[1], len(self._blocks))
            first = counts.get(layer, 0)
            counts[layer] = first + len(slices)
            modules[path] = (layer, tuple(range(first, first + len(slices))))
            for column, of_slice in enumerate(slices, start=first):
                self.places[f"{parent}.{of_slice}"] = (layer, column)
        return modules

    def _attach(self, modules: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        blocks = {layer: self.manager.model.get_submodule(path) for path, layer in self._blocks.items()}
        for block in blocks.values():
            if "hidden_states" not in inspect.signature(block.forward).parameters:
                raise MiLoraError(
                    f"MiLoRA cannot read the input of {type(block).__name__}: it has no argument hidden_states. The "
                    "backbone is not supported on vLLM."
                )
        for layer, block in blocks.items():
            hook = partial(self._before_block, layer, inspect.signature(block.forward))
            block.register_forward_pre_hook(hook, with_kwargs=True)
        for path, module in self.manager.modules.items():
            wrapped = module.punica_wrapper
            if path in modules:
                layer, columns = modules[path]
                if self.buffers is None:
                    module.set_mapping(GatedLinear(wrapped, layer, columns, lambda: self.step))
                else:
                    module.set_mapping(BufferedLinear(wrapped, layer, columns, self.buffers))
            elif BLOCK.match(path) is None and self.buffers is None:
                module.set_mapping(IdleSkipped(wrapped, partial(self._outside.__contains__, path)))

    def read_routers(self, file: AdapterFile) -> dict[int, LayerRouter]:
        """Reads an adapter's routers; see [`milora_vllm.routers.read_routers`]."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        mapper = getattr(self.manager.model, "hf_to_vllm_mapper", None)
        mapper = None if mapper is None else mapper.get_rename_mapper()

        def name_of(path: str) -> str:
            return str(parse_fine_tuned_lora_name(f"{PREFIX}{path}.lora_A.weight", mapper)[0])

        return read_routers(file, self.places, name_of, self._config.model_config.get_hidden_size(), self._device)

    # ------------------------------------------------------------------ the step

    def begin(self, chunks: Iterable[Chunk]) -> None:
        """Prepares the step of the next forward pass."""
        slots = {number: slot for slot, number in enumerate(self.manager.lora_index_to_id) if number is not None}
        step = Step()
        for chunk in chunks:
            if chunk.lora is None or chunk.end == chunk.first:
                continue
            slot = slots[chunk.lora.lora_int_id]
            routers = getattr(self.manager.get_adapter(chunk.lora.lora_int_id), "milora_routers", None)
            if routers is None:
                step.rows.append(Rows(chunk.first, chunk.end, slot, self._plain))
                continue
            rows, decision = self._routes.follow(chunk, slot, routers)
            if rows is not None:
                step.rows.append(rows)
            if decision is not None:
                step.decisions.append(decision)
        if step.rows != self._rows:
            # The rows keep their routes alive, so no new route compares equal to an old one.
            self._rows, self._prepared = step.rows, {}
        step.prepared = self._prepared
        self._note_loaded()
        if self.buffers is not None:
            self.buffers.fill(step.rows)
        self.step = step

    def end(self, *_: Any) -> None:
        """Ends the step. Forward passes outside a step are vLLM's dummy runs."""
        self.step = None

    def forget(self, request: str) -> None:
        """Removes a request."""
        self._routes.forget(request)

    def _note_loaded(self) -> None:
        """Records the modules outside the blocks that loaded adapters change."""
        loaded = tuple(self.manager.lora_index_to_id)
        if loaded != self._loaded:
            self._loaded = loaded
            self._outside.clear()
            for number in filter(None, loaded):
                self._outside.update(path for path in self.manager.get_adapter(number).loras if not BLOCK.match(path))

    def _before_block(
        self, layer: int, signature: inspect.Signature, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Runs a layer's routers on the block's input, before its norm."""
        step = self.step
        if step is None or not step.decisions:
            return
        arguments = signature.bind_partial(*args, **kwargs).arguments
        hidden, residual = arguments["hidden_states"], arguments.get("residual")
        for decision in step.decisions:
            router = decision.routers.get(layer)
            if router is None:
                continue
            # vLLM's own models have no batch dimension. The ones from transformers have a batch of 1.
            of_rows = hidden.flatten(0, -2)[decision.first : decision.end]
            if residual is not None:  # vLLM's blocks pass the residual stream in two parts.
                of_rows = of_rows + residual.flatten(0, -2)[decision.first : decision.end]
            router.decide(of_rows, decision.route.gates[layer])
        if self.buffers is not None:
            self.buffers.decided(layer, step.rows)
