import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from support.adapted import adapted
from support.tokenizer import save_backbone

from milora.locks import writing_file_alone
from milora_cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone `base` and two adapters `a` and `b` for it."""
    root = tmp_path_factory.mktemp("workspace")
    base = save_backbone(root / "base")
    for seed, name in enumerate("ab"):
        model = adapted("llama", seed=seed).model
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def milora(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "milora", *arguments], capture_output=True, text=True, check=False, input=""
    )


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("milora: ")
    return captured.err


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2() -> None:
    done = milora("generate", "--adapter", "nowhere", "--prompt", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.slow
def test_json_is_all_of_standard_output() -> None:
    done = milora("generate", "--adapter", "a", "--prompt", "Hello", "--max-new-tokens", "4", "--json")
    assert done.returncode == 0
    summary = json.loads(done.stdout)
    assert summary["rows"] == 1
    assert summary["texts"][0]["prompt"] == "Hello"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--foo"], "--foo"),
        (["gen"], "gen"),
        (["generate", "--beams", "no"], "--beams"),
        (["route", "--prompt", "x"], "--adapter"),
        (["generate", "--prompt", "x"], "--backbone"),
        (["generate", "--adapter", "aa", "--prompt", "x"], "did you mean 'a'"),
        (["generate", "--adapter", "base", "--prompt", "x"], "backbone, not an adapter"),
        (["generate", "--backbone", "a", "--prompt", "x"], "pass it as --adapter"),
        (["generate", "--backbone", "./none", "--prompt", "x"], "no such backbone"),
        (["generate", "--backbone", "owner/none", "--prompt", "x"], "offline, use a folder"),
        (["generate", "--adapter", "a", "--data", "none.jsonl"], "none.jsonl"),
        (["generate", "--adapter", "a", "--data", "base/model.safetensors"], "convert it to JSON lines"),
        (["generate", "--adapter", "a", "--data", "x", "--prompt", "x"], "both"),
        (["generate", "--adapter", "a", "--prompt", "x", "--seed", "-1"], "--seed"),
        (
            ["export", "--adapter", "a", "--output", "x", "--route", "a/adapter_config.json"],
            "config.json is not a route",
        ),
        (["generate", "--adapter", "a", "--prompt", " "], "empty"),
        (["generate", "--adapter", "a", "--prompt", "x", "--max-new-tokens", "500"], "128 positions"),
        (["generate", "--adapter", "a", "--prompt", "x", "--dtype", "float99"], "float99"),
        (["generate", "--adapter", "a", "--prompt", "x", "--device", "nothing"], "nothing"),
        (["generate", "--adapter", "a", "--prompt", "x", "--temperature", "0.5", "--beams", "2"], "1 beam"),
        (["generate", "--adapter", "a", "--adapter", "b", "--prompt", "x"], "NAME=a"),
        (["generate", "--adapter", "x=a", "--adapter", "x=b", "--prompt", "x"], "'x' is already"),
        (["generate", "--adapter", "x=a", "--adapter", "y=b", "--prompt", "x"], "field `adapter`"),
        (["route", "--adapter", "a", "--prompt", "x", "--output", "x.txt"], ".safetensors"),
        (["export", "--adapter", "a", "--output", "x"], "--route"),
        (["export", "--adapter", "a", "--output", "x", "--route", "none.safetensors"], "none.safetensors"),
        (["export", "--adapter", "a", "--output", "base", "--prompt", "x"], "base is not an empty folder"),
        (
            ["export", "--adapter", "a", "--output", "base/config.json", "--prompt", "x"],
            "config.json is a file: name a",
        ),
        (["generate", "--adapter", "a", "--prompt", "x", "--output", "base"], "base is a folder: give a file"),
        (
            ["route", "--adapter", "a", "--prompt", "x", "--output", "base/config.json/x.json"],
            "is a file: name a folder",
        ),
    ],
)
def test_mistakes_name_the_thing(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in complaint(capsys, *arguments)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such adapter"):
        main(["generate", "--adapter", "none", "--prompt", "x", "--debug"])
    monkeypatch.setenv("MILORA_DEBUG", "1")
    with pytest.raises(ValueError, match="no such adapter"):
        main(["generate", "--adapter", "none", "--prompt", "x"])


def test_what_is_no_mistake_of_the_user_is_raised_and_an_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: BaseException):
        def load(*_: object, **__: object) -> None:
            raise error

        return load

    monkeypatch.setattr("milora.backbone.loading.load_for_inference", failing(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        main(["generate", "--adapter", "a", "--prompt", "x"])
    monkeypatch.setattr("milora.backbone.loading.load_for_inference", failing(KeyboardInterrupt()))
    assert main(["generate", "--adapter", "a", "--prompt", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_texts_are_printed_in_the_order_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["generate", "--adapter", "a", "--max-new-tokens", "4", "--batch-size", "1"]
    texts = result(capsys, *shared, "--prompt", "hi", "--prompt", "something longer")["texts"]
    assert [row["prompt"] for row in texts] == ["hi", "something longer"]
    assert main([*shared, "--prompt", "something longer"]) == 0
    assert capsys.readouterr().out.strip() == texts[1]["output"].strip()


def test_rows_are_judged_written_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "rows.jsonl"
    arguments = ["generate", "--adapter", "a", "--data", "bundled-choice", "--limit", "3", "--output", str(output)]
    summary = result(capsys, *arguments)
    assert {key: summary[key] for key in ("rows", "accuracy", "unparsed", "generated")} == {
        "rows": 3,
        "accuracy": 0.0,
        "unparsed": 3,
        "generated": 3,
    }
    assert summary["tokens_per_second"] > 0
    lines = output.read_text().splitlines()
    assert all(json.loads(line)["parsed"] is None for line in lines)
    output.write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])
    assert result(capsys, *arguments)["generated"] == 1
    assert sorted(output.read_text().splitlines()) == sorted(lines)
    assert result(capsys, *arguments)["generated"] == 0
    assert "another adapter" in complaint(capsys, *arguments, "--beams", "1")
    arguments[arguments.index("bundled-choice")] = "bundled-yesno"
    assert "line 1" in complaint(capsys, *arguments, "--max-new-tokens", "12")
    output.write_text("no row\n")
    assert "line 1" in complaint(capsys, *arguments)


def test_texts_of_other_weights_are_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = save_backbone(tmp_path / "base"), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "Hello", "adapter": name}) + "\n" for name in "xy"))
    output = ["--max-new-tokens", "2", "--beams", "1", "--output", str(tmp_path / "texts.jsonl")]
    shared = ["generate", "--backbone", str(base), "--data", str(data), *output]
    adapters = ["--adapter", "x=a", "--adapter", "y=b"]
    assert result(capsys, *shared, *adapters)["generated"] == 2
    assert result(capsys, *shared, *adapters)["generated"] == 0
    other = "another adapter, backbone or settings"
    assert other in complaint(capsys, *shared, *adapters, "--dtype", "bfloat16")
    assert other in complaint(capsys, *shared, "--adapter", "x=b", "--adapter", "y=a")
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 0.5 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert other in complaint(capsys, *shared, *adapters)


def test_rows_name_their_adapter_and_need_no_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Hello", "adapter": name, "answer": "x"} for name in ("x", "y", "x")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["generate", "--data", str(data), "--max-new-tokens", "6", "--beams", "2"]
    summary = result(capsys, *shared, "--adapter", "x=a", "--adapter", "y=b")
    first, second, third = (row["output"] for row in summary["texts"])
    assert first == third
    assert first != second
    assert summary["accuracy"] == 0
    alone = result(capsys, *shared, "--adapter", "b")["texts"]
    assert [row["output"] for row in alone] == [second] * 3
    assert "'y'" in complaint(capsys, *shared, "--adapter", "x=a", "--adapter", "z=b")


@pytest.mark.parametrize("command", ["generate", "route"])
def test_standard_input_is_a_prompt_a_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    def prompts(*arguments: str) -> list[str]:
        limited = ["--max-new-tokens", "2"] if command == "generate" else []
        found = result(capsys, command, "--adapter", "a", *limited, *arguments)
        return [row["prompt"] for row in found["texts"]] if command == "generate" else found["prompts"]

    pipe(b"one\n\ntwo\n")
    assert prompts() == ["one", "two"]
    pipe(b"\xef\xbb\xbfone \r\n\r\ncaf\xc3\xa9\r\n")
    assert prompts() == ["one ", "café"]
    pipe(b'{"prompt": "one"}\n{"prompt": "two"}\n')
    assert prompts("--data", "-") == ["one", "two"]
    for content, said in [
        (b"", "Standard input is empty"),
        (b"one\ncaf\xe9\n", "standard input, line 2: byte 0xe9 is not UTF-8"),
        ("one".encode("utf-16"), "is not UTF-8 but UTF-16"),
        ("one".encode("utf-16-le"), "standard input, line 1: a NUL byte"),
    ]:
        pipe(content)
        assert said in complaint(capsys, command, "--adapter", "a")
    monkeypatch.setattr("sys.stdin", None)  # closed before Python started
    assert "Standard input is empty" in complaint(capsys, command, "--adapter", "a")


def test_a_prompt_in_the_arguments_is_utf_8_in_every_locale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["generate", "--adapter", "a", "--max-new-tokens", "2", "--prompt"]
    as_in_the_c_locale = "café".encode().decode("ascii", "surrogateescape")
    assert result(capsys, *shared, as_in_the_c_locale)["texts"][0]["prompt"] == "café"
    for arguments in (shared, ["export", "--adapter", "a", "--output", "x", "--prompt"]):
        assert "not UTF-8" in complaint(capsys, *arguments, b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_rows_come_through_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "one", "adapter": "any"}\n',))
    writer.start()
    found = result(capsys, "generate", "--adapter", "a", "--max-new-tokens", "2", "--data", str(pipe))
    writer.join()
    assert [row["prompt"] for row in found["texts"]] == ["one"]


def test_routes_as_table_json_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from milora import Route

    prompts = ["--prompt", "Hello there", "--prompt", "no"]
    files = [tmp_path / f"route{ending}" for ending in (".png", ".json", ".safetensors")]
    outputs = [argument for file in files for argument in ("--output", str(file))]
    printed = result(capsys, "route", "--adapter", "a", *prompts, *outputs)
    assert printed["prompts"] == ["Hello there", "no"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files[1].read_text()) == printed
    assert Route.load(files[2]) == Route.from_dict(printed)
    # Batches of one prompt, in another order of lengths, give each prompt the same route.
    swapped = result(capsys, "route", "--adapter", "a", *prompts[2:], *prompts[:2], "--batch-size", "1")
    assert Route.from_dict(swapped)[[1, 0]].chosen.equal(Route.from_dict(printed).chosen)
    assert main(["route", "--adapter", "a", *prompts[:2]]) == 0
    table = capsys.readouterr().out
    assert "q_proj" in table
    assert table.count("●") == 4
    assert main(["route", "--adapter", "a", "--data", "bundled-choice", "--data", "bundled-yesno", "--limit", "2"]) == 0
    assert "bundled-yesno: share of 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "outputs"), [("generate", ["texts.jsonl"]), ("route", ["x.json", "x.png"]), ("export", ["lora"])]
)
def test_two_processes_do_not_share_an_output(
    command: str, outputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = ["--max-new-tokens", "2"] if command == "generate" else []
    arguments = [command, "--adapter", "a", "--prompt", "Hello", *limited]
    for output in outputs:
        arguments += ["--output", str(tmp_path / output)]
    (tmp_path / "link").symlink_to(tmp_path / outputs[-1])
    with writing_file_alone(tmp_path / "link"):
        assert f"{outputs[-1]} is in use by process {os.getpid()}" in complaint(capsys, *arguments)
    (tmp_path / "link").unlink()
    assert main(arguments) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(outputs), "no lock is left"


def test_an_exported_route_generates_what_its_prompt_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, route = tmp_path / "lora", tmp_path / "route.json"
    printed = result(capsys, "export", "--adapter", "a", "--prompt", "Hello", "--output", str(exported))
    assert PeftConfig.from_pretrained(str(exported)).peft_type.value == "LORA"
    assert printed["modules"] == sum(map(len, printed["experts"].values())) == 4
    shared = ["generate", "--prompt", "Hello", "--max-new-tokens", "6", "--adapter"]
    assert result(capsys, *shared, str(exported))["texts"] == result(capsys, *shared, "a")["texts"]
    assert "no routers" in complaint(capsys, "route", "--adapter", str(exported), "--prompt", "x")
    result(capsys, "route", "--adapter", "a", "--prompt", "no", "--prompt", "Hello", "--output", str(route))
    arguments = ["export", "--adapter", "a", "--route", str(route), "--output", str(tmp_path / "other")]
    assert result(capsys, *arguments, "--row", "1")["experts"] == printed["experts"]
    assert "2 prompts" in complaint(capsys, *arguments, "--row", "2")
