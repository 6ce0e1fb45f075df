"""The page on tasks agrees with the code: every task, its splits and tokens, and its sources of rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from milora.tasks import alpaca, bbh, mmlu, mt_bench, registry
from milora.tasks.instruction import InstructionTask

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
TABLES = {
    title: [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "][1:]
    for title, text in re.findall(r"^##+ (.*?)\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}
BENCHMARKS = {row[0].strip("`"): row[1:] for row in TABLES["Benchmarks"]}
BUNDLED = {row[0].strip("`"): row[1:] for title in ("Bundled tasks", "Shop tasks") for row in TABLES[title]}
OTHERS = {
    "mmlu": (mmlu.HUB_ID, mmlu.FOLDER),
    "mmlu-subject": (mmlu.HUB_ID, mmlu.FOLDER),
    "bbh": (bbh.HUB_ID, bbh.FOLDER),
    "mt-bench": (mt_bench.HUB_ID, mt_bench.FOLDER),
    "alpaca": (alpaca.HUB_ID, alpaca.FILES[0].partition("/")[0]),
}


def test_all_tasks_are_there() -> None:
    assert {*BENCHMARKS, *BUNDLED} == set(registry.names())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark(name: str) -> None:
    rows, dev, metric, tokens, hub, folder = BENCHMARKS[name]
    task = registry.get(name)
    train, test = (count.strip() != "none" for count in rows.split(","))
    assert int(tokens) == task.max_new_tokens
    assert (train, dev != "none") == ("train" in task.splits, "dev" in task.splits)
    assert test == ("test" in task.splits or name == "mt-bench")
    assert ("mean accuracy of" in metric) == (task.average == "groups")
    if isinstance(task, InstructionTask):
        found = (task.hub_id, task.folder)
        assert (task.hub_config or "") == (hub.partition("(`")[2].removesuffix("`)"))
        assert ("hub's" in dev) == ("dev" in task.hub_splits)
    else:
        found = OTHERS[name]
    assert (hub.split("`")[1], folder.strip("`")) == found


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_task(name: str) -> None:
    assert int(BUNDLED[name][-1]) == registry.get(name).max_new_tokens
