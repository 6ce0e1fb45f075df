"""The model card of an adapter: method, settings, data, results, routes, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from milora.backbone.loading import TINY
from milora.markdown import markdown_table
from milora.training.arguments import TrainingArguments
from milora.training.result import TrainingResult, versions
from milora_core.files import write_text

CARD_FILE = "README.md"
ROUTES_FILE = "routes.png"
TAGS = ("milora", "peft", "sft")
UNREMARKABLE = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "experts",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "modules",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "task_type",
)
"""Fields of an adapter's configuration that do not describe its method, or appear elsewhere in the card."""

LONGEST_VALUE = 300
"""Maximum characters of a setting; found structures are longer and are in the configuration."""


@dataclass
class CardFacts:
    """The contents of a card; unknown facts are left out.

    Attributes:
        name: The adapter's name, the card's title.
        title: The method's name, as in the paper's tables.
        config: The adapter's configuration.
        arguments: The training's.
        base_model: The backbone's name for loading it; a local folder is only mentioned.
        data: The sources of the rows.
        result: The run's result; `None` while it runs.
        history: The trainer's log.
        trains_activations: Whether the method has trainable rational activations (Theta).
        has_routes: Whether there is a picture of the routes beside the card.
        repository: The adapter's id on the hub.
    """

    name: str
    title: str
    config: PeftConfig
    arguments: TrainingArguments
    base_model: str | None = None
    data: list[str] = field(default_factory=list)
    result: TrainingResult | None = None
    history: list[Mapping[str, Any]] = field(default_factory=list)
    trains_activations: bool = False
    has_routes: bool = False
    repository: str | None = None


def write_card(folder: Path, facts: CardFacts) -> None:
    """Writes the card, completely or not at all.

    Raises:
        MiLoraError: If it cannot be written.
    """
    write_text(folder / CARD_FILE, model_card(facts))


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, with the metadata that the hub reads on top."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(facts), sort_keys=False)}---",
        f"# {facts.name}",
        f"A {facts.title} adapter{_for_backbone(facts.base_model)}, trained with [milora]"
        "(https://arxiv.org/abs/2410.18035 'Zhang et al., Findings of EMNLP 2024') on PEFT and TRL.",
        f"## Use\n\n{_use(facts)}",
        f"## Method\n\n{_table(('setting', 'value'), _settings(facts.config))}",
        f"## Data\n\n{_data(facts)}",
        f"## Training\n\n{_table(('setting', 'value'), _training(facts))}",
        f"## Results\n\n{_results(facts)}",
    ]
    if facts.has_routes:
        parts.append(
            "## Routes\n\nThe share of dev prompts for which each block's router chose each module.\n\n"
            f"![Share of prompts that choose each expert, by block]({ROUTES_FILE})"
        )
    found = "\n".join(f"- {name} {version}" for name, version in versions().items())
    parts.append(f"### Framework versions\n\n{found}")
    return "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts) -> dict[str, Any]:
    base = facts.base_model if _is_public(facts.base_model) else None
    method = facts.config.peft_type.value.lower()
    tags = [*dict.fromkeys([*TAGS, method, *([f"base_model:adapter:{base}"] if base else [])])]
    names = dict.fromkeys(name.partition(":")[0] for name in facts.data)  # without configurations
    datasets = [name for name in names if "/" in name and not Path(name).exists() and not Path(name).suffix]
    return {
        "library_name": "peft",
        **({"base_model": base} if base else {}),
        "pipeline_tag": "text-generation",
        "tags": tags,
        **({"datasets": datasets} if datasets else {}),
    }


def _is_public(base: str | None) -> bool:
    """Whether a backbone is a hub id, not a folder."""
    return (
        base is not None
        and base != TINY
        and not Path(base).exists()
        and base.count("/") <= 1
        and not base.startswith((".", "/"))
    )


def _for_backbone(base: str | None) -> str:
    if base is None:
        return ""
    if base == TINY:
        return " for milora's bundled backbone"
    return (
        f" for [{base}](https://huggingface.co/{base})"
        if _is_public(base)
        else f" for the backbone `{Path(base).name}`"
    )


def _use(facts: CardFacts) -> str:
    base = facts.base_model if _is_public(facts.base_model) else "BACKBONE"
    if facts.base_model == TINY:
        return f"""```bash
milora generate --adapter {facts.repository or facts.name} --prompt "..."
```"""
    adapter = facts.repository or facts.name
    revision = f', revision="{facts.config.revision}"' if facts.config.revision else ""
    return f"""```python
import milora  # makes its methods known to PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{revision}), "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("{adapter}")
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


def _settings(config: PeftConfig) -> dict[str, Any]:
    """The fields as saved."""
    values = {name: value for name, value in config.to_dict().items() if name not in UNREMARKABLE}
    return {name: value for name, value in values.items() if value not in (None, False, [], {}, "")}


def _data(facts: CardFacts) -> str:
    if facts.result is None:
        return ", ".join(facts.data) or "Rows that the trainer was given."
    rows = [
        (name, counts["train"], counts["dev"], counts["too_long"] + counts["no_room"])
        for name, counts in facts.result.rows.items()
    ]
    return markdown_table(("source", "training rows", "dev rows", "left out for their length"), rows)


def _training(facts: CardFacts) -> dict[str, Any]:
    arguments = facts.arguments
    values = {
        "rows a step": arguments.rows_at_once * arguments.gradient_accumulation_steps,
        "learning rate": arguments.learning_rate,
        "schedule": f"{_text(arguments.lr_scheduler_type)}, warm-up {arguments.warmup_steps}",
        "optimiser": _text(arguments.optim),
        "most epochs": arguments.num_train_epochs,
        "max length": arguments.max_length,
        "early stopping after": f"{arguments.early_stopping_patience} evaluations",
        "seed": arguments.seed,
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "float32",
    }
    if facts.trains_activations:
        every = f", every {arguments.bilevel_every} steps" if arguments.bilevel_every > 1 else ""
        values["activations"] = f"{arguments.activation_training}, {arguments.activation_learning_rate}{every}"
    return values


def _results(facts: CardFacts) -> str:
    result = facts.result
    if result is None:
        last = next((entry for entry in reversed(facts.history) if "eval_perplexity" in entry), None)
        if last is None:
            return "Training is in progress."
        return f"Training is in progress: dev perplexity {last['eval_perplexity']:.4g} at step {last['step']}."
    values: dict[str, Any] = {"steps": result.steps, "tunable parameters": f"{result.tunable_parameters:,}"}
    if result.dev_perplexity_before is not None:
        values["dev perplexity before"] = f"{result.dev_perplexity_before:.4g}"
    if result.dev_perplexity_best is not None:
        values["dev perplexity"] = f"{result.dev_perplexity_best:.4g}"
    if result.best_step is not None:
        values["kept is step"] = result.best_step
    return _table(("", "value"), values)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return markdown_table(head, [(name, _text(value)) for name, value in rows.items()], left=2)


def _text(value: Any) -> str:
    value = getattr(value, "value", value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]} ..."
    return text
