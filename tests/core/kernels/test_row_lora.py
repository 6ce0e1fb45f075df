"""The native kernel against a loop over rows in float64, and its build."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_core.kernels import Piece, RowLora, grouped_lora, native, one_token
from milora_core.kernels.grouped_lora_cpu import PackedRows
from milora_core.kernels.row_lora import MOST_ROWS

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def by_rows(result: Tensor, x: Tensor, pieces: list[Piece], bias: Tensor | None) -> Tensor:
    out = result.double().clone()
    for piece in pieces:
        for row, gate in zip(piece.rows, piece.gates, strict=True):
            change = piece.scaling * (piece.b.double() @ (piece.a.double() @ x[row].double()))
            if piece.factors is not None:
                bare = out[row] if bias is None else out[row] - bias.double()
                change = piece.factors.double() * (bare + change) - bare
            out[row] += gate * change
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Piece], Tensor | None]:
    rank = draw(st.sampled_from([1, 3, 4, 7, 8, 16, 32, 48]))
    d_in = draw(st.sampled_from([1, 5, 16, 33, 130]))
    d_out = draw(st.sampled_from([1, 15, 16, 64, 65, 100]))
    gap = draw(st.sampled_from([0, 3]))
    kind, of_x = draw(st.sampled_from(list(TOLERANCE))), draw(st.sampled_from(list(TOLERANCE)))
    rows = draw(st.permutations(range(draw(st.integers(1, 7)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(rows)), min_size=1, max_size=3)))
    pieces = []
    for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False)):
        of_piece = rows[start:end]
        pieces.append(
            Piece(
                of_piece,
                draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), min_size=len(of_piece), max_size=len(of_piece))),
                draw(st.sampled_from([1.0, 2.0])),
                (normal(rank, d_in, seed=number) * d_in**-0.5).to(kind),
                (normal(d_out, rank + gap, seed=number) * rank**-0.5).to(kind)[:, :rank],
                normal(d_out, seed=number) if draw(st.booleans()) else None,
            )
        )
    bias = normal(d_out, seed=9) if draw(st.booleans()) else None
    return normal(len(rows), d_out, dtype=of_x), normal(len(rows), d_in, dtype=of_x), pieces, bias


@settings(deadline=None, max_examples=150)
@given(cases())
def test_it_is_the_loop_over_rows(case: tuple[Tensor, Tensor, list[Piece], Tensor | None]) -> None:
    result, x, pieces, bias = case
    expected = by_rows(result, x, pieces, bias)
    before = result.clone()
    assert RowLora(pieces, bias).add_to(result, x)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    served = {row for piece in pieces for row in piece.rows}
    idle = [row for row in range(len(x)) if row not in served]
    assert torch.equal(result[idle], before[idle])


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("gap", [0, 8])
def test_small_ranks_with_adjacent_rows_of_b_or_gaps(kind: torch.dtype, rank: int, gap: int) -> None:
    b = normal(75, rank + gap, dtype=kind)[:, :rank]
    x, result = normal(3, 40, dtype=kind), normal(3, 75, dtype=kind)
    pieces = [Piece([2, 0], [1.0, 0.5], 2.0, normal(rank, 40, dtype=kind), b)]
    expected = by_rows(result, x, pieces, None)
    assert RowLora(pieces).add_to(result, x)
    tolerance = TOLERANCE[kind]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", list(TOLERANCE))
def test_it_adds_to_columns_of_a_larger_result(kind: torch.dtype) -> None:
    pieces = [small_piece([2, 0], kind), small_piece([1], kind)]
    x, whole = normal(3, 96, dtype=kind), normal(3, 300, dtype=kind)
    expected = whole.double()
    expected[:, 64:264] = by_rows(whole[:, 64:264], x, pieces, None)
    assert RowLora(pieces).add_to(whole[:, 64:264], x)
    tolerance = TOLERANCE[kind]
    torch.testing.assert_close(whole.double(), expected, rtol=tolerance, atol=tolerance)


def small_piece(rows: list[int], dtype: torch.dtype = torch.float32, d_in: int = 96, d_out: int = 200) -> Piece:
    a, b = normal(32, d_in, dtype=dtype), normal(d_out, 32, dtype=dtype)
    return Piece(rows, [1.0] * len(rows), 0.5, a, b)


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.cat(
        [
            torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float(),
            torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
            .view(torch.float32),
            # Ties, which round to even; overflow; the smallest numbers.
            torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 1e-40, -1e-45]),
        ]
    )  # fmt: skip
    result = torch.zeros(1, len(values), dtype=torch.bfloat16)
    one = torch.ones(1, 1)
    assert RowLora([Piece([0], [1.0], 1.0, one, values[:, None].contiguous())]).add_to(result, one.bfloat16())
    expected = values.bfloat16()
    is_number = ~expected.isnan()
    assert torch.equal(result[0][is_number], expected[is_number])
    assert torch.equal(result[0].isnan(), expected.isnan())


def test_threads_do_not_change_a_bit() -> None:
    x, result = normal(3, 96), normal(3, 200)
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(result.clone())
            assert RowLora([small_piece([0, 2])]).add_to(outcomes[-1], x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_weights_of_other_rows_are_not_read_and_changes_in_place_are_seen() -> None:
    piece = small_piece([1])
    lora, x, result = RowLora([piece]), normal(2, 96), normal(2, 200)
    x[0] = math.nan
    changed = result.clone()
    assert lora.add_to(changed, x)
    assert torch.equal(changed[0], result[0])
    piece.b.zero_()
    again = result.clone()
    assert lora.add_to(again, x)
    assert torch.equal(again, result)


def test_what_it_does_not_take_is_left_as_it_is() -> None:
    lora, x, result = RowLora([small_piece([0, 1])]), normal(2, 96), normal(2, 200)
    before = result.clone()
    assert not lora.add_to(result, x.bfloat16())
    assert not lora.add_to(result.half(), x.half())
    assert not lora.add_to(result, normal(2, 192)[:, ::2])
    assert not lora.add_to(result.T.contiguous().T, x)
    assert not lora.add_to(result[:1], x[:1])
    assert not lora.add_to(result[:1], x)
    assert not lora.add_to(result, normal(3, 96))
    assert torch.equal(result, before)
    assert not RowLora.serves([])
    assert not RowLora.serves([small_piece([0], torch.float16)])
    assert not RowLora.serves([small_piece([0], torch.float64)])
    assert not RowLora.serves([small_piece(list(range(MOST_ROWS + 1)))])
    assert not RowLora.serves([small_piece([0]), small_piece([1], d_in=80)])
    with pytest.raises(RuntimeError, match="serves"):
        RowLora([])


def test_one_token_a_row_goes_to_the_kernel_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(3, 8, 40), normal(3, 50, 8)
    x, result = normal(4, 1, 40), normal(4, 1, 50)
    arguments = (torch.tensor([2, -1, 0, 2]), torch.tensor([1.0, 1.0, 0.0, 2.0]), a, b)
    prepared = one_token(*arguments)
    assert isinstance(prepared, RowLora)
    native_result = result.clone()
    assert prepared.add_to(native_result, x)
    assert torch.equal(native_result, grouped_lora(x, *arguments, result))
    monkeypatch.setenv(native.SWITCH, "0")
    packed = one_token(*arguments)
    assert isinstance(packed, PackedRows)
    torch_result = result.clone()
    assert packed.add_to(torch_result, x)
    torch.testing.assert_close(torch_result, native_result, rtol=1e-4, atol=1e-4)


USE = """
import torch
from milora_core.kernels import grouped_lora, native
lora = grouped_lora(
    torch.ones(1, 1, 4), torch.tensor([0]), torch.ones(1), torch.ones(1, 2, 4), torch.ones(1, 3, 2)
)
print(native.library() is not None, lora.flatten().tolist())
"""


def in_a_process(**environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", USE], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    return run.stdout.strip()


@pytest.mark.slow
def test_it_is_built_once_for_all_processes(tmp_path: Path) -> None:
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)) == "True [8.0, 8.0, 8.0]"
    (built,) = (tmp_path / "milora").iterdir()
    first = built.stat()
    assert built.suffix == ".so"
    assert (tmp_path / "milora").stat().st_mode & 0o077 == 0
    # Another process uses the same file without a rebuild.
    assert in_a_process(XDG_CACHE_HOME=str(tmp_path)) == "True [8.0, 8.0, 8.0]"
    assert (built.stat().st_mtime_ns, built.stat().st_ino) == (first.st_mtime_ns, first.st_ino)


@pytest.mark.slow
def test_without_a_compiler_torch_multiplies(tmp_path: Path) -> None:
    assert in_a_process(PATH=str(tmp_path), CC="") == "False [8.0, 8.0, 8.0]"
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    assert in_a_process(CC=str(broken), XDG_CACHE_HOME=str(tmp_path)) == "False [8.0, 8.0, 8.0]"
    assert not list((tmp_path / "milora").iterdir())


@pytest.mark.slow
def test_without_a_cache_it_is_built_for_the_process(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert in_a_process(XDG_CACHE_HOME=str(file)) == "True [8.0, 8.0, 8.0]"


def test_a_compiler_that_does_not_know_a_flag_is_given_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_flags: list[Any] = []

    def built(compiler: str, flags: tuple[str, ...]) -> Path:
        given_flags.append(flags)
        if "-fopenmp" in flags:
            raise subprocess.CalledProcessError(1, compiler, stderr="unknown option -fopenmp")
        return original(compiler, flags)

    original = native._built
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_built", built)
    kernels = native._library.__wrapped__()
    assert kernels is not None
    assert given_flags == list(native.FLAGS[:2])
