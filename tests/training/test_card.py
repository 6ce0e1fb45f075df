"""The model card: the metadata that the hub reads, and that every writer of cards writes ours."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.tokenizer import save_backbone

from milora.training import TrainingArguments
from milora.training.card import CardFacts, model_card
from milora.training.result import TrainingResult
from milora.tuners.milora import MiLoraConfig


def facts(**values: Any) -> CardFacts:
    result = TrainingResult(
        output="out",
        method="milora",
        train_rows=10,
        dev_rows=2,
        skipped_rows=3,
        rows={"boolq": {"train": 10, "dev": 2, "too_long": 1, "no_room": 2}},
        steps=40,
        tunable_parameters=1234567,
        dev_perplexity_before=9.5,
        dev_perplexity_best=1.25,
        best_step=30,
    )
    defaults: dict[str, Any] = {
        "name": "mine",
        "title": "MiLoRA",
        "config": MiLoraConfig(top_k=2),
        "arguments": TrainingArguments("out", use_cpu=True, seed=11),
        "base_model": "meta-llama/Llama-3.2-1B",
        "data": ["boolq", "someone/rows"],
        "result": result,
        "repository": "someone/mine",
        "trains_activations": True,
        "has_routes": True,
    }
    return CardFacts(**{**defaults, **values})


def one_spaced(text: str) -> str:
    """Removes the spaces that align tables."""
    return re.sub(" +", " ", text)


def test_the_hub_can_read_it() -> None:
    card = ModelCard(model_card(facts(data=["boolq", "someone/rows", "someone/rows:easy", "someone/more:2022.en"])))
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"], data["pipeline_tag"]) == (
        "peft",
        "meta-llama/Llama-3.2-1B",
        "text-generation",
    )
    assert data["datasets"] == ["someone/rows", "someone/more"]
    assert {"milora", "peft", "base_model:adapter:meta-llama/Llama-3.2-1B"} <= set(data["tags"])
    for text in (
        "| top_k | 2 |",
        "| boolq | 10 | 2 | 3 |",
        "| seed | 11 |",
        "| tunable parameters | 1,234,567 |",
        "| dev perplexity | 1.25 |",
        "| activations | bilevel, 1e-06 |",
        "](routes.png)",
        'from_pretrained("meta-llama/Llama-3.2-1B"), "someone/mine")',
    ):
        assert text in one_spaced(card.text), text


def test_a_folder_is_no_base_model(tmp_path: Path) -> None:
    text = model_card(facts(base_model=str(tmp_path), has_routes=False))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert str(tmp_path) not in text
    assert "routes.png" not in text


def test_what_does_not_train_or_was_taken_at_once() -> None:
    arguments = TrainingArguments("out", use_cpu=True, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    text = one_spaced(model_card(facts(trains_activations=False, arguments=arguments)))
    assert "| activations |" not in text
    assert "| rows a step | 12 |" in text


def test_while_it_runs() -> None:
    text = model_card(facts(result=None, history=[{"step": 7, "eval_perplexity": 3.5}]))
    assert "dev perplexity 3.5 at step 7" in text


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that creates a repository and commits small files."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            answer: Any = {"url": f"http://{self.headers['Host']}/someone/adapter"}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/someone/adapter/commit/abc"
            answer = {"commitUrl": url, "commitOid": "abc", "success": True, "pullRequestUrl": None}
        else:
            answer = {}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "someone/adapter", "sha": "abc", "siblings": []})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card(tmp_path: Path) -> None:
    """Pushes over HTTP to a server that speaks the hub's protocol."""
    backbone = save_backbone(tmp_path / "backbone")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) + "\n" for i in range(24)))
    handler = type("Handler", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_of_nobody",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        output = tmp_path / "out"
        flags = f"--backbone {backbone} --data {rows} --output_dir {output} --r 4 --max_steps 2 --eval_steps 1"
        more = "--save_steps 1 --use_cpu --report_to none --push_to_hub --hub_model_id someone/adapter"
        command = [sys.executable, "-m", "milora", "train", *flags.split(), *more.split(), "--hub_strategy", "end"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        server.shutdown()
        server.server_close()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_result.json"} <= set(
        handler.files
    )
    card = ModelCard(handler.files["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "peft"
    assert "| dev perplexity |" in one_spaced(card.text)
    assert '"someone/adapter")' in card.text
    pytest.importorskip("matplotlib")
    assert handler.files["routes.png"].startswith(b"\x89PNG")
    assert "](routes.png)" in card.text
