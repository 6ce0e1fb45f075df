"""`milora bench decode`: tokens per second after the first, and peak memory, of methods side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from milora.benchmark.compiling import Compilations, room_for_graphs
from milora.benchmark.environment import environment
from milora.benchmark.generating import Timing, affordable_tokens, generate, random_prompts
from milora.benchmark.memory import live_bytes, only_new_objects, peak_growth
from milora.benchmark.methods import BASE, MeasuredMethod, build_backbone, build_method, check_names
from milora.benchmark.result import MIB, Result
from milora.benchmark.rounds import Progress, Turn, compared, in_turn, spread
from milora.benchmark.settings import Settings, check_at_least
from milora.benchmark.sharing import model_bytes

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
    "midora",
)


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """What is generated.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`].
        beams: Widths of the search, each measured by itself; 1 is greedy.
        batch: Prompts a batch.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate, the first included, which counts as prefill.

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
        for beams in self.beams:
            check_at_least("beams", beams, 1)
        check_at_least("batch", self.batch, 1)
        check_at_least("prompt_tokens", self.prompt_tokens, 1)
        check_at_least("new_tokens", self.new_tokens, 2)


Build = Callable[[str, Any, Settings], MeasuredMethod]


def decode(settings: DecodeSettings, progress: Progress = lambda line: None, build: Build = build_method) -> Result:
    """Measures decoding.

    Every method is a copy of the backbone's modules around the same weights, with adapter layers of its own. Time is
    taken from the logits of the first new token to those of the last, so the prefill is not in it. Memory is the
    backbone's, what the method keeps, and the most that one generation has on top.

    Args:
        settings: What to measure.
        progress: Is told how far it is.
        build: Makes a method from its name, the backbone and the settings.
    """
    settings = replace(settings, **_shared(settings))
    device = torch.device(settings.device or "cpu")
    before = environment(device)
    progress(f"building {settings.backbone} in {settings.dtype}")
    backbone = build_backbone(settings)
    prompts = random_prompts(backbone.config.vocab_size, settings.batch, settings.prompt_tokens, settings)
    rows: list[dict[str, Any]] = []
    order: list[Turn] = []
    with only_new_objects(), room_for_graphs(len(settings.methods) * len(settings.beams)):
        methods, kept = build_all(settings.methods, backbone, settings, build, progress)
        for beams in settings.beams:
            case = Case(settings, methods, prompts, beams, settings.new_tokens, model_bytes(backbone), kept)
            measured, turns = case.measure(progress)
            rows += measured
            order += turns
    return Result("decode", settings.to_dict(), rows, order, {**before, "load_average_after": _load(device)})


def _shared(settings: Settings) -> dict[str, Any]:
    resolved = settings.resolved()
    return {name: getattr(resolved, name) for name in ("device", "backbone", "adapter_dtype")}


def _load(device: torch.device) -> Any:
    return environment(device)["load_average"]


def build_all(
    names: Sequence[str], backbone: Any, settings: Settings, build: Build, progress: Progress
) -> tuple[dict[str, MeasuredMethod], dict[str, int]]:
    """Makes the methods, and tells the bytes that each keeps besides the backbone."""
    device = torch.device(settings.device or "cpu")
    methods: dict[str, MeasuredMethod] = {}
    kept: dict[str, int] = {}
    probe = random_prompts(backbone.config.vocab_size, 1, 2, settings)
    for name in names:
        progress(f"building {name}")
        before = live_bytes(device)
        methods[name] = build(name, backbone, settings)
        # What a method makes at its first use and keeps (DoRA's caches, say) is its own as well.
        generate(methods[name], probe, replace(settings, compile=False), beams=1, new_tokens=2)
        kept[name] = live_bytes(device) - before - methods[name].own_weights
    return methods, kept


@dataclass
class Case:
    """Methods that generate from the same prompts with the same beams.

    Attributes:
        settings: The benchmark's.
        methods: By name.
        prompts: As from [`random_prompts`].
        beams: Width of the search.
        new_tokens: Tokens to generate.
        backbone_bytes: Of the weights that all share.
        kept: Bytes that each method keeps besides.
    """

    settings: Settings
    methods: dict[str, MeasuredMethod]
    prompts: dict[str, Tensor]
    beams: int
    new_tokens: int
    backbone_bytes: int
    kept: dict[str, int]

    def measure(self, progress: Progress) -> tuple[list[dict[str, Any]], list[Turn]]:
        """Warms up, measures memory, then speed in turn; the rows and the order of the turns."""
        batch, length = self.prompts["input_ids"].shape
        name_of_case = f"beam {self.beams}, batch {batch}"
        tokens: dict[str, int] = {}
        growth: dict[str, int] = {}
        for name, method in self.methods.items():
            progress(f"{name_of_case}: warming {name} up")
            tokens[name] = self._warm_up(method)
            growth[name] = peak_growth(lambda m=method: self._run(m, tokens), self._device)  # type: ignore[misc]
        graphs = Compilations()
        timings = in_turn(
            name_of_case,
            list(self.methods),
            self.settings.rounds,
            lambda name: graphs.during(name, lambda: self._run(self.methods[name], tokens)),
            progress,
        )
        speeds = {name: [timing.tokens_per_second for timing in of] for name, of in timings.samples.items()}
        rows = []
        for name, of_method in speeds.items():
            speed = spread(of_method)
            rows.append(
                {
                    "method": name,
                    "beam": self.beams,
                    "batch": batch,
                    "tokens_per_second": speed["median"],
                    "tokens_per_second_low": speed["low"],
                    "tokens_per_second_high": speed["high"],
                    "peak_memory_mib": (self.backbone_bytes + self.kept[name] + growth[name]) / MIB,
                    **compared(speeds, name),
                    "seconds_to_first_token": spread([timing.first_token for timing in timings.samples[name]])[
                        "median"
                    ],
                    "prompt_tokens": length,
                    "new_tokens": tokens[name],
                    "compilations": graphs.of(name) if self.settings.compile else None,
                }
            )
        return rows, timings.order

    @property
    def _device(self) -> torch.device:
        return torch.device(self.settings.device or "cpu")

    def _run(self, method: MeasuredMethod, tokens: dict[str, int]) -> Timing:
        return generate(method, self.prompts, self.settings, beams=self.beams, new_tokens=tokens[method.name])

    def _warm_up(self, method: MeasuredMethod) -> int:
        """Runs a method, unmeasured, and says how many tokens it can be asked for."""
        affordable = self.new_tokens
        if not self.settings.compile:
            # Under compile the length is the static cache's, and a short run would compile for another.
            short = generate(method, self.prompts, self.settings, beams=self.beams, new_tokens=min(4, self.new_tokens))
            affordable = affordable_tokens(short, self.new_tokens, self.settings.round_seconds)
        for _ in range(self.settings.warmups):
            generate(method, self.prompts, self.settings, beams=self.beams, new_tokens=affordable)
        return affordable
