"""The bytes that a decode step must read and its operations, computed from the sizes of the modules.

Decoding one token reads every weight of the backbone once, independent of the batch, so the bytes determine the time on
most machines. A step over `rows` rows (prompts times beams) with a cache of `context` tokens needs:

- backbone: all weights of the blocks, the last norm and the head, and `rows` rows of the embedding;
- adapter: the weights that the step uses (below);
- cache: `rows * context` keys and values per block;
- operations: 2 per weight of a linear module and row, and 4 * context * heads * head_dim per block and row.

Adapters, per adapted module with `A (r, d_in)` and `B (d_out, r)`:

- LoRA, and DoRA's low-rank part: A and B. DoRA with caching also reads the magnitude and the cached norm (`2 d_out`).
  DoRA without caching recomputes the norm of `W + s B A`: it reads W again, multiplies B A out (`2 d_in r d_out`
  operations), writes it and reads it: at least `3 d_in d_out` more values;
- MOELoRA: A and B of all experts (one product each) and the module's router;
- MiLoRA: A and B of the chosen experts. With uniformly distributed choices this is k / N of all for one prompt. With
  `n` prompts and independent choices, an expert is read with probability `1 - (1 - k / N)^n`. The router runs only at
  the prefill. MiDoRA also reads `2 d_out` values of the chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from milora.backbone.blocks import find_blocks
from milora.backbone.shapes import build
from milora.benchmark.methods import BASE, check_names, variant
from milora.benchmark.result import GIGA, Result
from milora.benchmark.settings import Settings, check_at_least
from milora.methods import config_for
from milora_core.errors import MiLoraError

MEGA = 1e6
TRAFFIC_METHODS = (BASE, "lora", "dora", "dora-cached", "moelora", "milora-k1", "milora-k2", "milora", "midora")
COUNTED = ("lora", "dora", "moelora", "milora", "midora")


@dataclass(frozen=True)
class TrafficSettings(Settings):
    """The settings of a decode step.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`].
        batch: Prompts per batch.
        beams: Number of beams.
        context: Number of tokens whose keys and values are read.

    Raises:
        MiLoraError: If a value is unknown or out of range, or there is no formula for a method.
    """

    methods: tuple[str, ...] = TRAFFIC_METHODS
    batch: int = 1
    beams: int = 1
    context: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods)
        for name in self.methods:
            if variant(name).method not in (None, *COUNTED):
                raise MiLoraError(f"There is no formula for {name}; there are those of {', '.join((BASE, *COUNTED))}.")
        for field in ("batch", "beams", "context"):
            check_at_least(field, getattr(self, field), 1)


@dataclass(frozen=True)
class Step:
    """The bytes and operations of a decode step.

    Attributes:
        weight_bytes: Bytes of the backbone's weights.
        adapter_bytes: Bytes of the adapter's weights and of values recomputed from them.
        cache_bytes: Bytes of keys and values.
        operations: Floating-point operations.
    """

    weight_bytes: float
    adapter_bytes: float
    cache_bytes: float
    operations: float

    @property
    def total_bytes(self) -> float:
        """All bytes that are read."""
        return self.weight_bytes + self.adapter_bytes + self.cache_bytes


def traffic(settings: TrafficSettings) -> Result:
    """The formulas' values for methods on a shape. Nothing is measured and no weights are created.

    Raises:
        MiLoraError: If there is no such shape.
    """
    settings = settings.resolved()
    assert settings.backbone is not None
    fields = {} if settings.layers is None else {"num_hidden_layers": settings.layers}
    backbone = build(settings.backbone, "meta", settings.torch_dtype, **fields)
    steps = {name: step(name, backbone, settings) for name in settings.methods}
    base = step(BASE, backbone, settings).total_bytes
    rows = [
        {
            "method": name,
            "beam": settings.beams,
            "batch": settings.batch,
            "context": settings.context,
            "weight_megabytes": of.weight_bytes / MEGA,
            "adapter_megabytes": of.adapter_bytes / MEGA,
            "cache_megabytes": of.cache_bytes / MEGA,
            "megabytes": of.total_bytes / MEGA,
            "gigaflops": of.operations / GIGA,
            "bytes_ratio_to_base": of.total_bytes / base,
        }
        for name, of in steps.items()
    ]
    return Result("traffic", settings.to_dict(), rows, [], {})


def step(name: str, backbone: Any, settings: TrafficSettings) -> Step:
    """One method's decode step.

    Args:
        name: See [`milora.benchmark.methods.variant`].
        backbone: A model of the shape, on `meta`. It is not changed.
        settings: The batch and the context.
    """
    rows = settings.batch * settings.beams
    weight_bytes, operations = backbone_traffic(backbone, rows, settings.context)
    cache_bytes = _cache_values(backbone) * rows * settings.context * settings.torch_dtype.itemsize
    found = variant(name)
    if found.method is None or found.merged or found.merges_route:
        return Step(weight_bytes, 0.0, cache_bytes, operations)
    values, adapter_operations = 0.0, 0.0
    for part in _modules(name, backbone, settings):
        values += part.values
        adapter_operations += part.operations
    itemsize = settings.torch_dtype.itemsize if settings.adapter_dtype == settings.dtype else 4
    return Step(weight_bytes, values * itemsize, cache_bytes, operations + adapter_operations)


@dataclass(frozen=True)
class _Part:
    values: float
    operations: float


def _modules(name: str, backbone: Any, settings: TrafficSettings) -> Sequence[_Part]:
    found = variant(name)
    assert found.method is not None
    config = config_for(found.method, backbone, **found.overrides)
    rows = settings.batch * settings.beams
    parts = []
    for block in find_blocks(backbone):
        linears = list(block.linears.values())
        chosen = (
            found.overrides.get("top_k", config.top_k) / len(linears) if found.method in ("milora", "midora") else 1
        )
        read = 1 - (1 - chosen) ** settings.batch
        for weight in map(_weight, linears):
            d_out, d_in = weight.shape
            low_rank = config.r * (d_in + d_out)
            values, operations = read * low_rank, rows * chosen * 2 * low_rank
            if found.method == "moelora":
                router = min(d_in, backbone.config.hidden_size) * config.num_experts
                values, operations = values + router, operations + rows * 2 * router
            elif found.method == "dora" and not found.dora_caching:
                values += 3 * d_in * d_out + d_out
                operations += 2 * d_in * config.r * d_out + 4 * d_in * d_out
            elif found.method in ("dora", "midora"):
                values += read * 2 * d_out
            parts.append(_Part(values, operations))
    return parts


def backbone_traffic(backbone: Any, rows: int, context: int) -> tuple[float, float]:
    """Bytes of the backbone's weights that a decode step reads, and the backbone's operations.

    Args:
        backbone: A model, on `meta` or with weights.
        rows: Prompts times beams.
        context: Number of tokens whose keys and values are read.
    """
    embedding = backbone.get_input_embeddings().weight
    head = backbone.get_output_embeddings().weight
    others = {id(parameter): parameter for parameter in backbone.parameters()}
    others.pop(id(embedding), None)
    others[id(head)] = head
    read = sum(parameter.nbytes for parameter in others.values())
    read += rows * embedding.shape[1] * embedding.element_size()
    matrices = sum(_weight(module).numel() for module in _linears(backbone))
    attention = 4 * context * _query_size(backbone)
    return read, rows * (2 * matrices + attention)


def _linears(backbone: Any) -> Sequence[nn.Module]:
    return [
        *(linear for block in find_blocks(backbone) for linear in block.linears.values()),
        backbone.get_output_embeddings(),
    ]


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _heads(backbone: Any) -> tuple[int, int, int, int]:
    config = backbone.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, config.num_attention_heads, groups, head


def _query_size(backbone: Any) -> int:
    blocks, heads, _, head = _heads(backbone)
    return blocks * heads * head


def _cache_values(backbone: Any) -> int:
    """Number of values in the keys and values of one token, over all blocks."""
    blocks, _, groups, head = _heads(backbone)
    return 2 * blocks * groups * head
