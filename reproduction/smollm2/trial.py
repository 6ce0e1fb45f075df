"""One training run on a real language model, and its measurements.

The loop uses AdamW, linear decay after a warm-up, the method's own losses, and scores answers by their likelihood. The
routers' rational activations are not trained: a step changes a coefficient by at most the learning rate, and at the
paper's 1e-6 the steps of such a run change no decision.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from trl.trainer.utils import add_fused_lm_head

from milora.backbone.loading import load_backbone
from milora.methods import config_for
from milora.tasks.sources import read_rows
from milora.training.supervised_positions import score_supervised_positions_only
from milora.tuners.milora import MiLoraModel
from milora.tuners.milora.router import RouterLayer, routers_of
from milora_core.routing import Decision
from reproduction.smollm2.routing import Centred, Recorder, route_statistics
from reproduction.smollm2.t0 import t0_rows

CHOICES = {
    "arc-easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "arc-challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "boolq": ("true", "false"),
}
"""The answers of a task. A completion ends in one of them. Others (gsm8k, t0) are measured by perplexity only."""


@dataclass(frozen=True)
class Example:
    """A tokenized row.

    Attributes:
        ids: Prompt and completion with the end of sequence.
        prompt: Number of prompt tokens.
        decisive: Position of the first token in which the task's answers differ; 0 if the task has no list of answers.
        candidates: The token of each answer at this position.
        answer: Index of the right answer; -1 if the task has no list of answers.
    """

    task: str
    ids: list[int]
    prompt: int
    decisive: int
    candidates: list[int]
    answer: int


def examples_of(task: str, split: str, tokenizer: Any, data: str, rows: int | None, most_tokens: int) -> list[Example]:
    """The first rows of a task that have at most the given number of tokens."""
    found: list[Example] = []
    for row in t0_rows(split, data) if task == "t0" else read_rows(task, split, data):
        prompt, completion = str(row.prompt), str(row.completion)
        ids = tokenizer(prompt + completion)["input_ids"]
        first = tokenizer(prompt)["input_ids"]
        if len(ids) + 1 > most_tokens or ids[: len(first)] != first:
            continue
        stem = completion.removesuffix(str(row.answer))
        choices = CHOICES.get(task, ())
        endings = [tokenizer(prompt + stem + choice)["input_ids"] for choice in choices]
        decisive = next((i for i in range(len(ids)) if len({ending[i] for ending in endings}) > 1), 0)
        candidates = [ending[decisive] for ending in endings]
        answer = choices.index(str(row.answer)) if choices else -1
        found.append(Example(task, [*ids, tokenizer.eos_token_id], len(first), decisive, candidates, answer))
        if rows is not None and len(found) == rows:
            break
    return found


def collate(examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """(batch, tokens) on the device: padded on the right, with labels for the completions."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[place, : len(tokens)] = tokens
        mask[place, : len(tokens)] = 1
        labels[place, example.prompt : len(tokens)] = tokens[example.prompt :]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@dataclass(frozen=True)
class Trial:
    """The settings of a run.

    Args:
        method: One of [`milora.methods.METHODS`].
        settings: Fields of its configuration that differ from the paper's.
        seed: Seed of the adapter's initialisation and of the batches.
        tasks: The tasks. Each batch has the same number of rows of each.
        steps: Optimizer steps.
        batch: Rows per step.
        learning_rate: Peak learning rate, after a warm-up of 6 %.
        router_rate: Factor of the routers' learning rate.
        router_scale: Factor of the routers' initial weights `W_r`.
        centre: Whether routers read the pooled vector's difference from its running mean, scaled to unit size.
        router_bias: Whether the routers' logits have a bias, initially zero. With it, a router of centered vectors can
            prefer the same expert for all prompts.
        gradient_to_all: Whether the probabilities of experts that were not chosen get a gradient too: the derivative of
            the loss to their gate of 0. These experts are then computed in training, which makes a step slower.
        detach_router_input: Whether the routers' gradients stop at their input, so they do not reach the experts below.
        dense_steps: Number of steps at the beginning in which every prompt chooses all experts.
        train_rows: Training rows of each task.
        dev_rows: Dev rows of each task.
        test_rows: Test rows of each task; `None` for all.
        most_tokens: Maximum length of a row. Longer rows are left out.
    """

    method: str = "milora"
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tasks: tuple[str, ...] = ("arc-easy", "boolq")
    steps: int = 40
    batch: int = 8
    learning_rate: float = 1e-3
    router_rate: float = 1.0
    router_scale: float = 1.0
    centre: bool = False
    router_bias: bool = False
    gradient_to_all: bool = False
    detach_router_input: bool = False
    dense_steps: int = 0
    train_rows: int = 2000
    dev_rows: int = 50
    test_rows: int | None = 0
    most_tokens: int = 112


