"""Everything that belongs to an adapter is saved with it: tokenizer, end of sequence, backbone revision, embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import ARCHITECTURES
from support.tokenizer import character_tokenizer, save_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora import MiLoraConfig
from milora.backbone.loading import load_adapter, load_backbone, load_for_inference
from milora.inference.generation import Decoding, encode_prompt, generate_texts
from milora.locks import writing_alone
from milora_cli.main import main
from milora_core.errors import MiLoraError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
PROMPT = [{"role": "user", "content": "Say 3"}]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"), chat=True)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    replies = [
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"yes {i}"}] for i in range(24)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in replies), encoding="utf-8")
    return path


def train(backbone: Path | str, rows: Path, output: Path, **settings: Any) -> int:
    fields = {
        "backbone": backbone,
        "data": rows,
        "output_dir": output,
        "r": 2,
        "max_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        **settings,
    }
    return main(["train", *[part for name, value in fields.items() for part in (f"--{name}", str(value))]])


def template_file(folder: Path, text: str = TEMPLATE) -> Path:
    path = folder / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_template_that_an_adapter_was_trained_with_is_used(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(backbone, chats, out, chat_template_path=template_file(tmp_path)) == 0
    tokenizer = load_for_inference(out, device="cpu")[1]
    assert tokenizer.decode(encode_prompt(tokenizer, PROMPT)) == "<user>Say 3;<bot>"
    # The same folder under two names, with an explicit backbone.
    tokenizer = load_for_inference({"a": out, "b": out}, backbone, device="cpu")[1]
    assert tokenizer.decode(encode_prompt(tokenizer, PROMPT)) == "<user>Say 3;<bot>"
    assert main(["export", "--adapter", str(out), "--prompt", "a", "--output", str(tmp_path / "lora")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == TEMPLATE
    bare = load_for_inference({}, backbone, device="cpu")[1]
    assert bare.chat_template != TEMPLATE


def test_adapters_with_different_templates_are_refused_together(backbone: Path, chats: Path, tmp_path: Path) -> None:
    assert train(backbone, chats, tmp_path / "a", chat_template_path=template_file(tmp_path)) == 0
    assert train(backbone, chats, tmp_path / "b") == 0
    with pytest.raises(MiLoraError, match=r"'a' and 'b' have different tokenizers \(the chat template\)"):
        load_for_inference({"a": tmp_path / "a", "b": tmp_path / "b"}, device="cpu")


def test_a_run_is_not_resumed_with_another_template(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = template_file(tmp_path)
    assert train(backbone, chats, tmp_path / "out", chat_template_path=template) == 0
    again = {"resume_from_checkpoint": "last", "max_steps": 2}
    assert train(backbone, chats, tmp_path / "out", **again) == 2
    assert "another tokenizer (the chat template)" in capsys.readouterr().err
    assert train(backbone, chats, tmp_path / "out", chat_template_path=template, **again) == 0


def test_a_template_of_a_tokenizer_gives_its_end_and_leaves_the_embeddings(
    backbone: Path, chats: Path, tmp_path: Path
) -> None:
    other = character_tokenizer()
    other.chat_template, other.eos_token = TEMPLATE, "~"
    other.save_pretrained(tmp_path / "other")
    assert train(backbone, chats, tmp_path / "out", chat_template_path=tmp_path / "other") == 0
    model, tokenizer = load_for_inference(tmp_path / "out", device="cpu")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "~")
    assert model.get_input_embeddings().weight.shape[0] == 97


@pytest.mark.parametrize("missing", ["in the template", "as the end"])
def test_a_template_that_needs_new_tokens_is_refused_before_the_first_step(
    backbone: Path, chats: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = character_tokenizer()
    other.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    other.chat_template = "<|im_start|>{{ messages[0].content }}" if missing == "in the template" else TEMPLATE
    if missing == "as the end":
        other.eos_token = "<|im_end|>"
    other.save_pretrained(tmp_path / "other")
    assert train(backbone, chats, tmp_path / "out", chat_template_path=tmp_path / "other") == 2
    assert "which the backbone has no embeddings for" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% for m in %}", "is not valid"), ("{{ raise_exception('no users here') }}", "no users here")],
)
def test_a_template_that_fails_is_one_line(
    backbone: Path, chats: Path, tmp_path: Path, template: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, chats, tmp_path / "out", chat_template_path=template_file(tmp_path, template)) == 2
    assert message in capsys.readouterr().err


def test_the_end_of_sequence_of_training_ends_generation(backbone: Path, chats: Path, tmp_path: Path) -> None:
    assert train(backbone, chats, tmp_path / "out", eos_token="~") == 0
    model, tokenizer = load_for_inference(tmp_path / "out", device="cpu")
    assert tokenizer.eos_token == "~"
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    # The bare backbone keeps its own end of sequence.
    bare = load_for_inference({}, backbone, device="cpu")[0].generation_config.eos_token_id
    assert tokenizer.eos_token_id not in (bare if isinstance(bare, list) else [bare])


def test_an_end_that_is_no_token_is_refused(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, chats, tmp_path / "out", eos_token="<end>") == 2
    assert "eos_token='<end>' is not a token" in capsys.readouterr().err


def resized(folder: Path, backbone: Path, *, config: Any = None) -> Path:
    """A hand-trained adapter with two tokens that the backbone lacks."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    model = AutoModelForCausalLM.from_pretrained(backbone)
    model.resize_token_embeddings(len(tokenizer))
    adapted = get_peft_model(model, config or MiLoraConfig(r=2))
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_embeddings_that_were_resized_are_loaded(backbone: Path, tmp_path: Path, method: str) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None
    folder = resized(tmp_path / "adapter", backbone, config=config)
    model, tokenizer = load_for_inference(folder, backbone, device="cpu")
    assert model.get_input_embeddings().weight.shape[0] == 99
    assert encode_prompt(tokenizer, "<two>") == [98]
    by_hand = AutoModelForCausalLM.from_pretrained(backbone)
    by_hand.resize_token_embeddings(99)
    by_hand = PeftModel.from_pretrained(by_hand, folder).eval()
    ids = torch.tensor([[5, 98, 7]])
    torch.testing.assert_close(model(ids).logits, by_hand(ids).logits)
    plain = tmp_path / "plain"
    get_peft_model(AutoModelForCausalLM.from_pretrained(backbone), MiLoraConfig(r=2)).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    with pytest.raises(MiLoraError, match="load it without other adapters"):
        load_for_inference({"plain": plain, "resized": folder}, backbone, device="cpu")


