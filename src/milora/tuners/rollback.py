"""Restores the model if an adapter cannot be built or its file does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from milora.tuners.adapter_file import check_adapter_tensors
from milora.tuners.context import ContextOwner, scopes
from milora.tuners.identity import BASE_ROW
from milora_core.errors import MiLoraError


class RevertibleTuner(BaseTuner):  # type: ignore[misc]
    """A tuner that removes an adapter if adding it fails.

    PEFT freezes the backbone, builds the adapter's layers, and then reads its weights. It does not clean up after an
    exception. Configurations must be [`milora.tuners.adapter_file.CheckedFileConfig`]s.
    """

    active_adapter: str | list[str]
    owner: ContextOwner

    @contextmanager
    def changing_adapter(self, adapter_name: str) -> Iterator[None]:
        """Inside this context no request uses the adapter of this name, and no other adapter is added or removed.

        Raises:
            MiLoraError: See [`milora.tuners.identity.AdapterIdentities.changing`].
        """
        own = [scope.generation.use for scope in scopes(self.owner) if scope.generation is not None]
        with self.owner.identities.changing(adapter_name, own):
            self.owner.identities.forget(adapter_name)
            yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Like PEFT's method, followed by [`RevertibleTuner.complete_adapter`]. If it fails, the model is unchanged.

        Raises:
            MiLoraError: If the adapter does not fit this model, or its name is reserved.
        """
        if not hasattr(self, "owner"):
            self.owner = ContextOwner()
        config = self.peft_config[adapter_name]
        if self._is_only(adapter_name):
            self._trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            if adapter_name == BASE_ROW:
                raise MiLoraError(f"An adapter cannot be named {BASE_ROW!r}: in adapter_names it means no adapter.")
            with self.owner.identities.lock:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self.complete_adapter(adapter_name, config, *args, **kwargs)
                if not config.awaits_weights:
                    self.owner.identities.renew(adapter_name)
        except Exception:
            self._take_back(adapter_name)
            raise
        if not config.awaits_weights:
            self._trained_before = []

    def complete_adapter(self, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        """Hook for a method's own setup after PEFT has built the layers. The default does nothing.

        Args:
            adapter_name: The adapter.
            config: Its configuration.
            *args: See `inject_adapter`.
            **kwargs: See `inject_adapter`.
        """

    def remove_empty_layers(self) -> None:
        """Removes layers that have no adapter left. Does nothing if `delete_adapter` already removes them."""

    def _is_only(self, adapter_name: str) -> bool:
        return set(self.peft_config) <= {adapter_name}

    def _take_back(self, adapter_name: str) -> None:
        """Restores the model to its state before an adapter was added, fully or in part."""
        if self._is_only(adapter_name):
            trained = self._trained_before
            self._restore_modules(only_unused=False)
            self.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            return
        active = self.active_adapter
        self.delete_adapter(adapter_name)
        self.active_adapter = active
        self.remove_empty_layers()
        self._restore_modules(only_unused=True)

    def _restore_modules(self, *, only_unused: bool) -> None:
        """Replaces PEFT's wrappers for `modules_to_save` or `trainable_token_indices` by the backbone's modules.

        Args:
            only_unused: Keep wrappers that an adapter still uses.
        """
        for path, wrapper in list(self.model.named_modules()):
            if isinstance(wrapper, AuxiliaryTrainingWrapper) and not (only_unused and wrapper._adapters):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, wrapper.original_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        tuner = model.base_model if isinstance(model.base_model, cls) else None
        try:
            check_adapter_tensors(model, adapter_name, remapped)
        except MiLoraError:
            if tuner is not None and config.awaits_weights:
                tuner._take_back(adapter_name)
            raise
        config.awaits_weights = False
        if tuner is not None:
            tuner._trained_before = []
            # Load the weights here, where no request uses the adapter; PEFT loads them again, when requests may. The
            # adapter gets a new identity: caches filled under its name before cannot be continued.
            with tuner.changing_adapter(adapter_name):
                is_on_meta = any(place.is_meta for place in model.parameters())
                model.load_state_dict(remapped, strict=False, assign=is_on_meta)
                tuner.owner.identities.renew(adapter_name)
        return remapped
