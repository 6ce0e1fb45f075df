"""A grid worked through: failures, several processes, and a process that is killed in the middle of a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.grids import grid, instantly, record

from milora.paper import worker
from milora.paper.grid import Grid
from milora.paper.runs import Run, UnfinishedRunError
from milora.paper.store import ResultStore
from milora.paper.worker import Worker
from milora_core.errors import MiLoraError

RUNS = 2 * 2 * 2 + 2 * 2
# Forked, as a new interpreter takes seconds to import torch.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def shared_grid() -> Grid:
    return grid(sections=["table2"], only_methods=["lora", "milora"])


def work(folder: Path, name: str) -> None:
    worker.WAIT = 0.05

    def execute(run: Run, *_: Any) -> dict[str, Any]:
        with (folder / "started").open("a") as file:
            file.write(run.digest + "\n")
        time.sleep(0.1)
        return record(run)

    done = Worker(shared_grid(), ResultStore(folder), execute=execute).work()
    (folder / name).write_text(f"{done.finished} {done.failed} {done.left}")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_everything_is_run_once(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    said: list[str] = []
    of = grid(sections=["table1", "table2"], only_methods=["lora", "milora"], tune={"learning_rate": [1, 2]})
    done = Worker(of, store, execute=instantly, say=said.append).work()
    # For two tasks and both together, two tries with seed 0, of which one is seed 0's run, and seed 1.
    assert (done.finished, done.failed, done.left, done.awaited) == (2 * 3 * 3, 0, 0, 0)
    assert len(lines(store.path)) == len(said) == 18
    Worker(of, store, execute=lambda *_: pytest.fail("run again")).work()


def test_a_failure_is_recorded_stops_nothing_and_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    of = grid(sections=["table1"], only_methods=["lora", "milora"])
    calls: list[str] = []

    def fails_for_lora(run: Run, *_: Any) -> dict[str, Any]:
        calls.append(run.digest)
        if run.method == "lora":
            raise RuntimeError("it\nbroke")
        return record(run)

    done = Worker(of, store, execute=fails_for_lora).work()
    assert (done.finished, done.failed, done.left) == (4, 4, 0)
    assert len(calls) == 8, "each once"
    failed = [json.loads(line) for line in lines(store.path) if '"failed"' in line]
    assert {one["error"] for one in failed} == {"RuntimeError: it broke"}
    assert all(one["method"] == "lora" and one["seed"] in (0, 1) for one in failed)
    done = Worker(of, store, execute=instantly).work()
    assert (done.finished, done.failed) == (8, 0)


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_failed_takes_no_room(tmp_path: Path, error: Exception) -> None:
    def fails(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        (folder / "checkpoint-1").mkdir(parents=True)
        raise error

    store = ResultStore(tmp_path)
    with suppress(MiLoraError):
        Worker(grid(sections=["table1"], only_methods=["lora"]), store, execute=fails).work()
    assert not list((store.working / "runs").iterdir())


@pytest.mark.parametrize("error", [UnfinishedRunError("no judge"), KeyboardInterrupt()])
def test_what_was_interrupted_keeps_its_folder_until_its_record_is_written(
    tmp_path: Path, error: BaseException
) -> None:
    def interrupted(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        folder.mkdir(parents=True)
        raise error

    def goes_on(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        assert folder.is_dir()
        return record(run)

    store = ResultStore(tmp_path)
    of = grid(sections=["table1"], only_methods=["lora"], tasks=["bundled-choice"], seeds=(0,))
    with suppress(KeyboardInterrupt):
        Worker(of, store, execute=interrupted).work()
    append = store.append

    def watched(one: dict[str, Any]) -> None:
        assert store.run_folder(one["run"]).is_dir()
        append(one)

    store.append = watched  # type: ignore[method-assign]
    assert Worker(of, store, execute=goes_on).work().finished == 1
    assert not list((store.working / "runs").iterdir())


def test_grades_and_routes_are_told_as_well_as_accuracies(tmp_path: Path) -> None:
    def execute(run: Run, *_: Any) -> dict[str, Any]:
        return record(run, tests={"mt-bench": {"score": 6.5}, "bbh": {"accuracy": 0.25}} if run.seed else {})

    said: list[str] = []
    of = grid(sections=["table3"], only_methods=["milora"], tasks=())
    Worker(of, ResultStore(tmp_path), execute=execute, say=said.append).work()
    assert "seed 0: routes in 10 s" in said[0]
    assert "seed 1: mt-bench 6.50 of 10, bbh 25.0% in 10 s" in said[1]


def test_where_all_tries_fail_the_grid_ends(tmp_path: Path) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise ValueError("no")

    of = grid(sections=["table1"], only_methods=["lora"], tune={"learning_rate": [1, 2]})
    done = Worker(of, ResultStore(tmp_path), execute=fails).work()
    assert (done.finished, done.failed, done.left) == (0, 4, 0)


def test_two_processes_share_a_grid(tmp_path: Path) -> None:
    processes = [FORK.Process(target=work, args=(tmp_path, name)) for name in "ab"]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=180)
    assert [(tmp_path / name).read_text() for name in "ab"] == [f"{RUNS} 0 0"] * 2
    started = lines(tmp_path / "started")
    assert len(started) == len(set(started)) == RUNS


def test_a_killed_process_loses_its_run_only(tmp_path: Path) -> None:
    killed = FORK.Process(target=work, args=(tmp_path, "killed"))
    killed.start()
    deadline = time.monotonic() + 120
    while len(lines(tmp_path / "started")) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(timeout=30)
    finished = len(ResultStore(tmp_path).read().finished)
    assert 3 <= finished < RUNS
    started = len(lines(tmp_path / "started"))
    assert started - finished <= 1
    done = Worker(shared_grid(), ResultStore(tmp_path), execute=instantly)
    assert done.work().finished == RUNS
    assert len(lines(ResultStore(tmp_path).path)) == RUNS, "nothing was made twice"


def test_a_full_disk_ends_the_grid_in_one_line(tmp_path: Path) -> None:
    calls: list[str] = []

    def fills(run: Run, *_: Any) -> dict[str, Any]:
        calls.append(run.digest)
        if len(calls) == 3:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("could not save") from error
        return record(run)

    store = ResultStore(tmp_path)
    with pytest.raises(MiLoraError, match=r"is full.*make room") as caught:
        Worker(grid(sections=["table1"], only_methods=["lora"]), store, execute=fills).work()
    assert "\n" not in str(caught.value)
    assert len(store.read().finished) == 2
    assert store.read().failures == {}
