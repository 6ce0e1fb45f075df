import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from milora.paper import speed
from milora.paper.speed import FILE, speed_section
from milora_core.errors import MiLoraError


def test_a_measurement_beside_the_paper_s(tmp_path: Path) -> None:
    speeds = {("dora", 1): 10.0, ("moelora", 1): 8.0, ("milora", 1): 12.0, ("milora", 3): 9.0}
    rows = [
        {"method": name, "beam": beam, "tokens_per_second": speed, "peak_memory_mib": 100.4}
        for (name, beam), speed in speeds.items()
    ]
    measured = {
        "rows": rows,
        "settings": {"rounds": 5, "backbone": "tinyllama-1.1b"},
        "environment": {"processor": "x"},
    }
    (tmp_path / FILE).write_text(json.dumps(measured))
    lines = speed_section(tmp_path)
    # 12 / 10 and 12 / 8; in the paper 43.7 / 36.5 and 43.7 / 35.9.
    assert lines[2] == "| DoRA | 1 | 10.0 | 36.5 | 1.200 | 1.197 | 100 | 13784 |"
    assert lines[3] == "| MOELoRA | 1 | 8.0 | 35.9 | 1.500 | 1.217 | 100 | 13788 |"
    assert lines[4] == "| MiLoRA | 1 | 12.0 | 43.7 | - | - | 100 | 13784 |"
    assert lines[5] == "| MiLoRA | 3 | 9.0 | 33.5 | - | - | 100 | 15300 |"


def test_each_row_has_its_number_of_tokens_where_they_differ(tmp_path: Path) -> None:
    rows = [
        {"method": name, "beam": 1, "tokens_per_second": 8.0, "peak_memory_mib": 100.4, "new_tokens": tokens}
        for name, tokens in (("dora", 4), ("milora", 32))
    ]
    measured = {"rows": rows, "settings": {"rounds": 5, "new_tokens": 32}, "environment": {"processor": "x"}}
    (tmp_path / FILE).write_text(json.dumps(measured))
    lines = speed_section(tmp_path)
    assert lines[0].startswith("|  | beam | new tokens | tokens a second |")
    assert {line.count("|") for line in lines[:4]} == {10}
    assert lines[2].startswith("| DoRA | 1 | 4 | 8.0 |")
    assert lines[3].startswith("| MiLoRA | 1 | 32 | 8.0 |")
    assert "4 to 32 new ones (each row has its number)" in lines[-1]
    # With the same for all it is said once, and it is what they wrote rather than what was asked for.
    (tmp_path / FILE).write_text(json.dumps({**measured, "rows": [{**row, "new_tokens": 16} for row in rows]}))
    lines = speed_section(tmp_path)
    assert "new tokens" not in lines[0]
    assert "16 new ones, x." in lines[-1]


def test_without_a_measurement_and_with_a_broken_one(tmp_path: Path) -> None:
    assert speed_section(tmp_path, measure=False) == ["Not measured yet."]
    (tmp_path / FILE).write_text("{")
    with pytest.raises(MiLoraError, match="remove it to measure again"):
        speed_section(tmp_path)


def test_of_two_processes_one_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Measurement:
        def to_dict(self) -> dict[str, Any]:
            time.sleep(0.2)
            made.append(1)
            return {"rows": [], "settings": {}, "environment": {"processor": "x"}}

    monkeypatch.setattr(speed, "table4", lambda settings, say: Measurement())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: speed_section(tmp_path), range(2))
    assert first == second
    assert len(made) == 1
