"""Every method through `train`: the best state is saved, and an interrupted run resumes to the same result."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tokenizer import save_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora import MiLoraError
from milora.methods import METHODS
from milora.training import DataArguments, MethodArguments, TrainingArguments, TrainingResult, train

SMALL: dict[str, dict[str, Any]] = {
    "parallel-adapter": {"bottleneck": 8},
    "learned-adapter": {"bottleneck": 8},
    "p-tuning-v2": {"num_virtual_tokens": 3, "projection_dim": 4},
    "iapt": {"num_virtual_tokens": 3, "bottleneck": 8},
    "bitfit": {"projection_dim": 4},
    "ia3": {"projection_dim": 4},
    "ssp": {"r": 4, "projection_dim": 4},
    "adalora": {"init_r": 4},
    "moelora": {"r": 8, "num_experts": 4, "top_k": 2},
}

pytestmark = [
    # PEFT reports a module without ranks as not gathered, and reads AdaLoRA's rank_pattern as LoRA's.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


def rows(folder: Path) -> str:
    letters = "abcdefgh"
    lines = [
        {"prompt": f"repeat {letters[i % 8]}{letters[i // 8]}: ", "completion": f"{letters[i % 8]}{letters[i // 8]}"}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def run(method: str, backbone: Path, folder: Path, output: str, **values: Any) -> TrainingResult:
    defaults = {
        "max_steps": 10,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 20,
        "per_device_train_batch_size": 4,
        "total_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "activation_learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    arguments = TrainingArguments(str(folder / output), **{**defaults, **values})
    settings = SMALL.get(method, {"r": 4})
    return train(DataArguments(str(backbone), data=[rows(folder)]), MethodArguments(method, settings), arguments)


def perplexity(backbone: Path, adapter: str, dev: list[dict[str, str]]) -> float:
    """Perplexity of a saved adapter, loaded with plain PEFT; the backbone's own loss, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), adapter).eval()
    total, count = 0.0, 0
    for row in dev:
        prompt = tokenizer(row["prompt"])["input_ids"]
        text = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        # Without labels: some methods find the prompt's end in them, and PEFT's AdaLoRA fails on them in inference.
        model_prompt = torch.tensor([[1] * len(prompt) + [0] * (len(text) - len(prompt))])
        said = getattr(model.base_model, "use_prompt", None)
        with torch.no_grad(), said(model_prompt) if said else nullcontext():
            logits = model(input_ids=torch.tensor([text])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(text[len(prompt) :])
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
    return math.exp(total / count)


def held_out(folder: Path, seed: int = 1) -> list[dict[str, str]]:
    from milora.training.training_rows import read_sources

    dev = next(iter(read_sources(DataArguments("tiny", data=[rows(folder)]), seed).values())).dev
    return [{"prompt": str(row.prompt), "completion": str(row.completion)} for row in dev]


# Each takes some seconds. The fast ones have a router, a search, and a pruning schedule.
FAST = ("milora", "ssp", "adalora")


@pytest.mark.parametrize(
    "method", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_the_adapter_on_disk_is_the_best_one(method: str, backbone: Path, tmp_path: Path) -> None:
    result = run(method, backbone, tmp_path, "out")
    record = json.loads((tmp_path / "out" / "training_result.json").read_text())
    assert record["results"] == result.to_dict()
    assert record["method"]["name"] == result.method == method
    assert record["seed"] == 1
    assert (result.train_rows, result.dev_rows, result.steps) == (36, 4, 10)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    # A checkpoint counts only once the method's structure is fixed.
    first = {"ssp": 3, "learned-adapter": 3, "adalora": 7}.get(method, 1)
    best = min((step for step in losses if step >= first), key=lambda step: (losses[step], step))
    assert result.best_step == best
    measured = perplexity(backbone, result.output, held_out(tmp_path))
    assert measured == pytest.approx(math.exp(losses[best]), rel=2e-3)
    assert measured == pytest.approx(result.dev_perplexity_best, rel=2e-3)
    assert measured < result.dev_perplexity_before


@pytest.mark.parametrize(
    ("method", "step"),
    [
        pytest.param("milora", 4, marks=pytest.mark.slow),
        ("ssp", 2),
        pytest.param("ssp", 5, marks=pytest.mark.slow),
        pytest.param("learned-adapter", 2, marks=pytest.mark.slow),
        pytest.param("learned-adapter", 5, marks=pytest.mark.slow),
        pytest.param("adalora", 4, marks=pytest.mark.slow),
        ("adalora", 8),
        pytest.param("moelora", 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_same_bits(method: str, step: int, backbone: Path, tmp_path: Path) -> None:
    whole = run(method, backbone, tmp_path, "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    again = run(method, backbone, tmp_path, "again", resume_from_checkpoint=str(checkpoint))
    assert again.resumed_from == str(checkpoint)
    last = [tmp_path / folder / "checkpoint-10" / "adapter_model.safetensors" for folder in ("whole", "again")]
    expected, actual = (load_file(file) for file in last)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert again.dev_perplexity_best == pytest.approx(whole.dev_perplexity_best)


def test_a_checkpoint_of_something_else(backbone: Path, tmp_path: Path) -> None:
    run("lora", backbone, tmp_path, "out", max_steps=1)
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(MiLoraError, match="is of a LoraConfig, and --method milora has a MiLoraConfig"):
        run("milora", backbone, tmp_path, "out", resume_from_checkpoint=checkpoint)
    SMALL["lora"] = {"r": 8}
    try:
        with pytest.raises(MiLoraError, match="has r=4, but 8 is requested"):
            run("lora", backbone, tmp_path, "out", resume_from_checkpoint=checkpoint)
    finally:
        del SMALL["lora"]


def test_early_stopping_ends_a_run_that_gets_worse(backbone: Path, tmp_path: Path) -> None:
    result = run("milora", backbone, tmp_path, "out", learning_rate=3.0, early_stopping_patience=2, warmup_steps=0)
    assert result.stopped_early
    assert result.steps < 10
    assert result.best_step is not None


def test_methods_that_search_need_dev_rows(backbone: Path, tmp_path: Path) -> None:
    data = DataArguments(str(backbone), data=[rows(tmp_path)], dev_fraction=0.0)
    for method, complaint in (("ssp", "SSP searches"), ("milora", "--activation_training joint or frozen")):
        arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none")
        with pytest.raises(MiLoraError, match=complaint):
            train(data, MethodArguments(method, SMALL.get(method, {"r": 4})), arguments)


def test_adalora_is_trained_with_its_penalty(backbone: Path, tmp_path: Path) -> None:
    """The first loss differs by weight times penalty, with the penalty computed here from the initial adapter."""
    losses = {}
    for weight in (0.0, 0.5):
        SMALL["adalora"] = {"init_r": 4, "orth_reg_weight": weight, "tfinal": 0}
        run("adalora", backbone, tmp_path, f"out{weight}", max_steps=2, learning_rate=0.0, total_train_batch_size=8)
        state = json.loads((tmp_path / f"out{weight}" / "checkpoint-2" / "trainer_state.json").read_text())
        losses[weight] = next(entry["loss"] for entry in state["log_history"] if "loss" in entry)
    SMALL["adalora"] = {"init_r": 4}
    weights = torch.load(tmp_path / "out0.5" / "checkpoint-1" / "milora_state.pt")["AdaLoraAllocation"]["weights"]
    norms = [
        ((w @ w.T if "lora_A" in name else w.T @ w) - torch.eye(4)).norm()
        for name, w in weights.items()
        if "lora_A" in name or "lora_B" in name
    ]
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * torch.stack(norms).mean().item(), abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains_as_float32_does(method: str, backbone: Path, tmp_path: Path) -> None:
    # The default on processors with bfloat16 products.
    more = {"max_steps": 4, "search_share": 0.8, "eval_strategy": "no", "save_strategy": "no"}

    histories = [
        json.loads((Path(result.output) / "trainer_state.json").read_text())["log_history"]
        for result in (run(method, backbone, tmp_path, f"bf16={on}", bf16=on, **more) for on in (True, False))
    ]

    rounded, exact = ([entry["loss"] for entry in history if "loss" in entry] for history in histories)
    assert len(exact) == 4
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
