"""Runs a step: one packed pass of the backbone over the tokens of many texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from milora.backbone.positions import positions_of
from milora.serving.engine.adapters import AdapterPool
from milora.serving.engine.attention import NAME, PackedAttention, Piece, attending
from milora.serving.engine.cache import KeyValueCache
from milora.serving.engine.scheduler import Part
from milora.tuners.context import Scope, entered
from milora.tuners.milora.packed import PackedRoute, PackedTokens, Segment
from milora_core.errors import MiLoraError
from milora_core.kernels.packed_linear import PackedLinear

LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
DYNAMIC_ROPE = ("dynamic", "longrope")
"""Position embeddings that depend on the length of the whole batch."""

CHECK_TOKENS = 12
CHECK_TOLERANCE = 0.02
"""Maximum difference from the model's own logits, relative to the largest logit."""

CHECK_ROUNDING = 8
"""The tolerance is at least this many times the dtype's epsilon. In bfloat16, a random backbone of TinyLlama's shape
differs by 0.022, three epsilons."""


class Runner:
    """The backbone and its cache.

    Args:
        backbone: A Hugging Face causal language model, in eval mode.
        budget: Bytes for the cache.
        page_tokens: Tokens of a page.
        packs_weights: See [`milora.serving.engine.settings.EngineSettings`].

    Raises:
        MiLoraError: If packed passes do not support the backbone; the message says why.
    """

    def __init__(self, backbone: Any, budget: int, page_tokens: int, *, packs_weights: bool = True) -> None:
        self.backbone = backbone
        config = backbone.config.get_text_config(decoder=True)
        _check_architecture(backbone, config)
        self.positions = positions_of(backbone)
        self.vocabulary = int(config.vocab_size)
        self.steps = 0
        tokens = torch.randint(self.vocabulary, (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            own = backbone(input_ids=tokens.to(backbone.device), use_cache=True)
        shapes = {(*layer.keys.shape[1::2], layer.values.shape[3]) for layer in own.past_key_values.layers}
        if len(shapes) != 1:
            raise MiLoraError(f"{_name(backbone)} has attention layers of different shapes, which is not supported.")
        layers = len(own.past_key_values.layers)
        self.cache = KeyValueCache(budget, page_tokens, layers, shapes.pop(), backbone.dtype, backbone.device)
        self._packed = [module for module in backbone.modules() if packs_weights and PackedLinear.serves(module)]
        for linear in self._packed:
            PackedLinear.pack(linear)
        self._own_attention = backbone.config._attn_implementation
        backbone.set_attn_implementation(NAME)
        self._check(tokens, own.logits[0].float())

    def close(self) -> None:
        """Restores the backbone's attention and linear layers."""
        for linear in self._packed:
            PackedLinear.unpack(linear)
        self.backbone.set_attn_implementation(self._own_attention)

    def run(self, parts: Sequence[Part], adapters: AdapterPool) -> Tensor:
        """Computes parts of texts, writes their keys and values, and routes prompts.

        Args:
            parts: The parts to compute, single tokens first.
            adapters: The model's adapters.

        Returns:
            (texts, vocabulary), float32, on the CPU: the next-token logits of each part that completes its text.
        """
        pieces, segments, outputs = [], [], []
        tokens: list[int] = []
        positions: list[int] = []
        for part in parts:
            text, start = part.text, len(tokens)
            end = text.computed + part.count
            tokens += text.tokens[text.computed : end]
            positions += range(text.computed, end)
            pieces.append(Piece(start, part.count, text.computed, text.pages))
            segments.append(_segment(part, start))
            if part.gives_token:
                outputs.append(len(tokens) - 1)
        # Some models return the logits of all tokens for `logits_to_keep=0`, so at least one position is requested.
        packed = PackedTokens(segments, outputs or [len(tokens) - 1], adapters.slots.packed)
        with entered(Scope(adapters.slots.owner, packed=packed)):
            logits = self._forward(tokens, positions, pieces, packed.outputs)
        for part, segment in zip(parts, segments, strict=True):
            if segment.deciding is not None:
                part.text.job.is_routed = True
        self.steps += 1
        return logits if outputs else logits[:0]

    def forget_decisions(self, parts: Sequence[Part]) -> None:
        """Discards the routes decided in a failed pass."""
        for part in parts:
            job = part.text.job
            if job.route is not None and not job.is_routed:
                job.route = PackedRoute(job.route.adapter)

    def _forward(
        self, tokens: Sequence[int], positions: Sequence[int], pieces: Sequence[Piece], outputs: Sequence[int]
    ) -> Tensor:
        device = self.backbone.device
        with torch.inference_mode(), attending(PackedAttention(self.cache, pieces)):
            logits: Tensor = self.backbone(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(outputs, device=device),
            ).logits[0]
            return logits.float().cpu()

    def _check(self, tokens: Tensor, expected: Tensor) -> None:
        """Compares a prompt's logits from two chunks and single tokens with those of the model's own pass."""
        size, ids = self.cache.pool.page_tokens, tokens[0].tolist()
        pages = list(range(-(-len(ids) // size)))
        if len(pages) > self.cache.pool.pages:
            return  # The cache is too small to serve any request.
        logits = [
            self._forward(ids[past:end], range(past, end), [Piece(0, end - past, past, pages)], range(end - past))
            for past, end in ((0, 4), (4, 8), *((place, place + 1) for place in range(8, len(ids))))
        ]
        difference = float((torch.cat(logits) - expected.cpu()).abs().max())
        tolerance = max(CHECK_TOLERANCE, CHECK_ROUNDING * torch.finfo(self.backbone.dtype).eps)
        if not difference <= tolerance * float(expected.abs().max()):
            raise MiLoraError(
                f"{_name(self.backbone)} gives other logits in packed passes than in its own (by {difference:.2g}), so "
                "the engine does not serve it."
            )


def _segment(part: Part, start: int) -> Segment:
    text, job = part.text, part.text.job
    bare = min(max(job.bare_tokens - text.computed, 0), part.count)
    deciding = job.deciding
    if deciding is not None:
        first, count = deciding[0] - text.computed, deciding[1]
        deciding = (first, count) if first >= 0 and first + count <= part.count else None
    return Segment(start, part.count, job.route, bare, deciding)


def _check_architecture(backbone: Any, config: Any) -> None:
    name = _name(backbone)
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise MiLoraError(f"{name} is an encoder-decoder; the engine serves decoder-only models.")
    if not getattr(backbone, "_supports_attention_backend", False):
        raise MiLoraError(f"{name} does not call transformers' attention interface; the engine does not serve it.")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if others:
        raise MiLoraError(f"{name} has layers of type {others[0]!r}; the engine serves {', '.join(LAYER_TYPES[:2])}.")
    ropes = getattr(config, "rope_parameters", None) or {}
    for of_layers in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if of_layers.get("rope_type") in DYNAMIC_ROPE:
            raise MiLoraError(
                f"{name} scales its position embeddings by the length of a batch ({of_layers['rope_type']}); the "
                "engine does not serve it."
            )


def _name(backbone: Any) -> str:
    return type(backbone).__name__
