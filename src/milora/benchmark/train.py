"""`milora bench train`: the time and the peak memory of an optimiser's step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milora.benchmark.generating import random_prompts
from milora.benchmark.methods import MeasuredMethod, build_method, check_names, variant
from milora.benchmark.result import Result
from milora.benchmark.rounds import Progress
from milora.benchmark.session import Build, opened
from milora.benchmark.settings import Settings, check_at_least
from milora.errors import MiLoraError

TRAIN_METHODS = ("lora", "dora", "moelora", "milora", "midora")
IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class TrainSettings(Settings):
    """What a step is.

    Args:
        methods: Names, see [`milora.benchmark.methods.variant`]; those that can be trained.
        batch: Rows.
        tokens: Of each row; the first half is the prompt and has no loss.
        gradient_checkpointing: Whether blocks are run a second time in the backward pass.

    Raises:
        MiLoraError: If a value is unknown or out of range, or a method cannot be trained.
    """

    methods: tuple[str, ...] = TRAIN_METHODS
    batch: int = 8
    tokens: int = 256
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods)
        for name in self.methods:
            found = variant(name)
            inference_only = found.merged or found.dora_caching or found.together or found.merges_route
            if found.method is None or inference_only:
                raise MiLoraError(f"{name} has nothing to train, or is for inference: leave it out of the methods.")
        check_at_least("batch", self.batch, 1)
        check_at_least("tokens", self.tokens, 2)


class Training:
    """A method with its optimiser.

    Args:
        method: What to train.
        device: Where.
        gradient_checkpointing: Whether blocks are run a second time in the backward pass.
    """

    def __init__(self, method: MeasuredMethod, device: torch.device, gradient_checkpointing: bool) -> None:
        self.model = method.model.train()
        self.device = device
        if gradient_checkpointing:
            enable_checkpointing(self.model.base_model.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, rows: Mapping[str, Tensor]) -> float:
        """Forward, backward, AdamW; the seconds that it took."""
        self._wait()
        started = time.perf_counter()
        self.model(**rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def enable_checkpointing(backbone: Any) -> None:
    """Switches gradient checkpointing on, under the name that transformers gives it."""
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def labelled_rows(backbone: Any, batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, all (batch, tokens), the first half of each row without loss."""
    rows = random_prompts(backbone, batch, tokens, seed)
    labels = rows["input_ids"].clone()
    labels[:, : tokens // 2] = IGNORED
    return {**rows, "labels": labels}


def train_steps(settings: TrainSettings, progress: Progress = lambda line: None, build: Build = build_method) -> Result:
    """Measures training steps: forward with loss, backward, and AdamW on the adapter.

    Memory is the backbone's, what the method keeps (adapter and optimiser's states), and the most that a step has on
    top: activations and gradients.

    Args:
        settings: What to measure.
        progress: Is told how far it is.
        build: Makes a method from its name, the backbone and the settings.
    """
    with opened(settings, progress, len(settings.methods), training=True) as session:
        rows = labelled_rows(session.backbone, settings.batch, settings.tokens, settings.seed)
        short = {name: tensor[:1] for name, tensor in rows.items()}
        trainings: dict[str, Training] = {}

        def first_step(method: MeasuredMethod) -> None:
            trainings[method.name] = Training(method, session.device, settings.gradient_checkpointing)
            trainings[method.name].step(short)

        methods = session.prepare(settings.methods, build, first_step)

        def run(name: str) -> float:
            return trainings[name].step(rows)

        case = f"batch {settings.batch} x {settings.tokens}"
        measured = session.measure(case, methods, run=run, timed=run, describe=_seconds)
        session.rows += [
            {
                "method": name,
                "batch": settings.batch,
                "tokens": settings.tokens,
                **measured.fields(name, "seconds_per_step", float),
                "trainable": sum(parameter.numel() for parameter in trainings[name].parameters),
            }
            for name in methods
        ]
        return session.result("train")


def _seconds(sample: float) -> str:
    return f"{sample:.3f} s a step"
