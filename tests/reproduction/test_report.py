"""Tables from handwritten records, compared with numbers computed by hand; the committed tables are reproduced."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from support.grids import grid, record

from reproduction import __main__ as command
from reproduction import inputs
from reproduction.grid import Grid
from reproduction.measurements import Summary
from reproduction.report import write_report

ROOT = Path(__file__).parents[2]
Accuracies = dict[tuple[str, str], list[float | None]]


def records(of: Grid, accuracies: Accuracies, **values: Any) -> list[dict[str, Any]]:
    """Records of finished runs with an accuracy per method, task and seed; `None` means no record."""
    found = [(run, accuracies[run.method, "+".join(run.tasks)][run.seed]) for run in of.runs()]
    return [record(run, accuracy, **values) for run, accuracy in found if accuracy is not None]


def report(of: Grid, found: list[dict[str, Any]], folder: Path) -> str:
    of.see(found)
    return write_report(of, folder).path.read_text()


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, starting with its header."""
    lines = text.partition(f"## {heading}")[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_medians_spread_and_average(tmp_path: Path) -> None:
    of = grid(sections=["table1"], only_methods=["lora", "milora"], seeds=(0, 1, 2), tasks=("boolq", "piqa"))
    found = records(
        of,
        {
            ("lora", "boolq"): [0.5, 0.7, 0.6],
            ("lora", "piqa"): [0.2, None, None],
            ("milora", "boolq"): [0.65, 0.8, 0.9],
            ("milora", "piqa"): [0.4, 0.5, 0.6],
        },
    )
    header, lora, milora = table(report(of, found, tmp_path), "Table 1")
    assert header == ["", "tunable, M", "activated, M", "boolq", "boolq, paper", "piqa", "piqa, paper", "average",
                      "average, paper (7 tasks)"]  # fmt: skip
    # Only seed 0 finished both tasks.
    assert lora[3:] == ["60.0 (50.0 to 70.0)", "68.8", "20.0 (1 of 3 seeds)", "81.4", "35.0 (1 of 3 seeds)", "58.4"]
    # Averages by seed: 52.5, 65, 75.
    assert milora[3:] == ["80.0 (65.0 to 90.0)", "72.8", "50.0 (40.0 to 60.0)", "83.3", "65.0 (52.5 to 75.0)", "61.5"]
    boolq, piqa, average, *_ = numbers(tmp_path / "table1.csv")
    assert (boolq["median"], boolq["min"], boolq["max"], boolq["seeds"]) == ("60.0", "50.0", "70.0", "3")
    assert (boolq["values"], boolq["paper"], boolq["test_rows"]) == ("50.000 70.000 60.000", "68.8", "30")
    assert (piqa["median"], piqa["seeds"], piqa["tunable"]) == ("20.0", "1", "100")
    assert (average["column"], average["median"], average["seeds"]) == ("average", "35.0", "1")
    assert json.loads((tmp_path / "report.json").read_text())["table1"][0]["median"] == 60.0


def test_summaries_as_text() -> None:
    assert str(Summary((1, 3, 10), 3)) == "3.0 (1.0 to 10.0)"
    assert str(Summary((1, 4), 3)) == "2.5 (1.0 to 4.0; 2 of 3 seeds)"
    assert str(Summary((1,), 1)) == "1.0"


def test_one_adapter_for_all_tasks_beside_one_for_each(tmp_path: Path) -> None:
    of = grid(sections=["table2"], only_methods=["lora"], seeds=(0,))
    single = {("lora", "bundled-choice"): [0.5], ("lora", "bundled-extraction"): [0.7]}
    found = records(of, {**single, ("lora", "bundled-choice+bundled-extraction"): [0.9]})
    rows = table(report(of, found, tmp_path), "Table 2")[1:]
    assert [row[0] for row in rows] == ["LoRA ST", "LoRA MT"]
    assert [row[3:] for row in rows] == [["50.0", "70.0", "60.0", "72.2"], ["90.0", "90.0", "90.0", "70.2"]]


def test_table_7_has_the_papers_rows_by_backbone(tmp_path: Path) -> None:
    others = {"Llama-2 13B": "l", "Gemma 2B": "g"}
    of = grid(sections=["table7"], tasks=("boolq",), seeds=(0,), other_backbones=others)
    found = [
        one for one in records(of, {("moelora", "boolq"): [0.25], ("milora", "boolq"): [0.5]}) if one["backbone"] == "g"
    ]
    assert table(report(of, found, tmp_path), "Table 7")[1:] == [
        ["Llama-2 13B: MOELoRA", "-", "73.5"],
        ["Llama-2 13B: MiLoRA", "-", "74.9"],
        ["Gemma 2B: MOELoRA", "25.0", "62.3"],
        ["Gemma 2B: MiLoRA", "50.0", "63.9"],
    ]


def test_grades_are_no_percentages_and_lost_rows_have_a_table(tmp_path: Path) -> None:
    of = grid(sections=["table3"], only_methods=["milora"], tasks=(), seeds=(0, 1, 2), judge_url="http://x")
    lost = {"accuracy": 0.5, "rows": 10, "unparsed": 2, "no_room": 3}
    found = []
    for run in of.runs():
        grade = {"score": [6.25, 7.5, 7.0][run.seed], "judge": "gpt-4", "rows": 160, "unparsed": 0, "no_room": 0}
        found.append(record(run, tests={"mt-bench": grade, "mmlu": lost, "bbh": {**lost, "unparsed": 0, "no_room": 0}}))
    text = report(of, found, tmp_path)
    assert (numbers(tmp_path / "table3.csv")[0]["median"], numbers(tmp_path / "table3.csv")[0]["max"]) == ("7.0", "7.5")
    assert ["MiLoRA", "mmlu", "30", "6", "9", "0"] in table(
        text.partition("Rows without")[2].join(["## Lost\n", ""]), "Lost"
    )


def test_tuning_data_failures_and_versions_are_tables(tmp_path: Path) -> None:
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0,), tune={"learning_rate": [1e-3, 1e-2, 1e-1]})
    first, second, third, *_ = of.runs()
    prints = {"train": {"bundled-choice": "t"}, "dev": {}, "test": {"bundled-choice": "x"}}
    found = [record(first, fingerprints=prints), record(second, dev_perplexity=1.5, revision="dirty")]
    found.append({**found[0], **third.says, "status": "failed", "error": "it | broke"})
    text = report(of, found, tmp_path)
    assert table(text, "Tuned on dev")[1] == [
        "LoRA", "bundled-choice", "0.001: 2.000, 0.01: 1.500, 0.1: -", "0.01"
    ]  # fmt: skip
    assert table(text, "Data")[1:] == [["bundled-choice", "train", "t", "1"], ["bundled-choice", "test", "x", "1"]]
    assert [(row[0], row[3]) for row in table(text, "Made with")[1:]] == [("abc", "1"), ("dirty", "1")]
    assert "it \\| broke" in text.partition("## Failed runs")[2]


