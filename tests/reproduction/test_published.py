import json
import os
from pathlib import Path

import pytest

from milora.methods import METHODS
from reproduction import published

RESULTS = Path(os.environ.get("MILORA_PAPER_DIR", Path(__file__).parents[3] / "shared" / "paper")) / "results.json"


@pytest.mark.skipif(not RESULTS.is_file(), reason=f"no {RESULTS}: set MILORA_PAPER_DIR")
def test_the_figures_are_those_of_the_transcription() -> None:
    transcribed = json.loads(RESULTS.read_text())
    del transcribed["source"]
    assert published.everything() == transcribed


def test_every_method_has_a_row_in_table_1() -> None:
    assert set(set(published.everything()[published.TABLES["table1"]]) - {"columns"}) == {
        method.title for method in METHODS.values()
    }
    for method in METHODS.values():
        assert published.row("table1", method.title)["tunable_m"] * 1e6 == pytest.approx(method.paper_tunable)


def test_numbers_by_our_names() -> None:
    # Copied from the paper's pages.
    assert published.row("table1", "MiLoRA")["arc-challenge"] == 61.2
    assert published.row("table1", "P-tuning v2")["aqua"] == 9.63
    assert published.row("table2", "LoRA MT")["avg"] == 70.2
    assert published.row("table3", "MiLoRA") == {"mt-bench": 7.21, "mmlu": 49.7, "bbh": 37.3}
    assert published.row("table5", "MiLoRA-4 (ReLU lower half, GeLU upper half)")["piqa"] == 82.0
    assert published.row("table7", "Gemma 2B: MiLoRA") == {"boolq": 63.9, "piqa": 80.3, "mmlu": 40.7}
    assert published.table4()["MiLoRA", 1] == (43.7, 13784)
    assert published.row("table1", "MiLoRa") == {}
