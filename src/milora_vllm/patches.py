"""Patches all private parts of vLLM that the plugin needs. `tests/vllm_plugin/test_parts.py` reports parts that moved.

Each patch calls the original. Without a MiLoRA adapter, it does nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

from milora_core.errors import MiLoraError
from milora_vllm.adapter import PROMPT_TOKENS, adapter_file, request_routing
from milora_vllm.batch import Chunk
from milora_vllm.options import check_options
from milora_vllm.routers import ROUTER, WEIGHTS
from milora_vllm.scheduling import RoutedScheduling, with_routes
from milora_vllm.served import ServedModel

PARTS = {
    "vllm.config.scheduler.SchedulerConfig.get_scheduler_cls": "self",
    "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys": "request start_token_idx end_token_idx start_mm_idx",
    "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit": "self request",
    "vllm.v1.core.sched.scheduler.Scheduler._mamba_block_aligned_split": (
        "self request num_new_tokens num_new_local_computed_tokens num_external_computed_tokens"
    ),
    "vllm.v1.core.sched.scheduler.Scheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.scheduler.Scheduler.add_request": "self request",
    "vllm.v1.core.sched.scheduler.Scheduler.get_request_counts": "self",
    "vllm.v1.request.Request.get_skip_reading_prefix_cache": "self",
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs": None,
    "vllm.entrypoints.generate.beam_search.utils.BeamSearchSequence.get_prompt": "self",
    "vllm.lora.worker_manager.WorkerLoRAManager.__init__": None,
    "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter": "self lora_request",
    "vllm.lora.model_manager.LoRAModelManager.get_adapter": "self adapter_id",
    "vllm.lora.layers.base.BaseLayerWithLoRA.set_mapping": "self punica_wrapper",
    "vllm.lora.lora_model.LoRAModel._should_skip_module": "module_name skip_prefixes",
    "vllm.lora.utils.parse_fine_tuned_lora_name": "name weights_mapper",
    "vllm.lora.utils.get_adapter_absolute_path": "lora_path",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._model_forward": None,
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._on_request_state_removed": "self req_id req_state",
    "vllm.v1.worker.gpu.model_states.resolve_model_state_cls": "vllm_config model",
    "vllm.v1.worker.gpu.model_states.default.DefaultModelState.add_request": "self req_index new_req_data",
    "vllm.v1.worker.gpu.model_states.default.DefaultModelState.remove_request": "self req_id",
    "vllm.v1.worker.gpu.model_states.default.DefaultModelState.prepare_inputs": "self input_batch req_states",
}
"""The functions that are patched, overridden or called, with the arguments they must have; `None` for any arguments."""


@cache
def install() -> None:
    """Patches vLLM, once per process."""
    _patch_scheduler()
    _patch_requests()
    _patch_loading()
    _patch_runner_v1()
    _patch_runner_v2()
    _register_resolver()


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(make(original)))


def _patch_scheduler() -> None:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.core import block_pool, kv_cache_utils

    @cache
    def routed(base: type) -> type:
        return type(f"MiLora{base.__name__}", (RoutedScheduling, base), {"__module__": __name__})

    _patch(SchedulerConfig, "get_scheduler_cls", lambda original: lambda self: routed(original(self)))
    # The second module imports the function by name.
    for module in (kv_cache_utils, block_pool):
        _patch(module, "generate_block_hash_extra_keys", with_routes)


def _patch_requests() -> None:
    """Rejects unsupported requests without affecting others, and passes on the prompt's length in beam search."""
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def get_prompt(original: Any) -> Any:
        def with_length(self: Any) -> Any:
            prompt = original(self)
            if prompt["type"] == "token" and adapter_file(self.lora_request) is not None:
                prompt[PROMPT_TOKENS] = len(self.orig_prompt["prompt_token_ids"])
            return prompt

        return with_length

    def process_inputs(original: Any) -> Any:
        def checked(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, request_id, prompt, *args, **kwargs)
            try:
                file = adapter_file(request.lora_request)
                if file is not None:
                    check_options(self.vllm_config, file, request.lora_request.lora_name)
                    _check_request(request)
                    if isinstance(prompt, dict) and PROMPT_TOKENS in prompt:
                        arguments = request.sampling_params.extra_args or {}
                        request.sampling_params.extra_args = {**arguments, PROMPT_TOKENS: prompt[PROMPT_TOKENS]}
                    request_routing(request)
            except MiLoraError as error:
                # The server returns status 400 for this error.
                raise VLLMValidationError(str(error)) from error
            return request

        return checked

    _patch(BeamSearchSequence, "get_prompt", get_prompt)
    _patch(InputProcessor, "process_inputs", process_inputs)


def _check_request(request: Any) -> None:
    found = {
        "images, audio or video": bool(request.mm_features),
        "prompt embeddings": request.prompt_embeds is not None or request.prompt_token_ids is None,
        "streamed prompts": request.resumable,
        "pooling": request.sampling_params is None,
    }
    for name, is_set in found.items():
        if is_set:
            raise MiLoraError(
                f"The MiLoRA adapter {request.lora_request.lora_name!r} does not support {name}; send a text prompt."
            )


