"""Rows from the user's files and data sets: every supported form, and the location of every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from milora.tasks import registry
from milora.tasks.rows import Row, instruction_prompt
from milora.tasks.sources import DEV_SPLITS, dev_split, read_dev_rows, read_rows, to_dataset
from milora_core.errors import DataError, MiLoraError

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MESSAGES = {"messages": CHAT}
INSTRUCTION = {"instruction": "Add.", "input": "", "output": "4", "answer": "4"}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_array(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def error_of(source: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def dev_error_of(source: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read_dev_rows(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestShapes:
    def test_prompt_and_completion(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "rows.jsonl", PAIR, {**PAIR, "answer": "4", "id": 7})
        assert read_rows(str(file)) == [Row("2 + 2 =", " 4"), Row("2 + 2 =", " 4", "4")]

    def test_prompt_and_completion_of_messages(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "rows.jsonl", {"prompt": CHAT[:1], "completion": CHAT[1:]})
        assert read_rows(file) == [Row(CHAT[:1], CHAT[1:])]

    def test_every_reply_of_a_chat_is_a_row_after_its_own_prompt(self, tmp_path: Path) -> None:
        system = {"role": "system", "content": "Be brief."}
        file = write_lines(tmp_path / "rows.jsonl", {"messages": [system, *CHAT, *CHAT], "answer": "Hello"})
        assert read_rows(file) == [
            Row([system, CHAT[0]], [CHAT[1]]),
            Row([system, *CHAT, CHAT[0]], [CHAT[1]], "Hello"),
        ]

    def test_a_greeting_has_no_prompt_and_is_no_row(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "rows.jsonl", {"messages": [CHAT[1], *CHAT]})
        assert read_rows(file) == [Row([CHAT[1], CHAT[0]], [CHAT[1]])]

    @pytest.mark.parametrize("context", ["", None])
    def test_instruction(self, tmp_path: Path, context: str | None) -> None:
        file = write_array(tmp_path / "rows.json", {**INSTRUCTION, "input": context})
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:\n"
        )
        assert read_rows(file) == [Row(prompt, "4", "4")]

    def test_instruction_with_input(self) -> None:
        assert instruction_prompt("Add.", "2, 2") == (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n"
        )

    @pytest.mark.parametrize(("answer", "read"), [(42, "42"), (3.5, "3.5"), (True, "true"), ("x", "x"), (None, None)])
    def test_answer(self, tmp_path: Path, answer: Any, read: str | None) -> None:
        assert read_rows(write_lines(tmp_path / "rows.jsonl", {**PAIR, "answer": answer}))[0].answer == read

    def test_null_columns_are_absent(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "rows.jsonl", {**PAIR, "messages": None, "answer": None})
        assert read_rows(file) == [Row("2 + 2 =", " 4")]


class TestFiles:
    def test_blank_lines_byte_order_mark_and_carriage_returns(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        line = json.dumps(PAIR).encode()
        file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
        assert len(read_rows(file)) == 2
        file.write_bytes(b"\xef\xbb\xbf" + line + b"\n\n\n{}\n")
        assert error_of(file).startswith(f"{file}, line 4: ")

    def test_a_line_separator_inside_a_string_is_no_end_of_line(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({**PAIR, "prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
        assert read_rows(file)[0].prompt == "a\u2028b\x85c"

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ('{"prompt": "a", "completion": }', "not JSON: Expecting value at column 31, found '}'"),
            ('{"prompt": "a"', "not JSON"),
            ("[" * 100_000, "not JSON that can be read"),
            ('{"prompt": ' + "9" * 5000 + "}", "not JSON that can be read"),
            ('{"prompt": "a", "completion": "b", "answer": NaN}', "not JSON that can be read: NaN is not a number"),
            ('{"prompt": "a", "completion": "b", "answer": -Infinity}', "-Infinity is not a number"),
            ('{"prompt": "a", "completion": "b", "completion": "c"}', "the key 'completion' is given twice"),
            (
                '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "completion": "c"}',
                "the key 'content' is given twice",
            ),
            ('["a", "b"]', "a row is a list, it must be an object"),
            ('"a"', "a row is a string"),
            ("null", "a row is null"),
            (
                "{}",
                "a row needs `prompt` and `completion`, or `messages`, or `instruction` and `output`; fields found: ",
            ),
            ('{"text": "a", "id": 1}', "fields found: `text`, `id`"),
            ('{"prompt": "a", "id": 1}', "`completion` is missing; fields found: `prompt`, `id`"),
            ('{"completion": "a"}', "`prompt` is missing; fields found: `completion`"),
            ('{"prompt": null, "completion": "a"}', "`prompt` is missing; fields found: `prompt` (null), `completion`"),
            ('{"instruction": "a"}', "`output` is missing"),
            ('{"prompt": "a", "completion": "b", "messages": []}', "two readings are possible"),
            ('{"prompt": 5, "completion": "a"}', "`prompt` is a number, it must be a string"),
            ('{"prompt": "a", "completion": true}', "`completion` is a boolean, it must be a string"),
            ('{"prompt": {"a": 1}, "completion": "b"}', "`prompt` is an object, it must be a string"),
            ('{"prompt": "a", "completion": "b", "answer": ["c"]}', "`answer` is a list, it must be a string"),
            ('{"prompt": " \\n", "completion": "a"}', "`prompt` is empty"),
            ('{"prompt": "a", "completion": ""}', "`completion` is empty"),
            ('{"instruction": " ", "output": "a"}', "`instruction` is empty"),
            ('{"instruction": "a", "output": " "}', "`output` is empty"),
            ('{"instruction": "a", "input": ["b"], "output": "c"}', "`input` is a list"),
            ('{"prompt": "\\ud800", "completion": "a"}', "`prompt` has half of a surrogate pair, \\ud800"),
            ('{"messages": "a"}', "`messages` is a string, it must be a list of messages"),
            ('{"messages": []}', "`messages` is an empty list"),
            ('{"messages": ["a"]}', "`messages[0]` is a string"),
            ('{"messages": [{"role": "user"}]}', "`messages[0]` must have `role` and `content` and nothing else"),
            ('{"messages": [{"from": "user", "value": "a"}]}', "fields found: `from`, `value`"),
            ('{"messages": [{"role": "human", "content": "a"}]}', "`messages[0].role` is 'human', it must be one of"),
            ('{"messages": [{"role": "user", "content": ["a"]}]}', "`messages[0].content` is a list"),
            ('{"messages": [{"role": "user", "content": "a"}]}', "the last of `messages` is from 'user'"),
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "a reply without a prompt"),
            (json.dumps({"messages": [{"role": "user", "content": " "}, CHAT[1]]}), "`messages` is empty"),
            (
                json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}),
                "`messages[1].content` is empty",
            ),
            (json.dumps({"prompt": CHAT[:1], "completion": "a"}), "make both strings, or both lists of messages"),
            (json.dumps({"prompt": CHAT[:1], "completion": CHAT[:1]}), "starts with a message of 'user'"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, says: str) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(line + "\n", encoding="utf-8")
        assert error_of(file).startswith(f"{file}, line 1: ")
        assert says in error_of(file)

    def test_a_bad_line_further_down(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "rows.jsonl", PAIR, PAIR, {**PAIR, "prompt": 1})
        assert error_of(file).startswith(f"{file}, line 3: `prompt` is a number")

    def test_a_bad_row_of_an_array_is_named(self, tmp_path: Path) -> None:
        file = write_array(tmp_path / "rows.json", INSTRUCTION, {**INSTRUCTION, "output": None})
        assert error_of(file).startswith(f"{file}, row 2: `output` is missing; fields found: `instruction`, `input`")
        assert error_of(write_array(file, INSTRUCTION, "a")).startswith(f"{file}, row 2: a row is a string")

    def test_a_repeated_key_of_an_array_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.json"
        file.write_text(f'[{json.dumps(INSTRUCTION)}, {{"instruction": "a", "output": "b", "output": "b"}}]')
        assert error_of(file) == f"{file}, row 2: the key 'output' is given twice: keep one of them"

    def test_json_that_is_no_array(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.json"
        file.write_text("[\n  {},\n", encoding="utf-8")
        assert "not JSON" in error_of(file)
        assert "line 3, column 1" in error_of(file)
        assert "if every line is a row, name the file .jsonl" in error_of(write_lines(file, PAIR, PAIR))
        assert "must hold an array of rows" in error_of(write_lines(file, PAIR))

    @pytest.mark.parametrize(
        ("first", "second"),
        [(PAIR, MESSAGES), (PAIR, INSTRUCTION), (PAIR, {"prompt": CHAT[:1], "completion": CHAT[1:]})],
    )
    def test_mixed_shapes(self, tmp_path: Path, first: Any, second: Any) -> None:
        for rows in ((first, second), (second, first)):
            file = write_lines(tmp_path / "rows.jsonl", *rows)
            message = error_of(file)
            assert message.startswith(f"{file}, line 2: ")
            assert f"{file}, line 1 is a row of" in message

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
    @pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
    def test_empty(self, tmp_path: Path, name: str, text: str) -> None:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        assert error_of(file) == f"{file} is empty"

    def test_empty_array(self, tmp_path: Path) -> None:
        assert "is empty: it needs at least one row" in error_of(write_array(tmp_path / "rows.json"))

    def test_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}')
        assert error_of(file) == f"{file}, line 2: byte 0xe9 is not UTF-8: save the file as UTF-8"
        file.write_text(json.dumps(PAIR), encoding="utf-16")
        assert error_of(file) == f"{file} is not UTF-8 but UTF-16: save it as UTF-8"
        file.write_text(json.dumps(PAIR), encoding="utf-16-le")
        assert error_of(file).startswith(f"{file}, line 1: a NUL byte is not text")

    @pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl.gz", "rows"])
    def test_unknown_format(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("a", encoding="utf-8")
        assert "convert it to JSON lines (.jsonl, a row a line) or to a JSON array (.json)" in error_of(tmp_path / name)

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")  # real permissions do not stop root

        file = write_lines(tmp_path / "rows.jsonl", PAIR)
        monkeypatch.setattr(Path, "read_bytes", refuse)
        assert error_of(file) == f"{file} cannot be read: Permission denied"


class TestNotFound:
    def test_file(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "train.jsonl", PAIR)
        assert error_of(tmp_path / "trian.jsonl") == (
            f"{tmp_path / 'trian.jsonl'}: no such file or folder; did you mean 'train.jsonl'?"
        )
        assert error_of(tmp_path / "zzz").endswith("no such file or folder")

    def test_folder_of_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "none" / "train.jsonl"
        assert error_of(file) == f"{file}: no such file, and no folder {file.parent}"

    def test_bare_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_lines(tmp_path / "train.jsonl", PAIR)
        assert "did you mean 'arc-easy'?" in error_of("arc-esy")
        assert "did you mean 'train.jsonl'?" in error_of("trian.jsonl")
        assert all(name in error_of("zzz") for name in registry.names())


class TestFolders:
    def test_the_split_s_own_file(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "train.jsonl", PAIR)
        write_array(tmp_path / "test.json", INSTRUCTION, INSTRUCTION)
        assert len(read_rows(tmp_path)) == 1
        assert len(read_rows(tmp_path, split="test")) == 2
        write_lines(tmp_path / "test.jsonl", PAIR)
        assert error_of(tmp_path, split="test").endswith("test.jsonl and test.json: name the one to read")

    def test_a_dataset_that_load_dataset_reads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # keep the user's cache unchanged
        folder = tmp_path / "data"
        folder.mkdir()
        Dataset.from_list([PAIR, {**PAIR, "prompt": " "}]).to_parquet(folder / "rows.parquet")
        assert error_of(folder) == f"{folder} (train), row 2: `prompt` is empty"
        message = error_of(folder, split="dev")
        assert "split 'dev' of the dataset" in message
        assert "Should be one of ['train']" in message

    def test_a_dataset_that_was_saved(self, tmp_path: Path) -> None:
        single = Dataset.from_list([{**MESSAGES, "messages": [{**message, "name": None} for message in CHAT]}])
        single.save_to_disk(str(tmp_path / "one"))
        assert read_rows(tmp_path / "one") == [Row(CHAT[:1], CHAT[1:])]
        DatasetDict(validation=single).save_to_disk(str(tmp_path / "many"))
        assert read_rows(tmp_path / "many", split="validation") == [Row(CHAT[:1], CHAT[1:])]
        assert error_of(tmp_path / "many") == f"{tmp_path / 'many'} has no split 'train'; its splits: validation"

    def test_a_folder_of_nothing(self, tmp_path: Path) -> None:
        assert "cannot be loaded" in error_of(tmp_path)


class TestHub:
    def test_a_hub_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(*arguments: Any, **options: Any) -> Dataset:
            asked.append((arguments, options))
            return Dataset.from_list([INSTRUCTION])

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        rows = [Row(instruction_prompt("Add."), "4", "4")]
        assert read_rows("owner/some.data") == rows
        assert read_rows("owner/data:20220301.en", split="test") == rows
        assert asked == [
            (("owner/some.data", None), {"split": "train"}),
            (("owner/data", "20220301.en"), {"split": "test"}),
        ]

    def test_a_bad_row_is_named_with_its_configuration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([{**PAIR, "prompt": " "}]))
        assert error_of("owner/data:easy") == "owner/data:easy (train), row 1: `prompt` is empty"

    @pytest.mark.parametrize("name", ["data:easy", "owner/data:", "owner/data.json:easy", "owner/part/data:easy"])
    def test_what_is_no_hub_id(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert error_of(name).startswith(f"{name}: no such file")

    def test_a_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*_: Any, **__: Any) -> Dataset:
            raise ConnectionError("Couldn't reach\nthe Hub")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        message = error_of("owner/data")
        assert message.startswith("split 'train' of the dataset 'owner/data' cannot be loaded: Couldn't reach the Hub")
        assert error_of("owner/data:easy").startswith("split 'train' of the dataset 'owner/data:easy' cannot be")


class TestDevRows:
    @pytest.mark.parametrize("name", DEV_SPLITS)
    def test_a_folder_s_file(self, name: str, tmp_path: Path) -> None:
        write_lines(tmp_path / "train.jsonl", PAIR, PAIR)
        write_lines(tmp_path / "test.jsonl", PAIR, PAIR, PAIR)
        assert dev_split(tmp_path) is None
        message = dev_error_of(tmp_path)
        assert message.startswith(
            f"{tmp_path} has no split dev or validation to take dev rows from; its splits: test, train"
        )
        write_lines(tmp_path / f"{name}.jsonl", {**PAIR, "prompt": "of dev"})
        assert dev_split(tmp_path) == name
        assert read_dev_rows(tmp_path) == [Row("of dev", " 4")]

    def test_dev_comes_before_validation(self, tmp_path: Path) -> None:
        for name in ("validation", "dev"):
            write_lines(tmp_path / f"{name}.jsonl", {**PAIR, "prompt": name})
        assert [row.prompt for row in read_dev_rows(tmp_path)] == ["dev"]

    def test_a_file_is_its_own_split(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "train.jsonl", PAIR)
        assert dev_split(file) is None
        assert read_dev_rows(file) == [Row("2 + 2 =", " 4")]

    def test_a_dataset_that_load_dataset_reads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "data"
        folder.mkdir()
        Dataset.from_list([PAIR]).to_parquet(folder / "train-0.parquet")
        assert dev_split(folder) is None
        assert "its splits: train: name a file" in dev_error_of(folder)
        Dataset.from_list([{**PAIR, "prompt": "of dev"}]).to_parquet(folder / "dev-0.parquet")
        assert dev_split(folder) == "validation"
        assert read_dev_rows(folder) == [Row("of dev", " 4")]

    def test_a_dataset_that_was_saved(self, tmp_path: Path) -> None:
        single = Dataset.from_list([PAIR])
        single.save_to_disk(str(tmp_path / "one"))
        assert dev_split(tmp_path / "one") is None
        assert len(read_dev_rows(tmp_path / "one")) == 1
        DatasetDict(train=single, validation=single).save_to_disk(str(tmp_path / "many"))
        assert dev_split(tmp_path / "many") == "validation"

    def test_a_dataset_on_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        splits = DatasetDict(
            train=Dataset.from_list([PAIR, PAIR]), validation=Dataset.from_list([{**PAIR, "prompt": "of dev"}])
        )

        def load_dataset(name: str, config: str | None, split: str | None = None) -> Any:
            assert (name, config) == ("owner/data", "easy")
            return splits if split is None else splits[split]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        assert dev_split("owner/data:easy") == "validation"
        assert read_dev_rows("owner/data:easy") == [Row("of dev", " 4")]
        del splits["validation"]
        assert dev_error_of("owner/data:easy").startswith("owner/data:easy has no split dev or validation")

    def test_tasks(self) -> None:
        name = registry.names()[0]
        assert dev_split(name) == "dev"
        assert read_dev_rows(name) == read_rows(name, "dev")
        with pytest.raises(MiLoraError, match="mmlu has no split 'dev'; its splits: test"):
            read_dev_rows("mmlu")


class TestTaskNames:
    def test_a_bundled_task(self) -> None:
        name = registry.names()[0]
        examples = registry.get(name).examples("train")
        rows = read_rows(name)
        assert [(row.prompt, row.completion, row.answer) for row in rows] == [
            (example.prompt, example.completion, example.answer) for example in examples
        ]

    def test_a_benchmark_with_its_data_folder(self, tmp_path: Path) -> None:
        (tmp_path / "boolq").mkdir()
        write_array(
            tmp_path / "boolq" / "test.json",
            {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"},
        )
        rows = read_rows("boolq", "test", tmp_path)
        assert rows == [Row(instruction_prompt("Is it?"), "the correct answer is true", "true")]

    @pytest.mark.parametrize("name", registry.names())
    def test_a_split_that_tasks_do_not_have(self, name: str) -> None:
        with pytest.raises(MiLoraError, match=f"{name} has no split 'validation'; its splits: train, dev, test"):
            read_rows(name, "validation")


class TestToDataset:
    def test_strings(self) -> None:
        dataset = to_dataset([Row("a", "b"), Row("c", "d", "e")])
        assert dataset.to_list() == [
            {"prompt": "a", "completion": "b", "answer": None},
            {"prompt": "c", "completion": "d", "answer": "e"},
        ]

    def test_messages(self) -> None:
        assert to_dataset([Row(CHAT[:1], CHAT[1:])])[0] == {"prompt": CHAT[:1], "completion": CHAT[1:], "answer": None}

    def test_columns_are_the_same_with_and_without_answers(self) -> None:
        assert to_dataset([Row("a", "b")]).features == to_dataset([Row("a", "b", "c")]).features

    def test_no_rows_and_mixed_rows(self) -> None:
        with pytest.raises(DataError, match="no rows"):
            to_dataset([])
        with pytest.raises(DataError, match="keep one kind"):
            to_dataset([Row("a", "b"), Row(CHAT[:1], CHAT[1:])])
