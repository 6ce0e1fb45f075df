"""What a reader must know before comparing with the paper: how the set-up differs from it, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from milora.methods import METHODS, method
from milora.paper import published
from milora.paper.budget import TOLERANCE, paper_backbone
from milora.paper.grid import Choice, Grid
from milora.paper.request import SEEDS
from milora.paper.store import Record, Results
from milora.paper.wording import listed, value_text
from milora.tasks import registry
from milora.training import TrainingArguments

PAPER_BEAMS = 3
PAPER_TARGET = "about 80M"
PAPER_LENGTH = "at most 10 epochs, ended early by dev perplexity"
PAPER_BATCH = "16, or 128 from 10,000 rows on"
NOT_TOLD = (
    "max_steps",
    "use_cpu",
    "gradient_checkpointing",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "logging_steps",
    "logging_strategy",
    "eval_on_start",
    "save_strategy",
    "save_steps",
)
"""Settings that decide how fast a run is or what it writes, and not what comes out."""


def differences(grid: Grid, records: Iterable[Record]) -> list[str]:
    """How the set-up differs from the paper's, a sentence each.

    Args:
        grid: The grid.
        records: Of the runs that the report is made of.
    """
    records = list(records)
    request = grid.request
    lines = [_backbone(grid)]
    tasks = list(dict.fromkeys(column for section in grid.sections for column in section.columns))
    lines.append(f"Tasks: {', '.join(tasks)}." + _rows(records))
    lines += [f"{task}: {differs}" for task in tasks if (differs := registry.get(task).differs)]
    lines += _training(grid)
    seeds = f"{len(request.seeds)} ({', '.join(map(str, request.seeds))})"
    lines.append(f"Seeds: {seeds}; the paper has {len(SEEDS)}. Rows are the same for all seeds.")
    evaluation = request.evaluation
    rows = (
        "all test rows" if evaluation.test_rows is None else f"the first {evaluation.test_rows} rows of each test split"
    )
    beams = f"beam {evaluation.beams}" if evaluation.beams > 1 else "greedy decoding"
    lines.append(f"Evaluation: {beams} (the paper: beam {PAPER_BEAMS}), {rows} (the paper: all).")
    return [line for line in lines if line]


def budget_lines(grid: Grid) -> list[str]:
    """How the methods' sizes were set, as text and a table; nothing where they are the paper's."""
    if grid.request.budget == "paper" or _is_paper_backbone(grid):
        return [
            f"Every method has the paper's settings, with which it has {PAPER_TARGET} tunable parameters on Llama-2 7B."
        ]
    budgets = grid.budgets()
    asked = grid.request.budget
    target = budgets["milora"].counts.tunable if asked == "milora" and "milora" in budgets else asked
    of = f"{target:,}" if isinstance(target, int) else "MiLoRA's"
    lines = [
        f"Budgets: every method is at the size at which its tunable parameters are nearest to {of} (the paper: "
        f"{PAPER_TARGET}), and within {TOLERANCE:.0%} of it. DoRA's magnitudes are not counted, as in the paper.",
        "",
        "| | setting | tunable | off the target | activated, mean | most |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in METHODS:
        if name in budgets:
            budget = budgets[name]
            settings = ", ".join(f"`{field}={value}`" for field, value in budget.settings.items())
            off = f"{budget.counts.tunable / target - 1:+.1%}" if isinstance(target, int) else ""
            counts = budget.counts
            lines.append(
                f"| {method(name).title} | {settings} | {counts.tunable:,} | {off} | {counts.activated_mean:,} | "
                f"{counts.activated_max:,} |"
            )
    return lines


def tuning_lines(grid: Grid, results: Results) -> list[str]:
    """What was tried on dev and taken, as text and a table; nothing where nothing was tuned."""
    choices: dict[tuple[str, tuple[str, ...]], Choice] = {}
    for cell in grid.cells():
        if grid.missing(cell) is None and grid.candidates(cell):
            choice = grid.choice(cell, results, lambda digest: True)
            choices.setdefault((choice.label, choice.tasks), choice)
    if not choices:
        return []
    names = ", ".join(grid.request.tune)
    criterion = grid.request.tune_by
    lines = [
        f"Tuned for every method and every set of tasks it is trained on: {names}, by dev {criterion}, with seed "
        f"{grid.request.seeds[0]}; the best is used for all seeds. Variants of MiLoRA and MOELoRA in the ablations and "
        "along an axis take their method's; gates are tuned one by one. Each try below with what dev said of it.",
        "",
        f"| | trained on | tried: dev {criterion} | taken |",
        "| --- | --- | --- | --- |",
    ]
    for choice in choices.values():
        tried = ", ".join(f"{_values(value)}: {_merit(merit, choice.criterion)}" for value, merit in choice.tried)
        taken = NOTHING if choice.best is None else f"{_values(choice.best)}{_at_the_edge(choice)}"
        lines.append(f"| {choice.label} | {' + '.join(choice.tasks)} | {tried} | {taken} |")
    others = [" + ".join(tasks) for (_, tasks), choice in choices.items() if choice.criterion != criterion]
    if others:
        told = listed(list(dict.fromkeys(others)))
        lines += ["", f"Of {told}, where no output is right or wrong, it is dev perplexity."]
    if any(_at_the_edge(choice) for choice in choices.values()):
        lines += ["", "\\* At the edge of what was tried: a value beyond it might be better."]
    if any(len(tried) == 2 for choice in choices.values() for tried in _tried(choice).values()):
        lines += [
            "",
            "A choice between two values is always at an edge of what was tried: a value beyond it might be better.",
        ]
    return lines


def environment_lines(records: Iterable[Record]) -> list[str]:
    """What the runs were made with."""
    records = list(records)
    if not records:
        return []
    revisions = _distinct(record["revision"] for record in records)
    versions = _distinct(", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records)
    machines = _distinct(_machine(record["environment"]) for record in records)
    hours = sum(float(record["seconds"]["total"]) for record in records) / 3600
    lines = [
        f"{len(records)} runs, {hours:.1f} hours one after the other. Code: revision {' and '.join(revisions)}. "
        f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}."
    ]
    if any(revision.endswith("-changed") for revision in revisions) or len(revisions) > 1:
        lines.append("Not all runs were made by one committed state of the code: `results.jsonl` says which by which.")
    return lines


NOTHING = "-"


def _backbone(grid: Grid) -> str:
    config = grid.materials.config(grid.request.backbone)
    inner = config.get_text_config(decoder=True)
    name = _short(grid.request.backbone)
    if _is_paper_backbone(grid):
        return f"Backbone: {name}, one of the paper's."
    return (
        f"Backbone: {name} ({inner.num_hidden_layers} blocks, hidden size {inner.hidden_size}), not Llama-2 7B "
        "(32 blocks, hidden size 4096). Numbers are not comparable with the paper's, at best their order is."
    )


def _is_paper_backbone(grid: Grid) -> bool:
    return paper_backbone(grid.materials.config(grid.request.backbone)) is not None


def _rows(records: list[Record]) -> str:
    single = {tuple(record["tasks"]): record["rows"] for record in records if len(record["tasks"]) == 1}
    if not single:
        return ""
    told = "; ".join(
        f"{tasks[0]} {rows['train']} and {rows['dev']}{_paper_rows(tasks[0])}" for tasks, rows in single.items()
    )
    return f" Training and dev rows: {told}."


def _paper_rows(task: str) -> str:
    rows = published.dataset(task)
    if not rows:
        return ""
    return f" (the paper: {rows['train']} and {'none of its own' if rows['dev'] is None else rows['dev']})"


def _training(grid: Grid) -> list[str]:
    request = grid.request
    defaults = {
        one.name: one.default for one in fields(TrainingArguments) if one.name in TrainingArguments.__annotations__
    }
    told = [
        f"{name} {value_text(value)}" + (f" (the paper: {_paper_value(name, defaults)})" if name in defaults else "")
        for name, value in request.training.items()
        if name not in NOT_TOLD and defaults.get(name, MISSING) != value and name not in request.tune
    ]
    if "max_steps" in request.training:
        told.insert(0, f"{request.training['max_steps']} steps (the paper: {PAPER_LENGTH})")
    lines = [
        f"Training: the paper's settings but for {', '.join(told)}." if told else "Training: the paper's settings."
    ]
    if request.data:
        lines.append(f"Data: {', '.join(f'{name} {value_text(value)}' for name, value in request.data.items())}.")
    own = {name: settings for name, settings in request.methods.items() if settings}
    if own:
        each = "; ".join(
            f"{method(name).title}: {', '.join(f'{field} {value_text(value)}' for field, value in settings.items())}"
            for name, settings in own.items()
        )
        lines.append(f"Settings of single methods: {each}.")
    return lines


def _paper_value(name: str, defaults: Mapping[str, Any]) -> str:
    return PAPER_BATCH if name == "total_train_batch_size" else value_text(defaults[name])


def _machine(environment: Mapping[str, Any]) -> str:
    gpu = (environment.get("gpu") or {}).get("name")
    return f"{gpu or environment.get('processor') or 'unknown processor'}, {environment.get('threads')} threads"


def _distinct(texts: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys("none" if text is None else str(text) for text in texts))


def _at_the_edge(choice: Choice) -> str:
    """`*` if a value taken is the least or the greatest of three or more."""
    if choice.best is None:
        return ""
    edges = {name: (tried[0], tried[-1]) for name, tried in _tried(choice).items() if len(tried) > 2}
    return " \\*" if any(choice.best[name] in edge for name, edge in edges.items()) else ""


def _tried(choice: Choice) -> dict[str, list[float]]:
    """The different values of each field of numbers, in order; what has no order has no edge."""
    found = {}
    for name in dict.fromkeys(name for values, _ in choice.tried for name in values):
        tried = [values[name] for values, _ in choice.tried]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried):
            found[name] = sorted(set(tried))
    return found


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(value_text(value) for value in values.values())


def _merit(merit: float | None, criterion: str) -> str:
    if merit is None:
        return "no result"
    return f"{-merit:.1%}" if criterion == "accuracy" else f"{merit:.3f}"


def _short(backbone: str) -> str:
    return backbone.rstrip("/").rpartition("/")[2]
