"""Bi-level training of the routers' activations: which rows train which parameters, the cost, and resuming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.adapted import adapted as adapted_with_reference
from support.methods import adapted as adapted_method
from support.tokenizer import character_tokenizer
from torch import Tensor
from transformers import Trainer, TrainingArguments

from milora import MiLoraError
from milora.training import BilevelActivations, MiLoraTrainer
from milora.training import TrainingArguments as MiLoraTrainingArguments
from milora.training.dev_step import DevBatches, DevStep

RATE = 1e-3


def text_rows(count: int, shift: int = 0) -> Dataset:
    """Rows of equal length, so a mean of means is the mean over all tokens."""
    letters = "abcdefghijklmnop"
    prompts = [f"say {letters[(i + shift) % 16]} and {letters[(3 * i + shift) % 16]}:" for i in range(count)]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {letters[(i + shift) % 16]}" for i in range(count)]})


def arguments(folder: Path, **values: Any) -> MiLoraTrainingArguments:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "activation_learning_rate": RATE,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MiLoraTrainingArguments(str(folder), **{**defaults, **values})


def trainer_for(folder: Path, model: PeftModel | None = None, dev: int = 4, **values: Any) -> MiLoraTrainer:
    torch.manual_seed(0)
    return MiLoraTrainer(
        adapted() if model is None else model,
        arguments(folder, **values),
        train_dataset=text_rows(16),
        eval_dataset=text_rows(dev, shift=5),
        processing_class=character_tokenizer(),
    )


def adapted(**values: Any) -> PeftModel:
    return adapted_with_reference("llama", **values).model


def trained(model: Any, *, theta: bool) -> dict[str, Tensor]:
    names = ("lora_", "milora_router")
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if any(part in name for part in names) and (".activation." in name) is theta
    }


def moved(model: Any, before: dict[str, Tensor], *, theta: bool) -> bool:
    after = trained(model, theta=theta)
    return any(not torch.equal(after[name], before[name]) for name in after)


def by_hand(rows: Dataset, steps: int) -> dict[str, Tensor]:
    """Theta after `steps` Adam steps on the mean loss of all rows, in plain torch with the backbone's own loss."""
    model = adapted()
    tokenizer = character_tokenizer()
    theta = [parameter for name, parameter in model.named_parameters() if ".activation." in name]
    optimizer = torch.optim.Adam(theta, lr=RATE)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    tokens = torch.tensor(texts)
    labels = torch.tensor([[-100] * len(p) + t[len(p) :] for p, t in zip(prompts, texts, strict=True)])
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    return trained(model, theta=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated")
@pytest.mark.parametrize(
    "checkpointing",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
)
def test_theta_takes_adams_steps_on_the_dev_loss(tmp_path: Path, checkpointing: dict[str, Any]) -> None:
    # Other parameters do not move; the dev loss contains neither their balance loss nor dropout.
    model = adapted(load_balancing_coef=0.5, lora_dropout=0.5)
    trainer = trainer_for(tmp_path, model, learning_rate=0.0, **checkpointing)
    rest = trained(model, theta=False)
    trainer.train()
    expected = by_hand(text_rows(4, shift=5), steps=3)
    for name, theta in trained(model, theta=True).items():
        torch.testing.assert_close(theta, expected[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not moved(model, rest, theta=False)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".activation." in name)


def test_everything_else_trains_as_without(tmp_path: Path) -> None:
    results, logs = {}, {}
    for mode, rate in (("bilevel", 0.0), ("frozen", 1.0)):
        model = adapted(lora_dropout=0.2)
        trainer = trainer_for(tmp_path, model, activation_training=mode, activation_learning_rate=rate)
        before = trained(model, theta=True)
        trainer.train()
        assert not moved(model, before, theta=True)
        results[mode] = trained(model, theta=False)
        logs[mode] = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Bit-identical: a dev step draws no random numbers and leaves no gradients or statistics.
    for name, value in results["frozen"].items():
        assert torch.equal(results["bilevel"][name], value), name
    assert [e["load_balancing_loss"] for e in logs["bilevel"]] == [e["load_balancing_loss"] for e in logs["frozen"]]
    assert all("dev_step_loss" in entry for entry in logs["bilevel"])
    assert [entry["dev_steps_skipped"] for entry in logs["bilevel"]] == [0.0] * 3
    assert not any("dev_steps_skipped" in entry for entry in logs["frozen"])


def test_by_default_theta_learns_from_dev_rows_alone(tmp_path: Path) -> None:
    ends = {}
    for train_shift in (0, 7):
        model = adapted()
        trainer = trainer_for(tmp_path, model, learning_rate=0.0)
        trainer.train_dataset = trainer._prepare_dataset(
            text_rows(16, train_shift), trainer.processing_class, trainer.args, False, None, "train"
        )
        trainer.train()
        ends[train_shift] = trained(model, theta=True)
    assert all(torch.equal(ends[0][name], ends[7][name]) for name in ends[0])


def test_the_activations_of_iapt_are_theta_too(tmp_path: Path) -> None:
    ends = {}
    for rate in (0.0, RATE):
        model = adapted_method("iapt", "llama")
        theta = {name: p.detach().clone() for name, p in model.named_parameters() if ".activation." in name}
        assert len(theta) == 4
        trainer_for(tmp_path, model, activation_learning_rate=rate, max_steps=1).train()
        after = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(after[name], value) for name, value in theta.items()) is (rate == 0)
        ends[rate] = after
    # The other parameters' only step comes before Theta's, so it is the same.
    for name, value in ends[0.0].items():
        assert ".activation." in name or torch.equal(value, ends[RATE][name]), name


class Passes:
    """Counts the backbone's forward and backward passes, and the parameters that get gradients in them."""

    def __init__(self, model: PeftModel) -> None:
        self.rows: list[int] = []
        self.backward = self.theta = self.rest = 0
        backbone = model.get_base_model()
        backbone.model.embed_tokens.register_forward_hook(self._forward)
        backbone.model.norm.register_full_backward_hook(self._backward)
        for name, parameter in model.named_parameters():
            if name.endswith("milora_router.activation.default.numerator"):
                parameter.register_post_accumulate_grad_hook(self._theta)
            elif name.endswith("milora_router.projection.default.weight"):
                parameter.register_post_accumulate_grad_hook(self._rest)

    def _forward(self, module: Any, args: Any, output: Tensor) -> None:
        self.rows.append(len(output))

    def _backward(self, *args: Any) -> None:
        self.backward += 1

    def _theta(self, parameter: Tensor) -> None:
        self.theta += 1

    def _rest(self, parameter: Tensor) -> None:
        self.rest += 1


@pytest.mark.parametrize(
    ("values", "train_passes", "dev_passes"),
    [
        ({"activation_training": "frozen"}, 4, 0),
        ({}, 4, 4),
        ({"bilevel_every": 2}, 4, 2),
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, 16, 4),
    ],
)
def test_a_step_costs_at_most_one_more_pass(
    tmp_path: Path, values: dict[str, Any], train_passes: int, dev_passes: int
) -> None:
    model = adapted()
    passes = Passes(model)
    trainer_for(tmp_path, model, **{"max_steps": 4, **values}).train()
    blocks = 2
    assert len(passes.rows) == passes.backward == train_passes + dev_passes
    assert len(set(passes.rows)) == 1  # All batches have one size.
    assert passes.rest == blocks * train_passes
    assert passes.theta == blocks * dev_passes


