"""Which adapter folders may be loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapted import ALL_ARCHITECTURES, saved
from support.fake_engine import FakeEngine
from support.tokenizer import character_tokenizer

from milora import MiLoraConfig
from milora.serving.admission import Admission, AdmissionLimits, adapters_below
from milora.serving.app import build_app
from milora.serving.prompts import Prompts
from milora.serving.requests import AdapterError
from milora.serving.service import Service, admitted

from .conftest import ADMIN, bearer

WEIGHTS = "adapter_model.safetensors"
FILE = f"ada/{WEIGHTS}"
PREFIX = "base_model.model."


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "ada"))


@pytest.fixture
def admission(backbone: Any, tmp_path: Path) -> Admission:
    return Admission(backbone, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"pooler": "mean", "router_norm": "centered", "adapted_tokens": "completion"},
        {"pooler": "last", "router_activation": "gelu", "use_rslora": True},
    ],
)
def test_milora_adapters_pass(backbone: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "ada"
    model = get_peft_model(ALL_ARCHITECTURES["llama"](), MiLoraConfig(r=4, top_k=2, **settings))
    model.save_pretrained(folder)
    Admission(backbone, tmp_path).check("ada", folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
    ],
)
def test_lora_adapters_pass(backbone: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "plain"
    get_peft_model(ALL_ARCHITECTURES["llama"](), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(
        folder, save_embedding_layers=False
    )
    Admission(backbone, tmp_path).check("plain", folder)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "lfm2"])
def test_other_backbones_and_uneven_blocks(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "ada", family)
    Admission(ALL_ARCHITECTURES[family](), tmp_path).check("ada", folder)
    if family != "lfm2":
        with pytest.raises(AdapterError, match="backbone"):
            Admission(ALL_ARCHITECTURES["lfm2"](), tmp_path).check("ada", folder)


@pytest.mark.parametrize("path", ["ada", "./ada", "x/../ada", "{root}/ada"])
def test_paths_below_the_root(admission: Admission, folder: Path, path: str) -> None:
    assert admission.folder(path.format(root=folder.parent)) == folder.resolve()


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../other",
        "/etc",
        "/",
        "ada/../..",
        "{root}",
        "missing",
        "ada/" + WEIGHTS,
        "a" * 5000,
        "a\0b",
        "out",
    ],
)
def test_other_paths_are_refused_alike(admission: Admission, folder: Path, path: str, tmp_path_factory: Any) -> None:
    (folder.parent / "out").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(AdapterError, match=r"^lora_path must be an adapter's folder below the server's"):
        admission.folder(path.format(root=folder.parent))


def test_without_a_root_nothing_is_loaded(backbone: Any) -> None:
    with pytest.raises(AdapterError, match="--adapters"):
        Admission(backbone, None).folder("ada")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "a\n", "a" * 129, "é"])
def test_names(admission: Admission, folder: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="name"):
        admission.check(name, folder)


def test_links_out_of_the_root(admission: Admission, folder: Path, whole: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(whole / WEIGHTS)
    with pytest.raises(AdapterError, match="leaves the folder"):
        admission.check("ada", folder)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "MILORA and LORA are served"),
        ({"peft_type": ["LORA"]}, "MILORA and LORA are served"),
        ({"bias": "all"}, "loaded into the backbone"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the backbone"),
        ({"r": 257}, "from 1 to 256"),
        ({"r": "8"}, "from 1 to 256"),
        ({"rank_pattern": {"q_proj": 1000}}, "from 1 to 256"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_configurations(admission: Admission, folder: Path, fields: dict[str, Any], said: str) -> None:
    change_config(folder, **fields)
    with pytest.raises(AdapterError, match=said):
        admission.check("ada", folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, " " * 2**20 + "{}"])
def test_configurations_that_are_none(admission: Admission, folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        admission.check("ada", folder)


Tensors = dict[str, torch.Tensor]
Q_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
PROJECTION = f"{PREFIX}model.layers.0.milora_router.projection.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.update({Q_A: torch.zeros(4, 33)}), "the backbone needs"),
        (lambda tensors: tensors.update({Q_A: torch.zeros(300, 32)}), "rank must be from 1 to 256"),
        (lambda tensors: tensors.update({Q_A: torch.zeros(4)}), "rank must be"),
        (lambda tensors: tensors.update({Q_A: tensors[Q_A].to(torch.int64)}), "must be F32"),
        (lambda tensors: tensors.update({PROJECTION: torch.zeros(7, 31)}), "no router"),
        (lambda tensors: tensors.update({PROJECTION: torch.zeros(99, 32)}), "no router"),
        (lambda tensors: tensors.update({f"{PREFIX}model.embed_tokens.weight": torch.zeros(97, 32)}), "all tenants"),
        (lambda tensors: tensors.update({f"{PREFIX}model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "all ten"),
        (lambda tensors: tensors.update({f"{PREFIX}model.nowhere.lora_A.weight": torch.zeros(4, 32)}), "does not have"),
        (lambda tensors: tensors.update({"other": torch.zeros(1)}), "does not begin"),
    ],
)
def test_tensors(admission: Admission, folder: Path, change: Callable[[Tensors], None], said: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=said):
        admission.check("ada", folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", struct.pack("<Q", 2**40), struct.pack("<Q", 10) + b"{}", struct.pack("<Q", 17 * 2**20), None],
)
def test_files_that_are_not_safetensors(admission: Admission, folder: Path, content: bytes | None) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(AdapterError, match="safetensors"):
        admission.check("ada", folder)


def test_a_pickle_is_never_read(admission: Admission, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled, and never read"):
        admission.check("ada", folder)


def test_a_file_that_is_too_large(backbone: Any, folder: Path) -> None:
    with pytest.raises(AdapterError, match="at most 100"):
        Admission(backbone, folder.parent, AdmissionLimits(bytes=100)).check("ada", folder)


def test_what_a_server_starts_with(
    admission: Admission, backbone: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, folder.parent / "broken")
    change_config(folder.parent / "broken", bias="all")
    shutil.copytree(folder, folder.parent / "base")
    (folder.parent / "notes").mkdir()
    found = adapters_below(folder.parent)
    assert list(found) == ["ada", "base", "broken"]
    prompts = Prompts(backbone, character_tokenizer())
    assert admitted(found, "base", admission, prompts) == {"ada": folder.resolve()}
    refused = {record.__dict__["fields"]["adapter"] for record in caplog.records}
    assert refused == {"base", "broken"}


def test_over_http(make_service: Callable[..., Service], engine: FakeEngine, folder: Path) -> None:
    client = TestClient(build_app(make_service()))
    shutil.copytree(folder, folder.parent / "new")

    def load(**body: Any) -> Any:
        return client.post("/v1/load_lora_adapter", json=body, headers=bearer(ADMIN))

    loaded = load(lora_name="new", lora_path="new")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert engine.known["new"] == (folder.parent / "new").resolve()
    assert load(lora_name="new", lora_path="new").status_code == 409
    assert load(lora_name="base", lora_path="new").status_code == 400
    assert load(lora_name="other", lora_path="../..").status_code == 400

    engine.in_use.add("new")
    assert load(lora_name="new", lora_path="new", load_inplace=True).status_code == 409
    engine.in_use.clear()
    assert load(lora_name="new", lora_path="new", load_inplace=True).status_code == 200
    # A refused folder does not affect the loaded adapter of that name.
    change_config(folder.parent / "new", bias="all")
    assert load(lora_name="new", lora_path="new", load_inplace=True).status_code == 400
    assert "new" in engine.known

    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=bearer(ADMIN))
    assert unloaded.text == "Success: LoRA adapter 'new' removed successfully."
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=bearer(ADMIN)).status_code == 404


def test_a_broken_tokenizer_leaves_the_old_adapter(
    make_service: Callable[..., Service], engine: FakeEngine, folder: Path
) -> None:
    client = TestClient(build_app(make_service()))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "a"
    tokenizer.save_pretrained(folder)
    load = {"lora_name": "new", "lora_path": "ada", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=load, headers=bearer(ADMIN)).status_code == 200
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    refused = client.post("/v1/load_lora_adapter", json=load, headers=bearer(ADMIN))
    assert refused.status_code == 400, refused.text
    assert "tokenizer" in refused.json()["error"]["message"]
    body = {"model": "new", "messages": [{"role": "user", "content": "x"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert len(engine.requests[0].prompt) == 1


def test_adapters_have_their_own_tokenizers(backbone: Any, tmp_path: Path) -> None:
    own = character_tokenizer(chat=True)
    prompts = Prompts(backbone, own)
    for name, template in (("one", "a"), ("same", "a"), ("other", "bb")):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "none").mkdir()
    for name in ("one", "same", "other", "none"):
        prompts.add(name, tmp_path / name)
    messages = [{"role": "user", "content": "x"}]
    assert [len(prompts.encode(name, messages)) for name in ("one", "same", "other")] == [1, 1, 2]
    assert prompts.tokenizer("one") is prompts.tokenizer("same")
    assert prompts.tokenizer("none") is prompts.tokenizer(None) is own
    prompts.remove("other")
    assert prompts.tokenizer("other") is own