def large_tokenizer(folder: Path) -> Path:
    """A backbone whose tokenizer has tokens without embeddings, including padding."""
    save_backbone(folder)
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_beyond_the_vocabulary_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = large_tokenizer(tmp_path / "backbone")
    model, tokenizer = load_backbone(backbone, device="cpu")
    texts = list(generate_texts(model, tokenizer, ["ab", "abcdef"], Decoding(max_new_tokens=2)))
    assert len(texts) == 2  # although the padding token is beyond the vocabulary
    with pytest.raises(MiLoraError, match="'<new>' the id 97, but the backbone has embeddings for only 97 tokens"):
        generate_texts(model, tokenizer, ["a <new> b"], Decoding(max_new_tokens=2))
    for completion, status in (("yes", 0), ("<new>", 2)):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": completion}) + "\n" for i in range(24)))
        assert train(backbone, rows, tmp_path / completion.strip("<>"), dev_fraction=0.2) == status
    assert "'<new>' the id 97" in capsys.readouterr().err


def test_a_name_that_is_in_use_is_refused(backbone: Path, tmp_path: Path) -> None:
    for name, rank in (("one", 2), ("two", 4)):
        get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=rank)).save_pretrained(tmp_path / name)
    model = load_adapter(load_backbone(backbone, device="cpu")[0], tmp_path / "one", "mine")
    with pytest.raises(MiLoraError, match="already has an adapter 'mine'"):
        load_adapter(model, tmp_path / "two", "mine")


