"""An adapter known to the engine, and the facts that its configuration determines."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from milora.backbone.loading import read_adapter_config
from milora.serving.requests import AdapterError
from milora.tuners.milora.packed import PackedRoute
from milora_core.errors import MiLoraError

KINDS = ("MILORA", "LORA")


class Adapter:
    """An adapter known to the engine, in memory or not.

    Args:
        name: The adapter's name.
        folder: The adapter's folder.
        number: Identifies the adapter among all adapters that ever had this name.

    Attributes:
        kind: PEFT's name for the adapter's method.
        config: PEFT's configuration.
        slot: The adapter's name in the model while it is in memory. PEFT's adapter names may not contain dots.
        uses: Number of waiting or running requests that use the adapter.
        running: Number of running requests that use it. While this is above 0, the adapter stays in memory.
        is_late: Whether the bare backbone computes all prompt tokens but the last (`adapted_tokens="completion"`).
        is_shared: Whether the tokens that the bare backbone computes are the same for all adapters.
    """

    def __init__(self, name: str, folder: Path, number: int) -> None:
        try:
            config = read_adapter_config(folder)
        except MiLoraError as error:
            raise AdapterError(str(error)) from error
        self.kind = str(getattr(config.peft_type, "value", config.peft_type))
        if self.kind not in KINDS:
            raise AdapterError(f"{folder} holds a {self.kind} adapter; the engine serves {' and '.join(KINDS)}.")
        if config.trainable_token_indices:
            raise AdapterError(
                f"{folder} trains single tokens of the embedding (trainable_token_indices), which PEFT cannot keep "
                "beside other adapters; train the embedding whole (modules_to_save)."
            )
        self.name, self.folder, self.number = name, folder, number
        self.slot = ""
        self.uses = self.running = 0
        self.config = config
        self.tokenizer: Any = None
        self.files = self._state_of_files()
        is_routed = self.kind == "MILORA"
        self.is_late = is_routed and config.adapted_tokens == "completion"
        self.is_shared = is_routed and config.leaves_prompt_bare
        self._window: int | None = config.router_window if is_routed else None
        self._reads_last = is_routed and config.pooler == "last" and self._window is None

    def deciding(self, prompt: int) -> tuple[int, int] | None:
        """The index of the first prompt token that the routers read, and the number they read; `None` for LoRA.

        Args:
            prompt: Number of prompt tokens.
        """
        if self.kind == "LORA":
            return None
        if self._reads_last and self.is_late:
            return prompt - 1, 1
        return 0, prompt if self._window is None else min(prompt, self._window)

    def salt(self, route: PackedRoute | None) -> Hashable | None:
        """A key for the weights that compute the cached tokens; `None` while the route is unknown.

        Args:
            route: The request's route, if known.
        """
        if self.is_shared and (route is not None or self._reads_last):
            return ()
        if route is None:
            return None
        gates = tuple((block, tuple(of_block)) for block, of_block in route.gates.items())
        return (self.number, gates)

    def check_files(self) -> None:
        """Rejects a folder with files that changed since the adapter was opened: cached pages belong to the old files.

        Raises:
            AdapterError: If a file changed.
        """
        if self._state_of_files() != self.files:
            raise AdapterError(
                f"The files of adapter {self.name!r} in {self.folder} have changed since it was loaded; unload it and "
                "load it again."
            )

    def _state_of_files(self) -> list[tuple[int, int]]:
        try:
            found = [(self.folder / name).stat() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        except OSError as error:
            raise AdapterError(f"{self.folder} holds no adapter: {error}.") from error
        return [(state.st_mtime_ns, state.st_size) for state in found]
