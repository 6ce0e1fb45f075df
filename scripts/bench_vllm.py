"""Measures the throughput of MiLoRA on vLLM, alternating with vLLM's own LoRA and its base model.

    .venv-vllm/bin/python scripts/bench_vllm.py --json

The engines have the same random backbone (SmolLM2-135M's shape) and separate processes. They run the same requests in
turns, so a busy machine slows all of them. 32 requests of 8 tenants have prompts of 16 to 48 tokens and get 32 new
tokens each. The script needs the environment of `make setup-vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = ("base", "lora", "milora")
TENANTS, RANK, TOP_K = 8, 16, 3
REQUESTS, NEW_TOKENS, PROMPT_TOKENS = 32, 32, (16, 48)
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
READY = "READY"


def main() -> None:
    """Measures all engines, or serves one of them (`--engine`, used by the started processes)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each engine; the median counts (default 5)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        serve(arguments.engine, arguments.folder, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        seconds = measure(Path(folder), arguments.engines, arguments.rounds, arguments.dtype)
    rates = {name: [REQUESTS * NEW_TOKENS / run for run in runs] for name, runs in seconds.items()}
    medians = {name: statistics.median(runs) for name, runs in rates.items()}
    result = {
        "tokens_per_second": {name: [round(rate, 1) for rate in runs] for name, runs in rates.items()},
        "median": {name: round(median, 1) for name, median in medians.items()},
        "milora_to": {
            name: round(medians["milora"] / medians[name], 2)
            for name in arguments.engines
            if name != "milora" and "milora" in medians
        },
        "dtype": arguments.dtype,
        "processors": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, median in medians.items():
        print(f"{name:8} {median:8.1f} tokens/s   {min(rates[name]):.1f} to {max(rates[name]):.1f}")
    for name, ratio in result["milora_to"].items():
        print(f"milora / {name}: {ratio}")


def measure(folder: Path, engines: list[str], rounds: int, dtype: str) -> dict[str, list[float]]:
    """The seconds of each run of each engine, after a warm-up run."""
    processes = {name: start(name, folder, dtype) for name in engines}
    try:
        for name in engines:
            wait_for(processes[name], name)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(rounds + 1):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                run = float(wait_for(process, name))
                print(f"round {number} {name}: {run:.2f} s", file=sys.stderr, flush=True)
                if number:
                    seconds[name].append(run)
        return seconds
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


def start(name: str, folder: Path, dtype: str) -> subprocess.Popen[str]:
    """A process that serves one engine."""
    processors = sorted(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        # Stock vLLM, without our plugin.
        **({} if name == "milora" else {"VLLM_PLUGINS": "none"}),
    }
    command = [sys.executable, __file__, "--engine", name, "--folder", str(folder), "--dtype", dtype]
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def wait_for(process: subprocess.Popen[str], name: str) -> str:
    """The next message of an engine's process."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(READY):
            return line.removeprefix(READY).strip() or "0"
    raise SystemExit(f"The engine {name!r} ended with status {process.wait()}.")


def serve(name: str, folder: Path, dtype: str) -> None:
    """Runs the requests for each line on standard input, and reports the seconds."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {} if name == "base" else {"enable_lora": True, "max_loras": TENANTS, "max_lora_rank": RANK}
    llm = LLM(
        str(folder / "backbone"),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=4096,
        block_size=32,
        # With prefix caching, only the first run would compute the prompts.
        enable_prefix_caching=False,
        **lora,
    )
    generator = random.Random(0)
    prompts = [
        {
            "prompt_token_ids": [
                generator.randrange(SHAPE["vocab_size"]) for _ in range(generator.randint(*PROMPT_TOKENS))
            ]
        }
        for _ in range(REQUESTS)
    ]
    parameters = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    adapters = [
        None if name == "base" else LoRARequest(f"{name}{tenant}", tenant + 1, str(folder / f"{name}{tenant}"))
        for tenant in range(TENANTS)
    ]
    print(READY, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        outputs = llm.generate(
            prompts,
            parameters,
            lora_request=[adapters[place % TENANTS] for place in range(REQUESTS)],
            use_tqdm=False,
        )
        took = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == NEW_TOKENS for output in outputs)
        print(READY, took, flush=True)


def write_models(folder: Path) -> None:
    """A random backbone, and an adapter of each kind for each tenant."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(folder / "backbone")
    tokenizer_of(SHAPE["vocab_size"], PreTrainedTokenizerFast).save_pretrained(folder / "backbone")
    for tenant in range(TENANTS):
        tensors = {}
        for layer in range(SHAPE["num_hidden_layers"]):
            for module, (d_out, d_in) in EXPERTS.items():
                path = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, d_in) * d_in**-0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, RANK) * 0.01
        write_adapter(folder / f"lora{tenant}", {"peft_type": "LORA"}, tensors, save_file)
        for layer in range(SHAPE["num_hidden_layers"]):
            router = f"base_model.model.model.layers.{layer}.milora_router"
            tensors[f"{router}.projection.weight"] = torch.randn(len(EXPERTS), 576) * 0.5
            tensors[f"{router}.pooler.weight"] = torch.randn(1, 576) * 0.2
            # x/2 + x^2/4 over 1 + |x^2/4|.
            tensors[f"{router}.activation.numerator"] = torch.tensor([0, 0.5, 0.25, 0, 0, 0, 0])
            tensors[f"{router}.activation.denominator"] = torch.tensor([0, 0.25, 0, 0, 0])
        routing = {
            "peft_type": "MILORA",
            "experts": list(EXPERTS),
            "top_k": TOP_K,
            "pooler": "attention",
            "router_activation": "rational",
            "rational_orders": [6, 5],
            "gate": "hard",
            "router_norm": "tokens",
        }
        write_adapter(folder / f"milora{tenant}", routing, tensors, save_file)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Any], save_file: Any) -> None:
    """An adapter in PEFT's layout."""
    folder.mkdir()
    common = {"r": RANK, "lora_alpha": RANK, "target_modules": [name.rpartition(".")[2] for name in EXPERTS]}
    (folder / "adapter_config.json").write_text(json.dumps({**common, **config}), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


def tokenizer_of(vocabulary: int, kind: Any) -> Any:
    """A tokenizer with one word per token."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(vocabulary)}
    return kind(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


if __name__ == "__main__":
    main()
