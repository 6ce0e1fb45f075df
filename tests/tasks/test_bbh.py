"""BBH: all 27 tasks, exact match up to formatting; rows shown as examples are not tested."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.data import real

from milora.tasks import bbh
from milora.tasks.bbh import TASKS, Bbh
from milora_core.errors import DataError, MiLoraError
from reproduction import published


def write(data_dir: Path, rows: int = 4) -> None:
    folder = data_dir / "bbh"
    folder.mkdir()
    for task in TASKS:
        examples = [{"input": f"{task} {number}?", "target": f"({'ABCD'[number % 4]})"} for number in range(rows)]
        (folder / f"{task}.json").write_text(json.dumps({"canary": "", "examples": examples}), encoding="utf-8")


class TestRealRows:
    def test_counts_and_gold_answers(self) -> None:
        task = Bbh(real("bbh"))
        rows = task.examples("test")
        assert len(rows) == published.everything()["table6_datasets"]["bbh"][-1]
        counts = Counter(row.group for row in rows)
        assert len(counts) == 27
        assert counts["penguins_in_a_table"] == 146
        for row in rows:
            for output in (
                row.completion,
                f"Let's think.\nSo the answer is{row.completion}.",
                f"{row.completion}\n\nQ: ?",
            ):
                assert task.is_correct(output, row.answer)

    def test_gold_answers_that_differ_stay_different(self) -> None:
        """Tolerant matching must not confuse different answers of a task."""
        data = real("bbh")
        for name in TASKS:
            raw = json.loads((data / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
            targets = {row["target"] for row in raw}
            assert len({Bbh().parse(target) for target in targets}) == len(targets), name


class TestFiles:
    def test_zero_shot(self, tmp_path: Path) -> None:
        write(tmp_path)
        rows = Bbh(tmp_path).examples("test")
        assert len(rows) == 27 * 4
        row = next(row for row in rows if row.prompt == "Q: navigate 1?\nA:")
        assert (row.completion, row.answer, row.group) == (" (B)", "(b)", "navigate")

    def test_rows_that_are_shown_are_not_tested(self, tmp_path: Path) -> None:
        write(tmp_path)
        rows = Bbh(tmp_path, shots=3).examples("test")
        assert len(rows) == 27
        for row in rows:
            *shots, question = row.prompt.split("\n\n")
            assert len({*shots, question}) == 4
            assert all(shot.startswith(f"Q: {row.group} ") and "\nA: (" in shot for shot in shots)
            assert not any(shot.startswith(question) for shot in shots)
        assert rows == Bbh(tmp_path, shots=3).examples("test")
        with pytest.raises(MiLoraError, match="shots is 4, but boolean_expressions has 4 rows in all"):
            Bbh(tmp_path, shots=4).examples("test")
        with pytest.raises(MiLoraError, match="shots is -1"):
            Bbh(tmp_path, shots=-1)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                '{"examples": [{"input": "a", "target": "b"}, {"input": "a"}]}',
                "row 2: `target` is missing; fields found",
            ),
            ('{"examples": [{"input": "a", "target": " "}]}', "row 1: `target` is empty"),
            ('{"examples": [7]}', "row 1: a row is a number, it must be an object with `input`, `target`"),
            ('{"rows": []}', "`examples` is null, it must be a list of rows"),
            ('{"examples": []}', "it must be a list of rows, at least one"),
            ("{", "not JSON"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, content: str, message: str) -> None:
        write(tmp_path)
        (tmp_path / "bbh" / "word_sorting.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError) as caught:
            Bbh(tmp_path).examples("test")
        assert "word_sorting.json" in str(caught.value)
        assert message in str(caught.value)

    def test_a_missing_task(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "bbh" / "snarks.json").unlink()
        with pytest.raises(
            DataError, match=r"bbh/snarks\.json: no such file; .*each of the 27 tasks; .*SaylorTwift/bbh"
        ):
            Bbh(tmp_path).examples("test")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_split(name: str, split: str, config: str) -> Dataset:
        calls.append((name, split, config))
        return Dataset.from_list([{"input": f"{config}?", "target": "Yes"}])

    monkeypatch.setattr(bbh, "load_split", load_split)
    rows = {row.group: row for row in Bbh().examples("test")}
    assert calls == [("SaylorTwift/bbh", "test", task) for task in TASKS]
    assert (rows["snarks"].prompt, rows["snarks"].completion, rows["snarks"].answer) == (
        "Q: snarks?\nA:",
        " Yes",
        "yes",
    )


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("(B)", "(b)"),
        ("B", "(b)"),
        ("b.", "(b)"),
        ("(B) The robin is the leftmost.", "(b)"),
        ("Let's think.\nSo the answer is (R).", "(r)"),
        ("$\\boxed{B}$", "(b)"),
        ("Yes", "yes"),
        ("No, she does not.", "no"),
        ("valid because it is", "valid"),
        ("so \\boxed{\\text{True}}.", "true"),
        ("**True**", "true"),
        ("The answer is: Invalid.", "invalid"),
        ("-35", "-35"),
        ("1,234", "1234"),
        ("8 musical instruments", "8"),
        ("] ) }", "])}"),
        ("])}", "])}"),
        ("Sioux, Fortescue, it&t", "sioux fortescue it&t"),
        ("no true valid", "no true valid"),  # a list of words, not a verdict
        ("Monsters, Inc.", "monsters inc"),
        ("Yes\n\nQ: Is it?\nA: No", "yes"),
        ("\n\n", None),
        ("", None),
    ],
)
def test_parse(output: str, answer: str | None) -> None:
    assert Bbh().parse(output) == answer


@given(st.text())
def test_any_text_is_read_without_failing(text: str) -> None:
    answer = Bbh().parse(text)
    assert answer is None or answer.strip() == answer != ""