def test_joint_training_leaves_the_dev_set_alone(tmp_path: Path) -> None:
    model = adapted()
    passes, before = Passes(model), trained(model, theta=True)
    trainer_for(tmp_path, model, activation_training="joint").train()
    assert len(passes.rows) == 3
    assert passes.theta == passes.rest == 6
    assert moved(model, before, theta=True)


def test_under_autocast_theta_stays_exact(tmp_path: Path) -> None:
    model = adapted()
    before = trained(model, theta=True)
    trainer = trainer_for(tmp_path, model, learning_rate=0.0, bf16=True)
    trainer.train()
    expected = by_hand(text_rows(4, shift=5), steps=3)
    after = trained(model, theta=True)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    # Gradients are rounded, and Adam's first steps depend on their signs.
    agreeing = [((after[n] - before[n]).sign() == (expected[n] - before[n]).sign()).float().mean() for n in after]
    assert torch.stack(agreeing).mean() > 0.9


def test_a_fixed_activation_has_no_theta(tmp_path: Path) -> None:
    model = adapted(router_activation="gelu")
    trainer = MiLoraTrainer(
        model, arguments(tmp_path), train_dataset=text_rows(8), processing_class=character_tokenizer()
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_bilevel_without_dev_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match="--activation_training joint or frozen"):
        MiLoraTrainer(
            adapted(), arguments(tmp_path), train_dataset=text_rows(8), processing_class=character_tokenizer()
        )


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match="bilevel, joint, frozen; found 'both'"):
        arguments(tmp_path, activation_training="both")
    with pytest.raises(MiLoraError, match="bilevel_every must be at least 1"):
        arguments(tmp_path, bilevel_every=0)


