"""Trains an adapter: reads rows, trains, and writes the best checkpoint's adapter."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import set_seed

from milora.backbone.adapter_tokenizer import adapter_tokenizer, difference
from milora.backbone.hub_files import commit_of
from milora.backbone.loading import TINY, load_backbone, locate, read_adapter_config
from milora.backbone.positions import positions_of
from milora.backbone.prefix_attention import implementation_of
from milora.locks import writing_alone
from milora.tasks.sources import to_dataset
from milora.training.activation_memory import activations_fit
from milora.training.arguments import DataArguments, TrainingArguments
from milora.training.card import ROUTES_FILE
from milora.training.checkpoints import KEPT, last_checkpoint
from milora.training.hub import check_hub, pushing
from milora.training.launching import check_launch
from milora.training.method import MethodArguments
from milora.training.method_callbacks import method_callbacks
from milora.training.quantized import keep_trainable, loading_arguments
from milora.training.result import RESULT_FILE, TrainingResult, finite_only, versions
from milora.training.template import give_end, give_template
from milora.training.trainer import MiLoraTrainer
from milora.training.training_rows import Mixture, mix, read_sources
from milora_core.errors import MiLoraError
from milora_core.files import write_text, writing

_log = logging.getLogger(__name__)

BUSY = "wait until it ends, or use another --output_dir"
"""The fix if another run writes to the folder; the end of the message."""

DEFAULT_REVISION = "main"

EAGER_TOKENS = 256
"""The length of rows up to which eager attention trains faster in bf16 on a CPU. The backward pass of torch's fused
attention is slow there: with 16 rows of 114 tokens, forward and backward take twice as long as eager attention's."""

RESOLVED_FIELDS = ("target_modules", "exclude_modules", "router_activation", "budget", "total_step")


def train(data: DataArguments, method: MethodArguments, arguments: TrainingArguments) -> TrainingResult:
    """Fine-tunes an adapter of any method and writes it to `arguments.output_dir`, with `training_result.json`.

    If the training diverges, the adapter may have NaN or infinity: see `nonfinite_tensors` of the result.

    Raises:
        MiLoraError: If there are no training rows, no row fits `max_length`, the method needs dev rows and there are
            none, an argument is out of range, another run writes to the folder, or the hub to push to cannot be
            reached.
    """
    started = time.monotonic()
    output = Path(arguments.output_dir or "out")
    check_launch()
    # The first of several processes that train together locks the folder.
    is_first = arguments.process_index == 0
    with writing_alone(output, BUSY, name="_lock") if is_first else nullcontext():
        return _train(data, method, arguments, output, started)


def _train(
    data: DataArguments, method: MethodArguments, arguments: TrainingArguments, output: Path, started: float
) -> TrainingResult:
    checkpoint = _checkpoint(arguments.resume_from_checkpoint, output)
    set_seed(arguments.seed)
    sources = read_sources(data, arguments.seed)
    check_hub(arguments, output)
    model, tokenizer = load_for_training(data, arguments)
    arguments.set_length(positions_of(model))
    mixture = mix(sources, tokenizer, arguments.max_length)
    if not mixture.dev:
        arguments.without_evaluation()
    arguments.set_accumulation(len(mixture.train))
    # Seeded again: reading and filtering may have used random numbers, and the adapter's initialisation should not
    # depend on them.
    set_seed(arguments.seed)
    model.config.use_cache = False
    steps = arguments.optimizer_steps(len(mixture.train))
    revision = _revision(data)
    if checkpoint is not None:
        _check_same_prompts(checkpoint, tokenizer, revision)
    _choose_attention(model, data, arguments, mixture.longest)
    model = _adapted(model, method, steps, revision, checkpoint)
    _choose_checkpointing(model, arguments, mixture.longest)
    trainer = _trainer(model, tokenizer, arguments, mixture)
    trainer.card.update(title=method.title, base_model=data.backbone, data=data.sources)
    if checkpoint is not None:
        # The resumed run made the first evaluation.
        trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    with writing(output, KEPT):
        trainer.save_model(str(output))
    result = _result(trainer, method, mixture, output, checkpoint, time.monotonic() - started)
    if trainer.is_world_process_zero():
        with writing(output, KEPT):
            trainer.state.save_to_json(str(output / "trainer_state.json"))
        record = _record(data, method, arguments, trainer, result)
        write_text(
            output / RESULT_FILE, json.dumps(record, indent=2, default=str, ensure_ascii=False, allow_nan=False) + "\n"
        )
        trainer.draw_routes({name: counts.dev for name, counts in mixture.counts.items()}, output / ROUTES_FILE)
    trainer.card["result"] = result
    trainer.create_model_card()
    if arguments.push_to_hub:
        with pushing(trainer.hub_model_id, f"the adapter is in {output}, push it with `hf upload`"):
            trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    return result


