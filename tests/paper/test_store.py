"""Results, with real processes: what is written survives."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from milora.paper.store import Results, ResultStore
from milora_core.errors import MiLoraError

# Forked, as a new interpreter takes seconds to import torch.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def append(folder: Path, name: str) -> None:
    store = ResultStore(folder)
    store.prepare()
    for index in range(60):
        store.append({"run": f"{name}-{index}", "status": "finished", "filling": name * 5000})


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    writers = [FORK.Process(target=append, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 120
    for line in lines:
        record = json.loads(line)
        assert record["filling"] == record["run"][0] * 5000
    assert len(ResultStore(tmp_path).read().finished) == 120


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    store.append({"run": "a", "status": "finished"})
    write = os.write
    full = True

    def cut_off(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:7]) if full else write(descriptor, data)

    monkeypatch.setattr(os, "write", cut_off)
    with pytest.raises(MiLoraError, match=r"results\.jsonl cannot be written to: No space left.*are kept"):
        store.append({"run": "b", "status": "finished"})
    assert list(store.read().finished) == ["a"]
    full = False
    store.append({"run": "c", "status": "finished"})
    assert list(store.read().finished) == ["a", "c"]


def test_half_a_line_is_passed_over_and_not_continued(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    store.append({"run": "a", "status": "finished"})
    with store.path.open("a") as file:
        file.write('{"run": "b", "sta')
    assert list(store.read().finished) == ["a"]
    store.append({"run": "c", "status": "finished"})
    assert list(store.read().finished) == ["a", "c"]


def test_failures_are_counted_and_a_later_success_stands() -> None:
    failed = [{"run": "a", "status": "failed", "error": text} for text in ("first", "second")]
    results = Results.of([*failed, {"run": "a", "status": "finished", "x": 1}, {"run": "a", "status": "finished"}])
    assert results.failures == {"a": ["first", "second"]}
    assert results.finished["a"]["x"] == 1


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiLoraError, match="is a file"):
        ResultStore(tmp_path / "file")
    assert ResultStore(tmp_path / "nothing").read() == Results()
    ResultStore(tmp_path / "new").prepare()
    assert (tmp_path / "new" / ".working" / ".gitignore").read_text() == "*\n"
