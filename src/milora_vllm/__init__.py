"""A vLLM plugin: unmodified vLLM serves MiLoRA adapters, plain LoRA adapters and the base model in one batch.

vLLM finds the plugin through the entry point `vllm.general_plugins` and calls [`register`] in each of its processes.
Until a MiLoRA adapter is loaded, vLLM runs as without the plugin.

- `adapter`: the adapter's folder and the routing of a prompt
- `options`: the vLLM options that MiLoRA does not support
- `scheduling`: prompt chunks and the prefix cache
- `routers`, `batch`, `served`: routes of the running requests
- `linear`, `buffers`: LoRA with gates, on a CPU and on a GPU
- `resolver`: adapters loaded by name from a folder
- `patches`: the private parts of vLLM that the plugin patches
"""

from __future__ import annotations

import logging

SUPPORTED = "0.32."
"""The tested vLLM releases."""

_log = logging.getLogger("vllm.milora")


def register() -> None:
    """Patches vLLM to support MiLoRA, once per process.

    With an unsupported vLLM release, it logs a warning and changes nothing. vLLM then rejects MiLoRA adapters at
    loading, because it does not know the routers' tensors.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        _log.warning(
            "milora supports vLLM %sx; found %s. MiLoRA adapters cannot be served: install vllm==%s0.",
            SUPPORTED,
            vllm.__version__,
            SUPPORTED,
        )
        return
    from milora_vllm import patches

    patches.install()
