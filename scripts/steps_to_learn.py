"""Measures the number of steps until the bundled backbone learns a task, with LoRA, MiLoRA, and variants of MiLoRA.

    python scripts/steps_to_learn.py --output docs/results/steps-to-learn.jsonl            # runs the missing cases
    python scripts/steps_to_learn.py --output docs/results/steps-to-learn.jsonl --table    # prints the table

A report's tables show an adapter's accuracy after a fixed number of steps, which for easy tasks is all or nothing. This
script scores the dev set every 20 steps until 95 % of it is right (all tokens of a completion right, given the prompt
and the preceding tokens). Its own loop with plain AdamW allows changing each part separately. Several processes can
share a file.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import set_seed

from milora.backbone.blocks import find_blocks
from milora.backbone.loading import load_backbone
from milora.methods import config_for
from milora.records import append_record, read_records
from milora.tasks import registry
from milora_core.routing import RationalActivation

STEPS, EVERY, ENOUGH = 360, 20, 0.95
TRAIN_ROWS, DEV_ROWS, DEV_BATCH = 960, 100, 50
WARM_UP = 0.06
THETA_RATE, THETA_EVERY = 3e-5, 4
TASKS = ("bundled-arithmetic", "bundled-extraction")

Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Case:
    """A case of the table.

    Attributes:
        name: Name in the table.
        tasks: The tasks, trained one at a time.
        method: A method of `milora.methods`.
        settings: Fields of its configuration.
        learning_rate: Learning rate of the LoRAs and routers.
        batch: Rows per step.
        router_rate: The routers' learning rate as a share of `learning_rate`; 0 keeps their initial weights.
        theta: Whether the rationals are `frozen`, or train on dev batches (`bilevel`) or train batches (`joint`).
        dense_steps: Number of steps at the beginning in which every prompt trains all experts; scores are always for
            the chosen ones.
        fixed_modules: Use LoRA on this number of randomly drawn modules per block: MiLoRA without a router.
    """

    name: str
    tasks: tuple[str, ...] = TASKS
    method: str = "milora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3
    batch: int = 8
    router_rate: float = 1.0
    theta: str = "frozen"
    dense_steps: int = 0
    fixed_modules: int = 0


ARITHMETIC = TASKS[:1]
CASES = (
    Case("LoRA", method="lora"),
    Case("MiLoRA, k = 7", settings={"top_k": 7}),
    Case("MiLoRA, k = 5", settings={"top_k": 5}),
    Case("MiLoRA (k = 3)"),
    Case("MiLoRA, k = 2", ARITHMETIC, settings={"top_k": 2}),
    Case("MiLoRA, k = 1", ARITHMETIC, settings={"top_k": 1}),
    Case("all experts for 40 steps", dense_steps=40),
    Case("all experts for 60 steps", dense_steps=60),
    Case("3 modules a block, drawn once", fixed_modules=3),
    Case("routers left as they began", router_rate=0.0),
    Case("routers at a tenth of the rate", router_rate=0.1),
    Case("no load balancing", settings={"load_balancing_coef": 0.0}),
    Case("mean pooler", ARITHMETIC, settings={"pooler": "mean"}),
    Case("last-token pooler", ARITHMETIC, settings={"pooler": "last"}),
    Case("normalised router input", ARITHMETIC, settings={"router_norm": "pooled"}),
    Case("GeLU in the router", ARITHMETIC, settings={"router_activation": "gelu"}),
    Case("rationals on dev batches", ARITHMETIC, theta="bilevel"),
    Case("rationals on train batches", ARITHMETIC, theta="joint"),
    Case("gate renormalized", ARITHMETIC, settings={"gate": "renormalized"}),
    Case("gate softmax, rate 5e-3", ARITHMETIC, settings={"gate": "softmax"}, learning_rate=5e-3),
    Case("LoRA, rate 1e-3", ARITHMETIC, method="lora", learning_rate=1e-3),
    Case("MiLoRA, rate 1e-3", ARITHMETIC, learning_rate=1e-3),
    Case("LoRA, batches of 19", ARITHMETIC, method="lora", batch=19),
    Case("MiLoRA, batches of 19", ARITHMETIC, batch=19),
)


def main() -> None:
    """Trains the missing cases, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="All, unless named.")
    parser.add_argument("--table", action="store_true", help="Print a Markdown table of what has been run.")
    arguments = parser.parse_args()
    runs = list(_read(arguments.output))
    if arguments.table:
        print(table(runs))
        return
    torch.set_num_threads(1)
    cases = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    for seed, case in ((seed, case) for seed in arguments.seeds for case in cases):
        for task in case.tasks:
            name = f"{case.name}, {task}, seed {seed}"
            lock = arguments.output.with_name(f".{arguments.output.stem}, {name}.lock")
            with suppress(Timeout), FileLock(lock, blocking=False):
                done = [(run["case"], run["task"], run["seed"]) for run in _read(arguments.output)]
                if (case.name, task, seed) not in done:
                    found = learn(case, task, seed)
                    append_record(arguments.output, found)
                    print(f"{name}: {found['learned_after'] or f'not within {STEPS}'}", flush=True)
            lock.unlink(missing_ok=True)


