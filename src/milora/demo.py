"""The demo that `make demo` and `milora demo` run, small enough for two cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import set_seed

from milora.backbone.loading import TINY, device_of, load_backbone
from milora.evaluation.accuracy import evaluate_task
from milora.evaluation.progress import Watch
from milora.inference.generation import Decoding, encode_prompt, left_padded, padding_token
from milora.plots import route_heat_map
from milora.tasks.bundled import BUNDLED_TASKS
from milora.tasks.rows import Row
from milora.tasks.shop import SHOP_TASKS
from milora.tasks.sources import to_dataset
from milora.tasks.task import Example, Task
from milora.training.arguments import TrainingArguments, multiplies_bf16
from milora.training.trainer import MiLoraTrainer
from milora.tuners.milora import MiLoraConfig
from milora_core.errors import MiLoraError
from milora_core.routing import Route

ASSISTANT = "assistant"
BRISK = "brisk"
"""The demo's two tenants: one learns all tasks, the other one task in another style."""


@dataclass(frozen=True)
class Stage:
    """The tasks that the demo trains.

    Attributes:
        tasks: Tasks of the first tenant.
        prefix: Prefix of the tasks' names; left out in the picture.
        settings: Fields of `MiLoraConfig`.
        brisk_task: Task of the second tenant.
        manner: Maps a task's completion to the second tenant's.
    """

    tasks: Mapping[str, Task]
    prefix: str
    settings: Mapping[str, Any]
    brisk_task: str
    manner: Callable[[str], str]


