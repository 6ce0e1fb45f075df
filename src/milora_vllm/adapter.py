"""Reads a MiLoRA adapter's folder for the scheduler and the workers, and determines how a prompt is routed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from milora_core.errors import MiLoraError

PROMPT_TOKENS = "milora_prompt_tokens"
"""Key of `SamplingParams.extra_args`: the number of the request's tokens that are the prompt. Beam search sets it
because its requests send the prompt together with the tokens generated so far."""


@dataclass(frozen=True)
class Routing:
    """The routing of one request.

    Attributes:
        key: Identifies the adapter and the deciding tokens. Requests with equal keys have equal routes.
        first: Position of the first token that the routers read.
        end: Position after the last one. One step must compute all tokens from `first` to `end`.
        adapted: Position of the first token that the adapter changes.
        late: Whether tokens before `adapted` go through the bare backbone (late adaptation).
        cache_key: Extra key in the block hashes of the tokens from `adapted` on.
    """

    key: bytes
    first: int
    end: int
    adapted: int
    late: bool
    cache_key: str


@dataclass(frozen=True)
class AdapterFile:
    """The routing settings in `adapter_config.json`.

    Attributes:
        folder: The adapter's folder.
        identity: Identifies this loading of the adapter. If the adapter is loaded again under the same name, cached
            keys and values of the earlier loading are not reused.
        window: `router_window`: maximum number of tokens that the routers read; `None` means the whole prompt.
        late: Whether `adapted_tokens` is `completion`.
        reads_last: Whether the routers read only the last prompt token.
        config: The whole configuration.
    """

    folder: Path
    identity: str
    window: int | None
    late: bool
    reads_last: bool
    config: dict[str, Any]

    def span(self, prompt_length: int) -> int:
        """Number of prompt tokens that one step must compute together to decide the route."""
        if self.reads_last:
            return 1
        return prompt_length if self.window is None else min(self.window, prompt_length)

    def routing(self, tokens: Sequence[int], prompt_length: int) -> Routing:
        """The routing of a prompt, which is the first `prompt_length` of `tokens`."""
        end = prompt_length if self.window is None else min(self.window, prompt_length)
        first = end - self.span(prompt_length)
        digest = hashlib.sha256(f"{self.identity}\0{self.window}\0".encode())
        digest.update(array("q", tokens[:end]).tobytes())
        adapted = prompt_length - 1 if self.late else 0
        # Adapted tokens depend on the route and on the position at which adaptation starts. A block's hash contains
        # the tokens before it, so with late adaptation only the prompt's length must be added.
        cache_key = f"milora:{self.identity}:{prompt_length}" if self.late else f"milora:{digest.hexdigest()}"
        return Routing(digest.digest(), first, end, adapted, self.late, cache_key)


def adapter_file(lora_request: Any) -> AdapterFile | None:
    """The MiLoRA adapter of a `LoRARequest`; `None` for a plain LoRA adapter and for no adapter.

    Raises:
        MiLoraError: If `adapter_config.json` cannot be read or describes an adapter that vLLM cannot serve.
    """
    if lora_request is None:
        return None
    return _read(lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)


def request_routing(request: Any) -> Routing | None:
    """The routing of a vLLM request, or of any object with the same fields; `None` without a MiLoRA adapter.

    Raises:
        MiLoraError: If `milora_prompt_tokens` is not between 1 and the number of tokens sent, or if [`adapter_file`]
            raises an error.
    """
    file = adapter_file(request.lora_request)
    if file is None:
        return None
    tokens = request.prompt_token_ids
    arguments = getattr(request.sampling_params, "extra_args", None) or {}
    length = arguments.get(PROMPT_TOKENS, len(tokens))
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= len(tokens):
        raise MiLoraError(f"{PROMPT_TOKENS} must be between 1 and the {len(tokens)} tokens sent; found {length!r}.")
    return file.routing(tokens, length)


@lru_cache(maxsize=4096)
def _read(name: str, number: int, path: str) -> AdapterFile | None:
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(path))
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            return None  # vLLM reports this error itself.
        raise MiLoraError(f"{folder / 'adapter_config.json'} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "MILORA":
        return None
    _check(folder, config)
    window = config.get("router_window")
    late = config.get("adapted_tokens", "all") == "completion"
    reads_last = late and window is None and config.get("pooler") == "last"
    return AdapterFile(folder, f"{number}:{name}:{path}", window, late, reads_last, config)


def _check(folder: Path, config: dict[str, Any]) -> None:
    if config.get("use_dora"):
        raise MiLoraError(f"{folder} is a MiDoRA adapter (use_dora), which vLLM does not support; `milora serve` does.")
    for field in ("modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias"):
        if config.get(field):
            raise MiLoraError(f"{folder} uses {field}, which vLLM does not support for MiLoRA adapters.")
    if config.get("adapted_tokens", "all") not in ("all", "completion"):
        raise MiLoraError(f"{folder}: unknown adapted_tokens {config['adapted_tokens']!r}; choose all or completion.")
    window = config.get("router_window")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise MiLoraError(f"{folder}: router_window must be a whole number of at least 1, or null; found {window!r}.")
    if not config.get("experts"):
        raise MiLoraError(f"{folder}: adapter_config.json has no experts; save the adapter again.")
