"""An adapter that the engine knows, and what follows from how it was trained."""

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
    """An adapter that the engine knows, in memory or not.

    Args:
        name: Its name.
        folder: Its folder.
        number: Tells it from any other adapter of its name, before or after it.

    Attributes:
        kind: PEFT's name of its method.
        config: PEFT's configuration.
        slot: Its name in the model while it is in memory, where names may hold no dots.
        uses: How many waiting or running requests use it.
        running: How many of these are running, so that it must stay in memory.
        is_late: Whether prompts but for their last token are the bare backbone's (`adapted_tokens="completion"`).
        is_shared: Whether what it leaves to the bare backbone is the same for all adapters.
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
        self.is_shared = self.is_late and not config.modules_to_save
        self._window: int | None = config.router_window if is_routed else None
        self._reads_last = is_routed and config.pooler == "last" and self._window is None

    def deciding(self, prompt: int) -> tuple[int, int] | None:
        """The first prompt token that the routers read, and how many; `None` for a LoRA adapter.

        Args:
            prompt: Tokens of the prompt.
        """
        if self.kind == "LORA":
            return None
        if self._reads_last and self.is_late:
            return prompt - 1, 1
        return 0, prompt if self._window is None else min(prompt, self._window)

    def salt(self, route: PackedRoute | None) -> Hashable | None:
        """What computes its cached tokens; `None` while the route is not known.

        Args:
            route: The request's route, if it is known.
        """
        if self.is_shared and (route is not None or self._reads_last):
            return ()
        if route is None:
            return None
        gates = tuple((block, tuple(of_block)) for block, of_block in route.gates.items())
        return (self.number, gates)

    def check_files(self) -> None:
        """Refuses a folder whose files were changed since it was loaded: texts and caches are of the old ones.

        Raises:
            AdapterError: If they were.
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
