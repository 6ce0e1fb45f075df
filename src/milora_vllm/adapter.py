"""A MiLoRA adapter's folder as the scheduler and the workers read it, and how a request's prompt is routed."""

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
"""Key of `SamplingParams.extra_args`: how many of the request's tokens are the prompt. Beams set it, whose requests
repeat the prompt together with the tokens generated so far."""


@dataclass(frozen=True)
class Routing:
    """How one request is routed.

    Attributes:
        key: Names the adapter and the tokens that decide; requests with equal keys have equal routes.
        first: Position of the first token that the routers read.
        end: Position after the last one. One step must compute all tokens from `first` to `end`.
        adapted: Position of the first token that the adapter changes.
        late: Whether tokens before `adapted` go through the bare backbone (late adaptation).
        cache_key: What the block hashes of tokens from `adapted` on depend on, beyond the tokens.
    """

    key: bytes
    first: int
    end: int
    adapted: int
    late: bool
    cache_key: str


@dataclass(frozen=True)
class AdapterFile:
    """What `adapter_config.json` says about routing.

    Attributes:
        folder: The adapter's folder.
        identity: Names this loading of the adapter. Keys and values of an adapter that was unloaded and loaded again
            under the same name are never reused.
        window: `router_window`: the routers read at most so many tokens; `None` means the whole prompt.
        late: Whether `adapted_tokens` is `completion`.
        reads_last: Whether the routers read the last prompt token alone.
        config: The whole configuration.
    """

    folder: Path
    identity: str
    window: int | None
    late: bool
    reads_last: bool
    config: dict[str, Any]

    def span(self, prompt_length: int) -> int:
        """How many tokens of a prompt one step must compute together, so that its route is known."""
        if self.reads_last:
            return 1
        return prompt_length if self.window is None else min(self.window, prompt_length)

    def routing(self, tokens: Sequence[int], prompt_length: int) -> Routing:
        """Routes a prompt of `prompt_length` tokens, the first of `tokens`."""
        end = prompt_length if self.window is None else min(self.window, prompt_length)
        first = end - self.span(prompt_length)
        digest = hashlib.sha256(f"{self.identity}\0{self.window}\0".encode())
        digest.update(array("q", tokens[:end]).tobytes())
        adapted = prompt_length - 1 if self.late else 0
        # Adapted tokens depend on the route and on where adaptation begins. The hash of a block contains the tokens
        # before it, so with late adaptation the prompt's length is all that is missing.
        cache_key = f"milora:{self.identity}:{prompt_length}" if self.late else f"milora:{digest.hexdigest()}"
        return Routing(digest.digest(), first, end, adapted, self.late, cache_key)


def adapter_file(lora_request: Any) -> AdapterFile | None:
    """The MiLoRA adapter that a `LoRARequest` names; `None` for a plain LoRA adapter and for no adapter.

    Raises:
        MiLoraError: If its `adapter_config.json` cannot be read or describes an adapter that vLLM cannot serve.
    """
    if lora_request is None:
        return None
    return _read(lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)


def request_routing(request: Any) -> Routing | None:
    """The routing of one of vLLM's requests, of any object with its fields; `None` without a MiLoRA adapter.

    Raises:
        MiLoraError: If `milora_prompt_tokens` is no number of its tokens, or as of [`adapter_file`].
    """
    file = adapter_file(request.lora_request)
    if file is None:
        return None
    tokens = request.prompt_token_ids
    arguments = getattr(request.sampling_params, "extra_args", None) or {}
    length = arguments.get(PROMPT_TOKENS, len(tokens))
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= len(tokens):
        raise MiLoraError(f"{PROMPT_TOKENS} must lie between 1 and the {len(tokens)} tokens sent; found {length!r}.")
    return file.routing(tokens, length)


@lru_cache(maxsize=4096)
def _read(name: str, number: int, path: str) -> AdapterFile | None:
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(path))
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            return None  # vLLM says it in its own words.
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