def _patch_loading() -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    def init(original: Any) -> Any:
        def keep_config(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            self._milora_config = vllm_config

        return keep_config

    def load(original: Any) -> Any:
        def with_routers(self: Any, lora_request: Any) -> Any:
            file = adapter_file(lora_request)
            if file is None:
                return original(self, lora_request)
            check_options(self._milora_config, file, lora_request.lora_name)
            if lora_request.load_inplace:
                raise MiLoraError(
                    f"MiLoRA adapter {lora_request.lora_name!r} cannot be loaded in place, because keys, values and "
                    "routes of the old weights stay cached: unload it, then load it without load_inplace."
                )
            if not (file.folder / WEIGHTS).is_file():
                raise MiLoraError(f"{file.folder} has no {WEIGHTS}; save the adapter as safetensors.")
            manager = self._adapter_manager
            if served_by(manager) is None:
                manager.milora_served = ServedModel(manager, self._milora_config)
            routers = manager.milora_served.read_routers(file)
            lora = _without_routers(manager.model, lambda: original(self, lora_request))
            lora.milora_routers = routers
            return lora

        return with_routers

    _patch(WorkerLoRAManager, "__init__", init)
    _patch(WorkerLoRAManager, "_load_adapter", load)


def _without_routers(model: Any, load: Callable[[], Any]) -> Any:
    """Makes vLLM load an adapter without its routers' tensors, which it would reject."""
    before = getattr(model, "lora_skip_prefixes", None)
    model.lora_skip_prefixes = [*(before or ()), ROUTER.strip(".") + "."]
    try:
        return load()
    finally:
        model.lora_skip_prefixes = before


def served_by(manager: Any) -> ServedModel | None:
    """The [`ServedModel`] of a `LoRAModelManager`; `None` before its first MiLoRA adapter is loaded."""
    return getattr(manager, "milora_served", None)


def _patch_runner_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def served(runner: Any) -> ServedModel | None:
        return served_by(runner.lora_manager._adapter_manager) if runner.lora_config else None

    def chunks(runner: Any) -> Iterator[Chunk]:
        batch, starts = runner.input_batch, runner.query_start_loc.np
        for index, name in enumerate(batch.req_ids):
            state = runner.requests[name]
            yield Chunk(
                name,
                state.lora_request,
                state.prompt_token_ids,
                state.sampling_params,
                int(starts[index]),
                int(starts[index + 1]),
                int(batch.num_computed_tokens_cpu[index]),
            )

    def forward(original: Any) -> Any:
        def in_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            model = served(self)
            if model is None:
                return original(self, *args, **kwargs)
            model.begin(chunks(self))
            try:
                return original(self, *args, **kwargs)
            finally:
                model.end()

        return in_step

    def removed(original: Any) -> Any:
        def forget(self: Any, req_id: str, req_state: Any) -> None:
            model = served(self)
            if model is not None:
                model.forget(req_id)
            original(self, req_id, req_state)

        return forget

    _patch(GPUModelRunner, "_model_forward", forward)
    _patch(GPUModelRunner, "_on_request_state_removed", removed)


class RoutedState:
    """Mixed into the model state of vLLM's runner V2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._milora_requests: dict[str, tuple[Any, Any, Any]] = {}
        self.model.register_forward_hook(self._milora_end, always_call=True)  # type: ignore[attr-defined]

    def _milora(self) -> ServedModel | None:
        return served_by(getattr(self.model, "lora_manager", None))  # type: ignore[attr-defined]

    def _milora_end(self, *_: Any) -> None:
        served = self._milora()
        if served is not None:
            served.end()

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """See vLLM's `ModelState`."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        new = new_req_data
        self._milora_requests[new.req_id] = (new.lora_request, new.prompt_token_ids, new.sampling_params)

    def remove_request(self, req_id: str) -> None:
        """See vLLM's `ModelState`."""
        super().remove_request(req_id)  # type: ignore[misc]
        self._milora_requests.pop(req_id, None)
        served = self._milora()
        if served is not None:
            served.forget(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """See vLLM's `ModelState`."""
        inputs = super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]
        served = self._milora()
        # The requests of a dummy run were never added.
        if served is not None and all(name in self._milora_requests for name in input_batch.req_ids):
            starts, computed = input_batch.query_start_loc_np, input_batch.num_computed_tokens_np
            served.begin(
                Chunk(name, *self._milora_requests[name], int(first), int(end), int(before))
                for name, first, end, before in zip(input_batch.req_ids, starts, starts[1:], computed, strict=False)
            )
        return inputs


def _patch_runner_v2() -> None:
    from vllm.v1.worker.gpu import model_states

    @cache
    def routed(base: type) -> type:
        return type(f"MiLora{base.__name__}", (RoutedState, base), {})

    def resolve(original: Any) -> Any:
        def with_routes(vllm_config: Any, model: Any) -> Any:
            base = original(vllm_config, model)
            return routed(base) if vllm_config.lora_config else base

        return with_routes

    _patch(model_states, "resolve_model_state_cls", resolve)


def _register_resolver() -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    root = os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR")
    if root:
        from milora_vllm.resolver import MiLoraFilesystemResolver

        LoRAResolverRegistry.register_resolver("MiLoRA Filesystem Resolver", MiLoraFilesystemResolver(Path(root)))
