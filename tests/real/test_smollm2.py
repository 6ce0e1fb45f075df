"""MiLoRA on a real language model.

Random models lack two properties of pretrained ones: a first token whose hidden state is a hundred times as long as
the others, and prompts whose mean hidden states point in nearly the same direction. A router must read the prompt
despite both.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.reference import ReferenceMiLora
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora import MiLoraConfig, Route

pytestmark = [pytest.mark.real, pytest.mark.slow]

SCIENCE = [
    (
        "Which of these is a source of light?\nAnswer1: the Moon\nAnswer2: the Sun\nAnswer format: answer1/answer2",
        "answer2",
    ),
    ("Water turns into ice when it is\nAnswer1: heated\nAnswer2: cooled\nAnswer format: answer1/answer2", "answer2"),
    ("Which animal lays eggs?\nAnswer1: a hen\nAnswer2: a cow\nAnswer format: answer1/answer2", "answer1"),
    ("Plants take up water with their\nAnswer1: roots\nAnswer2: petals\nAnswer format: answer1/answer2", "answer1"),
]
YES_OR_NO = [
    (
        "Question: is the Danube longer than the Rhine? It is 2,850 km long, the Rhine 1,233 km. Answer: true/false",
        "true",
    ),
    (
        "Question: is Bern a city in Austria? Bern is the seat of the government of Switzerland. Answer: true/false",
        "false",
    ),
    ("Question: can a whale breathe under water? Whales are mammals and come up for air. Answer: true/false", "false"),
    ("Question: is chess older than radio? Chess was played in India in the sixth century. Answer: true/false", "true"),
]
ARITHMETIC = [
    ("Anna has 12 apples and gives 5 to Ben. How many apples does she have left?", "12 - 5 = 7. The answer is 7"),
    ("A train travels 60 miles an hour. How far does it travel in 3 hours?", "60 * 3 = 180. The answer is 180"),
    ("Tom reads 4 pages a day. How many days does he need for 36 pages?", "36 / 4 = 9. The answer is 9"),
    ("A pen costs $2 and a book $11. What do 3 pens and a book cost?", "3 * 2 + 11 = 17. The answer is 17"),
]
ROWS = [row for group in zip(SCIENCE, YES_OR_NO, ARITHMETIC, strict=True) for row in group]
PROMPTS = [prompt for prompt, _ in ROWS]
NEW = 8


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2, padding_side="left")


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def fresh(folder: Path, seed: int, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(load(folder, torch.bfloat16), MiLoraConfig(r=8, **settings))


@torch.no_grad()
def route_of(model: PeftModel, tokenizer: Any, prompts: list[str] = PROMPTS) -> Route:
    return model.eval().route(**tokenizer(prompts, return_tensors="pt", padding=True))


def adapted(folder: Path, adapter: Path, dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    return PeftModel.from_pretrained(load(folder, dtype), adapter).eval()


@torch.no_grad()
def answers(model: PeftModel, tokenizer: Any, prompts: list[str]) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def entropy(probabilities: Tensor) -> Tensor:
    """Normalised entropy, (blocks, batch): 1 where all experts are equally probable."""
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(probabilities.shape[-1])


def distinct(route: Route) -> int:
    """The number of different routes in a batch of prompts."""
    return len({tuple(row.flatten().tolist()) for row in (route.gates > 0).unbind(dim=1)})


def blocks_that_vary(route: Route) -> int:
    """The number of blocks in which the prompts choose different experts."""
    return int(((route.gates > 0) != (route.gates[:, :1] > 0)).any(dim=-1).any(dim=-1).sum())


def kept_and_dropped(route: Route) -> tuple[Tensor, Tensor]:
    """The smallest probability that was chosen and the largest that was not, each (blocks, batch)."""
    ordered = route.probabilities.sort(dim=-1, descending=True).values
    return ordered[..., 2], ordered[..., 3]


def batch_of(tokenizer: Any, rows: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Rows padded on the right, with labels on the completions."""
    inputs = [tokenizer(f"{prompt}\n")["input_ids"] for prompt, _ in rows]
    outputs = [[*tokenizer(completion)["input_ids"], tokenizer.eos_token_id] for _, completion in rows]
    width = max(len(prompt) + len(completion) for prompt, completion in zip(inputs, outputs, strict=True))

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in lists])

    pairs = list(zip(inputs, outputs, strict=True))
    return {
        "input_ids": padded([prompt + completion for prompt, completion in pairs], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(prompt + completion) for prompt, completion in pairs], 0),
        "labels": padded([[-100] * len(prompt) + completion for prompt, completion in pairs], -100),
    }


