"""`milora params`: the table, the JSON, and one-line errors."""

import json
from pathlib import Path

import pytest

from milora.backbone.shapes import shape_config
from milora.methods import parameter_counts
from milora_cli.evaluate import table
from milora_cli.main import main
from milora_cli.output import print_table


def test_json_is_one_object_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--backbone", "llama-2-7b", "--methods", "lora, milora", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["method"] for row in result["methods"]] == ["lora", "milora"]
    for row in result["methods"]:
        counts = parameter_counts(row["method"], "llama-2-7b")
        assert row["tunable"] == counts.tunable
        assert (row["activated_mean"], row["activated_max"]) == (counts.activated_mean, counts.activated_max)
    assert [row["paper_tunable"] for row in result["methods"]] == [80_000_000, 80_900_000]


def test_the_table_has_the_papers_figure_beside(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["params", "--methods", "lora"]) == 0
    out = capfd.readouterr().out
    assert "LoRA" in out
    assert all(figure in out for figure in ("79.95", "80.0", "-0.1%"))


def test_a_narrow_terminal_cuts_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    for columns in ("40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["params", "--methods", "learned-adapter,p-tuning-v2"]) == 0
        out = capfd.readouterr().out
        assert "…" not in out
        assert all(text in out for text in ("Learned-Adapter", "P-tuning v2", "activated", "differs"))


def test_what_may_not_wrap_is_whole_too(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    result = {"rows": 3, "accuracy": 0.0, "interval": (0.0, 0.561), "unparsed": 3}
    print_table(table({"bundled-choice": result, "arc-challenge": result}, 0.0))
    out = capfd.readouterr().out
    assert "…" not in out
    assert all(text in out for text in ("bundled-choice", "95 % interval", "0.0% - 56.1%", "unparsed", "mean"))


def test_another_backbone_has_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["params", "--backbone", "tinyllama-1.1b", "--methods", "bitfit"]) == 0
    out = capfd.readouterr().out
    assert "BitFit" in out
    assert "paper" not in out
    shape_config("tinyllama-1.1b").save_pretrained(tmp_path)
    assert main(["params", "--backbone", str(tmp_path), "--methods", "bitfit", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["methods"]
    assert row["paper_tunable"] is None
    assert row["tunable"] == parameter_counts("bitfit", "tinyllama-1.1b").tunable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "llama-7b"], "no backbone shape 'llama-7b'"),
        (["--methods", "lora,mlora"], "no method 'mlora'"),
        (["--methods", ","], "--methods has no names"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["params", *arguments]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1