def load_for_training(data: DataArguments, arguments: TrainingArguments) -> tuple[Any, Any]:
    """Loads the backbone of `data`, in the dtype for training on this machine, and its tokenizer.

    The tokenizer has the chat template and end of sequence of `arguments`, and is saved with the adapter.

    Raises:
        MiLoraError: If it cannot be loaded, a folder has a revision, or the tokenizer lacks a requested template or
            token.
    """
    # On a CPU autocast rounds only the operands of products and is as fast as a bf16 backbone. Hidden states, in which
    # real models have single values of thousands, stay float32.
    on_cpu = data.dtype == "auto" and (arguments.use_cpu or not torch.cuda.is_available())
    # With several processes the trainer assigns the devices.
    stays = arguments.use_cpu or arguments.world_size > 1
    quantized = data.load_in_4bit or data.load_in_8bit
    folder = Path(locate(data.backbone))
    if folder.is_dir() and data.model_revision != DEFAULT_REVISION:
        raise MiLoraError(
            f"--model_revision {data.model_revision} is only for backbones on the hub, but {data.backbone} is a folder."
        )
    model, tokenizer = load_backbone(
        # The adapter names its backbone and may be loaded from another working directory.
        str(folder.absolute()) if folder.is_dir() and data.backbone != TINY else data.backbone,
        dtype="float32" if on_cpu and not quantized else data.dtype,
        device="cpu" if stays else None,
        revision=None if data.model_revision == DEFAULT_REVISION else data.model_revision,
        **loading_arguments(data),
    )
    keep_trainable(model)
    if arguments.chat_template_path is not None:
        give_template(tokenizer, arguments.chat_template_path)
    if arguments.eos_token is not None:
        give_end(tokenizer, arguments.eos_token)
    return model, tokenizer


def _trainer(model: Any, tokenizer: Any, arguments: TrainingArguments, mixture: Mixture) -> MiLoraTrainer:
    try:
        return MiLoraTrainer(
            model,
            args=arguments,
            train_dataset=to_dataset(mixture.train),
            eval_dataset=to_dataset(mixture.dev) if mixture.dev else None,
            processing_class=tokenizer,
            callbacks=method_callbacks(model, arguments, has_dev=bool(mixture.dev)),
        )
    except MiLoraError:
        raise
    except (ValueError, ImportError) as error:
        # TRL and transformers check their settings here: names, and loggers and optimisers that are not installed.
        raise MiLoraError(f"The training settings are refused: {str(error).splitlines()[0]}") from error


def _revision(data: DataArguments) -> str | None:
    """The backbone's revision for the adapter's configuration: a commit, so the adapter stays on it if a branch moves.

    `None` for the default revision.
    """
    if data.model_revision == DEFAULT_REVISION:
        return None
    return commit_of(data.backbone, data.model_revision) or data.model_revision


def _check_same_prompts(checkpoint: Path, tokenizer: Any, revision: str | None) -> None:
    """Refuses to resume with another revision, chat template or end of sequence than the run started with."""
    found = read_adapter_config(checkpoint).revision
    if found != revision:
        raise MiLoraError(
            f"{checkpoint} was trained on revision {found or DEFAULT_REVISION} of its backbone, but "
            f"{revision or DEFAULT_REVISION} is requested: pass --model_revision {found or DEFAULT_REVISION}."
        )
    other = adapter_tokenizer(checkpoint)
    if other is not None and (different := difference(tokenizer, other)):
        raise MiLoraError(
            f"{checkpoint} was trained with another tokenizer ({different}): resume with its --chat_template_path and "
            "--eos_token."
        )


def _adapted(backbone: Any, method: MethodArguments, steps: int, revision: str | None, checkpoint: Path | None) -> Any:
    """The backbone with a new adapter, or with the adapter of the checkpoint to resume from.

    The current or final structure of a search is in the checkpoint's configuration, not in the initial one.
    """
    config = method.to_config(backbone, steps)
    if checkpoint is not None:
        _check_same_method(config, read_adapter_config(checkpoint), method, checkpoint)
        if not isinstance(config, AdaLoraConfig):
            return PeftModel.from_pretrained(backbone, checkpoint, is_trainable=True)
    # A checkpoint of AdaLoRA is pruned, but training continues with all ranks.
    try:
        return get_peft_model(backbone, config, revision=revision)
    except MiLoraError:
        raise
    except ValueError as error:
        raise MiLoraError(f"The settings of {method.method} are refused: {str(error).splitlines()[0]}") from error


