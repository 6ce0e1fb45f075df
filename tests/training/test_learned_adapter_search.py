"""The search of Learned-Adapter under the stock `Trainer`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.architectures import ARCHITECTURES, random_prompts
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora import MiLoraError
from milora.training.learned_adapter_search import LearnedAdapterSearch
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.learned_adapter.cell import DROPPED
from milora.tuners.parallel_adapter import ParallelAdapterConfig

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}


def rows(seed: int, count: int = 8) -> Dataset:
    prompts = random_prompts(count, 9, seed=seed)
    return Dataset.from_dict({"input_ids": prompts, "labels": [[-100] * 3 + prompt[3:] for prompt in prompts]})


def dev_batches() -> DataLoader:
    return DataLoader(rows(seed=6).with_format("torch"), batch_size=4)


def learned(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ARCHITECTURES["llama"](), LearnedAdapterConfig(bottleneck=8, **settings))


def trainer_for(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    settings = {**QUIET, "max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **settings}
    arguments = TrainingArguments(str(folder), **settings)
    return Trainer(model, arguments, train_dataset=rows(seed=5), callbacks=list(callbacks))


class Recorder(TrainerCallback):
    """Records the adapter and the search after every step."""

    def __init__(self) -> None:
        self.rounds_left: list[int] = []
        self.weights: list[list[torch.Tensor]] = []
        self.optimizer_sizes: list[int] = []
        self.up: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.rounds_left.append(model.base_model.rounds_left)
        self.weights.append([weights.detach().clone() for weights in model.base_model.architecture_parameters()])
        self.optimizer_sizes.append(sum(len(group["params"]) for group in optimizer.param_groups))
        self.up.append(sum(p.abs().sum().item() for n, p in model.named_parameters() if n.endswith(".up")))


@pytest.mark.parametrize("retrain", [True, False])
def test_searches_then_trains(tmp_path: Path, retrain: bool) -> None:
    model, recorder = learned(), Recorder()
    search = LearnedAdapterSearch(dev_batches(), search_share=0.6, learning_rate=1e-2, retrain=retrain)
    trainer = trainer_for(model, tmp_path, search, recorder)
    trainer.train()
    # Three rounds in the first six of ten steps; the first round ends after the second step.
    assert recorder.rounds_left == [3, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    assert len(recorder.weights[0]) == 8
    # Adam's first steps are about the learning rate. Operations start equal, so they differ from the second step on.
    assert all(weights.abs().max() > 5e-3 for weights in recorder.weights[0][::2])
    assert all(weights[weights > DROPPED / 2].abs().max() > 5e-3 for weights in recorder.weights[2])
    assert not model.base_model.is_searching
    assert len(model.peft_config["default"].architecture) == 4
    assert (recorder.up[5] == 0) == retrain
    # After the search only the remaining parameters are trained, and they learn.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert recorder.optimizer_sizes[-1] == len(trained)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[9] < losses[6 if retrain else 0]


@pytest.mark.parametrize("when", ["with the trainer", "after it"])
def test_the_trainer_leaves_the_architecture_alone(tmp_path: Path, when: str) -> None:
    """Neither gradients nor weight decay of the trainer change the architecture weights."""
    model, recorder = learned(), Recorder()
    for weights in model.base_model.architecture_parameters():
        torch.nn.init.constant_(weights, 0.5)
    search = LearnedAdapterSearch(dev_batches(), search_share=1.0, learning_rate=0.0)
    if when == "with the trainer":
        trainer = trainer_for(model, tmp_path, search, recorder, weight_decay=0.1)
    else:
        trainer = trainer_for(model, tmp_path, recorder, weight_decay=0.1)
        trainer.add_callback(search)
    trainer.train()
    for weights in itertools.chain(*recorder.weights):
        assert set(weights.tolist()) <= {0.5, DROPPED}
    # Only drops changed them; among equal candidates the last is dropped.
    assert model.peft_config["default"].architecture["model.layers.0.mlp"] == {
        "activation": "relu",
        "operation": "identity",
    }


def test_dev_batches_teach_nothing_but_the_architecture(tmp_path: Path) -> None:
    recorders = []
    for seed in (6, 7):
        recorders.append(Recorder())
        batches = DataLoader(rows(seed).with_format("torch"), batch_size=2)
        search = LearnedAdapterSearch(batches, search_share=1.0, learning_rate=0.0)
        trainer_for(learned(), tmp_path, search, recorders[-1], max_steps=4).train()
    assert recorders[0].up == recorders[1].up
    assert recorders[0].up[0] > 0


def test_a_run_is_resumed_during_the_search_and_after_it(tmp_path: Path) -> None:
    whole = learned()
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, "lr_scheduler_type": "constant"}
    trainer_for(whole, tmp_path, LearnedAdapterSearch(dev_batches(), search_share=0.5), **settings).train()
    for step, rounds_left in ((4, 1), (8, 0)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        model = PeftModel.from_pretrained(ARCHITECTURES["llama"](), checkpoint, is_trainable=True)
        assert model.base_model.rounds_left == rounds_left
        recorder, search = Recorder(), LearnedAdapterSearch(dev_batches(), search_share=0.5)
        trainer = trainer_for(model, tmp_path / "resumed", search, recorder, **settings)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert recorder.rounds_left == ([1, 0] if rounds_left else []) + [0] * (12 - max(step, 6))
    # After the search, the resumed run equals the uninterrupted one.
    assert model.peft_config["default"].architecture == whole.peft_config["default"].architecture
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), msg=name)


def test_the_best_checkpoint_has_the_architecture(tmp_path: Path) -> None:
    model = learned()
    arguments = TrainingArguments(
        str(tmp_path),
        **{**QUIET, "save_strategy": "steps"},
        max_steps=8,
        # So large that the adapter is best at the start, during the search.
        learning_rate=0.5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    search = LearnedAdapterSearch(dev_batches(), search_share=0.5, retrain=False)
    trainer = Trainer(model, arguments, train_dataset=rows(5), eval_dataset=rows(6), callbacks=[search])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    # The search ends with the fourth step, before that step's evaluation.
    best = 4 + min(range(5), key=lambda index: losses[3:][index])
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), trainer.state.best_model_checkpoint)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_known_architecture_is_only_trained(tmp_path: Path) -> None:
    found = learned(activations=["tanh"], operations=["gate"])
    found.base_model.drop_weakest()
    architecture = found.peft_config["default"].architecture
    model = learned(architecture=architecture)
    trainer_for(model, tmp_path, LearnedAdapterSearch([]), max_steps=2).train()
    assert model.peft_config["default"].architecture == architecture
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if n.endswith(".up"))


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {"search_share": 0.5}, "no dev batches"),
        (
            [{"input_ids": torch.ones(1, 4, dtype=torch.long)}],
            {"search_share": 0.5},
            r"no labels, only \['input_ids'\]",
        ),
        ([], {"search_share": 0.2}, r"drops candidates 3 times, but search_share=0\.2 gives it 2 steps"),
        ([], {"search_share": 0.0}, "search_share must be above 0"),
    ],
)
def test_a_search_that_makes_no_sense(tmp_path: Path, batches: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        trainer_for(learned(), tmp_path, LearnedAdapterSearch(batches, **settings)).train()


def test_another_method_has_nothing_to_search(tmp_path: Path) -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), ParallelAdapterConfig(bottleneck=8))
    with pytest.raises(MiLoraError, match="searches for a LearnedAdapterModel's structure"):
        trainer_for(model, tmp_path, LearnedAdapterSearch(dev_batches()))


TWO_PROCESSES = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from torch.utils.data import DataLoader
from test_learned_adapter_search import LearnedAdapterSearch, learned, rows, trainer_for
model = learned()
# Other dev batches in each process.
batches = DataLoader(rows(6 + int(os.environ["RANK"])).with_format("torch"), batch_size=4)
search = LearnedAdapterSearch(batches, search_share=0.5, learning_rate=1e-2, retrain=False)
trainer_for(model, Path(sys.argv[1]), search, max_steps=8, per_device_train_batch_size=2).train()
tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
torch.save((model.peft_config["default"].architecture, tensors), Path(sys.argv[1]) / os.environ["RANK"])
"""


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path: Path) -> None:
    """Under DDP as `Trainer` sets it up: it does not wait for parameters that the search removed."""
    script, here = tmp_path / "script.py", Path(__file__).parent
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(31000 + os.getpid() % 1000), str(script), str(tmp_path), str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (architecture, tensors), (other_architecture, other) = (torch.load(tmp_path / rank) for rank in "01")
    assert architecture == other_architecture
    assert len(architecture) == 4
    assert tensors.keys() == other.keys()
    assert all(torch.equal(tensors[name], other[name]) for name in tensors)
