"""Finds the Transformer blocks of a decoder, and in each block the linear modules that can be experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from milora_core.errors import MiLoraError

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "wg", "gate_weight"})
"""Names of the routers of mixture-of-experts backbones: linear layers that are not our experts."""

SPARSE_EXPERTS = "experts"
"""The child that holds the sparse experts of mixture-of-experts backbones, which see only some of a prompt's tokens."""

OWN_ROUTER = "milora_router"
"""The child that holds our router in a routed block."""


@dataclass(frozen=True)
class Block:
    """A Transformer block: its path in the backbone, the module, and its linear modules by relative path, in order."""

    path: str
    module: nn.Module
    linears: dict[str, nn.Module]


def find_blocks(model: nn.Module, path: str | None = None) -> list[Block]:
    """The Transformer blocks of a decoder.

    Without `path`, the blocks are the only list of modules with the configuration's `num_hidden_layers` entries
    (without a configuration, the longest list) that is not inside another such list; if the model names its decoder,
    only lists in the decoder count. A linear module wrapped by an adapter counts as the module itself.

    Args:
        model: A Hugging Face model, with or without adapters in it.
        path: The path of the list of blocks (`model.layers`), for models where it cannot be found.

    Raises:
        MiLoraError: If there is no such list, more than one, or one without linear modules.
    """
    chosen: str = path if path is not None else _find_list(model)
    try:
        layers = model.get_submodule(chosen)
    except AttributeError as error:
        raise MiLoraError(f"blocks={chosen!r}: {_name(model)} has no such module.") from error
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise MiLoraError(
            f"blocks={chosen!r}: in {_name(model)} this is a {_name(layers)}, not a ModuleList with entries."
        )
    blocks = [Block(f"{chosen}.{index}", module, dict(_linears(module))) for index, module in enumerate(layers)]
    if not any(block.linears for block in blocks):
        raise MiLoraError(f"The blocks at {chosen!r} of {_name(model)} have no linear module that could be an expert.")
    return blocks


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps its input's last dimension linearly: `nn.Linear`, `Conv1D`, quantised ones."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    # Quantised layers of different back-ends have no common class, but all name both sizes and have no children.
    sizes = ("in_features", "out_features"), ("infeatures", "outfeatures")
    return any(all(isinstance(getattr(module, size, None), int) for size in pair) for pair in sizes)


def _linears(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        path = f"{prefix}{name}"
        if name == OWN_ROUTER or name in ROUTER_NAMES or (name == SPARSE_EXPERTS and not is_linear(child)):
            continue
        wrapped = getattr(child, "base_layer", None)
        if is_linear(wrapped if isinstance(wrapped, nn.Module) else child):
            yield path, child
        else:
            yield from _linears(child, f"{path}.")


def _find_list(model: nn.Module) -> str:
    depth = _depth(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and (depth is None or len(module) == depth)
        and all(any(True for _ in _linears(entry)) for entry in module)
    }
    outermost = {
        name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    }
    decoder = _decoder(model)
    if len(outermost) > 1 and decoder is not None:
        # A vision or audio tower may be as deep as the language model.
        inside = {id(module) for module in decoder.modules()}
        outermost = {name: module for name, module in outermost.items() if id(module) in inside} or outermost
    if depth is None and len(outermost) > 1:
        longest = max(len(module) for module in outermost.values())
        outermost = {name: module for name, module in outermost.items() if len(module) == longest}
    if len(outermost) == 1:
        (only,) = outermost
        return str(only)
    looked_for = "a list of modules with linear layers" if depth is None else f"one list of {depth} modules"
    found = f"found {sorted(outermost)}" if outermost else "found none"
    raise MiLoraError(
        f"Could not find the Transformer blocks of {_name(model)}: looked for {looked_for}, {found}. Name the list of "
        "blocks, for example MiLoraConfig(blocks='model.layers')."
    )


def _depth(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _decoder(model: nn.Module) -> nn.Module | None:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _name(module: nn.Module) -> str:
    return type(module).__name__


def hidden_size(model: nn.Module, block: Block) -> int:
    """The size of a block's hidden states.

    Raises:
        MiLoraError: If neither the configuration nor the block's norms define it.
    """
    config: Any = getattr(model, "config", None)
    if config is not None:
        if hasattr(config, "get_text_config"):
            config = config.get_text_config(decoder=True)
        size = getattr(config, "hidden_size", None)
        if isinstance(size, int):
            return size
    raise MiLoraError(
        f"{_name(model)} does not define the size of its hidden states (config.hidden_size), which the router of "
        f"{block.path} needs."
    )


def in_features(module: nn.Module) -> int:
    """The input size of a linear module or of the adapter around it."""
    return _features(module)[0]


def out_features(module: nn.Module) -> int:
    """The output size of a linear module or of the adapter around it."""
    return _features(module)[1]


def _features(module: nn.Module) -> tuple[int, int]:
    linear: Any = getattr(module, "base_layer", module)
    if type(linear).__name__ == "Conv1D":
        # Its weight is (in, out); `nf` is the number of outputs.
        return int(linear.weight.shape[0]), int(linear.nf)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = tuple(getattr(linear, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]
    raise MiLoraError(f"{_name(linear)} does not define its sizes, so it cannot be adapted. Exclude it.")