def test_the_stock_trainer_takes_the_callback(tmp_path: Path) -> None:
    model = adapted()
    tokens = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    batch = {"input_ids": tokens, "labels": torch.where(torch.arange(4) < 2, -100, tokens)}
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    before = trained(model, theta=True)
    callback = BilevelActivations([batch], learning_rate=RATE)
    stock = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.0, report_to="none", disable_tqdm=True, use_cpu=True
    )
    Trainer(model, stock, train_dataset=rows, callbacks=[callback]).train()
    assert callback.steps == 2
    assert moved(model, before, theta=True)


@pytest.mark.parametrize("mode", ["bilevel", "joint", "frozen"])
def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path, mode: str) -> None:
    values = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 9,
        "activation_training": mode,
        "bilevel_every": 2,
    }
    whole = trainer_for(tmp_path / "whole", adapted(lora_dropout=0.1), dev=7, **values)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", adapted(lora_dropout=0.1), dev=7, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for theta in (True, False):
        after = trained(resumed.model, theta=theta)
        for name, value in trained(whole.model, theta=theta).items():
            assert torch.equal(value, after[name]), name
    state = torch.load(tmp_path / "whole" / "checkpoint-6" / "milora_state.pt", weights_only=True)
    assert ("BilevelActivations" in state) is (mode == "bilevel")
    if mode == "bilevel":
        step = state["BilevelActivations"]["dev_step"]
        assert step["steps"] == 3
        assert all(part["step"] == 3 for part in step["optimizer"]["state"].values())


def test_a_checkpoint_without_thetas_optimiser_is_refused(tmp_path: Path) -> None:
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, **values).train()
    (tmp_path / "checkpoint-1" / "milora_state.pt").unlink()
    with pytest.raises(MiLoraError, match=r"has no milora_state\.pt: another trainer wrote it"):
        trainer_for(tmp_path, **values).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_quantised_backbones_leave_routers_exact(tmp_path: Path) -> None:
    """TRL casts trainable parameters to bfloat16 if a backbone reports that it is quantised."""
    model = adapted()
    before = {name: value for theta in (True, False) for name, value in trained(model, theta=theta).items()}
    model.get_base_model().is_loaded_in_4bit = True
    trainer_for(tmp_path, model)
    for name, parameter in model.named_parameters():
        if "milora_router" in name:
            assert torch.equal(parameter, before[name]), name
        elif "lora_" in name:
            assert parameter.dtype == torch.bfloat16, name


