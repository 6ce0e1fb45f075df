"""`milora bench prefill`: the time to the first token, and the share of pooling and routing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from milora.benchmark.generating import Timing, first_generation, generate, random_prompts
from milora.benchmark.methods import BASE, build_method, check_names
from milora.benchmark.result import Result
from milora.benchmark.rounds import Progress
from milora.benchmark.routing_time import routing_time
from milora.benchmark.session import Build, Prepared, Session, opened
from milora.benchmark.settings import Settings, check_at_least
from milora_core.errors import MiLoraError

PREFILL_METHODS = (BASE, "lora", "lora-merged", "dora-cached", "moelora", "milora-k1", "milora", "midora")


@dataclass(frozen=True)
class PrefillSettings(Settings):
    """The settings of a prefill benchmark.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`].
        batch: Prompts per batch.
        prompt_tokens: Lengths of the prompts, each measured separately.

    Raises:
        MiLoraError: If a value is unknown or out of range, or `compile` is set.
    """

    methods: tuple[str, ...] = PREFILL_METHODS
    batch: int = 1
    prompt_tokens: tuple[int, ...] = (64, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods)
        if self.compile:
            raise MiLoraError("A prefill is not compiled: leave compile out, or measure decoding with it.")
        check_at_least("batch", self.batch, 1)
        check_at_least("prompt_tokens", self.prompt_tokens, 1)


@dataclass(frozen=True)
class Prefill:
    """The time of one prefill, and the share of routing in another prefill."""

    timing: Timing
    routing_share: float | None

    def __str__(self) -> str:
        share = "" if self.routing_share is None else f", routing {self.routing_share:.2%}"
        return f"{self.timing}{share}"


def prefill(settings: PrefillSettings, progress: Progress = lambda line: None, build: Build = build_method) -> Result:
    """Measures the time from the call of `generate` to the logits of the first new token.

    The share of pooling and routing is measured in a second prefill right after, so that timing the routers does not
    slow the first.

    Args:
        settings: What to measure.
        progress: Called with progress messages.
        build: Builds a method from its name, the backbone and the settings.
    """
    with opened(settings, progress, len(settings.methods)) as session:
        methods = session.prepare(settings.methods, build, first_generation(session))
        for tokens in settings.prompt_tokens:
            _measure(session, methods, settings.batch, tokens)
        return session.result("prefill")


def _measure(session: Session, methods: dict[str, Prepared], batch: int, tokens: int) -> None:
    prompts = random_prompts(session.backbone, batch, tokens, session.settings.seed)

    def run(name: str) -> Timing:
        return generate(methods[name].method, prompts, session.device, beams=1, new_tokens=1)

    def run_twice(name: str) -> Prefill:
        timing = run(name)
        with routing_time(methods[name].method.model, session.device) as routing:
            if routing is None:
                return Prefill(timing, None)
            with_clocks = run(name)
        return Prefill(timing, routing.seconds() / with_clocks.first_token)

    case = f"batch {batch}, prompts of {tokens}"
    measured = session.measure(case, methods, run=run, timed=run_twice)
    session.rows += [
        {
            "method": name,
            "batch": batch,
            "prompt_tokens": tokens,
            **measured.fields(name, "seconds_to_first_token", lambda sample: sample.timing.first_token),
            "routing_share": _median([sample.routing_share for sample in measured.samples[name]]),
        }
        for name in methods
    ]


def _median(values: list[Any]) -> float | None:
    return None if None in values else statistics.median(values)
