"""`milora bench`: the documented JSON from a real process, options as settings, and one-line errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from milora import benchmark
from milora_cli.main import main

SMALL = ["--backbone", "tiny", "--layers", "1", "--device", "cpu", "--threads", "1"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "milora", "bench", *arguments], capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_a_process_prints_one_json_object_and_tells_its_progress_elsewhere(tmp_path: Path) -> None:
    done = _run("decode", *SMALL, "--methods", "base,lora,milora", "--beams", "1,2", "--rounds", "2",
                "--prompt-tokens", "4", "--new-tokens", "3", "--json")  # fmt: skip
    result = json.loads(done.stdout)
    assert [(row["method"], row["beam"]) for row in result["rows"]] == [
        (name, beam) for beam in (1, 2) for name in ("base", "lora", "milora")
    ]
    contract = {"method", "beam", "batch", "tokens_per_second", "peak_memory_mib", "ratio_to_base"}
    assert all(contract <= set(row) for row in result["rows"])
    assert result["environment"]["threads"] == 1
    assert "round 2/2, milora" in done.stderr
    (tmp_path / "result.json").write_text(done.stdout)
    table = _run("markdown", str(tmp_path / "result.json")).stdout
    assert table.count("\n| milora") == 2


def test_bytes_are_those_of_the_shape(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "traffic", "--methods", "base,lora,milora,milora-k1", "--context", "100", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capfd.readouterr().out)["rows"]}
    # TinyLlama: 22 blocks of 2048 x (2048 + 256 + 256 + 2048 + 3 x 5632), 45 norms, a head, one embedding row.
    linear = 22 * 2048 * (2048 + 256 + 256 + 2048 + 3 * 5632)
    weights = 2 * (linear + 45 * 2048 + 32000 * 2048 + 2048)
    assert rows["base"]["weight_megabytes"] == pytest.approx(weights / 1e6)
    assert rows["base"]["cache_megabytes"] == pytest.approx(2 * 22 * 4 * 64 * 100 * 2 / 1e6)
    assert rows["base"]["gigaflops"] == pytest.approx((2 * (linear + 32000 * 2048) + 4 * 100 * 22 * 2048) / 1e9)
    lora = 2 * 22 * 32 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632))
    assert rows["lora"]["adapter_megabytes"] == pytest.approx(lora / 1e6)
    assert rows["milora"]["adapter_megabytes"] == pytest.approx(3 / 7 * lora / 1e6)
    assert rows["milora-k1"]["adapter_megabytes"] == pytest.approx(1 / 7 * lora / 1e6)


MODELS = ["--backbone", "tiny", "--layers", "3", "--methods", "lora, milora", "--dtype", "float32",
          "--adapter-dtype", "float32"]  # fmt: skip
GENERATION = ["--beams", "2,4", "--prompt-tokens", "7", "--new-tokens", "9", "--round-seconds", "1.5", "--compile"]
KERNEL = ["--batches", "2,3", "--d-in", "4", "--d-out", "5", "--rank", "6", "--active", "7", "--dtype", "float16"]
MEASUREMENT = ["--rounds", "2", "--device", "cpu", "--seed", "4"]
OF_MODELS: dict[str, Any] = {
    "backbone": "tiny", "layers": 3, "methods": ("lora", "milora"), "dtype": "float32", "adapter_dtype": "float32",
}  # fmt: skip
OF_GENERATION: dict[str, Any] = {
    "beams": (2, 4), "prompt_tokens": 7, "new_tokens": 9, "round_seconds": 1.5, "compile": True,
}  # fmt: skip
OF_MEASUREMENT: dict[str, Any] = {"rounds": 2, "device": "cpu", "seed": 4}
ATTENTION = {"attention": "eager"}
FUNCTIONS = {"train": "train_steps"}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        # Omitted options have the defaults of the Python API.
        (["decode"], benchmark.DecodeSettings()),
        (["decode", "--compile"], benchmark.DecodeSettings(compile=True, methods=benchmark.decode_methods(True))),
        (["prefill"], benchmark.PrefillSettings()),
        (["train"], benchmark.TrainSettings()),
        (["tenants"], benchmark.TenantsSettings()),
        (["kernel"], benchmark.KernelSettings()),
        (["traffic"], benchmark.TrafficSettings(backbone="tinyllama-1.1b", device="cpu")),
        (
            ["decode", *MODELS, "--attention", "eager", "--batch", "5", *GENERATION, *MEASUREMENT],
            benchmark.DecodeSettings(batch=5, **OF_MODELS, **ATTENTION, **OF_GENERATION, **OF_MEASUREMENT),
        ),
        (
            ["prefill", *MODELS, "--attention", "eager", "--batch", "5", "--prompt-tokens", "8, 9", *MEASUREMENT],
            benchmark.PrefillSettings(batch=5, prompt_tokens=(8, 9), **OF_MODELS, **ATTENTION, **OF_MEASUREMENT),
        ),
        (
            ["train", *MODELS, "--batch", "5", "--tokens", "6", "--gradient-checkpointing", *MEASUREMENT],
            benchmark.TrainSettings(batch=5, tokens=6, gradient_checkpointing=True, **OF_MODELS, **OF_MEASUREMENT),
        ),
        (
            ["tenants", *MODELS, "--tenants", "2,3", "--batch", "6", *GENERATION, *MEASUREMENT],
            benchmark.TenantsSettings(tenants=(2, 3), batch=6, **OF_MODELS, **OF_GENERATION, **OF_MEASUREMENT),
        ),
        (
            ["kernel", *KERNEL, *MEASUREMENT],
            benchmark.KernelSettings(
                batches=(2, 3), d_in=4, d_out=5, rank=6, active=7, dtype="float16", **OF_MEASUREMENT
            ),
        ),
        (
            ["traffic", *MODELS, "--batch", "5", "--beams", "6", "--context", "7"],
            benchmark.TrafficSettings(batch=5, beams=6, context=7, device="cpu", **OF_MODELS),
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_options_are_settings(
    arguments: list[str], settings: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measure(settings: Any, progress: Any = None) -> benchmark.Result:
        asked.append(settings)
        return benchmark.Result(arguments[0], {}, [], [], {})

    monkeypatch.setattr(benchmark, FUNCTIONS.get(arguments[0], arguments[0]), measure)
    assert main(["bench", *arguments, "--json"]) == 0
    assert asked == [settings]
    assert json.loads(capfd.readouterr().out)["command"] == arguments[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--methods", "base,mlora"], "no method 'mlora'"),
        (["decode", "--beams", "one"], "--beams takes whole numbers"),
        (["decode", "--backbone", "tinylama"], "no backbone shape 'tinylama'"),
        (["decode", "--compile", "--methods", "milora-merged"], "not served by compiled steps"),
        (["train", "--methods", "base,lora"], "base has nothing to train"),
        (["tenants", "--methods", "moelora"], "moelora serves one adapter at a time"),
        (["tenants", "--methods", "dora"], "dora serves one adapter at a time"),
        (["tenants", "--tenants", "4", "--batch", "2"], "batch must be at least 4"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert message in error
    assert error.strip().splitlines()[-1].startswith("milora: ")
