"""A bottleneck parallel to a sub-layer: the base of Parallel-Adapter and Learned-Adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora.backbone.blocks import Block, find_blocks, hidden_size
from milora.backbone.sublayers import SUBLAYER_NAMES, Sublayer, find_sublayers
from milora.tuners.attachment import Attachment, AttachmentConfig, AttachmentTuner
from milora_core.errors import MiLoraError, did_you_mean
from milora_core.routing.rational import ACTIVATIONS


class Bottleneck(nn.Module):
    """`scale * inner(x D^T) U^T`, without biases, for each token separately.

    `U` starts at zero, so a new adapter changes nothing. `D` is initialised like LoRA's `A` in PEFT.

    Args:
        size: Size d of the hidden states.
        bottleneck: Size r of the bottleneck.
        inner: The module between the projections, (..., r) to (..., r).
        scale: Factor of the result.

    Attributes:
        down: `D`, (r, d).
        up: `U`, (d, r).
    """

    def __init__(self, size: int, bottleneck: int, inner: nn.Module, scale: float) -> None:
        super().__init__()
        # Not `nn.Linear`: it would be found as one of the block's linear modules.
        self.down = nn.Parameter(torch.empty(bottleneck, size))
        self.up = nn.Parameter(torch.empty(size, bottleneck))
        self.inner = inner
        self.scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections again. The inner module resets itself."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., d) in any floating-point dtype to (..., d) in the parameters' dtype."""
        between = self.inner(functional.linear(x.to(self.down.dtype), self.down))
        return self.scale * functional.linear(between, self.up)


class Activation(nn.Module):
    """One of [`milora_core.routing.rational.ACTIVATIONS`], in the dtype of its input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation; the shape stays the same."""
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        """The activation's name."""
        return self.name


@dataclass
class BottleneckConfig(AttachmentConfig):
    """Base of the configurations of methods with bottlenecks.

    Args:
        bottleneck: Size of the bottleneck.
        scale: Factor of the bottleneck's output.
        sublayers: The sub-layers of a block that get a bottleneck: `attention`, `feed_forward`, or both.

    Raises:
        MiLoraError: If `bottleneck` is below 1, or `sublayers` is empty or has an unknown name.
    """

    bottleneck: int = 160
    scale: float = 4.0
    sublayers: list[str] = field(default_factory=lambda: list(SUBLAYER_NAMES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1:
            raise MiLoraError(f"bottleneck must be at least 1; found {self.bottleneck}.")
        check_names("sublayers", self.sublayers, SUBLAYER_NAMES)


def check_names(setting: str, names: Any, known: Any) -> None:
    """Checks that a setting is a list of known names without duplicates.

    Raises:
        MiLoraError: If it is not a list, is empty, or has an unknown name or a duplicate.
    """
    if not isinstance(names, list | tuple) or not names or len(set(names)) < len(names):
        raise MiLoraError(f"{setting} must be a list of one or several of {list(known)}; found {names!r}.")
    for name in names:
        if name not in known:
            raise MiLoraError(f"{setting} has {name!r}; known are {list(known)}{did_you_mean(str(name), known)}.")


class BottleneckLayer(Attachment):
    """`h = sublayer(x) + bottleneck(x)`, with `x` the input of the sub-layer (He et al. 2021, "parallel").

    Subclasses define the module between the projections in [`BottleneckLayer.build_inner`].

    Args:
        path: Path of the module whose output is changed.
        size: Size of the hidden states.
    """

    adapter_layer_names = ("bottleneck",)

    def __init__(self, path: str, size: int) -> None:
        super().__init__(path)
        self.size = size
        self.bottleneck = nn.ModuleDict()
        self._reads_elsewhere = False
        self._input: Tensor | None = None

    def build_inner(self, config: Any) -> nn.Module:
        """Builds the module between an adapter's projections, (..., r) to (..., r)."""
        raise NotImplementedError(f"{type(self).__name__} does not define the inside of its bottleneck.")

    def update_layer(self, adapter: str, module: nn.Module, config: Any) -> None:
        """See [`Attachment.update_layer`]."""
        self.bottleneck[adapter] = Bottleneck(self.size, config.bottleneck, self.build_inner(config), config.scale)

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """See [`Attachment.adapt`]."""
        change: Tensor = self.bottleneck[adapter](hidden)
        return output + change

    def read_from(self, module: nn.Module) -> None:
        """Reads the sub-layer's input from another module, which is called first."""
        self._reads_elsewhere = True
        self._handles.append(module.register_forward_pre_hook(self._keep_input, with_kwargs=True))

    def read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """See [`Attachment.read_input`]."""
        if not self._reads_elsewhere:
            return super().read_input(args, kwargs)
        # Released here, so that it does not outlive the forward pass.
        hidden, self._input = self._input, None
        if hidden is None:
            raise MiLoraError(f"{self.path} was called without the module before it, so there is no input.")
        return hidden

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.disable_adapters:
            self._input = super().read_input(args, kwargs)


class BottleneckModel(AttachmentTuner):
    """Base of tuners whose layers are [`BottleneckLayer`]s."""

    tuner_layer_cls: type[BottleneckLayer]

    def choose_modules(self, config: Any, block: Block) -> dict[str, nn.Module]:
        """Returns the output modules of the sub-layers that the configuration names."""
        sublayers = self._sublayers(config, block)
        return {s.output_path: block.module.get_submodule(s.output_path) for s in sublayers}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        blocks = find_blocks(self.model, peft_config.blocks)
        found = {f"{b.path}.{s.output_path}": (b, s) for b in blocks for s in self._sublayers(peft_config, b)}
        for kind in peft_config.sublayers:
            if all(sublayer.kind != kind for _, sublayer in found.values()):
                raise MiLoraError(
                    f"No block of {type(self.model).__name__} has the sub-layer {kind!r} for {self.method}: looked for"
                    f" {', '.join(SUBLAYER_NAMES[kind])}. Remove it from sublayers={peft_config.sublayers}."
                )
        self._found: dict[str, tuple[Block, Sublayer]] = found
        return super()._prepare_adapter_config(peft_config, model_config)

    def new_layer(self, path: str, module: nn.Module) -> BottleneckLayer:
        """See [`AttachmentTuner.new_layer`]."""
        block, sublayer = self._found[path]
        layer = self.tuner_layer_cls(path, hidden_size(self.model, block))
        if sublayer.input_path != sublayer.output_path:
            layer.read_from(block.module.get_submodule(sublayer.input_path))
        return layer

    @staticmethod
    def _sublayers(config: Any, block: Block) -> list[Sublayer]:
        found = find_sublayers(block)
        return [found[kind] for kind in config.sublayers if kind in found]
