"""Table 4: ratios within rounds; rounds on a disturbed machine are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_core.errors import MiLoraError
from reproduction.store import Store
from reproduction.table4 import FILE, table4

ROUNDS = {
    "base": [10, 5, 10, 11],
    "dora-cached": [8, 8, 4, 8],
    "dora": [1, 1, 1, 1],
    "moelora": [4, 1, 5, 4],
    "milora": [8, 9, 8, 10],
}


def test_a_measurement_beside_the_papers(tmp_path: Path) -> None:
    rows = [
        {"method": name, "beam": 1, "rounds": rounds, "peak_memory_mib": 100.4, "new_tokens": 32}
        for name, rounds in ROUNDS.items()
    ]
    (tmp_path / FILE).write_text(json.dumps({"rows": rows}))
    base, dora, moelora, milora = table4(Store(tmp_path), measure=False)
    # The second round is left out, because the backbone was half as fast.
    assert (base[""], base["rounds"], base["tokens a second"]) == ("the backbone alone", 3, "10.0 (10.0 to 11.0)")
    # 8/10, 8/10, 10/11; in the paper MiLoRA has 43.7, DoRA 36.5, MOELoRA 35.9.
    assert (base["MiLoRA's / its"], base["paper's ratio"]) == ("0.80 (0.80 to 0.91)", "-")
    assert (dora[""], dora["MiLoRA's / its"], dora["paper"], dora["paper's ratio"]) == (
        "DoRA (cached)", "1.25 (1.00 to 2.00)", "36.5", "1.20",
    )  # fmt: skip
    assert (moelora["MiLoRA's / its"], moelora["paper's ratio"], moelora["paper's, MiB"]) == (
        "2.00 (1.60 to 2.50)", "1.22", "13788",
    )  # fmt: skip
    assert (milora["MiLoRA's / its"], milora["peak memory, MiB"]) == ("-", "100")


def test_without_a_measurement_and_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match="not measured yet"):
        table4(Store(tmp_path), measure=False)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(MiLoraError, match="remove it to measure again"):
        table4(Store(tmp_path))
