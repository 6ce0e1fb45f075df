"""`scripts/bench_gpu.sh`: its dry run, its output folders, and that it never reuses a stale result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.sh"
NAMES = {
    "engine", "kernel", "decode-eager", "decode-compiled", "tenants-eager-2", "tenants-compiled-2", "prefill", "train",
    "traffic",
}  # fmt: skip

MILORA = """#!/bin/sh
# Stands for `milora`: a measurement prints what it was asked for, and a table the names of its files.
echo "$*" >>"$CALLS"
if [ "$2" = markdown ]; then shift 2; basename -a "$@"; else echo "{\\"asked\\": \\"$*\\"}"; fi
"""

PYTHON = """#!/bin/sh
# Stands for `python`, which runs pytest and the engine's benchmark.
echo "$*" >>"$PYTHON_CALLS"
echo '{"python": 1}'
"""


@pytest.mark.slow
def test_it_runs_dry(tmp_path: Path) -> None:
    settings = {"DRY_RUN": "1", "MILORA": f"{sys.executable} -m milora", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.json")} == NAMES
    assert "skipped" in (tmp_path / "tests.txt").read_text() or torch.cuda.is_available()
    text = (tmp_path / "README.md").read_text()
    assert "engine is faster by" in text
    assert all(f"\n{title}: " in text for title in ("kernel", "decode", "tenants", "prefill", "train", "traffic"))
    for name in ("decode-compiled", "tenants-compiled-2"):
        for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]:
            # A greedy step is one graph, compiled before the measurement begins.
            expected = (0, 0, row["beam"] == 1, row["beam"] > 1)
            compiled, reason = row["compiled_in_warm_up"] > 0, row["not_compiled"] is not None
            assert (row["compiled_later"], row["graph_breaks"], compiled, reason) == expected, (name, row["method"])


class Repository:
    """A repository that contains only the script, and `milora` and `python` commands that record their calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = root / "calls"
        self.python_calls = root / "python-calls"
        (root / "scripts").mkdir()
        shutil.copy(SCRIPT, root / "scripts")
        for name, text in (("milora", MILORA), ("python", PYTHON)):
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        (root / "elsewhere").mkdir()

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        self.python_calls.write_text("")
        own = {"MILORA": str(self.root / "milora"), "CALLS": str(self.calls), "TMPDIR": str(self.root), "BATCHES": "2"}
        own |= {"PYTHON": str(self.root / "python"), "PYTHON_CALLS": str(self.python_calls)}
        inherited = {name: value for name, value in os.environ.items() if name != "OUT"}
        return subprocess.run(
            ["bash", str(self.root / "scripts" / "bench_gpu.sh"), *arguments],
            env={**inherited, **own, **settings}, cwd=self.root / "elsewhere", capture_output=True, text=True,
        )  # fmt: skip

    def results(self) -> set[Path]:
        """The folders with complete results."""
        return {path.parent for path in self.root.rglob("kernel.json")}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_where_it_writes(repository: Repository) -> None:
    assert repository.run().returncode == 0
    assert repository.results() == {repository.root / "docs" / "results" / "gpu"}
    assert repository.run("own").returncode == 0
    assert repository.run(OUT="out").returncode == 0
    of_callers = {repository.root / "elsewhere" / name for name in ("own", "out")}
    assert repository.results() == {repository.root / "docs" / "results" / "gpu", *of_callers}


def test_a_dry_run_keeps_away_from_the_results(repository: Repository) -> None:
    done = repository.run(DRY_RUN="1")
    assert done.returncode == 0
    (folder,) = repository.results()
    assert folder.parent == repository.root
    assert f"tables in {folder}/README.md" in done.stderr
    assert not (repository.root / "docs").exists()


def test_what_is_finished_is_not_repeated(repository: Repository) -> None:
    assert repository.run("own").returncode == 0
    folder = repository.root / "elsewhere" / "own"
    files = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert {path.stem for path in files} == NAMES
    (folder / "train.json").unlink()
    assert repository.run("own").returncode == 0
    asked = [line.split()[1] for line in repository.calls.read_text().splitlines()]
    assert asked == ["train", "markdown"]
    assert not repository.python_calls.read_text()
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == files
    assert set((folder / "README.md").read_text().split()) >= {f"{name}.json" for name in NAMES - {"engine"}}


def test_a_result_of_other_settings_is_told_of_and_left_alone(repository: Repository) -> None:
    assert repository.run("own", DRY_RUN="1").returncode == 0
    folder = repository.root / "elsewhere" / "own"
    (folder / "prefill.json").unlink()
    files = {path: path.read_bytes() for path in folder.glob("*.json")}
    done = repository.run("own")
    assert done.returncode == 1
    assert f"own/kernel.json exists, but own/kernel.log does not begin with '{repository.root}/milora" in done.stderr
    assert {path: path.read_bytes() for path in folder.glob("*.json") if path.stem != "prefill"} == files
    tables = (folder / "README.md").read_text()
    assert "prefill.json" in tables
    assert "train.json" not in tables


def test_a_budget_that_is_used_up_skips_and_a_failure_does_not_stop_the_others(repository: Repository) -> None:
    done = repository.run("own", BUDGET="0")
    assert done.returncode == 1
    assert "train skipped: the budget of 0 seconds is used up" in done.stderr
    assert not repository.results()
    done = repository.run("own", PYTHON="false")
    assert done.returncode == 1
    assert "engine failed" in done.stderr
    folder = repository.root / "elsewhere" / "own"
    assert {path.stem for path in folder.glob("*.json")} == NAMES - {"engine"}
    assert repository.run("own").returncode == 0
    assert "bench_engine.py decode throughput" in repository.python_calls.read_text()
    assert {path.stem for path in folder.glob("*.json")} == NAMES
    assert '{"python": 1}' in (folder / "README.md").read_text()