def _choose_attention(model: Any, data: DataArguments, arguments: TrainingArguments, longest: int) -> None:
    """Selects eager attention for short rows in bf16 on a CPU, unless the caller set the implementation."""
    is_free = data.attn_implementation is None and implementation_of(model) == "sdpa"
    is_bf16_on_cpu = bool(arguments.bf16) and arguments.device.type == "cpu"
    if is_free and is_bf16_on_cpu and longest <= EAGER_TOKENS:
        model.set_attn_implementation("eager")


def _choose_checkpointing(model: Any, arguments: TrainingArguments, longest: int) -> None:
    """Disables gradient checkpointing on a CPU with enough memory, unless the caller set it."""
    if not arguments.chooses_checkpointing or arguments.device.type != "cpu" or arguments.world_size > 1:
        return
    if activations_fit(model, arguments.per_device_train_batch_size, longest, bf16=bool(arguments.bf16)):
        arguments.skip_checkpointing()


def _check_same_method(asked: Any, found: Any, method: MethodArguments, checkpoint: Path) -> None:
    if type(asked) is not type(found):
        raise MiLoraError(
            f"{checkpoint} is of a {type(found).__name__}, and --method {method.method} has a {type(asked).__name__}: "
            "resume with the same method, or start again in another --output_dir."
        )
    for name, value in method.overrides().items():
        # Others are resolved when the adapter is created: names of modules, shares of parameters.
        comparable = name not in RESOLVED_FIELDS and isinstance(value, int | float | str)
        if comparable and getattr(found, name) != value:
            raise MiLoraError(
                f"{checkpoint} has {name}={getattr(found, name)!r}, but {value!r} is requested: resume with the same "
                "settings, or start again in another --output_dir."
            )


def _result(
    trainer: MiLoraTrainer,
    method: MethodArguments,
    mixture: Mixture,
    output: Path,
    checkpoint: Path | None,
    seconds: float,
) -> TrainingResult:
    state = trainer.state
    evaluated = [(entry["step"], entry["eval_perplexity"]) for entry in state.log_history if "eval_perplexity" in entry]
    return TrainingResult(
        output=str(output),
        method=method.method,
        train_rows=len(mixture.train),
        dev_rows=len(mixture.dev),
        skipped_rows=mixture.left_out,
        rows={name: counts.to_dict() for name, counts in mixture.counts.items()},
        steps=state.global_step,
        epochs=round(state.epoch or 0.0, 4),
        stopped_early=state.global_step < state.max_steps,
        best_step=state.best_global_step if state.best_model_checkpoint else None,
        seconds=round(seconds, 1),
        tunable_parameters=trainer.tunable_parameters(),
        dev_perplexity_before=next((perplexity for step, perplexity in evaluated if step == 0), None),
        dev_perplexity_best=_best_perplexity(trainer, [perplexity for step, perplexity in evaluated if step > 0]),
        resumed_from=None if checkpoint is None else str(checkpoint),
        nonfinite_tensors=_nonfinite_tensors(output) if trainer.is_world_process_zero() else 0,
    )


def _nonfinite_tensors(folder: Path) -> int:
    """The number of tensors with NaN or infinity in the adapter of a folder."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        # One tensor at a time: an adapter may have whole embeddings.
        return sum(not bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118


def _best_perplexity(trainer: MiLoraTrainer, seen: list[float]) -> float | None:
    """Dev perplexity of the kept checkpoint, or the lowest measured if none was kept."""
    state = trainer.state
    if state.best_model_checkpoint and trainer.args.metric_for_best_model in ("loss", "eval_loss"):
        return math.exp(min(float(state.best_metric), 700.0))
    return min(seen, default=None)


def _record(
    data: DataArguments,
    method: MethodArguments,
    arguments: TrainingArguments,
    trainer: MiLoraTrainer,
    result: TrainingResult,
) -> dict[str, Any]:
    """Everything needed to repeat the run, and its results."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    record = {
        "method": {"name": method.method, "set": method.overrides(), "config": model.active_peft_config.to_dict()},
        "data": dict(vars(data)),
        "training": arguments.to_dict(),
        "seed": arguments.seed,
        "results": result.to_dict(),
        "device": {"type": arguments.device.type, "processes": arguments.world_size},
        "versions": versions(),
    }
    found: dict[str, Any] = finite_only(record)
    return found


def _checkpoint(resume: str | bool | None, output: Path) -> Path | None:
    if resume is None or str(resume).lower() in ("", "false"):
        return None
    if str(resume).lower() in ("true", "last", "latest"):
        found = last_checkpoint(output)
        if found is None:
            _log.warning("No complete checkpoint in %s to resume from: training starts from the beginning.", output)
        return found
    path = Path(str(resume))
    if not path.is_dir():
        raise MiLoraError(f"No checkpoint at {path}; use --resume_from_checkpoint last for the newest in {output}.")
    return path
