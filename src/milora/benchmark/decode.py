"""`milora bench decode`: compares methods' tokens per second after the first token, and their peak memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from milora.benchmark.compiling import Compilations, why_not_compiled
from milora.benchmark.generating import Timing, affordable_tokens, first_generation, generate, random_prompts
from milora.benchmark.methods import BASE, build_method, check_names, variant, with_generate_arguments
from milora.benchmark.result import GIGA, Result
from milora.benchmark.rounds import Progress
from milora.benchmark.session import Build, Prepared, Session, opened
from milora.benchmark.settings import Settings, check_at_least
from milora.benchmark.traffic import backbone_traffic
from milora_core.errors import MiLoraError

DECODE_METHODS = (
    BASE,
    "lora",
    "lora-merged",
    "dora",
    "dora-cached",
    "moelora",
    "milora-k1",
    "milora-k2",
    "milora",
    "milora-merged",
    "midora",
)
SHORT = 4
"""New tokens of the run that estimates a method's speed."""


def decode_methods(compiled: bool) -> tuple[str, ...]:
    """The default methods."""
    return tuple(name for name in DECODE_METHODS if not (compiled and variant(name).merges_route))


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """The settings of a decode benchmark.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`].
        beams: Numbers of beams, each measured separately; 1 is greedy.
        batch: Prompts per batch.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate, including the first, which counts as prefill.

    Raises:
        MiLoraError: If a value is unknown or out of range.
    """

    methods: tuple[str, ...] = DECODE_METHODS
    beams: tuple[int, ...] = (1, 3)
    batch: int = 1
    prompt_tokens: int = 64
    new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods)
        if self.compile:
            for name in self.methods:
                if variant(name).merges_route:
                    raise MiLoraError(f"{name} is not served by compiled steps: leave it out of the methods.")
        check_at_least("beams", self.beams, 1)
        check_at_least("batch", self.batch, 1)
        check_at_least("prompt_tokens", self.prompt_tokens, 1)
        check_at_least("new_tokens", self.new_tokens, 2)


def decode(settings: DecodeSettings, progress: Progress = lambda line: None, build: Build = build_method) -> Result:
    """Measures decoding.

    Every method is a copy of the backbone's modules that shares the weights and has its own adapter layers. The time is
    measured from the logits of the first new token to the logits of the last, without the prefill. For a method that
    merges a route in the first decode step, it starts at the second token, and the row has the first step's time.
    Memory is the backbone's, the method's own, and the peak growth in one generation.

    Args:
        settings: What to measure.
        progress: Called with progress messages.
        build: Builds a method from its name, the backbone and the settings.
    """
    with opened(settings, progress, len(settings.methods) * len(settings.beams)) as session:
        prompts = random_prompts(session.backbone, settings.batch, settings.prompt_tokens, settings.seed)
        methods = session.prepare(settings.methods, build, first_generation(session))
        for beams in settings.beams:
            served = {name: _with_one_route(prepared, prompts) for name, prepared in methods.items()}
            GenerationCase(session, served, prompts, beams, settings.new_tokens).measure()
        return session.result("decode")


def _with_one_route(prepared: Prepared, prompts: Mapping[str, Tensor]) -> Prepared:
    """Gives all rows the first row's route. A route can only be merged if all rows have the same one."""
    batch = prompts["input_ids"].shape[0]
    if not prepared.method.variant.merges_route or batch == 1:
        return prepared
    route = prepared.method.model.route(**{name: tensor[:1] for name, tensor in prompts.items()})
    return Prepared(with_generate_arguments(prepared.method, route=route.expand(batch)), prepared.kept)


@dataclass
class GenerationCase:
    """Methods that generate from the same prompts with the same number of beams.

    Attributes:
        session: The session that collects the rows.
        methods: The methods by name.
        prompts: Prompts from [`random_prompts`].
        beams: Number of beams.
        new_tokens: Tokens to generate.
        fields: Further fields of the rows, such as the number of tenants.
    """

    session: Session
    methods: Mapping[str, Prepared]
    prompts: Mapping[str, Tensor]
    beams: int
    new_tokens: int
    fields: Mapping[str, Any] | None = None

    def measure(self) -> None:
        """Warms up each method and measures its memory, then measures the methods' speed in turn."""
        session, compiles = self.session, self.session.settings.compile
        batch, length = self.prompts["input_ids"].shape
        warming, later = Compilations(), Compilations()
        tokens: dict[str, int] = {}
        bandwidth = session.copy_bandwidth

        def warm_up(name: str) -> None:
            tokens[name] = warming.during(name, lambda: self._warm_up(name))

        def run(name: str) -> Timing:
            return self._run(name, tokens[name])

        measured = session.measure(
            f"beam {self.beams}, batch {batch}",
            self.methods,
            run=run,
            timed=lambda name: later.during(name, lambda: run(name)),
            warm_up=warm_up,
            value=lambda timing: timing.tokens_per_second,
        )
        read, _ = backbone_traffic(session.backbone, batch * self.beams, length)
        for name, prepared in self.methods.items():
            steps_per_second = measured.median(name, lambda timing: timing.tokens_per_second) / batch
            weights_per_second = read * steps_per_second
            row = {
                "method": name,
                "beam": self.beams,
                "batch": batch,
                **measured.fields(name, "tokens_per_second", lambda timing: timing.tokens_per_second),
                "seconds_to_first_token": measured.median(name, lambda timing: timing.first_token),
                "seconds_of_first_step": measured.median(name, lambda timing: timing.first_step or 0.0),
                "seconds": measured.median(name, lambda timing: timing.whole),
                # Weight bytes that a decode step reads per second, and their share of a copy's bandwidth.
                "weight_gigabytes_per_second": weights_per_second / GIGA,
                "share_of_bandwidth": weights_per_second / bandwidth,
                "prompt_tokens": length,
                "new_tokens": tokens[name],
                "compiled_in_warm_up": warming.of(name) if compiles else None,
                "compiled_later": later.of(name) if compiles else None,
                "graph_breaks": warming.breaks(name) + later.breaks(name) if compiles else None,
                "not_compiled": why_not_compiled(prepared.method.model, self.beams) if compiles else None,
                **(self.fields or {}),
            }
            session.rows.append(row)

    def _run(self, name: str, new_tokens: int) -> Timing:
        return generate(
            self.methods[name].method,
            self.prompts,
            self.session.device,
            beams=self.beams,
            new_tokens=new_tokens,
            compiled=self.session.settings.compile,
        )

    def _warm_up(self, name: str) -> int:
        """Runs a method without measurement and returns the number of tokens it can generate in a round."""
        settings = self.session.settings
        if settings.compile:
            # A run of another length would compile again, for another cache length.
            affordable, runs = self.new_tokens, settings.warmups
        else:
            short = self._run(name, min(SHORT, self.new_tokens))
            affordable = affordable_tokens(short, self.new_tokens, settings.round_seconds)
            # The last warm-up run measures the memory. After a short run, its allocations are typical.
            runs = settings.warmups - 1
        for _ in range(runs):
            self._run(name, affordable)
        return affordable