def learn(case: Case, task: str, seed: int) -> dict[str, Any]:
    """Trains until the task is learned. Returns the dev scores every 20 steps."""
    model, tokenizer = load_backbone("tiny", dtype="float32", device="cpu")
    model.config.use_cache = False
    config = _fixed(case, model, seed) if case.fixed_modules else config_for(case.method, model, **case.settings)
    set_seed(seed)
    model = get_peft_model(model, config)
    theta = [p for module in model.modules() if isinstance(module, RationalActivation) for p in module.parameters()]
    optimizer = _optimizer(model, case, theta)
    of_theta = torch.optim.AdamW(theta, lr=THETA_RATE, weight_decay=0.0) if case.theta == "bilevel" else None
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARM_UP * STEPS)) * (1 - step / STEPS)
    )
    train, dev = (_rows(tokenizer, task, *what) for what in (("train", TRAIN_ROWS), ("dev", DEV_ROWS)))
    order = random.Random(seed)
    batches = _batches(train, case.batch, order)
    routes: Tensor | None = None
    curve: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        model.train()
        if case.dense_steps:
            model.base_model.train_all_experts(step <= case.dense_steps)
        model(**_padded(next(batches))).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        if of_theta is not None and step % THETA_EVERY == 0:
            model.eval()
            model(**_padded(order.sample(dev, case.batch))).loss.backward()
            of_theta.step()
            model.zero_grad()
        if step % EVERY == 0:
            model.eval()
            point = {"step": step, **_score(model, dev)}
            if config.peft_type == "MILORA":
                routes, before = _routes(model, dev), routes
                point["routes"] = len({tuple(row.flatten().tolist()) for row in routes.transpose(0, 1)})
                if before is not None:
                    point["changed"] = round(((routes & ~before).sum() / routes.sum()).item(), 4)
            curve.append(point)
            if point["accuracy"] >= ENOUGH:
                break
    learned = curve[-1]["accuracy"] >= ENOUGH
    return {
        "case": case.name,
        "task": task,
        "seed": seed,
        "learning_rate": case.learning_rate,
        "learned_after": curve[-1]["step"] if learned else None,
        "curve": curve,
    }


def _fixed(case: Case, model: Any, seed: int) -> LoraConfig:
    draw = random.Random(100 + seed)
    modules = [
        f"{block.path}.{name}"
        for block in find_blocks(model)
        for name in draw.sample(list(block.linears), case.fixed_modules)
    ]
    return LoraConfig(r=32, lora_alpha=64, target_modules=modules, task_type="CAUSAL_LM")