@pytest.fixture(scope="module")
def trained(smollm2: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """An adapter after 30 steps, and the norm of each router's last gradient, by block."""
    model = fresh(smollm2, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(30):
        optimizer.zero_grad()
        rows = [ROWS[(4 * step + row) % len(ROWS)] for row in range(4)]
        model(**batch_of(tokenizer, rows)).loss.backward()
        optimizer.step()
    gradients = {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if ".milora_router." in name and ".projection." in name
    }
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, gradients


class TestRouters:
    @pytest.mark.parametrize("seed", range(3))
    def test_they_read_the_prompt_at_the_start(self, seed: int, smollm2: Path, tokenizer: Any) -> None:
        route = route_of(fresh(smollm2, seed), tokenizer)
        assert entropy(route.probabilities).min() > 0.5
        # No expert wins among probabilities that are all near zero.
        assert kept_and_dropped(route)[0].min() > 0.02
        assert distinct(route) >= 10
        assert blocks_that_vary(route) >= 8

    def test_without_the_norm_the_first_token_decides_alone(self, smollm2: Path, tokenizer: Any) -> None:
        """A control: if this fails, the model lacks the property that these tests are about."""
        route = route_of(fresh(smollm2, 0, router_norm="none"), tokenizer)
        assert entropy(route.probabilities)[15:].max() < 0.1
        assert blocks_that_vary(route) < 8

    def test_they_read_the_prompt_after_training(
        self, smollm2: Path, tokenizer: Any, trained: tuple[Path, dict[str, float]]
    ) -> None:
        folder, gradients = trained
        assert len(gradients) == 30
        assert min(gradients.values()) > 1e-5
        route = route_of(adapted(smollm2, folder), tokenizer)
        assert entropy(route.probabilities).mean() > 0.5
        assert distinct(route) >= 8
        assert blocks_that_vary(route) >= 8


class TestAgainstTheReference:
    """The paper's equations in plain torch, one prompt at a time, without a cache, in float32."""

    @torch.no_grad()
    def test_routes_logits_and_greedy_tokens(
        self, smollm2: Path, tokenizer: Any, trained: tuple[Path, dict[str, float]]
    ) -> None:
        folder = trained[0]
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        reference = ReferenceMiLora(load(smollm2, torch.float32), tensors, config)
        model = adapted(smollm2, folder, torch.float32)
        for prompt in PROMPTS[:3]:
            inputs = tokenizer(prompt, return_tensors="pt")
            decision = reference.route(inputs["input_ids"])
            route = model.route(**inputs)
            torch.testing.assert_close(route.probabilities[:, 0], decision.probabilities, rtol=1e-3, atol=1e-4)
            assert torch.equal(route.gates[:, 0], decision.gates)
            length = inputs["input_ids"].shape[1]
            logits = reference.logits(inputs["input_ids"], length, decision)
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-3, atol=1e-2)
            written = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, length:].tolist()
            expected = reference.greedy(inputs["input_ids"], NEW)
            # The reference does not stop at the end of the text.
            assert written == expected[: len(written)]
            assert len(written) == NEW or written[-1] == tokenizer.eos_token_id

    def test_a_batch_is_its_rows_alone(
        self, smollm2: Path, tokenizer: Any, trained: tuple[Path, dict[str, float]]
    ) -> None:
        model = adapted(smollm2, trained[0], torch.float32)
        prompts = [PROMPTS[0], PROMPTS[5], PROMPTS[1]]
        together, route = answers(model, tokenizer, prompts), route_of(model, tokenizer, prompts)
        for row, prompt in enumerate(prompts):
            assert answers(model, tokenizer, [prompt]) == [together[row]]
            alone = route_of(model, tokenizer, [prompt])
            assert torch.equal(alone.gates[:, 0], route.gates[:, row])


class TestPrecision:
    def test_bfloat16_routes_as_float32_where_the_choice_is_clear(
        self, smollm2: Path, tokenizer: Any, trained: tuple[Path, dict[str, float]]
    ) -> None:
        prompts = PROMPTS[:6]
        exact = route_of(adapted(smollm2, trained[0], torch.float32), tokenizer, prompts)
        rounded = route_of(adapted(smollm2, trained[0]), tokenizer, prompts)
        kept, dropped = kept_and_dropped(exact)
        clear = kept - dropped > 0.01
        same = (exact.gates == rounded.gates).all(dim=-1)
        assert clear.float().mean() > 0.5
        assert same[clear].all()
        assert same.float().mean() > 0.9


class TestFiles:
    def test_saved_and_loaded_it_is_the_same_adapter(
        self, smollm2: Path, tokenizer: Any, trained: tuple[Path, dict[str, float]], tmp_path: Path
    ) -> None:
        model = adapted(smollm2, trained[0])
        model.save_pretrained(tmp_path)
        again = adapted(smollm2, tmp_path)
        prompts = PROMPTS[:4]
        first, second = route_of(model, tokenizer, prompts), route_of(again, tokenizer, prompts)
        assert torch.equal(first.probabilities, second.probabilities)
        assert answers(model, tokenizer, prompts) == answers(again, tokenizer, prompts)
        with model.disable_adapter():
            assert answers(model, tokenizer, prompts) != answers(again, tokenizer, prompts)
