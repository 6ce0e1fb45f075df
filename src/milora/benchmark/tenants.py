"""`milora bench tenants`: one batch in which each row has its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milora.benchmark.decode import GenerationCase
from milora.benchmark.generating import first_generation, random_prompts
from milora.benchmark.methods import (
    BASE,
    MeasuredMethod,
    build_method,
    check_names,
    variant,
    with_generate_arguments,
)
from milora.benchmark.result import Result
from milora.benchmark.rounds import Progress
from milora.benchmark.session import Prepared, Session, opened
from milora.benchmark.settings import Settings, check_at_least
from milora_core.errors import MiLoraError

TENANT_METHODS = (BASE, "lora", "lora-together", "milora")
SERVES_ROWS = ("lora", "milora", "midora")
"""Methods that support different adapters for the rows of one batch (`adapter_names`). PEFT does not support DoRA."""


@dataclass(frozen=True)
class TenantsSettings(Settings):
    """The settings of a benchmark with several tenants per batch.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`]. `base` runs the same batch without adapters.
        tenants: Numbers of tenants, each measured separately.
        batch: Number of rows, assigned to the tenants in turn; by default one row per tenant.
        beams: Numbers of beams.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens to generate, including the first, which counts as prefill.

    Raises:
        MiLoraError: If a value is unknown or out of range, or a method serves one adapter at a time.
    """

    methods: tuple[str, ...] = TENANT_METHODS
    tenants: tuple[int, ...] = (16,)
    batch: int | None = None
    beams: tuple[int, ...] = (1,)
    prompt_tokens: int = 64
    new_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods)
        for name in self.methods:
            found = variant(name)
            if found.merged or found.merges_route or found.method not in (None, *SERVES_ROWS):
                raise MiLoraError(
                    f"{name} serves one adapter at a time: give some of {', '.join((BASE, *SERVES_ROWS))}."
                )
        check_at_least("tenants", self.tenants, 1)
        if self.batch is not None:
            check_at_least("batch", self.batch, max(self.tenants))
        check_at_least("beams", self.beams, 1)
        check_at_least("prompt_tokens", self.prompt_tokens, 1)
        check_at_least("new_tokens", self.new_tokens, 2)


def tenants(settings: TenantsSettings, progress: Progress = lambda line: None) -> Result:
    """Measures `generate(..., adapter_names=[...])` in the same way as [`milora.benchmark.decode.decode`].

    Args:
        settings: What to measure.
        progress: Called with progress messages.
    """
    cases = len(settings.methods) * len(settings.tenants) * len(settings.beams)
    with opened(settings, progress, cases) as session:
        for number in settings.tenants:
            _measure(session, settings, number)
        return session.result("tenants")


def _measure(session: Session, settings: TenantsSettings, number: int) -> None:
    """Measures one number of tenants. Its models are freed before the next number's models are built."""
    names = [f"tenant-{index}" for index in range(number)]
    methods = _prepare(session, settings.methods, names)
    batch = settings.batch or number
    prompts = random_prompts(session.backbone, batch, settings.prompt_tokens, settings.seed)
    of_rows = [names[row % number] for row in range(batch)]
    served = {name: _serving(prepared, of_rows) for name, prepared in methods.items()}
    for beams in settings.beams:
        GenerationCase(session, served, prompts, beams, settings.new_tokens, {"tenants": number}).measure()


def _prepare(session: Session, methods: Sequence[str], names: Sequence[str]) -> dict[str, Prepared]:
    def build(name: str, backbone: Any, settings: Settings) -> MeasuredMethod:
        session.progress(f"building {len(names)} tenants of {name}")
        return build_method(name, backbone, settings, names)

    return session.prepare(methods, build, first_generation(session))


def _serving(prepared: Prepared, of_rows: list[str]) -> Prepared:
    if prepared.method.variant.method is None:
        return prepared
    return Prepared(with_generate_arguments(prepared.method, adapter_names=of_rows), prepared.kept)
