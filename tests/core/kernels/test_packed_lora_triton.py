"""The LoRA of packed passes in Triton against the formula, token by token: in the interpreter, and on a GPU."""

from itertools import product
from typing import Any

import pytest
import torch
from support.interpreted import run_interpreted
from torch import Tensor

from milora_core.kernels.triton_support import has_triton, is_interpreted

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
RANKS = (4, 16, 5, 33, 5, 8)
DORA = (2, 3)
SCALING = 0.5
COLUMNS = 3

SPANS = [(9, 1), (0, 1), (1, 1), (44, 2), (10, 34), (3, 1), (4, 1), (47, 33), (5, 1), (2, 1)]
"""First token and number of tokens of each row: some rows fill one block of a chunk, two need two blocks."""
ADAPTERS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 2]
"""Number 6 has no adapter."""
TOKENS = 90
"""Tokens 6 to 8, token 46, and all tokens from 80 on have no adapter."""

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not has_triton(), reason="needs a GPU and Triton")

Weights = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]]


class Case:
    """Random weights of adapters in three modules; each adapter adapts two or three of them."""

    def __init__(self, dtype: torch.dtype, device: str, sizes: tuple[int, int], *, has_bias: bool, seed: int) -> None:
        from milora_core.kernels.packed_lora_triton import PackedModule

        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.sizes = device, sizes
        d_in, d_out = sizes
        self.bias = self.random(d_out, dtype=dtype) if has_bias else None
        self.weights: Weights = {}
        self.modules = [
            PackedModule(8, column, sizes, dtype, self.bias, torch.empty(0, device=device).device)
            for column in range(COLUMNS)
        ]
        for column, module in enumerate(self.modules):
            for number, rank in enumerate(RANKS):
                if (number + column) % 4 == 3:
                    continue
                a = self.random(rank, d_in, dtype=dtype, scale=d_in**-0.5)
                b = self.random(d_out, rank + (3 if number == 1 else 0), dtype=dtype)[:, :rank]
                factors = self.random(d_out).abs() + 0.5 if number in DORA else None
                self.weights[column, number] = a, b, factors
                assert module.set(number, a, b, SCALING + number, factors)
        self.gates = self.random(len(SPANS), COLUMNS)
        self.gates[torch.rand(len(SPANS), COLUMNS, generator=self.generator) < 0.3] = 0

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, dtype)

    def expected(self, column: int, result: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """The formula, token by token, in float64."""
        y = result.double().cpu()
        for row, ((first, count), number) in enumerate(zip(SPANS, ADAPTERS, strict=True)):
            if (column, number) not in self.weights:
                continue
            a, b, factors = (None if w is None else w.double().cpu() for w in self.weights[column, number])
            for token in range(first, first + count):
                change = (SCALING + number) * (b @ (a @ x[token].double().cpu()))
                if factors is not None:
                    bare = y[token] - (0 if self.bias is None else self.bias.double().cpu())
                    change = (factors - 1) * bare + factors * change
                y[token] = y[token] + float(gates[row, column]) * change
        return y

    def idle(self, column: int) -> list[int]:
        """Tokens that no adapter changes in this module."""
        changed = {
            token
            for row, ((first, count), number) in enumerate(zip(SPANS, ADAPTERS, strict=True))
            if (column, number) in self.weights and self.gates[row, column] != 0
            for token in range(first, first + count)
        }
        return [token for token in range(TOKENS) if token not in changed]


def check(
    weights: torch.dtype, inputs: torch.dtype, device: str, sizes: tuple[int, int], *, has_bias: bool, seed: int
) -> None:
    from milora_core.kernels.packed_lora_triton import PackedLora

    case = Case(weights, device, sizes, has_bias=has_bias, seed=seed)
    packed = PackedLora(SPANS, ADAPTERS, case.gates, max(RANKS))
    for column, module in enumerate(case.modules):
        x, result = (case.random(1, TOKENS, size, dtype=inputs) for size in sizes)
        before = result.clone()
        expected = case.expected(column, result[0], x[0], case.gates)
        assert packed.add_to(module, result, x)
        tolerance = max(TOLERANCE[weights], TOLERANCE[inputs])
        torch.testing.assert_close(result[0].double().cpu(), expected, atol=tolerance * 4, rtol=tolerance)
        idle = case.idle(column)
        assert idle
        assert torch.equal(result[0, idle], before[0, idle])


SIZES = [(40, 72), (300, 130)]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.interpreted
@pytest.mark.parametrize(("weights", "inputs"), PAIRS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_token_gets_its_adapter_and_gate(weights: torch.dtype, inputs: torch.dtype, has_bias: bool) -> None:
    check(weights, inputs, "cpu", SIZES[has_bias], has_bias=has_bias, seed=int(has_bias))


@needs_gpu
@pytest.mark.skipif(is_interpreted(), reason="this is the process that interprets Triton")
@pytest.mark.parametrize(("weights", "inputs"), PAIRS)
@pytest.mark.parametrize(("has_bias", "sizes"), list(product([False, True], [*SIZES, (4096, 1024)])))
def test_on_a_gpu(weights: torch.dtype, inputs: torch.dtype, has_bias: bool, sizes: tuple[int, int]) -> None:
    check(weights, inputs, "cuda", sizes, has_bias=has_bias, seed=3)


@pytest.mark.interpreted
def test_gates_may_change_between_modules() -> None:
    """The router's decision is written after the pass is prepared."""
    from milora_core.kernels.packed_lora_triton import PackedLora

    case = Case(torch.float32, "cpu", (40, 72), has_bias=False, seed=5)
    packed = PackedLora(SPANS, ADAPTERS, case.gates, max(RANKS))
    case.gates.zero_()
    x, result = (case.random(TOKENS, size) for size in case.sizes)
    before = result.clone()
    assert packed.add_to(case.modules[1], result, x)
    assert torch.equal(result, before)
    case.gates[4] = 2
    assert packed.add_to(case.modules[1], result, x)
    torch.testing.assert_close(result.double(), case.expected(1, before, x, case.gates), atol=1e-4, rtol=1e-4)
    assert not torch.equal(result[10:44], before[10:44])


@pytest.mark.interpreted
def test_weights_without_a_gate_are_not_read() -> None:
    from milora_core.kernels.packed_lora_triton import PackedLora

    case = Case(torch.float32, "cpu", (40, 72), has_bias=False, seed=6)
    rows = [row for row, number in enumerate(ADAPTERS) if number in (1, 5)]  # A single token, and a chunk.
    case.gates[rows] = 0
    for module in case.modules:
        module.table[[1, 5], :2] = 16  # Nothing is mapped at this address: reading it would end the process.
    packed = PackedLora(SPANS, ADAPTERS, case.gates, max(RANKS))
    for module in case.modules:
        x, result = (case.random(TOKENS, size) for size in case.sizes)
        assert packed.add_to(module, result, x)
        assert not result.isnan().any()


@pytest.mark.interpreted
def test_removed_and_replaced_adapters() -> None:
    from milora_core.kernels.packed_lora_triton import PackedLora

    case = Case(torch.float32, "cpu", (40, 72), has_bias=False, seed=7)
    module = case.modules[0]
    packed = PackedLora([(0, 1), (1, 3)], [0, 2], torch.ones(2, COLUMNS), max(RANKS))
    module.clear(0)
    x, result = case.random(4, 40), torch.zeros(4, 72)
    assert packed.add_to(module, result, x)
    assert not result[0].any()
    assert result[1:].any()
    a, b = case.random(7, 40), case.random(72, 7)
    assert module.set(0, a, b, 2.0)
    result.zero_()
    assert packed.add_to(module, result, x)
    torch.testing.assert_close(result[0], 2 * b @ (a @ x[0]), atol=1e-3, rtol=1e-4)


@needs_triton
def test_weights_and_tensors_that_do_not_fit_are_left_to_others() -> None:
    from milora_core.kernels.packed_lora_triton import PackedLora, PackedModule

    module = PackedModule(2, 0, (8, 4), torch.float32, None, torch.device("cpu"))
    a, b = torch.randn(2, 8), torch.randn(4, 2)
    assert not module.set(0, a.double(), b, 1.0)
    assert not module.set(0, torch.randn(8, 2).T, b, 1.0)
    assert not module.set(0, torch.randn(2, 6), b, 1.0)
    assert not module.set(0, a.to("meta"), b.to("meta"), 1.0)
    assert not module.set(0, torch.randn(17)[1:].view(2, 8), b, 1.0)  # Not aligned.
    assert module.set(0, a, b, 1.0)
    packed = PackedLora([(2, 1)], [0], torch.ones(1, 1), 2)
    assert not packed.add_to(module, torch.zeros(2, 4), torch.randn(2, 8))  # Too few tokens.
    assert not packed.add_to(module, torch.zeros(3, 4).double(), torch.randn(3, 8))
    assert not packed.add_to(module, torch.zeros(3, 4), torch.randn(8, 3).T)
    assert not packed.add_to(module, torch.zeros(3, 4, device="meta"), torch.randn(3, 8, device="meta"))


class Launches:
    """A fake kernel that records the arguments of its launches."""

    def __init__(self) -> None:
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.arguments.append((args, kwargs))


def launched(monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, Launches]:
    """The launches of passes with different numbers of tokens, rows and columns."""
    from milora_core.kernels import packed_lora_triton

    found = {name: Launches() for name in ("_shrink", "_expand")}
    for name, kernel in found.items():
        monkeypatch.setattr(packed_lora_triton, name, kernel)
    weights, inputs = dtypes
    for columns in (1, 16, 17):
        module = packed_lora_triton.PackedModule(4, columns - 1, (64, 64), weights, torch.ones(64), torch.device("cpu"))
        for rank in (8, 16):
            kept = torch.zeros(rank, 64, dtype=weights), torch.zeros(64, rank, dtype=weights)
            assert module.set(rank // 8 - 1, *kept, 1.0, torch.ones(64))
        for singles, chunks in product((1, 3, 16), ([2], [7, 40], [16] * 3)):
            spans = [(place, 1) for place in range(singles)]
            for count in chunks:
                spans.append((sum(spans[-1]), count))
            packed = packed_lora_triton.PackedLora(spans, [0] * len(spans), torch.ones(len(spans), columns), 16)
            tokens = sum(spans[-1])
            assert packed.add_to(module, torch.zeros(tokens, 64, dtype=inputs), torch.zeros(tokens, 64, dtype=inputs))
    return found


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled in the interpreter")
def test_one_variant_for_single_tokens_and_one_for_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes Triton's own key for kernel variants, so no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from milora_core.kernels import packed_lora_triton

    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernels = {name: getattr(packed_lora_triton, name) for name in ("_shrink", "_expand")}
    launches = launched(monkeypatch, (torch.bfloat16, torch.bfloat16))
    for name, kernel in kernels.items():
        variant_of = create_function_from_signature(kernel.signature, kernel.params, backend)
        variants = {str(variant_of(*args, **kwargs)[1:]) for args, kwargs in launches[name].arguments}
        assert len(launches[name].arguments) == 3 * 9 * 2
        assert len({str(variant_of(*args, **kwargs)[1]) for args, kwargs in launches[name].arguments}) <= 2, name
        assert variants


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("weights", "inputs"), PAIRS)
def test_the_kernels_compile_for_a_gpu(
    weights: torch.dtype, inputs: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To PTX for an H100, which Triton can write without one, and to machine code with Triton's assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from milora_core.kernels import packed_lora_triton

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    kernels = {name: getattr(packed_lora_triton, name) for name in ("_shrink", "_expand")}
    launches = launched(monkeypatch, (weights, inputs))
    for name, kernel in kernels.items():
        variant_of = create_function_from_signature(kernel.signature, kernel.params, backend)
        for args, kwargs in launches[name].arguments[:2]:  # Single tokens, then chunks.
            bound, specialization, options = variant_of(*args, **kwargs)
            _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
            compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target)
            assert compiled.asm["cubin"]
            # Weights are loaded 16 bytes at a time; only the results of single tokens are loaded one by one.
            assert compiled.asm["ptx"].count("ld.global.b16") <= 1


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="this is the process that interprets Triton")
def test_in_tritons_interpreter() -> None:
    run_interpreted(__file__, passed=11)
