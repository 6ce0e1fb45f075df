"""One timed generation, with prefill and decode steps separated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from milora.benchmark.methods import MeasuredMethod
from milora.benchmark.session import Session
from milora.tuners.generate_options import compiled_settings

FEWEST_TOKENS = 4
"""The minimum for a slow method: a prefill and three decode steps."""


class TokenClock(LogitsProcessor):  # type: ignore[misc]
    """Records the time at which the logits of each new token are ready. It does not change the logits.

    On a GPU the times are events in the stream, without synchronisation during generation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A decoding step; see `transformers.LogitsProcessor`."""
        self.tick()
        return scores

    def tick(self) -> None:
        """Records the current time."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from the first recorded time to each later one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [self.ticks[0].elapsed_time(tick) / 1000 for tick in self.ticks[1:]]
        return [tick - self.ticks[0] for tick in self.ticks[1:]]


@dataclass(frozen=True)
class Timing:
    """The times of one generation.

    Attributes:
        prompts: Number of rows of the batch.
        ticks: Seconds from the call until the logits of each new token were ready.
        whole: Seconds until the call returned.
        merges_route: Whether the first decode step merged a route into the weights.
        output: Prompt and new tokens, `(batch, tokens)`.
    """

    prompts: int
    ticks: list[float]
    whole: float
    merges_route: bool
    output: Tensor

    @property
    def first_token(self) -> float:
        """Seconds until the logits of the first new token."""
        return self.ticks[0]

    @property
    def first_step(self) -> float | None:
        """Seconds of the first decode step, which may include a method's preparations for later steps."""
        return self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else None

    @property
    def step(self) -> float:
        """Mean seconds of a decode step, without the first step if a route was merged."""
        first = 1 if self.merges_route and len(self.ticks) > 2 else 0
        return (self.ticks[-1] - self.ticks[first]) / (len(self.ticks) - 1 - first)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding: one per row and step, independent of the beams."""
        return self.prompts / self.step

    def __str__(self) -> str:
        if len(self.ticks) == 1:
            return f"first token after {self.first_token:.3f} s"
        return f"{self.tokens_per_second:.2f} tokens/s, first token after {self.first_token:.3f} s"


def random_prompts(backbone: Any, batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both `(batch, tokens)`, on the backbone's device."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, backbone.config.vocab_size, (batch, tokens), generator=generator).to(backbone.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def generation_arguments(device: torch.device, beams: int, new_tokens: int, compiled: bool) -> dict[str, Any]:
    """Arguments for greedy or beam search that always generates all tokens. Compiled search has a static cache.

    They are arguments, not a `GenerationConfig`, because PEFT reads `num_beams` from them for rows with different
    adapters.
    """
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False}
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        # `fullgraph` would fail for PEFT's DoRA, which Dynamo cannot trace as one graph. Rows report graph breaks.
        arguments |= compiled_settings({"compile_config": CompileConfig(mode=mode, dynamic=False)})
    return arguments


def generate(
    method: MeasuredMethod,
    prompts: Mapping[str, Tensor],
    device: torch.device,
    *,
    beams: int,
    new_tokens: int,
    compiled: bool = False,
) -> Timing:
    """Times one generation.

    Args:
        method: The method whose model generates.
        prompts: Prompts from [`random_prompts`].
        device: The model's device.
        beams: Number of beams.
        new_tokens: Number of new tokens; 1 means only a prefill.
        compiled: Whether decode steps are compiled.

    Raises:
        RuntimeError: If fewer tokens were generated.
    """
    clock = TokenClock(device)
    processors = LogitsProcessorList([clock])
    arguments = generation_arguments(device, beams, new_tokens, compiled)
    with method.running():
        clock.tick()
        output = method.model.generate(**prompts, **arguments, logits_processor=processors, **method.variant.generate)
        clock.tick()
        *ticks, whole = clock.seconds()
    batch, length = prompts["input_ids"].shape
    if output.shape != (batch, length + new_tokens) or len(ticks) != new_tokens:
        raise RuntimeError(
            f"{method.name} was to write {new_tokens} tokens after each of {batch} prompts of {length}, and returned "
            f"{tuple(output.shape)} after {len(ticks)} steps."
        )
    return Timing(batch, ticks, whole, method.variant.merges_route, output)


def first_generation(session: Session) -> Callable[[MeasuredMethod], Timing]:
    """A function that runs a short generation, so that a method allocates its caches, such as DoRA's."""
    probe = random_prompts(session.backbone, 1, 2, session.settings.seed)
    return lambda method: generate(method, probe, session.device, beams=1, new_tokens=2)


def affordable_tokens(timing: Timing, new_tokens: int, round_seconds: float) -> int:
    """The number of tokens that a method can generate in a round of at most `round_seconds`."""
    steps = int((round_seconds - timing.first_token) / timing.step)
    return max(min(FEWEST_TOKENS, new_tokens), min(new_tokens, steps + 1))