def test_pictures(tmp_path: Path) -> None:
    limits = {"figure3": {"values": [1, 3]}, "figure4": {"values": [0, 0.01]}}
    of = grid(sections=["figure2", "figure3", "figure4", "figure5"], limits=limits)
    share = {"experts": ["a.q_proj", "a.k_proj"], "blocks": [0, 1], "share": [[1.0, 0.0], [0.5, 0.5]], "prompts": 4}
    found = []
    for run in of.runs():
        shares = dict.fromkeys(run.tests, share) if run.method == "milora" else {}
        if run.settings.get("r") in (None, 32):
            found.append(record(run, 0.5 + 0.1 * run.seed, expert_shares=shares))
    text = report(of, found, tmp_path)
    for name in ("figure2", "figure3", "figure4", "figure5"):
        assert image.imread(tmp_path / f"{name}.png").shape[1] > 500
        assert f"]({name}.png)" in text
    overall = {
        (one["task"], one["expert"]): float(one["share"])
        for one in numbers(tmp_path / "figure2.csv")
        if one["block"] == "all"
    }
    assert overall["bundled-choice", "a.q_proj"] == 0.75
    assert table(text, "Figure 2")[1] == ["bundled-choice", "75.0%", "25.0%"]


@pytest.mark.parametrize(("settings", "folder"), [("bundled", ""), ("bundled-240", "240-steps")])
def test_the_committed_tables_come_from_the_committed_records_alone(
    settings: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = ROOT / "docs" / "results" / folder
    shutil.copy(committed / "results.jsonl", tmp_path)

    def touched(*_: Any, **__: Any) -> Any:
        pytest.fail("a report looked at data or at a backbone's weights")

    monkeypatch.setattr(inputs, "Inputs", touched)
    monkeypatch.setattr(inputs, "_backbone_fingerprint", touched)
    monkeypatch.setattr("milora.tasks.registry.get", touched)
    arguments = ["--settings", str(ROOT / "reproduction" / f"{settings}.yaml"), "--output", str(tmp_path), "--no-run"]
    assert command.main(arguments) == 0
    for path in committed.glob("*.csv"):
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name
