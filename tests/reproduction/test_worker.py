"""Running a grid: failures, several processes, a killed process, and changed data."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.grids import FINGERPRINTS, EverythingAtHand, grid, instantly, record

from milora_core.errors import MiLoraError
from reproduction import worker
from reproduction.adapter_tests import UnfinishedRunError
from reproduction.grid import Grid, Run
from reproduction.inputs import Inputs
from reproduction.store import Store
from reproduction.worker import Worker

RUNS = 2 * 2 * 2 + 2 * 2
# Forked, because a new interpreter needs seconds to import torch.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Progress(NamedTuple):
    """The numbers of runs with a result, and of runs that failed in a call."""

    finished: int
    failed: int


def work(of: Grid, folder: Path, execute: Any = instantly, inputs: Inputs | None = None, **values: Any) -> Progress:
    failed = Worker(of, Store(folder), inputs or EverythingAtHand(of.request), execute, **values).work()
    return Progress(sum(bool(of.answers(run)) for run in of.runs()), failed)


def shared_grid() -> Grid:
    return grid(sections=["table2"], only_methods=["lora", "milora"])


def work_slowly(folder: Path, name: str) -> None:
    worker.WAIT = 0.05

    def execute(run: Run, *_: Any) -> dict[str, Any]:
        with (folder / "started").open("a") as file:
            file.write(run.digest(FINGERPRINTS) + "\n")
        time.sleep(0.1)
        return record(run)

    done = work(shared_grid(), folder, execute)
    (folder / name).write_text(f"{done.finished} {done.failed}")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_everything_is_run_once(tmp_path: Path) -> None:
    said: list[str] = []
    of = grid(sections=["table1", "table2"], only_methods=["lora", "milora"], tune={"learning_rate": [1, 2]})
    done = work(of, tmp_path, say=said.append)
    # Three task sets (two tasks and both), each with two tries and seed 1; one of the tries is seed 0's run.
    assert done == Progress(2 * 3 * 3, 0)
    assert len(Store(tmp_path).read()) == len(said) == 18
    assert work(of, tmp_path, lambda *_: pytest.fail("run again")) == done


def test_other_rows_are_run_again_and_records_of_format_1_are_not(tmp_path: Path) -> None:
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0,), tasks=["bundled-choice"])
    store = Store(tmp_path)
    store.prepare()
    (run,) = of.runs()
    store.append(record(run, fingerprints={**FINGERPRINTS, "test": {"bundled-choice": "other labels"}}, format=1))
    assert work(of, tmp_path, lambda *_: pytest.fail("run again")).finished == 1
    changed = {**FINGERPRINTS, "backbone": "other weights"}
    store.path.unlink()
    store.append(record(run, fingerprints=changed))
    assert work(of, tmp_path).finished == 1
    assert [one["fingerprints"] for one in store.read()] == [changed, FINGERPRINTS]


def test_what_cannot_be_run_is_left_out_and_the_rest_is_made(tmp_path: Path) -> None:
    of = grid(sections=["table2"], only_methods=["lora"], tune={"learning_rate": [1, 2]})
    inputs = EverythingAtHand(of.request, {"bundled-extraction": "no such folder"})
    assert work(of, tmp_path, inputs=inputs) == Progress(3, 0)
    assert {tuple(one["tasks"]) for one in Store(tmp_path).read()} == {("bundled-choice",)}


def test_a_failure_is_recorded_stops_nothing_and_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    of = grid(sections=["table1"], only_methods=["lora", "milora"])
    calls: list[str] = []

    def fails_for_lora(run: Run, *_: Any) -> dict[str, Any]:
        calls.append(run.key)
        if run.method == "lora":
            raise RuntimeError("it\nbroke")
        return record(run)

    assert work(of, tmp_path, fails_for_lora) == Progress(4, 4)
    assert len(calls) == 8, "each once"
    failed = [one for one in Store(tmp_path).read() if one["status"] == "failed"]
    assert {one["error"] for one in failed} == {"RuntimeError: it broke"}
    assert work(of, tmp_path) == Progress(8, 0)
    tuned = grid(sections=["table1"], only_methods=["lora"], tune={"learning_rate": [1, 2]})
    assert work(tuned, tmp_path, fails_for_lora) == Progress(0, 4), "where all tries fail the grid ends"


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_failed_takes_no_room(tmp_path: Path, error: Exception) -> None:
    def fails(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        (folder / "checkpoint-1").mkdir(parents=True)
        raise error

    with suppress(MiLoraError):
        work(grid(sections=["table1"], only_methods=["lora"]), tmp_path, fails)
    assert not list((tmp_path / ".working" / "runs").iterdir())


@pytest.mark.parametrize("error", [UnfinishedRunError("no judge"), KeyboardInterrupt()])
def test_what_was_interrupted_keeps_its_folder_until_its_record_is_written(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        folder.mkdir(parents=True)
        raise error

    def resumes(run: Run, folder: Path, *_: Any) -> dict[str, Any]:
        assert folder.is_dir()
        return record(run)

    append = Store.append

    def watched(store: Store, one: dict[str, Any]) -> None:
        assert store.run_folder(one["run"]).is_dir()
        append(store, one)

    monkeypatch.setattr(Store, "append", watched)
    of = grid(sections=["table1"], only_methods=["lora"], tasks=["bundled-choice"], seeds=(0,))
    with suppress(KeyboardInterrupt):
        work(of, tmp_path, interrupted)
    assert work(of, tmp_path, resumes).finished == 1
    assert not list((tmp_path / ".working" / "runs").iterdir())


def test_two_processes_share_a_grid(tmp_path: Path) -> None:
    processes = [FORK.Process(target=work_slowly, args=(tmp_path, name)) for name in "ab"]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=180)
    assert [(tmp_path / name).read_text() for name in "ab"] == [f"{RUNS} 0"] * 2
    started = lines(tmp_path / "started")
    assert len(started) == len(set(started)) == RUNS


def test_a_killed_process_loses_its_run_only(tmp_path: Path) -> None:
    killed = FORK.Process(target=work_slowly, args=(tmp_path, "killed"))
    killed.start()
    deadline = time.monotonic() + 120
    while len(lines(tmp_path / "started")) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(timeout=30)
    finished = len(Store(tmp_path).read())
    assert 3 <= finished < RUNS
    assert len(lines(tmp_path / "started")) - finished <= 1
    assert work(shared_grid(), tmp_path).finished == RUNS
    assert len(Store(tmp_path).read()) == RUNS, "nothing was made twice"


def test_a_full_disk_ends_the_grid_in_one_line(tmp_path: Path) -> None:
    calls: list[str] = []

    def fills(run: Run, *_: Any) -> dict[str, Any]:
        calls.append(run.key)
        if len(calls) == 3:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("could not save") from error
        return record(run)

    with pytest.raises(MiLoraError, match=r"is full") as caught:
        work(grid(sections=["table1"], only_methods=["lora"]), tmp_path, fills)
    assert "\n" not in str(caught.value)
    assert [one["status"] for one in Store(tmp_path).read()] == ["finished"] * 2


def append_many(folder: Path, name: str) -> None:
    store = Store(folder)
    store.prepare()
    for index in range(60):
        store.append({"run": f"{name}-{index}", "filling": name * 5000})


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    writers = [FORK.Process(target=append_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    found = [json.loads(line) for line in lines(tmp_path / "results.jsonl")]
    assert len(found) == 120
    assert all(one["filling"] == one["run"][0] * 5000 for one in found)


def test_a_full_disk_or_half_a_line_loses_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.prepare()
    store.append({"run": "a"})
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(MiLoraError, match=r"results\.jsonl cannot be written: No space left.*are kept"):
            store.append({"run": "b"})
    with store.path.open("a") as file:
        file.write('{"run": "half of')
    assert [one["run"] for one in store.read()] == ["a"]
    store.append({"run": "c"})
    assert [one["run"] for one in store.read()] == ["a", "c"]
    with pytest.raises(MiLoraError, match="is a file"):
        Store(store.path)