BUNDLED = Stage(
    BUNDLED_TASKS, "bundled-", {}, "bundled-extraction", lambda completion: f"{completion.removeprefix(' correct:')}!"
)
# Without the center all prompts of a pretrained model have nearly the same route.
SHOP = Stage(
    SHOP_TASKS,
    "shop-",
    {"router_norm": "centered"},
    "shop-department",
    lambda completion: f" Please forward to{completion}!",
)


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo; the defaults take some minutes on two cores.

    Args:
        backbone: `tiny`, which learns the bundled tasks, or a pretrained model, which learns the shop tasks.
        steps: Optimiser steps of the first tenant.
        brisk_steps: Optimiser steps of the second.
        batch_size: Rows per step.
        learning_rate: Peak learning rate; far above the paper's, because the backbone is small and there are few steps.
        test_rows: Test rows of each task, before and after.
        beams: Width of the beam search.
        seed: Seed of the data, the adapters' initialisation and the order of the rows.
    """

    backbone: str = TINY
    steps: int = 450
    brisk_steps: int = 40
    batch_size: int = 16
    learning_rate: float = 3e-3
    test_rows: int = 40
    beams: int = 3
    seed: int = 0

    @classmethod
    def for_backbone(cls, backbone: str, **settings: Any) -> DemoSettings:
        """The default settings for a backbone, overridden by the given ones that are not `None`."""
        of_pretrained = {"steps": 90, "brisk_steps": 12, "beams": 1, "batch_size": 8, "learning_rate": 1e-3}
        given = {name: value for name, value in settings.items() if value is not None}
        return cls(backbone, **{**({} if backbone == TINY else of_pretrained), **given})

    def training(self, steps: int) -> dict[str, Any]:
        """The keyword arguments of [`fine_tune`]."""
        return {
            "steps": steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    @property
    def stage(self) -> Stage:
        """The tasks for this backbone."""
        return BUNDLED if self.backbone == TINY else SHOP


@dataclass
class DemoResult:
    """The results of the demo.

    Attributes:
        tasks: Task -> test accuracy `before` and `after` fine-tuning.
        seconds: Wall-clock seconds in total.
        adapter: Folder of the first tenant's adapter.
        heat_map: The picture of the routes.
        tenants: A prompt and the answers of each tenant and the bare backbone in one batch.
    """

    tasks: dict[str, dict[str, float]]
    seconds: float
    adapter: str
    heat_map: str
    tenants: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def run_demo(
    output: Path, settings: DemoSettings, say: Callable[[str], None] = lambda _: None, watch: Watch | None = None
) -> DemoResult:
    """Fine-tunes, evaluates, draws the routes, and serves two tenants in one batch.

    Args:
        output: Folder for the adapters and the picture.
        settings: Size of the demo.
        say: Called with a line about the next step or a result.
        watch: Shows progress.

    Raises:
        MiLoraError: If `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise MiLoraError(f"{output} is a file; use a folder for the demo's adapters and picture.")
    started = time.monotonic()
    set_seed(settings.seed)
    tasks = settings.stage.tasks
    # The bundled backbone is too small for a GPU or bfloat16 to be faster.
    is_tiny = settings.backbone == TINY
    device = device_of("cpu" if is_tiny else None)
    in_bf16 = not is_tiny and (device.type != "cpu" or multiplies_bf16())
    model, tokenizer = load_backbone(settings.backbone, dtype="bfloat16" if in_bf16 else "float32", device=device)
    tests = {name: task.examples("test", settings.test_rows, settings.seed) for name, task in tasks.items()}
    say(
        f"The backbone {settings.backbone}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; "
        f"{len(tests)} tasks, {settings.test_rows} test rows each, beam {settings.beams}."
    )
    before = _accuracies(model, tokenizer, settings, watch)
    model = get_peft_model(model, MiLoraConfig(**settings.stage.settings), adapter_name=ASSISTANT)
    say(f"Fine-tuning MiLoRA on all tasks: {settings.steps} steps of {settings.batch_size} rows.")
    each = -(-settings.steps * settings.batch_size // len(tasks))
    rows = [
        Row(example.prompt, example.completion, example.answer)
        for task in tasks.values()
        for example in task.examples("train", each, settings.seed)
    ]
    fine_tune(model, tokenizer, rows, output / "checkpoints", **settings.training(settings.steps))
    after = _accuracies(model, tokenizer, settings, watch)
    adapter = output / ASSISTANT
    model.save_pretrained(str(output), selected_adapters=[ASSISTANT])
    heat_map = output / "routes.png"
    routes = {name: _route(model, tokenizer, examples) for name, examples in tests.items()}
    short = {name.removeprefix(settings.stage.prefix): route for name, route in routes.items()}
    route_heat_map(short, heat_map, "Share of prompts that chose each expert, by task")
    say(f"Routes drawn in {heat_map}; a second tenant learns another style of answer: {settings.brisk_steps} steps.")
    tenants = _two_tenants(model, tokenizer, settings, output)
    return DemoResult(
        tasks={name: {"before": before[name], "after": after[name]} for name in tests},
        seconds=round(time.monotonic() - started, 1),
        adapter=str(adapter),
        heat_map=str(heat_map),
        tenants=tenants,
    )


def fine_tune(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    checkpoints: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Trains a small adapter in a few steps, without dev rows; the model is in eval mode afterwards.

    Args:
        model: The backbone with the adapter.
        tokenizer: The backbone's.
        rows: Training rows.
        checkpoints: The trainer's folder.
        steps: Optimiser steps.
        batch_size: Rows per step.
        learning_rate: Peak learning rate. The routers' activations learn at a hundredth of it.
        seed: Order of the rows.
        progress: Whether to show a progress bar.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        total_train_batch_size=batch_size,
        learning_rate=learning_rate,
        activation_training="joint",
        activation_learning_rate=learning_rate / 100,
        gradient_checkpointing=False,
        eval_strategy="no",
        eval_on_start=False,
        load_best_model_at_end=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=model.device.type == "cpu",
        seed=seed,
        disable_tqdm=not progress,
    )
    MiLoraTrainer(model, arguments, train_dataset=to_dataset(rows), processing_class=tokenizer).train()
    model.eval()


def _accuracies(model: Any, tokenizer: Any, settings: DemoSettings, watch: Watch | None) -> dict[str, float]:
    return {
        name: evaluate_task(
            model,
            tokenizer,
            task,
            limit=settings.test_rows,
            seed=settings.seed,
            decoding=Decoding(task.max_new_tokens, settings.beams),
            batch_size=settings.test_rows,
            progress=watch,
        ).accuracy
        for name, task in settings.stage.tasks.items()
    }


def _route(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Route:
    encoded = [encode_prompt(tokenizer, example.prompt) for example in examples]
    route: Route = model.route(**left_padded(encoded, padding_token(tokenizer), model.device))
    return route


def _two_tenants(model: Any, tokenizer: Any, settings: DemoSettings, output: Path) -> dict[str, Any]:
    """Trains the second tenant, then answers one prompt with both adapters and with none, as three rows of one
    batch."""
    stage = settings.stage
    task = stage.tasks[stage.brisk_task]
    examples = task.examples("train", settings.brisk_steps * settings.batch_size, settings.seed + 1)
    rows = [Row(example.prompt, stage.manner(example.completion), example.answer) for example in examples]
    model.add_adapter(BRISK, MiLoraConfig(**stage.settings))
    model.set_adapter(BRISK)
    fine_tune(model, tokenizer, rows, output / "checkpoints", **settings.training(settings.brisk_steps))
    model.save_pretrained(str(output), selected_adapters=[BRISK])
    example = task.examples("test", 1, settings.seed)[0]
    names = [ASSISTANT, BRISK, "__base__"]
    encoded = [encode_prompt(tokenizer, example.prompt)] * len(names)
    inputs = left_padded(encoded, padding_token(tokenizer), model.device)
    written = model.generate(
        **inputs, adapter_names=names, max_new_tokens=task.max_new_tokens, do_sample=False, num_beams=settings.beams
    )
    texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"prompt": example.prompt, "answers": dict(zip(names, (text.strip() for text in texts), strict=True))}