def run(trial: Trial, backbone: str, data: str, device: str = "cpu") -> dict[str, Any]:
    """Trains and measures. Returns the record of a run, without its settings.

    Args:
        trial: The settings.
        backbone: The folder or hub name of the model.
        data: The folder of the benchmarks' files.
        device: `cpu` or `cuda`.
    """
    started = time.monotonic()
    torch.manual_seed(trial.seed)
    model, tokenizer = load_backbone(backbone, dtype="float32", device=device)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    score_supervised_positions_only()
    rows = {
        split: {task: examples_of(task, split, tokenizer, data, count, trial.most_tokens) for task in trial.tasks}
        for split, count in (("train", trial.train_rows), ("dev", trial.dev_rows), ("test", trial.test_rows))
        if count != 0
    }
    # Seeds again, so the adapter's initial weights do not depend on the rows.
    torch.manual_seed(trial.seed)
    model = get_peft_model(model, config_for(trial.method, model, **trial.settings))
    routers = prepare_routers(model, trial)
    pad = tokenizer.pad_token_id
    record: dict[str, Any] = {"tunable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    record["before"] = measure(model, rows["dev"], pad) if routers is not None else None
    seconds, losses, gradients = train(model, trial, rows["train"], pad)
    record["train_loss"] = losses
    record["seconds_a_step"] = seconds
    record["router_gradients"] = gradients
    record["dev"] = measure(model, rows["dev"], pad)
    if "test" in rows:
        record["test"] = measure(model, rows["test"], pad)
    record["seconds"] = time.monotonic() - started
    return record


def prepare_routers(model: Any, trial: Trial) -> list[RouterLayer] | None:
    """Prepares a MiLoRA model's routers for the trial; `None` for a method without routers."""
    if not isinstance(model.base_model, MiLoraModel):
        return None
    routers = list(routers_of(model).values())
    for router in routers:
        with torch.no_grad():
            router_weight(router).mul_(trial.router_scale)
        if trial.centre:
            router.activation["default"] = nn.Sequential(Centred(), router.activation["default"])
        if trial.router_bias:
            router.projection["default"] = Biased(router_weight(router))
        if trial.gradient_to_all:
            router.decide = partial(_decide_with_all_gradients, router.decide)  # type: ignore[method-assign]
        if trial.detach_router_input:
            router.decide = partial(_decide_on_detached, router.decide)  # type: ignore[method-assign]
    return routers


def _decide_on_detached(decide: Callable[..., Decision], adapter: str, hidden: Tensor, prompt: Tensor) -> Decision:
    """A decision whose gradients do not reach the hidden states."""
    return decide(adapter, hidden.detach(), prompt)


def _decide_with_all_gradients(decide: Callable[..., Decision], *args: Any) -> Decision:
    """A decision in which all experts are computed, those that were not chosen with a gate of 0."""
    decision = decide(*args)
    if not torch.is_grad_enabled():
        return decision
    probabilities = decision.probabilities
    gates = decision.chosen.float() + (probabilities - probabilities.detach())
    return Decision(gates, probabilities, torch.ones_like(decision.chosen))


class Biased(nn.Module):
    """A router's projection with a bias."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(weight.new_zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, hidden) to (batch, experts), float32."""
        return functional.linear(x.float(), self.weight, self.bias)


def router_weight(router: RouterLayer) -> nn.Parameter:
    """`W_r` of equation 3."""
    weight: nn.Parameter = router.projection["default"].weight  # type: ignore[assignment]
    return weight


def train(
    model: Any, trial: Trial, rows: dict[str, list[Example]], pad: int
) -> tuple[list[float], list[float], list[dict[str, float]]]:
    """Trains. Returns each step's seconds, loss without auxiliary losses, and gradient of W_r by block."""
    of_routers = [p for name, p in model.named_parameters() if "milora_router" in name and p.requires_grad]
    own = {id(parameter) for parameter in of_routers}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    # Theta is not trained.
    for name, parameter in model.named_parameters():
        if "milora_router.activation" in name:
            parameter.requires_grad_(False)
    of_routers = [parameter for parameter in of_routers if parameter.requires_grad]
    groups = [{"params": others, "lr": trial.learning_rate}]
    if of_routers:
        groups.append({"params": of_routers, "lr": trial.learning_rate * trial.router_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(round(0.06 * trial.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (trial.steps - step) / max(trial.steps - warmup, 1))
    )
    seconds, losses, gradients = [], [], []
    model.train()
    for step, batch in enumerate(batches(rows, trial)):
        started = time.monotonic()
        if trial.dense_steps:
            model.base_model.train_all_experts(step < trial.dense_steps)
        inputs = collate(batch, pad, model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            output = model(**inputs, fused_lm_head=True)
        count = output.label_mask.sum()
        loss = -output.log_probs.sum() / count
        loss.backward()
        weights = [router_weight(router) for router in routers_of(model).values()]
        watched = [index for index in range(len(weights)) if index % 5 == 0 or index == len(weights) - 1]
        norms = {
            str(index): gradient.norm().item() for index in watched if (gradient := weights[index].grad) is not None
        }
        gradients.append(norms)
        nn.utils.clip_grad_norm_([*others, *of_routers], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.monotonic() - started)
    return seconds, losses, gradients


def batches(rows: dict[str, list[Example]], trial: Trial) -> Iterator[list[Example]]:
    """Batches with the same number of rows of each task, drawn without replacement. They depend only on the seed."""
    order = random.Random(trial.seed)
    waiting: dict[str, list[Example]] = {task: [] for task in rows}
    for _ in range(trial.steps):
        batch = []
        for task, examples in rows.items():
            if len(waiting[task]) < trial.batch // len(rows):
                waiting[task] = order.sample(examples, len(examples))
            batch += [waiting[task].pop() for _ in range(trial.batch // len(rows))]
        yield batch


@torch.no_grad()
def measure(model: Any, rows: dict[str, list[Example]], pad: int) -> dict[str, Any]:
    """Perplexity of the completions, which answers were right (a string of 0 and 1 in the rows' order), and routes.

    `answer_losses` has `-log p` of each row's right answer, where `p` is a softmax over the task's answers. It shows
    differences that are too small to change which answer is the most likely. `completion_losses` has the mean `-log p`
    of the tokens of each row's completion, for tasks without a list of answers.
    """
    model.eval()
    batch = 10 if model.device.type == "cpu" else 100
    backbone = model.get_base_model()
    hidden: list[Tensor] = []
    handle = backbone.base_model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
    head = backbone.get_output_embeddings().weight
    result: dict[str, Any] = {"tasks": {}}
    total, tokens = 0.0, 0
    with Recorder(model) as recorder:
        for task, examples in rows.items():
            right: list[bool] = [False] * len(examples)
            answer_losses, completion_losses = [0.0] * len(examples), [0.0] * len(examples)
            task_total, task_tokens = 0.0, 0
            # Groups rows of similar length to reduce padding.
            order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids))
            for start in range(0, len(order), batch):
                places = order[start : start + batch]
                part = [examples[place] for place in places]
                hidden.clear()
                with torch.autocast(model.device.type, dtype=torch.bfloat16):
                    output = model(**collate(part, pad, model.device), fused_lm_head=True)
                task_total -= output.log_probs.sum().item()
                task_tokens += int(output.label_mask.sum())
                for row, (place, example) in enumerate(zip(places, part, strict=True)):
                    count = int(output.label_mask[row].sum())
                    completion_losses[place] = round(-output.log_probs[row].sum().item() / count, 4)
                    if not example.candidates:
                        continue
                    scores = hidden[0][row, example.decisive - 1].float() @ head[example.candidates].float().T
                    right[place] = int(scores.argmax()) == example.answer
                    answer_losses[place] = round(-scores.log_softmax(0)[example.answer].item(), 4)
            recorder.end_task()
            result["tasks"][task] = {"rows": len(examples), "loss": task_total / task_tokens}
            if task in CHOICES:
                result["tasks"][task] |= {
                    "accuracy": sum(right) / len(right),
                    "right": "".join("01"[value] for value in right),
                    "answer_losses": answer_losses,
                }
            else:
                result["tasks"][task]["completion_losses"] = completion_losses
            total, tokens = total + task_total, tokens + task_tokens
    handle.remove()
    result["loss"] = total / tokens
    accuracies = [of["accuracy"] for of in result["tasks"].values() if "accuracy" in of]
    result["accuracy"] = sum(accuracies) / len(accuracies) if accuracies else None
    result["routes"] = route_statistics(recorder.probabilities, recorder.chosen) if recorder.probabilities else None
    return result