@given(rows=st.integers(1, 9), size=st.integers(1, 5), processes=st.integers(1, 3), start=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_dev_batches(rows: int, size: int, processes: int, start: int) -> None:
    def batches(process: int, step: int = 0) -> Any:
        return DevBatches(range(rows), list, size, 3, process, processes).starting_at(step)

    steps = rows * 2
    streams = [batches(process) for process in range(processes)]
    seen = [[next(stream) for stream in streams] for _ in range(steps)]
    flat = [row for step in seen for part in step for row in part]
    # Every round contains each row once, and rounds do not overlap.
    for first in range(0, len(flat) - rows + 1, rows):
        assert sorted(flat[first : first + rows]) == list(range(rows))
    # Starting at any step gives the same batches as the whole run.
    later = batches(processes - 1, start % steps)
    assert [next(later) for _ in range(steps - start % steps)] == [step[-1] for step in seen[start % steps :]]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_scaled_loss_makes_the_same_step(scale: float) -> None:
    layer = torch.nn.Linear(2, 1)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    step = DevStep([layer.weight], torch.optim.SGD([layer.weight], lr=0.5), [BATCH], evaluation=True)
    loss = step(Model(layer), torch.device("cpu"), scale)
    # The loss is the sum of the outputs, so the weight's gradient is the sum of the inputs.
    assert loss == pytest.approx((BATCH["labels"] @ before.T + layer.bias).sum().item())
    torch.testing.assert_close(layer.weight, before - 0.5 * BATCH["labels"].sum(dim=0))
    assert (layer.weight.grad, layer.bias.grad, layer.weight.requires_grad) == (None, None, False)
    assert layer.bias.requires_grad


@pytest.mark.parametrize("is_scaled", [True, False])
def test_gradients_that_are_not_finite_make_no_step(is_scaled: bool, caplog: pytest.LogCaptureFixture) -> None:
    layer = torch.nn.Linear(2, 1)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    broken = {"labels": torch.tensor([[1.0, float("nan")]])}
    batches = [BATCH] if is_scaled else [broken]
    step = DevStep([layer.weight], torch.optim.SGD([layer.weight], lr=0.5), batches, evaluation=True)
    for _ in range(3):
        step(Model(layer), torch.device("cpu"), float("inf") if is_scaled else None)
    assert torch.equal(layer.weight, before)
    assert (step.steps, step.skipped, step.state_dict()["skipped"]) == (3, 3, 3)
    # Loss scaling finds its scale by skipping steps; without scaling, Theta would silently never change.
    assert ["not finite at dev step 0" in record.getMessage() for record in caplog.records] == [True] * (not is_scaled)


BATCH = {"labels": torch.tensor([[1.0, 2.0], [3.0, 5.0]])}


class Model(torch.nn.Module):
    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(labels).sum()}


TWO_PROCESSES = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_bilevel_activations import adapted, trained, trainer_for
folder, each = Path(sys.argv[1]), int(sys.argv[3])
model = adapted(top_k=1)
trainer = trainer_for(folder, model, dev=8, max_steps=3, per_device_train_batch_size=each, learning_rate=0.0,
    ddp_find_unused_parameters=False)
trainer.train()
torch.save(trained(model, theta=True), folder / f"{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_one_theta(tmp_path: Path) -> None:
    """Theta is equal in both processes, and equal to one process with twice the batch size, under strict DDP."""
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = folder / "script.py"
        script.write_text(TWO_PROCESSES)
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        port = ["--master_port", str(28500 + os.getpid() % 1000 + processes)]
        command = [*launcher, *port, str(script), str(folder), str(here), str(4 // processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = [torch.load(folder / f"{process}.pt") for process in range(processes)]
    start = trained(adapted(top_k=1), theta=True)
    for name, one in results[1][0].items():
        assert torch.equal(results[2][0][name], results[2][1][name]), name
        torch.testing.assert_close(results[2][0][name], one, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert any((results[2][0][name] - start[name]).abs().max() > RATE for name in start)
