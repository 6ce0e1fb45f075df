"""`milora.benchmark.tables`: columns that are shown and columns that are left out."""

from typing import Any

from milora.benchmark.tables import cells


def row(method: str, **fields: Any) -> dict[str, Any]:
    common = {"beam": 1, "batch": 1, "peak_memory_mib": 5, "weight_gigabytes_per_second": 7.25, "new_tokens": 3}
    speed = {"tokens_per_second": 4, "tokens_per_second_low": 3, "tokens_per_second_high": 5}
    return {"method": method, **common, **speed, **fields}


def test_a_column_in_which_nothing_stands_is_left_out() -> None:
    to_base = {"base": {"median": 0.9, "low": 0.8, "high": 1.0}}
    rows = [row("base", ratios={}), row("milora", ratios=to_base)]
    header, lines = cells({"command": "decode", "rows": rows})
    # There is no LoRA row, and the rows were measured before bandwidth was recorded.
    assert header == ["method", "beam", "batch", "tokens/s", "/ base", "peak MiB", "weights GB/s", "new"]
    assert lines[0] == ["base", "1", "1", "4.00 (3.00-5.00)", "1", "5", "7.2", "3"]
    assert lines[1] == ["milora", "1", "1", "4.00 (3.00-5.00)", "0.900 (0.800-1.000)", "5", "7.2", "3"]
    rows[1]["share_of_bandwidth"] = 0.714
    header, lines = cells({"command": "decode", "rows": rows})
    column = header.index("of bandwidth")
    assert [line[column] for line in lines] == ["-", "0.71"]
