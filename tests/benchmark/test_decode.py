"""`milora.benchmark.decode`: order, lengths, memory, and rows computed from the measurements."""

import statistics
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from milora.benchmark import DecodeSettings, decode
from milora.benchmark.bandwidth import Copy
from milora.benchmark.memory import only_new_objects
from milora.benchmark.methods import VARIANTS
from milora.benchmark.rounds import in_turn
from milora.tuners.milora.router import RouterLayer
from milora_core.errors import MiLoraError

QUICK = {"device": "cpu", "dtype": "float32", "beams": (1,), "prompt_tokens": 5, "new_tokens": 4, "rounds": 2}


def test_methods_take_turns() -> None:
    asked: list[str] = []
    with only_new_objects():
        measured = in_turn("case", ["a", "b", "c"], 2, lambda name: asked.append(name) or len(asked), lambda line: None)
    assert asked == ["a", "b", "c", "a", "b", "c"]
    assert [(turn.round, turn.method) for turn in measured.order] == list(zip([0, 0, 0, 1, 1, 1], asked, strict=True))
    assert measured.samples == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


@pytest.mark.slow
def test_every_method_runs_and_ratios_are_those_of_the_same_round(tiny_shape: str) -> None:
    names = [name for name, found in VARIANTS.items() if not found.bilevel]
    result = decode(DecodeSettings(backbone=tiny_shape, methods=tuple(names), batch=2, **{**QUICK, "rounds": 3}))
    # Up to three more rounds if the machine is busy.
    rounds = len(result.order) // len(names)
    assert 3 <= rounds <= 6
    assert [(turn.round, turn.method) for turn in result.order] == [(n, name) for n in range(rounds) for name in names]
    rows = {row["method"]: row for row in result.rows}
    assert list(rows) == names
    for row in rows.values():
        assert row["new_tokens"] == 4
        assert row["tokens_per_second"] == statistics.median(row["rounds"])
        by_round = [own / base for own, base in zip(row["rounds"], rows["base"]["rounds"], strict=True)]
        assert row["ratio_to_base"] == statistics.median(by_round)
    assert rows["milora"]["ratios"]["lora"]["low"] == min(
        own / lora for own, lora in zip(rows["milora"]["rounds"], rows["lora"]["rounds"], strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("base", "mlora")}, "no method 'mlora'.*did you mean 'milora'"),
        ({"methods": ("base", "base")}, "given twice"),
        ({"methods": ()}, "No method is given"),
        ({"beams": (0,)}, "beams must be at least 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"dtype": "auto"}, "no dtype 'auto'"),
        ({"adapter_dtype": "float16"}, "the backbone's dtype"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        DecodeSettings(**settings)  # type: ignore[arg-type]


def test_speed_and_share_of_the_bandwidth(tiny_shape: str, clock: Any) -> None:
    clock.slow(LlamaDecoderLayer, "forward", 3.0)
    clock.slow(RouterLayer, "decide", 1.0)
    clock.slow(Copy, "__call__", 0.25)
    result = decode(DecodeSettings(backbone=tiny_shape, methods=("base", "milora"), batch=3, **QUICK))
    rows = {row["method"]: row for row in result.rows}
    # A step is two blocks of 3 s and no router; each of three rows writes one token.
    assert {name: (row["tokens_per_second"], row["ratio_to_base"]) for name, row in rows.items()} == {
        "base": (pytest.approx(3 / 6), 1), "milora": (pytest.approx(3 / 6), pytest.approx(1)),
    }  # fmt: skip
    assert {name: (row["seconds_to_first_token"], row["seconds"]) for name, row in rows.items()} == {
        "base": (6, 6 + 3 * 6), "milora": (8, 8 + 3 * 6),
    }  # fmt: skip
    # q, o; k, v; gate, up, down of two blocks, five norms, the head, three embedding rows; 4 bytes each.
    weights = 4 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 5 * 32 + 61 * 32 + 3 * 32)
    copied = 2 * 2**20 / 0.25
    assert result.environment["copy_gigabytes_per_second"] == pytest.approx(copied / 1e9)
    for row in rows.values():
        assert row["weight_gigabytes_per_second"] == pytest.approx(weights / 6 / 1e9)
        assert row["share_of_bandwidth"] == pytest.approx(weights / 6 / copied)
