"""Finds MiLoRA adapters by name when a request asks for one that is not loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

_log = logging.getLogger("vllm.milora")


class MiLoraFilesystemResolver(LoRAResolver):  # type: ignore[misc]
    """Looks for the adapter `name` in the folder `root/name`, as vLLM's own resolver does for plain LoRA.

    Args:
        root: The folder of adapters, `VLLM_LORA_RESOLVER_CACHE_DIR`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter's `LoRARequest`; `None` if there is no MiLoRA adapter of this name for the base model."""
        folder = (self.root / lora_name).resolve()
        # The name comes from a request and must not leave the root, not even through a link.
        if folder.parent != self.root:
            return None
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if config.get("peft_type") != "MILORA":
            return None
        backbone = config.get("base_model_name_or_path")
        if backbone != base_model_name:
            _log.warning("The adapter %s was not loaded: it is for %s, not %s.", folder, backbone, base_model_name)
            return None
        # vLLM replaces the number.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))
