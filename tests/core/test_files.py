"""Files are written completely or not at all: writers fail, are killed, meet a full disk, or race."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.full_disk import largest_file

from milora_core.errors import MiLoraError
from milora_core.files import is_disk_full, whole_file, whole_folder, write_json, write_text, writing

# Forked, because a new interpreter needs seconds to import torch.
FORK = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_writer_that_raises_halfway_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "deep" / "results.json"
    write_text(path, "old")

    def write() -> None:
        with whole_file(path) as partial:
            partial.write_text("ne")
            assert path.read_text() == "old", "the new one is beside it"
            raise error

    with pytest.raises(type(error)) as raised:
        write()
    assert raised.value is error
    assert path.read_text() == "old"
    assert names(path.parent) == ["results.json"]
    write_text(path, "new é")
    assert path.read_bytes() == "new é".encode()
    assert names(path.parent) == ["results.json"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old")
    with largest_file(1000), pytest.raises(MiLoraError) as raised:
        write_text(path, "new" * 1000, ". The results are kept.")
    assert str(raised.value) == f"{path} cannot be written: File too large. The results are kept."
    tensors = {"a": torch.zeros(1000)}
    # Written by Rust, which raises a different exception.
    with largest_file(1000), pytest.raises(MiLoraError, match="File too large"), whole_file(path) as partial:
        save_file(tensors, partial)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]
    with whole_file(path) as partial:
        save_file(tensors, partial)
    assert load_file(path)["a"].shape == (1000,)


def test_a_disk_that_says_only_in_the_end_that_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MiLoraError, match="quota"):
        write_text(path, "new")
    with pytest.raises(MiLoraError, match="quota"), whole_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old")

    def write_half() -> None:
        with whole_file(path) as partial:
            partial.write_text("ne")
            time.sleep(60)

    writer = FORK.Process(target=write_half)
    writer.start()
    deadline = time.monotonic() + 60
    while len(names(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    (left,) = set(names(tmp_path)) - {"results.json"}
    assert left.startswith(".")
    assert left.endswith(".partial")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_readers_see_whole_files_while_several_write(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    texts = {letter * 100_000 for letter in "abc"}

    def write(text: str) -> None:
        for _ in range(8):
            write_text(path, text)

    write_text(path, "a" * 100_000)
    # In one process, so the process number alone does not distinguish writers.
    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert names(tmp_path) == ["results.txt"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"

    def write_half() -> None:
        with whole_folder(folder) as partial:
            (partial / "a").write_text("a")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_half()
    assert names(folder.parent) == []
    folder.mkdir()
    for _ in range(2):
        with whole_folder(folder) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "a").write_text("a")
            assert names(folder) == []
        assert (folder / "inner" / "a").read_text() == "a"
        (folder / "inner" / "a").unlink()
        (folder / "inner").rmdir()
    (folder / "mine").touch()
    with pytest.raises(MiLoraError, match="adapter cannot be written: Directory not empty"), whole_folder(folder):
        pass
    assert names(folder) == ["mine"]
    assert names(folder.parent) == ["adapter"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiLoraError, match=r"file/a cannot be written: Not a directory|File exists"):
        write_text(tmp_path / "file" / "a", "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MiLoraError, match="folder cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "a")
    with pytest.raises(MiLoraError, match="empty cannot be written: No such file"), whole_file(tmp_path / "empty"):
        pass  # a writer that wrote nothing
    assert names(tmp_path) == ["file", "folder"]


def test_a_number_that_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"é": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"é": 1}
    assert "é" in path.read_text()


@pytest.mark.parametrize("short_of_its_end", [True, False])
def test_what_torch_cannot_write_is_a_full_disk(tmp_path: Path, short_of_its_end: bool) -> None:
    """torch reports a file that lacks its last byte differently from one that lacks most bytes."""
    if short_of_its_end and torch.__version__.startswith("2.7."):
        pytest.skip("torch 2.7 does not report a missing last byte")
    path, tensors = tmp_path / "optimizer.pt", {"a": torch.zeros(100_000)}
    torch.save(tensors, path)
    limit = path.stat().st_size - 1 if short_of_its_end else 1000
    said = pytest.raises(MiLoraError, match="No space left on device, make room; go on")
    with largest_file(limit), said, writing(path, "; go on"):
        torch.save(tensors, path)
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), writing(path):
        torch.load(path)


def test_what_a_full_disk_looks_like() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert is_disk_full(RuntimeError("writing failed: No space left on device"))
    assert not is_disk_full(OSError(errno.ENOENT, "x"))
    assert not is_disk_full(RuntimeError("os error 28 is no number here"))


def test_a_full_disk_behind_another_error_is_said_too(tmp_path: Path) -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save") from error

    said = "a cannot be written: No space left on device, make room; all is kept"
    with pytest.raises(MiLoraError, match=said), writing(tmp_path / "a", "; all is kept"):
        write()
