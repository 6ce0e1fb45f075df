"""`milora bench train`: the time and the peak memory of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from milora.benchmark.generating import random_prompts
from milora.benchmark.methods import MeasuredMethod, build_method, check_names, variant
from milora.benchmark.result import Result
from milora.benchmark.rounds import Progress
from milora.benchmark.session import Build, opened
from milora.benchmark.settings import Settings, check_at_least
from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from milora.training.dev_step import DevStep

TRAIN_METHODS = ("lora", "dora", "moelora", "milora", "milora-bilevel", "midora")
IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of a training benchmark.

    Args:
        methods: Names of methods that can be trained, see [`milora.benchmark.methods.variant`].
        batch: Rows per batch.
        tokens: Tokens per row. The first half is the prompt and has no loss.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass.

    Raises:
        MiLoraError: If a value is unknown or out of range, or a method cannot be trained.
    """

    methods: tuple[str, ...] = TRAIN_METHODS
    batch: int = 8
    tokens: int = 256
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.methods, training=True)
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
        method: The method to train. For a `bilevel` method, the optimiser excludes Theta, the rational activations.
            Like [`milora.training.BilevelActivations`], it trains Theta with a separate
            [`milora.training.dev_step.DevStep`] after every step, at `milora train`'s learning rate.
        device: The device.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass.
        dev_batches: Batches for the steps of Theta.
    """

    def __init__(
        self,
        method: MeasuredMethod,
        device: torch.device,
        gradient_checkpointing: bool,
        dev_batches: Iterable[Mapping[str, Tensor]] = (),
    ) -> None:
        self.model = method.model.train()
        self.device = device
        if gradient_checkpointing:
            enable_checkpointing(self.model.base_model.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.dev_step = _dev_step(self.model, dev_batches) if method.variant.bilevel else None
        self.optimizer = torch.optim.AdamW([p for p in self.parameters if p.requires_grad], lr=1e-4)

    def step(self, rows: Mapping[str, Tensor]) -> float:
        """Runs forward, backward, AdamW and, for a bilevel method, a step of Theta. Returns the seconds."""
        self._wait()
        started = time.perf_counter()
        self.model(**rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.dev_step is not None:
            self.dev_step(self.model, self.device)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _dev_step(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> DevStep:
    """The step that trains Theta. Theta is removed from the trainable parameters of the main step."""
    # This imports TRL, which takes seconds and which other methods do not need.
    from milora.training.arguments import TrainingArguments
    from milora.training.bilevel_activations import activation_parameters
    from milora.training.dev_step import DevStep, require_gradients

    theta = activation_parameters(model)
    require_gradients(theta, False)
    optimizer = torch.optim.AdamW(theta, lr=TrainingArguments.activation_learning_rate, weight_decay=0.0)
    return DevStep(theta, optimizer, batches, evaluation=True)


def enable_checkpointing(backbone: Any) -> None:
    """Enables gradient checkpointing with transformers' method."""
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def labelled_rows(backbone: Any, batch: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, all `(batch, tokens)`. The first half of each row has no loss."""
    rows = random_prompts(backbone, batch, tokens, seed)
    labels = rows["input_ids"].clone()
    labels[:, : tokens // 2] = IGNORED
    return {**rows, "labels": labels}


def train_steps(settings: TrainSettings, progress: Progress = lambda line: None, build: Build = build_method) -> Result:
    """Measures training steps: forward with loss, backward, and AdamW on the adapter.

    `milora-bilevel` is `milora` with a step of Theta, the rational activations, on the same number of dev rows after
    each step, as in `milora train`. Its ratio to `milora` is the cost of bi-level training.

    Memory is the backbone's, the method's own (adapter and optimiser states), and the peak growth in a step
    (activations and gradients).

    Args:
        settings: What to measure.
        progress: Called with progress messages.
        build: Builds a method from its name, the backbone and the settings.
    """
    with opened(settings, progress, len(settings.methods), training=True) as session:
        rows = labelled_rows(session.backbone, settings.batch, settings.tokens, settings.seed)
        dev_rows = labelled_rows(session.backbone, settings.batch, settings.tokens, settings.seed + 1)
        short, short_dev = ({name: tensor[:1] for name, tensor in batch.items()} for batch in (rows, dev_rows))
        trainings: dict[str, Training] = {}

        def first_step(method: MeasuredMethod) -> None:
            dev_batches = chain([short_dev], repeat(dev_rows))
            trainings[method.name] = Training(method, session.device, settings.gradient_checkpointing, dev_batches)
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