def _optimizer(model: Any, case: Case, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
    own = {id(parameter) for parameter in theta}
    of_routers = [
        parameter
        for name, parameter in model.named_parameters()
        if "milora_router" in name and parameter.requires_grad and id(parameter) not in own
    ]
    own |= {id(parameter) for parameter in of_routers}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": case.learning_rate}]
    if of_routers and case.router_rate > 0:
        groups.append({"params": of_routers, "lr": case.learning_rate * case.router_rate})
    if theta and case.theta == "joint":
        groups.append({"params": list(theta), "lr": THETA_RATE})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _rows(tokenizer: Any, task: str, split: Any, count: int) -> list[Row]:
    return [
        (tokenizer(example.prompt)["input_ids"], [*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id])
        for example in registry.get(task).examples(split, count, 0)
    ]


def _batches(rows: Sequence[Row], size: int, order: random.Random) -> Iterator[list[Row]]:
    """Yields batches endlessly. Every row comes once before any row comes again."""
    queue: list[int] = []
    while True:
        if len(queue) < size:
            again = list(range(len(rows)))
            order.shuffle(again)
            queue += again
        yield [rows[number] for number in queue[:size]]
        queue = queue[size:]


def _padded(rows: Sequence[Row], *, prompts_alone: bool = False) -> dict[str, Tensor]:
    texts = [(prompt, [] if prompts_alone else completion) for prompt, completion in rows]
    longest = max(len(prompt) + len(completion) for prompt, completion in texts)
    ids, attended, labels = (
        torch.tensor([[*values, *[fill] * (longest - len(values))] for values in all_values])
        for all_values, fill in (
            ([prompt + completion for prompt, completion in texts], 0),
            ([[1] * len(prompt + completion) for prompt, completion in texts], 0),
            ([[-100] * len(prompt) + completion for prompt, completion in texts], -100),
        )
    )
    return {"input_ids": ids, "attention_mask": attended} | ({} if prompts_alone else {"labels": labels})


@torch.no_grad()
def _score(model: Any, rows: Sequence[Row]) -> dict[str, float]:
    right, loss, tokens = 0, 0.0, 0
    for start in range(0, len(rows), DEV_BATCH):
        batch = _padded(rows[start : start + DEV_BATCH])
        logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        counts = labels != -100
        right += int(((logits.argmax(-1) == labels) | ~counts).all(dim=1).sum())
        loss += functional.cross_entropy(logits[counts], labels[counts], reduction="sum").item()
        tokens += int(counts.sum())
    return {"accuracy": right / len(rows), "loss": round(loss / tokens, 4)}


@torch.no_grad()
def _routes(model: Any, rows: Sequence[Row]) -> Tensor:
    """(blocks, rows, experts), bool."""
    return model.route(**_padded(rows, prompts_alone=True)).gates != 0  # type: ignore[no-any-return]


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the steps that each case needed, by task and seed, and of its routes."""
    lines = [
        f"| | {' | '.join(TASKS)} | routes, of {DEV_ROWS} prompts | changed in {EVERY} steps |",
        f"| --- | {' | '.join('---:' for _ in TASKS)} | ---: | ---: |",
    ]
    for case in CASES:
        cells = []
        for task in TASKS:
            of_task = sorted((r for r in runs if (r["case"], r["task"]) == (case.name, task)), key=lambda r: r["seed"])
            needed = [run["learned_after"] for run in of_task]
            median = statistics.median([steps or STEPS + 1 for steps in needed]) if needed else None
            each = ", ".join(str(steps or f"> {STEPS}") for steps in needed)
            cells.append("" if median is None else f"{median if median <= STEPS else f'> {STEPS}'} ({each})")
        curves = [run["curve"] for run in runs if (run["case"], run["task"]) == (case.name, TASKS[0])]
        routes = [curve[-1]["routes"] for curve in curves if "routes" in curve[-1]]
        changed = [point["changed"] for curve in curves for point in curve if "changed" in point]
        cells.append(f"{statistics.median(routes):g}" if routes else "")
        cells.append(f"{100 * statistics.median(changed):.0f} %" if changed else "")
        if any(cells):
            lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    return (record for _, record in read_records(path)) if path.is_file() else iter(())


if __name__ == "__main__":
    main()
