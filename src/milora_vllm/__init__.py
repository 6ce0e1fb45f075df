"""The plugin by which unforked vLLM serves MiLoRA adapters, plain LoRA adapters and the base model in one batch.

vLLM finds it by the entry point `vllm.general_plugins` and calls [`register`] in each of its processes. Until a MiLoRA
adapter is loaded, vLLM runs as if the plugin were not installed.

- `adapter`: the adapter's folder, and how a prompt is routed
- `options`: the vLLM options that MiLoRA does not support
- `scheduling`: chunks of a prompt and the prefix cache
- `routers`, `batch`, `served`: routes of the running requests
- `linear`, `buffers`: LoRA with gates, on a CPU and on a GPU
- `resolver`: adapters loaded by name from a folder
- `patches`: the private parts of vLLM that all this attaches to
"""

from __future__ import annotations

import logging

SUPPORTED = "0.32."
"""The vLLM releases that the parity tests ran on."""

_log = logging.getLogger("vllm.milora")


def register() -> None:
    """Attaches MiLoRA to vLLM, once a process.

    On another vLLM release it logs one line and changes nothing. vLLM itself then refuses MiLoRA adapters when they are
    loaded, since it does not know the tensors of their routers.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        _log.warning(
            "milora supports vLLM %sx and found %s: MiLoRA adapters cannot be served. Install vllm==%s0.",
            SUPPORTED,
            vllm.__version__,
            SUPPORTED,
        )
        return
    from milora_vllm import patches

    patches.install()
