"""TRL's `SFTTrainer` for adapters of all methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DummyOptim
from datasets import Dataset, concatenate_datasets
from peft import AdaLoraModel
from torch import Tensor, nn
from trl import SFTTrainer

from milora.backbone.vocabulary import check_tokens
from milora.training.adalora import AdaLoraAllocation, orthogonality_penalty
from milora.training.architecture_search import ArchitectureSearch
from milora.training.arguments import TrainingArguments
from milora.training.bilevel_activations import BilevelActivations, activation_parameters
from milora.training.callbacks import routing_metrics
from milora.training.card import ROUTES_FILE, CardFacts, write_card
from milora.training.checkpoints import KEPT, STATE_FILE
from milora.training.dev_step import DevBatches, require_gradients
from milora.training.dev_step_callback import DevStepCallback
from milora.training.likelihood import LikelihoodSum, check_loss, plain_likelihood, row_likelihoods
from milora.training.route_picture import draw_routes
from milora.training.supervised_positions import score_supervised_positions_only
from milora.training.template import give_template
from milora.training.tuner import reads_prompts, tuner_of
from milora.tuners.prompt import attended_tokens, prompt_tokens
from milora_core.errors import MiLoraError
from milora_core.files import writing
from milora_core.routing.precision import KeepFloat32


class MiLoraTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` that trains the rational activations on dev batches and logs the routing.

    The activations' coefficients (Theta of the paper's equation 7) train by `TrainingArguments.activation_training`:

    - `bilevel`: on batches of `eval_dataset`, between the steps in which everything else trains
      ([`BilevelActivations`]), every `bilevel_every`-th step, at `activation_learning_rate`;
    - `joint`: on train batches with everything else, in a separate parameter group at that rate;
    - `frozen`: not at all.

    The dev loss, `eval_loss`, is the mean negative log-likelihood of all supervised tokens of the dev set, independent
    of the training loss, and `eval_perplexity` its exponential.

    Logs contain `load_balancing_loss`, `expert_share/{expert}`, `dev_step_loss`, `dev_steps_skipped` (total number of
    steps skipped because a gradient was not finite) and `eval_perplexity`. Searches on dev batches
    ([`ArchitectureSearch`]) without batches get those of `eval_dataset`. Checkpoints contain the state of all of these.
    For methods without rational activations it is `SFTTrainer` with these batches and checkpoints.

    Raises:
        MiLoraError: If parameters train on dev batches and there is no `eval_dataset`, or the loss does not work with
            routes (label smoothing, `compute_loss_func`; `loss_type="dft"` with a load-balancing loss).
    """

    args: TrainingArguments

    def __init__(
        self, model: Any, args: TrainingArguments, *more: Any, callbacks: Sequence[Any] | None = None, **settings: Any
    ) -> None:
        self.card: dict[str, Any] = {}
        """Facts for the model card that the trainer does not have: fields of [`CardFacts`]."""
        self._theta = activation_parameters(model)
        self._activations: BilevelActivations | None = None
        if self._theta and args.activation_training == "bilevel":
            self._activations = BilevelActivations(None, args.bilevel_every, args.activation_learning_rate)
        own = [] if self._activations is None else [self._activations]
        router_values = _float32_values(model)
        score_supervised_positions_only()
        with _template_given(args, settings.get("processing_class")):
            super().__init__(model, args, *more, callbacks=[*(callbacks or ()), *own], **settings)
        self._check_vocabulary()
        self._likelihood = LikelihoodSum()
        check_loss(self, self.accelerator.unwrap_model(self.model))
        shares_out_parameters = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if shares_out_parameters and any(
            isinstance(callback, AdaLoraAllocation | ArchitectureSearch) and callback.is_open(self.model, 0)
            for callback in self.callback_handler.callbacks
        ):
            raise MiLoraError(
                "AdaLoRA's pruning and the searches of SSP and Learned-Adapter need whole parameters, which FSDP and "
                "DeepSpeed shard: train without them."
            )
        if shares_out_parameters and self._activations is not None:
            raise MiLoraError(
                "--activation_training bilevel needs the whole model in each process, but FSDP and DeepSpeed shard "
                "the parameters: pass --activation_training joint, or use data parallelism."
            )
        # TRL rounds trained parameters on a quantised backbone to bfloat16, in which routers would decide differently
        # and a learning rate of 1e-6 would have no effect.
        for parameter, value in router_values:
            # The trainer may have moved the model in between.
            parameter.data = value.to(parameter.device)
        if self._activations is not None and self.eval_dataset is None:
            raise MiLoraError(
                "The rational activations of MiLoRA's routers and IAPT's bottlenecks train on dev rows "
                "(--activation_training bilevel, as in the paper), but there are none: pass --dev_data, or "
                "--activation_training joint or frozen."
            )
        scaler = self.accelerator.scaler
        for callback in self._on_dev_batches():
            # The rows are tokenised only now, after the callbacks were created.
            if callback.dev_batches is None:
                callback.use_batches(
                    self.dev_batches(),
                    # Scores only the supervised tokens, like the training step.
                    model_arguments={"fused_lm_head": True},
                    loss_scale=None if scaler is None else scaler.get_scale,
                )

    def _check_vocabulary(self) -> None:
        """Refuses rows with tokens without embeddings in the backbone."""
        dev = self.eval_dataset
        for rows in (self.train_dataset, *(dev.values() if isinstance(dev, dict) else [dev])):
            if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
                check_tokens(self.accelerator.unwrap_model(self.model), self.processing_class, rows["input_ids"])

    def dev_batches(self) -> DevBatches:
        """Batches of the dev set, of the size of the training batches of a device.

        Raises:
            MiLoraError: If there is no dev set.
        """
        rows = self.eval_dataset
        if rows is None:
            raise MiLoraError("There is no eval_dataset for dev batches.")
        if isinstance(rows, dict):
            rows = concatenate_datasets(list(rows.values()))
        return DevBatches(
            rows,
            self.data_collator,
            self.args.per_device_train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Like `Trainer`'s, but with Theta in a separate group without weight decay, or excluded."""
        is_new = self.optimizer is None
        if self._theta and isinstance(self.optimizer, DummyOptim):
            raise MiLoraError(
                "The DeepSpeed configuration has its own optimizer, which would train Theta, the rational "
                "activations, at the learning rate of the other parameters: remove 'optimizer' from it."
            )
        if self.args.activation_training != "joint":
            # Loading a checkpoint may have enabled them again.
            require_gradients(self._theta, False)
            return super().create_optimizer(model)  # type: ignore[no-any-return]
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self._theta:
            own = {id(parameter) for parameter in self._theta}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rate = self.args.activation_learning_rate
            optimizer.add_param_group({"params": self._theta, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Like `SFTTrainer`'s; in training with AdaLoRA's orthogonality penalty, once per step.

        In evaluation it is the negative log-likelihood, whose sums are kept for [`MiLoraTrainer.evaluation_loop`].
        """
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tuner = getattr(self.accelerator.unwrap_model(self.model), "base_model", None)
        if not isinstance(tuner, AdaLoraModel):
            return result
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        penalty = orthogonality_penalty(tuner) / steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Like `Trainer`'s, with the loss averaged over tokens: a mean over batches would depend on the batch size."""
        self._likelihood = LikelihoodSum()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        mean = self._likelihood.mean()
        if mean is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = mean
        return output

    def _evaluation_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        outputs = []

        def recorded(**arguments: Any) -> Any:
            outputs.append(model(**arguments))
            return outputs[-1]

        tuner = tuner_of(self.accelerator.unwrap_model(self.model))
        # For metrics SFTTrainer computes the logits in a second pass, without the labels that mark the prompt.
        says_prompt = return_outputs and reads_prompts(tuner)
        prompt = prompt_tokens(attended_tokens(inputs), inputs["labels"]) if says_prompt else None
        with plain_likelihood(self), nullcontext() if prompt is None else tuner.use_prompt(prompt):
            result = super().compute_loss(recorded, inputs, return_outputs)
        self._likelihood.add(self.accelerator.gather_for_metrics(row_likelihoods(outputs[0])))
        return result

    def tunable_parameters(self) -> int:
        """The number of trained parameters, over all optimisers."""
        theta = {id(parameter) for parameter in self._theta} if self.args.activation_training == "bilevel" else set()
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or id(p) in theta)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes our own card instead of TRL's, wherever TRL and transformers write one.

        Args:
            model_name: The adapter's name; by default that of its repository or folder.
            dataset_name: A data set's name, for the card's metadata.
            tags: Ignored: the card has its own.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or "out")
        config = self.accelerator.unwrap_model(self.model).active_peft_config
        facts: dict[str, Any] = {
            "title": config.peft_type.value,
            "base_model": config.base_model_name_or_path,
            "data": [dataset_name] if dataset_name else [],
            **self.card,
        }
        write_card(
            folder,
            CardFacts(
                name=model_name or (self.hub_model_id or folder.absolute().name).split("/")[-1],
                config=config,
                arguments=self.args,
                history=self.state.log_history,
                trains_activations=bool(self._theta),
                has_routes=(folder / ROUTES_FILE).is_file(),
                repository=self.hub_model_id,
                **facts,
            ),
        )

    def draw_routes(self, counts: Mapping[str, int], path: Path) -> bool:
        """Draws the routers' choices on the dev set; see [`milora.training.route_picture.draw_routes`].

        Args:
            counts: Dev rows of each source, in the order of `eval_dataset`.
            path: Where to write.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # The weights are sharded over processes, but only this one draws.
            return False
        model = self.accelerator.unwrap_model(self.model)
        return draw_routes(model, self.eval_dataset, self.data_collator, counts, path)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like `Trainer`'s, with routing statistics in training logs and the perplexity in evaluation logs."""
        if "loss" in logs:
            logs.update(self._mean_over_processes(routing_metrics(self.accelerator.unwrap_model(self.model))))
            if self._activations is not None and self._activations.loss is not None:
                logs["dev_step_loss"] = self._activations.loss.item()
            if on_dev_batches := self._on_dev_batches():
                logs["dev_steps_skipped"] = float(sum(callback.skipped for callback in on_dev_batches))
        for name in [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]:
            logs[f"{name.removesuffix('_loss')}_perplexity"] = math.exp(min(logs[name], 700.0))
        super().log(logs, start_time)

    def _on_dev_batches(self) -> list[DevStepCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, DevStepCallback)]

    def _mean_over_processes(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1 or not metrics:
            return metrics
        values = torch.tensor(list(metrics.values()), device=self.accelerator.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    # transformers has no public hook for a second optimiser in a checkpoint; these methods write and read the first
    # one.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # PEFT's file of AdaLoRA is pruned; our own file has all ranks.
        if not isinstance(getattr(self.model, "base_model", None), AdaLoraModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Here and not around the whole training, where an OSError can have other causes, such as the network.
        with writing(Path(self.args.output_dir or "out"), KEPT):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {name: callback.state_dict() for name, callback in self._stateful().items()}
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_FILE
        if not file.is_file():
            raise MiLoraError(f"{checkpoint} has no {STATE_FILE}: another trainer wrote it, or it is incomplete.")
        state = torch.load(file, map_location="cpu", weights_only=True)
        own = self._stateful()
        different = sorted((state.keys() ^ own.keys()) - {"EarlyStopping"})
        if different:
            raise MiLoraError(
                f"{checkpoint} was written with other settings, and only one of the two runs has a "
                f"{' and a '.join(different)}: resume with the same --method and --activation_training."
            )
        for name, callback in own.items():
            if name in state:
                callback.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        return {
            type(callback).__name__: callback
            for callback in self.callback_handler.callbacks
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
        }


@contextmanager
def _template_given(args: TrainingArguments, tokenizer: Any) -> Iterator[None]:
    """Sets the template of `chat_template_path` with [`give_template`] instead of TRL's way."""
    path = args.chat_template_path
    if path is not None:
        if tokenizer is None:
            raise MiLoraError("chat_template_path needs a processing_class.")
        give_template(tokenizer, path)
    args.chat_template_path = None
    try:
        yield
    finally:
        args.chat_template_path = path


def _float32_values(model: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Unchanged copies of the parameters that must stay in float32."""
    modules = [module for module in model.modules() if isinstance(module, KeepFloat32)]
    return [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
