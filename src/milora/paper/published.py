"""Figures as printed in the paper (Zhang et al. 2024, arXiv 2410.18035), to set measured ones beside."""

from __future__ import annotations

from collections.abc import Mapping

BACKBONE = "llama-2-7b"
"""The shape that Table 1 is about."""

TUNABLE: Mapping[str, int] = {
    "parallel-adapter": 83_900_000,
    "learned-adapter": 81_800_000,
    "p-tuning-v2": 84_500_000,
    "iapt": 83_900_000,
    "bitfit": 87_000_000,
    "ia3": 78_600_000,
    "ssp": 80_600_000,
    "lora": 80_000_000,
    "adalora": 80_000_000,
    "moelora": 87_300_000,
    "dora": 80_000_000,
    "milora": 80_900_000,
    "midora": 80_900_000,
}
"""Tunable parameters of each method in Table 1, which gives them in millions with one decimal."""
