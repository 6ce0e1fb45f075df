"""Demo of `milora serve` (`make serve-demo`): three tenants on one backbone, and a curl call for each.

The tenants learn to answer the same question in three styles. The backbone is SmolLM2 if `make smollm2` has created its
folder, otherwise the bundled one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from smollm2 import folder as smollm2_folder

TENANTS = ("ada", "bo", "cy")


def train_tenants(backbone: str, into: Path) -> tuple[str, int]:
    """Trains the tenants' adapters. Returns a question for them, and the length of answers."""
    import torch
    from datasets.utils.logging import disable_progress_bar as disable_progress_bars
    from peft import get_peft_model
    from transformers.utils.logging import set_verbosity_error

    from milora import MiLoraConfig
    from milora.backbone.loading import TINY, load_backbone
    from milora.demo import BUNDLED, SHOP, fine_tune
    from milora.tasks.rows import Row

    is_tiny = backbone == TINY
    stage, steps, batch = (BUNDLED, 40, 8) if is_tiny else (SHOP, 14, 8)
    set_verbosity_error()
    disable_progress_bars()
    if is_tiny:
        # So small that a second thread costs more than it computes.
        torch.set_num_threads(1)
    task = stage.tasks[stage.brisk_task]
    manners: dict[str, Callable[[str], str]] = {
        "ada": lambda completion: completion,
        "bo": stage.manner,
        "cy": lambda completion: f"{completion}?",
    }
    for name in TENANTS:
        started = time.monotonic()
        model, tokenizer = load_backbone(backbone, dtype="float32")
        examples = task.examples("train", steps * batch, 1)
        rows = [Row(example.prompt, manners[name](example.completion), example.answer) for example in examples]
        config = MiLoraConfig(adapted_tokens="completion", pooler="last", router_norm="centered")
        model = get_peft_model(model, config)
        with redirect_stdout(io.StringIO()):
            fine_tune(
                model,
                tokenizer,
                rows,
                into / "checkpoints",
                steps=steps,
                batch_size=batch,
                learning_rate=5e-3 if is_tiny else 1e-3,
                progress=False,
            )
        model.save_pretrained(into / "adapters" / name)
        print(f"{name}'s adapter: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    return task.examples("test", 1, 0)[0].prompt, task.max_new_tokens + 4


def start_server(backbone: str, folder: Path) -> tuple[subprocess.Popen[str], str, dict[str, str]]:
    """Starts `milora serve`. Returns the process, its address and each tenant's key."""
    keys = {name: secrets.token_hex(32) for name in TENANTS}
    entries = [
        {"name": name, "key_sha256": hashlib.sha256(key.encode()).hexdigest(), "adapters": [name]}
        for name, key in keys.items()
    ]
    (folder / "keys.yaml").write_text(json.dumps({"tenants": entries}))
    command = [sys.executable, "-m", "milora", "serve", "--backbone", backbone, "--adapters", str(folder / "adapters")]
    command += ["--port", "0", "--keys", str(folder / "keys.yaml"), "--dtype", "float32"]
    command += ["--threads", "1"] if backbone == "tiny" else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        said: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
        if said.get("event") == "ready":
            return process, f"http://{said['host']}:{said['port']}", keys
    sys.exit("milora serve did not start.")


def main() -> None:
    """Trains the adapters, serves them and sends the requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="'tiny', a folder or a hub id.")
    parser.add_argument("--stay", action="store_true", help="Serve until interrupted.")
    options = parser.parse_args()
    has_smollm2 = (smollm2_folder() / "config.json").is_file()
    backbone = options.backbone or (str(smollm2_folder()) if has_smollm2 else "tiny")
    print(f"Backbone: {backbone}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompt, tokens = train_tenants(backbone, folder)
        process, address, keys = start_server(backbone, folder)
        try:
            for name in TENANTS:
                body = json.dumps({"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0})
                command = ["curl", "-s", f"{address}/v1/completions", "-H", f"Authorization: Bearer {keys[name]}"]
                command += ["-H", "Content-Type: application/json", "-d", body]
                print(f"\n$ {shlex.join(command)}", flush=True)
                answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                print(json.dumps(answer, indent=1) if "error" in answer else answer["choices"][0]["text"].strip())
            if options.stay:
                print(f"\nServing on {address}; interrupt to end.", flush=True)
                process.wait()
        except KeyboardInterrupt:
            print()
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
