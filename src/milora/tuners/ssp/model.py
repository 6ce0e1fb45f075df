"""The tuner of SSP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.attachment import Attachment, AttachmentTuner
from milora.tuners.ssp.config import KINDS, SSPConfig
from milora.tuners.ssp.layer import SSPLayer
from milora.tuners.ssp.search import most_probable, sample_gates, shifted
from milora_core.errors import MiLoraError


class SSPModel(AttachmentTuner):
    """A backbone with a sparse structure of LoRAs and biases; created by `get_peft_model(model, SSPConfig())`.

    While an adapter searches, training passes sample their gates, and other passes use the probabilities as gates. The
    model keeps the gates of the running pass only, so with gradient checkpointing each backward pass must come before
    the next forward pass. [`milora.training.ssp_search.SSPSearch`] runs the search in a `Trainer`.
    """

    method = "SSP"
    prefix = "ssp_"
    tuner_layer_cls = SSPLayer

    def _pre_injection_hook(self, model: nn.Module, config: SSPConfig, adapter_name: str) -> None:
        # The layers share this dictionary, so it must never be replaced by another one.
        self._gates: dict[str, dict[str, Tensor]] = {}
        self._handle: Any = model.register_forward_pre_hook(self._before_forward)

    def _prepare_adapter_config(self, peft_config: SSPConfig, model_config: dict[str, Any]) -> SSPConfig:
        super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.structure is not None:
            there = {path for path, _ in peft_config.structure}
            missing = sorted(there - peft_config.module_paths)
            if missing:
                raise MiLoraError(
                    f"The adapter is for another backbone: its structure has {missing[0]}, which is no linear module "
                    "of a block here."
                )
            peft_config.module_paths = there
        return peft_config

    def new_layer(self, path: str, module: nn.Module) -> Attachment:
        """See [`AttachmentTuner.new_layer`]."""
        return SSPLayer(path, self._gates)

    def complete_adapter(self, adapter_name: str, config: SSPConfig, *args: Any, **kwargs: Any) -> None:
        """Converts the budget to a number of parameters.

        Raises:
            MiLoraError: If the budget is below the parameters of the smallest candidate.
        """
        if config.structure is None:
            counts = self._counts(adapter_name)
            config.budget = round(sum(counts) * config.share) if config.share is not None else round(config.budget)
            if config.budget < min(counts):
                raise MiLoraError(
                    f"budget={config.budget} is below the {min(counts)} parameters of the smallest candidate; raise it."
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """See [`AttachmentTuner.delete_adapter`]."""
        super().delete_adapter(adapter_name)
        self._gates.pop(adapter_name, None)

    def unload(self) -> nn.Module:
        """See [`AttachmentTuner.unload`]."""
        self._handle.remove()
        return super().unload()

    # ---------------------------------------------------------------- searching

    @property
    def is_searching(self) -> bool:
        """Whether an active adapter has no structure yet."""
        return any(self.peft_config[name].structure is None for name in self.active_adapters)

    def gate_parameters(self, adapter: str | None = None) -> list[nn.Parameter]:
        """The gate logits of a searching adapter, (2) for each module; empty if the structure is fixed.

        Args:
            adapter: The adapter's name; by default the active one.
        """
        adapter = self._named(adapter)
        return [layer.gate_logits(adapter) for layer in self._searching(adapter)]

    def probabilities(self, adapter: str | None = None) -> dict[tuple[str, str], float]:
        """The probability of each candidate, by module path and kind; empty if the structure is fixed."""
        adapter = self._named(adapter)
        layers = self._searching(adapter)
        if not layers:
            return {}
        values = torch.sigmoid(self._shifted(adapter, layers).detach()).tolist()
        names = [(layer.path, kind) for layer in layers for kind in KINDS]
        return dict(zip(names, values, strict=True))

    def expected_parameters(self, adapter: str | None = None) -> float:
        """The expected number of parameters, `sum p_i N_i`, which equals the budget. For a fixed structure, its actual
        number of parameters."""
        adapter = self._named(adapter)
        if self.peft_config[adapter].structure is None:
            probabilities = self.probabilities(adapter).values()
            return sum(p * n for p, n in zip(probabilities, self._counts(adapter), strict=True))
        return float(sum(sum(layer.parameter_counts(adapter)) for layer in self._layers()))

    def most_probable(self, adapter: str | None = None) -> dict[tuple[str, str], int]:
        """The candidates that [`SSPModel.harden`] would keep now, with their numbers of parameters.

        Args:
            adapter: The adapter's name; by default the active one.
        """
        adapter = self._named(adapter)
        probabilities, counts = self.probabilities(adapter), self._counts(adapter)
        names = list(probabilities)
        kept = most_probable(list(probabilities.values()), counts, self.peft_config[adapter].budget)
        return {names[index]: counts[index] for index in kept}

    def harden(self, adapter: str | None = None) -> list[list[str]]:
        """Ends the search: keeps the most probable candidates that fit the budget, and drops the rest.

        The kept candidates are initialised again. Their parameters stay the same objects, so an optimizer continues
        with them.

        Args:
            adapter: The adapter's name; by default the active one.

        Returns:
            The structure, which is also written to the configuration.

        Raises:
            MiLoraError: If the adapter is not searching.
        """
        adapter = self._named(adapter)
        config: SSPConfig = self.peft_config[adapter]
        if config.structure is not None:
            raise MiLoraError(f"The structure of the SSP adapter {adapter!r} is already fixed.")
        kept = self.most_probable(adapter)
        for layer in self._searching(adapter):
            module = self.model.get_submodule(layer.path)
            layer.keep(adapter, {kind for path, kind in kept if path == layer.path}, module, config)
            if not layer.adapters():
                layer.detach(module)
        config.structure = [list(name) for name in kept]
        self._gates.pop(adapter, None)
        return config.structure

    def _named(self, adapter: str | None) -> str:
        if adapter is None:
            return str(self.active_adapters[0])
        if adapter not in self.peft_config:
            raise MiLoraError(f"No adapter named {adapter!r}; there are {sorted(self.peft_config)}.")
        return adapter

    def _layers(self) -> list[SSPLayer]:
        return [layer for layer in self.layers().values() if isinstance(layer, SSPLayer)]

    def _searching(self, adapter: str) -> list[SSPLayer]:
        return [layer for layer in self._layers() if adapter in layer.gate]

    def _counts(self, adapter: str) -> list[int]:
        return [count for layer in self._searching(adapter) for count in layer.parameter_counts(adapter)]

    def _shifted(self, adapter: str, layers: list[SSPLayer]) -> Tensor:
        logits = [layer.gate_logits(adapter) for layer in layers]
        alpha = torch.cat([part.float().to(logits[0].device) for part in logits])
        if alpha.is_meta:
            # Meta tensors have no values: use the initial ones.
            alpha = torch.zeros_like(alpha, device="cpu")
        counts = torch.tensor(self._counts(adapter), device=alpha.device)
        return shifted(alpha, counts, self.peft_config[adapter].budget)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        for adapter in self.active_adapters:
            config: SSPConfig = self.peft_config[adapter]
            if config.structure is None:
                layers = self._searching(adapter)
                logits = self._shifted(adapter, layers)
                drawn = sample_gates(logits, config.temperature) if model.training else logits.sigmoid()
                if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                    drawn = _leaf(drawn)
                rows = drawn.view(len(layers), len(KINDS))
                self._gates[adapter] = {layer.path: row for layer, row in zip(layers, rows, strict=True)}


def _leaf(gates: Tensor) -> Tensor:
    """Returns the gates as a leaf that passes each gradient to the graph of `gates`.

    Reentrant gradient checkpointing runs a backward pass for each block, but the graph that the blocks share allows
    only one. `torch.autograd.grad` stops at the leaf; `backward` continues beyond it.
    """
    if not gates.requires_grad:
        return gates
    leaf = gates.detach().requires_grad_()

    def hand_on(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        torch.autograd.backward(gates, gradient, retain_graph=True)

    leaf.register_post_accumulate_grad_hook(hand_on)  # type: ignore[no-untyped-call]
    return leaf
