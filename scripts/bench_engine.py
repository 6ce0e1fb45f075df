"""Measures the embedded engine, interleaved in rounds: `python scripts/bench_engine.py CASE [...]`.

Cases: `decode` (a step of 16 tenants, compared with `generate(adapter_names=...)`), `throughput` (staggered requests of
MiLoRA tenants, compared with the engine's base model and with transformers' continuous batching with one PEFT LoRA),
`prefix` (time to first token of 8 tenants with prompts about one document of 1,500 tokens). Prints one JSON object.

The backbone is SmolLM2 by default. `--backbone tinyllama-1.1b --device cuda --dtype bfloat16` measures a named shape
with random weights on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from milora import MiLoraConfig
from milora.backbone.bundled import TINY_BACKBONE
from milora.backbone.shapes import SHAPES, build
from milora.serving.engine import Engine, EngineSettings
from milora.serving.requests import GenerationRequest, Sampling

RANK = 8
REQUESTS = 32
DOCUMENT = 1500


class Bench:
    """A backbone, and adapters for it with random weights.

    Args:
        backbone: A folder, `tiny`, or the name of a shape, which gets random weights.
        device: The device.
        dtype: The backbone's dtype.
        tenants: Number of tenants of `decode`; the other cases have 8 at most.
        new_tokens: Tokens to generate per request.
        folder: A folder for the adapters.
    """

    def __init__(
        self, backbone: str, device: torch.device, dtype: torch.dtype, tenants: int, new_tokens: int, folder: Path
    ) -> None:
        self._is_shape = backbone in SHAPES
        self._backbone = str(TINY_BACKBONE) if backbone == "tiny" else backbone
        self._dtype, self._folder = dtype, folder
        self.device, self.tenants, self.new_tokens = device, tenants, new_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_BACKBONE if self._is_shape else self._backbone)
        self.random = random.Random(0)
        self._tokens = self.load().config.vocab_size - 1

    def load(self) -> Any:
        """A fresh copy of the backbone."""
        if self._is_shape:
            torch.manual_seed(0)
            return build(self._backbone, self.device, self._dtype)
        return AutoModelForCausalLM.from_pretrained(self._backbone, dtype=self._dtype).eval().to(self.device)

    def adapters(self, count: int, **settings: Any) -> dict[str, Path]:
        """Saved adapters by tenant."""
        model = get_peft_model(self.load(), MiLoraConfig(r=RANK, **settings))
        folders = {}
        for number in range(count):
            torch.manual_seed(number)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.01)
                elif "milora_router.projection" in name:
                    parameter.data.normal_(std=0.05)
            folders[f"tenant-{number}"] = self._folder / f"{'-'.join(map(str, settings.values()))}-{number}"
            model.save_pretrained(folders[f"tenant-{number}"])
        return folders

    def engine(self, folders: dict[str, Path], **settings: Any) -> Engine:
        """An engine with these adapters."""
        return Engine(self.load(), self.tokenizer, folders, EngineSettings(cache_bytes=2**30, **settings))

    def prompt(self, tokens: int) -> tuple[int, ...]:
        """Random tokens."""
        return tuple(self.random.randrange(self._tokens // 40, self._tokens) for _ in range(tokens))


def decode(bench: Bench, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a decode step with a row and an adapter per tenant."""
    folders = bench.adapters(bench.tenants)
    new_tokens = bench.new_tokens
    names = list(folders)
    model = PeftModel.from_pretrained(bench.load(), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    model.eval()
    prompts = [bench.prompt(32) for _ in names]

    def generate(adapter_names: Sequence[str] | None) -> float:
        def of(tokens: int) -> float:
            begin = time.perf_counter()
            texts = model.generate(
                input_ids=torch.tensor(prompts, device=bench.device),
                attention_mask=torch.ones(len(prompts), 32, dtype=torch.long, device=bench.device),
                adapter_names=list(adapter_names or ["__base__"] * len(prompts)),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
            texts.cpu()  # Waits for a GPU.
            return time.perf_counter() - begin

        return 1000 * (of(new_tokens) - of(2)) / (new_tokens - 2)

    with bench.engine(folders, prefix_cache=False) as engine:

        def run(adapters: Sequence[str | None]) -> float:
            sampling = Sampling(new_tokens, ignore_eos=True)
            running = [
                engine.submit(GenerationRequest(prompt, sampling, adapter))
                for prompt, adapter in zip(prompts, adapters, strict=True)
            ]
            made = [[event.made for event in generation] for generation in running]
            # From the step at which all requests generate to the end of the first one.
            begin, end = max(times[0] for times in made), min(times[-1] for times in made)
            steps = len({time for times in made for time in times if begin < time <= end}) / len(made)
            return 1000 * (end - begin) / max(steps, 1)

        cases: dict[str, Callable[[], float]] = {
            "engine": lambda: run(names),
            "engine base": lambda: run([None] * len(names)),
            "generate(adapter_names)": lambda: generate(names),
            "generate base": lambda: generate(None),
        }
        found = interleaved(cases, rounds)
    found["engine is faster by"] = found["generate(adapter_names)"] / found["engine"]
    found["engine / engine base"] = found["engine base"] / found["engine"]
    return found


def throughput(bench: Bench, rounds: int) -> dict[str, Any]:
    """Median new tokens per second of 32 requests that arrive staggered, of 8 tenants."""
    folders = bench.adapters(min(8, bench.tenants))
    names = list(folders)
    prompts = [bench.prompt(bench.random.randrange(16, 49)) for _ in range(REQUESTS)]
    waits = [bench.random.expovariate(1 / 0.02) for _ in prompts]
    lora = get_peft_model(bench.load(), LoraConfig(r=RANK, target_modules="all-linear")).eval()

    # By default it takes most of the memory that is free.
    cache = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=2048)

    def continuous(model: Any) -> float:
        settings = GenerationConfig(max_new_tokens=bench.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=cache)
        manager.start()
        try:
            begin = time.perf_counter()
            for prompt, wait in zip(prompts, waits, strict=True):
                time.sleep(wait)
                manager.add_request(list(prompt), max_new_tokens=bench.new_tokens)
            tokens = done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    tokens += len(result.generated_tokens)
                    done += 1
            return tokens / (time.perf_counter() - begin)
        finally:
            manager.stop(block=True)

    with bench.engine(folders, prefix_cache=False) as engine:

        def run(adapters: Sequence[str | None]) -> float:
            begin = time.perf_counter()
            running = []
            for number, (prompt, wait) in enumerate(zip(prompts, waits, strict=True)):
                time.sleep(wait)
                sampling = Sampling(bench.new_tokens, ignore_eos=True)
                request = GenerationRequest(prompt, sampling, adapters[number % len(adapters)])
                running.append(engine.submit(request))
            tokens = sum(len(event.tokens) for generation in running for event in generation)
            return tokens / (time.perf_counter() - begin)

        inner = lora.base_model.model
        cases: dict[str, Callable[[], float]] = {
            "engine": lambda: run(names),
            "engine base": lambda: run([None]),
            "transformers with PEFT LoRA": lambda: continuous(inner),
        }
        found = interleaved(cases, rounds)
    found["engine / engine base"] = found["engine"] / found["engine base"]
    found["engine / transformers"] = found["engine"] / found["transformers with PEFT LoRA"]
    return found


def prefix(bench: Bench, rounds: int) -> dict[str, Any]:
    """Median share of the first tenant's time to first token that the other tenants wait."""
    folders = bench.adapters(min(8, bench.tenants), adapted_tokens="completion", pooler="last")
    shares, firsts = [], []
    with bench.engine(folders) as engine:
        for name in folders:  # In memory before anything is measured.
            list(engine.submit(GenerationRequest(bench.prompt(8), Sampling(1), name)))
        for _ in range(rounds):
            document = bench.prompt(DOCUMENT)
            times = []
            for name in folders:
                generation = engine.submit(GenerationRequest((*document, *bench.prompt(12)), Sampling(2), name))
                times.append(next(generation).made - generation.submitted)
                list(generation)
            firsts.append(times[0])
            shares.append(max(times[1:]) / times[0])
    return {"first tenant": statistics.median(firsts), "largest share of the others": statistics.median(shares)}


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """The medians of all cases, measured in turn; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, measure in cases.items():
            value = measure()
            if number:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cases = {"decode": decode, "throughput": throughput, "prefix": prefix}
    parser.add_argument("cases", nargs="+", choices=cases)
    default = str(Path.home() / ".cache/milora/smollm2-135m-instruct")
    parser.add_argument("--backbone", default=default, help="a folder, tiny, or a named shape with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            arguments.backbone,
            torch.device(arguments.device),
            getattr(torch, arguments.dtype),
            arguments.tenants,
            arguments.new_tokens,
            Path(folder),
        )
        print(json.dumps({name: cases[name](bench, arguments.rounds) for name in arguments.cases}, indent=2))


if __name__ == "__main__":
    main()
