"""Folders with one writing process: others get an error that names it, and a killed process leaves no lock."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from milora.locks import writing_alone
from milora_core.errors import MiLoraError

# Forked, because a new interpreter needs seconds to import torch.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def hold(folder: Path, told: Path, worker: bool) -> None:
    with writing_alone(folder):
        if worker and os.fork() == 0:  # like a data loader's worker that outlives its killed parent
            time.sleep(10)
            os._exit(0)
        told.write_text("here")
        time.sleep(60)


@contextmanager
def holding(folder: Path, told: Path, worker: bool = False) -> Iterator[int]:
    process = FORK.Process(target=hold, args=(folder, told, worker))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with holding(folder, tmp_path / "told") as pid:
        for _ in range(2):  # the first refusal must keep the name
            with pytest.raises(MiLoraError) as raised, writing_alone(folder, "give another"):
                pytest.fail("two are in")
            assert str(raised.value) == f"{folder} is in use by process {pid} on {platform.node()}: give another."
        with writing_alone(tmp_path / "other"):
            pass


@pytest.mark.parametrize("worker", [False, True])
def test_a_killed_process_leaves_no_lock(tmp_path: Path, worker: bool) -> None:
    folder = tmp_path / "out"
    with holding(folder, tmp_path / "told", worker) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with writing_alone(folder):
            pass


def test_a_program_started_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with writing_alone(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with writing_alone(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_an_exception_releases_the_lock_and_comes_through(tmp_path: Path) -> None:
    # The exception for a held lock, raised by something else.
    with pytest.raises(BlockingIOError), writing_alone(tmp_path):
        raise BlockingIOError
    refused = pytest.raises(MiLoraError, match=f"process {os.getpid()} on")
    with writing_alone(tmp_path), refused, writing_alone(tmp_path):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(self: FileLock, **options: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    done = []
    with caplog.at_level(logging.WARNING), writing_alone(tmp_path):
        done.append(True)
    assert done
    assert "has no locks" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiLoraError, match=r"file is a file: name a folder"), writing_alone(tmp_path / "file"):
        pass
