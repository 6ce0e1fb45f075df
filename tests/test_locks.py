"""Locks between real processes: they keep others out, say who has them, and die with their process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milora import locks
from milora.locks import alone_in, holder, locked
from milora_core.errors import MiLoraError

# Forked, as a new interpreter takes seconds to import torch.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def hold(path: Path, told: Path) -> None:
    with locked(path) as is_mine:
        told.write_text(str(is_mine))
        time.sleep(60)


def hold_folder(folder: Path, told: Path) -> None:
    with alone_in(folder, "never mind"):
        told.write_text("here")
        time.sleep(60)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.read_text()


def test_a_lock_keeps_other_processes_out_and_dies_with_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    process = FORK.Process(target=hold, args=(path, tmp_path / "told"))
    process.start()
    try:
        assert wait_for(tmp_path / "told") == "True"
        with locked(path) as is_mine:
            assert not is_mine
        assert holder(path).startswith(f"process {process.pid} on ")
        with locked(tmp_path / "locks" / "b.lock") as is_mine:
            assert is_mine
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=30)
        assert path.exists(), "the file stays, and means nothing"
        with locked(path) as is_mine:
            assert is_mine
            assert holder(path).startswith(f"process {os.getpid()} on ")
    finally:
        process.kill()
        process.join()


def test_a_lock_is_given_back_and_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path) as is_mine:
        assert is_mine
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with locked(path) as is_mine:
            assert is_mine, "the child that was started meanwhile holds it"
    finally:
        child.kill()
        child.wait()
    assert holder(path) == "another process"


def test_a_second_process_is_told_who_is_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = FORK.Process(target=hold_folder, args=(folder, tmp_path / "told"))
    process.start()
    try:
        assert wait_for(tmp_path / "told") == "here"
        with pytest.raises(MiLoraError) as raised, alone_in(folder, "give another"):
            pytest.fail("two are in")
        assert str(raised.value) == f"{folder} is in use by {holder(folder / '.lock')}: give another."
        assert f"process {process.pid} on" in str(raised.value)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=30)
        with alone_in(folder, "give another"):
            pass
    finally:
        process.kill()
        process.join()


def test_an_exception_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), alone_in(tmp_path, ""):
        # What a lock that is not to be had raises, from somewhere else.
        raise BlockingIOError
    with alone_in(tmp_path, ""):
        pass


def test_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(MiLoraError, match="no flock"), locked(tmp_path / "a.lock"):
        pass
    with caplog.at_level(logging.WARNING), alone_in(tmp_path, ""):
        pass
    assert "Nothing keeps other processes out" in caplog.text


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiLoraError, match=r"The lock .*file/\.lock cannot be made"), alone_in(tmp_path / "file", ""):
        pass