def test_a_folder_has_no_revision(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, chats, tmp_path / "out", model_revision="v2") == 2
    assert "is only for backbones on the hub" in capsys.readouterr().err


def test_a_folder_in_another_place_is_found(
    backbone: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(backbone.parent)
    assert train(backbone.name, chats, tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    assert load_for_inference("out", device="cpu")


def test_a_folder_that_another_run_writes_to_is_refused(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with writing_alone(tmp_path / "out", name="_lock"):
        assert train(backbone, chats, tmp_path / "out") == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert train(backbone, chats, tmp_path / "out") == 0


def test_a_hub_that_cannot_be_reached_is_one_line_before_the_backbone_is_loaded(
    backbone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora.training.training_run.load_for_training", None)
    assert train(backbone, chats, tmp_path / "out", push_to_hub=True, hub_model_id="me/x") == 2
    error = capsys.readouterr().err
    assert "me/x cannot be written to" in error
    assert error.count("\n") == 1


REVISIONS = """
import json, pathlib, sys
import torch
from transformers import AutoModelForCausalLM
from milora.backbone.loading import load_for_inference
from milora_cli.main import main
from support.architectures import ARCHITECTURES
from support.tokenizer import character_tokenizer

home, rows, out = map(pathlib.Path, sys.argv[1:])
root = home / "hub" / "models--me--m"
(root / "refs").mkdir(parents=True)
for seed, (name, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40, "moved": "c" * 40}.items()):
    model = ARCHITECTURES["llama"]()
    model.get_input_embeddings().weight.data.add_(seed)
    model.save_pretrained(root / "snapshots" / commit)
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template += str(seed)
    tokenizer.save_pretrained(root / "snapshots" / commit)
    (root / "refs" / name).write_text(commit)

def train(folder, *more):
    flags = "--backbone me/m --r 2 --max_steps 1 --eval_steps 1 --save_steps 1 --report_to none --use_cpu".split()
    return main(["train", *flags, "--data", str(rows), "--output_dir", str(out / folder), *more])

def offset(folder, **more):
    found = load_for_inference(out / folder, device="cpu", **more)[0].get_input_embeddings().weight
    main_ = AutoModelForCausalLM.from_pretrained("me/m").get_input_embeddings().weight
    return round((found - main_).mean().item(), 3)

found = {"statuses": [train("default"), train("branch", "--model_revision", "v2"),
                      train("commit", "--model_revision", "b" * 40)]}
found["offsets"] = [offset(name) for name in ("default", "branch", "commit")]
found["named"] = offset("branch", backbone="me/m")
found["elsewhere"] = offset("branch", backbone=str(root / "snapshots" / ("c" * 40)))
resume = ["--resume_from_checkpoint", "last", "--max_steps", "2"]
found["resumed"] = train("branch", *resume)
found["resumed right"] = train("branch", *resume, "--model_revision", "v2")
(root / "refs" / "v2").write_text("c" * 40)
found["moved"] = offset("branch")
found["saved"] = json.loads((out / "branch" / "adapter_config.json").read_text())["revision"]
found["card"] = "revision=" in (out / "branch" / "README.md").read_text()
try:
    load_for_inference({"a": out / "default", "b": out / "branch"}, device="cpu")
except ValueError as error:
    found["both"] = str(error)
print("FOUND" + json.dumps(found))
"""


def test_the_revision_of_the_backbone_is_the_adapters(chats: Path, tmp_path: Path) -> None:
    support = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([support, *sys.path]),
    }
    command = [sys.executable, "-c", REVISIONS, str(tmp_path / "home"), str(chats), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    assert found["statuses"] == [0, 0, 0]
    assert found["offsets"] == [0.0, 1.0, 1.0]
    assert (found["named"], found["elsewhere"], found["moved"]) == (1.0, 2.0, 1.0)
    assert (found["resumed"], found["resumed right"]) == (2, 0)
    assert found["saved"] == "b" * 40
    assert found["card"]
    assert "different revisions of me/m" in found["both"]
