"""The operator against a loop over rows, with every implementation that runs here."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.interpreted import run_interpreted
from torch import Tensor

from milora_core.errors import MiLoraError
from milora_core.kernels import add_grouped_lora, grouped_lora, grouped_lora_reference
from milora_core.kernels.grouped_lora_cpu import PackedRows
from milora_core.kernels.triton_support import has_triton, is_interpreted

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}

Case = dict[str, Tensor]


def make_case(
    ranks: list[int], adapters: list[int], gates: list[float], tokens: int, d_in: int, d_out: int, dtype: torch.dtype
) -> Case:
    generator = torch.Generator().manual_seed(sum(adapters) + tokens * 7 + d_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    r_max = max(ranks)
    kept = torch.arange(r_max)[None, :] < torch.tensor(ranks)[:, None]  # (adapters, r)
    return {
        "result": normal(len(adapters), tokens, d_out),
        "x": normal(len(adapters), tokens, d_in),
        "adapters": torch.tensor(adapters, dtype=torch.int32),
        "gates": torch.tensor(gates, dtype=torch.float32),
        "lora_a": normal(len(ranks), r_max, d_in) * d_in**-0.5 * kept[:, :, None],
        "lora_b": normal(len(ranks), d_out, r_max) * kept[:, None, :],
    }


def by_rows(case: Case) -> Tensor:
    """The operator's result row by row, in float64."""
    rows = []
    for row, (adapter, gate) in enumerate(zip(case["adapters"].tolist(), case["gates"].tolist(), strict=True)):
        out = case["result"][row].double()
        if adapter >= 0:
            a, b = case["lora_a"][adapter].double(), case["lora_b"][adapter].double()
            out = out + gate * (case["x"][row].double() @ a.T @ b.T)
        rows.append(out)
    return torch.stack(rows)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)) -> Case:
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rows = draw(st.integers(1, 6))
    return make_case(
        ranks,
        draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=rows, max_size=rows)),
        draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=rows, max_size=rows)),
        draw(st.sampled_from([1, 2, 5])),
        draw(st.sampled_from([1, 8, 19])),
        draw(st.sampled_from([1, 6, 33])),
        draw(st.sampled_from(dtypes)),
    )


def assert_right(actual: Tensor, case: Case) -> None:
    tolerance = TOLERANCE[case["result"].dtype]
    assert actual.dtype == case["result"].dtype
    torch.testing.assert_close(actual.double(), by_rows(case), rtol=tolerance, atol=tolerance)
    idle = (case["adapters"] < 0) | (case["gates"] == 0)
    assert torch.equal(actual[idle], case["result"][idle])


@settings(deadline=None, max_examples=60)
@given(cases())
def test_reference_is_the_loop_over_rows(case: Case) -> None:
    assert_right(grouped_lora_reference(**case), case)


@settings(deadline=None, max_examples=120)
@given(cases())
def test_operator_is_the_loop_over_rows(case: Case) -> None:
    before = case["result"].clone()
    assert_right(grouped_lora(**case), case)
    assert torch.equal(case["result"], before)
    in_place = {**case, "result": before}
    assert add_grouped_lora(**in_place) is before
    assert_right(before, case)


@settings(deadline=None, max_examples=30)
@given(cases(dtypes=(torch.float32,)))
def test_stacks_and_activations_of_different_types(case: Case) -> None:
    mixed = {name: tensor.bfloat16() if name in ("x", "result") else tensor for name, tensor in case.items()}
    assert_right(grouped_lora(**mixed), mixed)


@settings(deadline=None, max_examples=120)
@given(cases())
def test_packed_rows_are_the_loop_over_rows(case: Case) -> None:
    case |= {name: case[name][:, :1].contiguous() for name in ("x", "result")}
    result = case["result"].clone()
    packed = PackedRows(*(case[name] for name in ("adapters", "gates", "lora_a", "lora_b")))
    for _ in range(2):
        assert packed.add_to(result, case["x"])
        assert_right(result, case)
        result.copy_(case["result"])


@pytest.mark.parametrize(
    ("adapters", "size", "copied"),
    [([0, 1, 2], 1, False), ([1, 1, 2, 2], 2, False), ([2, 0, -1], 1, True), ([0, 0, 0, 1], 1, True)],
    ids=str,
)
def test_what_is_packed(adapters: list[int], size: int, copied: bool) -> None:
    case = make_case([2, 2, 2], adapters, [1.0] * len(adapters), 1, 4, 5, torch.float32)
    packed = PackedRows(*(case[name] for name in ("adapters", "gates", "lora_a", "lora_b")))
    assert packed.size == size
    shared = packed.a.untyped_storage().data_ptr() == case["lora_a"].untyped_storage().data_ptr()
    assert shared is not copied


SMALL = {
    "ranks": [2, 4, 3],
    "adapters": [2, -1, 0, 2, 1],
    "gates": [0.5, 1.0, 0.0, 0.5, 2.0],
    "tokens": 3,
    "d_in": 8,
    "d_out": 6,
    "dtype": torch.float32,
}


def test_views_that_are_not_contiguous() -> None:
    case = make_case(**SMALL)
    spread = {name: case[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "result")}
    assert_right(add_grouped_lora(**{**case, **{name: tensor.clone() for name, tensor in spread.items()}}), case)


def test_weights_of_idle_rows_are_not_read() -> None:
    case = make_case(**{**SMALL, "tokens": 1})
    case["lora_a"][0] = torch.nan
    case["lora_b"][0] = torch.nan
    assert not grouped_lora(**case).isnan().any()
    packed = PackedRows(*(case[name] for name in ("adapters", "gates", "lora_a", "lora_b")))
    assert packed.add_to(case["result"], case["x"])
    assert not case["result"].isnan().any()


def test_without_result_the_sum_alone() -> None:
    case = make_case(**SMALL)
    case["result"] = torch.zeros_like(case["result"])
    assert_right(grouped_lora(**{name: tensor for name, tensor in case.items() if name != "result"}), case)


def test_registration() -> None:
    """torch's own check of the schema, the fake implementation and what compilers derive from them."""
    with torch.no_grad():
        torch.library.opcheck(torch.ops.milora.add_grouped_lora.default, tuple(make_case(**SMALL).values()))


def test_compiled_whole_and_once_for_all_rows() -> None:
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counts, fullgraph=True, dynamic=False)
    def run(case: Case) -> Tensor:
        return add_grouped_lora(case["result"] * 1, *list(case.values())[1:])

    with torch.no_grad():
        for adapters in ([2, -1, 0, 2, 1], [0, 0, 0, 0, 0], [-1] * 5):
            case = make_case(**{**SMALL, "adapters": adapters})
            assert_right(run(case), case)
    assert counts.frame_count == 1


def test_a_gradient_is_refused() -> None:
    case = make_case(**SMALL)
    case["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
        grouped_lora(**case)


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "two dimensions": ("x", lambda x: x[0], r"x \(rows, tokens, d_in\)"),
    "too few gates": ("gates", lambda gates: gates[1:], r"gates must be \(5,\)"),
    "half gates": ("gates", lambda gates: gates.half(), "gates must be float32"),
    "adapters that are no numbers": ("adapters", lambda adapters: adapters.float(), "int32 or int64"),
    "B of another rank": ("lora_b", lambda b: b[:, :, 1:], r"B must be \(3, 6, 4\)"),
    "A and B of different types": ("lora_b", lambda b: b.double(), "one type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    argument, change, message = BAD[name]
    case = make_case(**SMALL)
    case[argument] = change(case[argument])
    with pytest.raises(MiLoraError, match=message):
        grouped_lora(**case)


def test_an_adapter_beyond_the_stacks() -> None:
    with pytest.raises(IndexError):
        grouped_lora(**make_case(**SMALL) | {"adapters": torch.tensor([0, 1, 2, 3, 0])})


def test_float64_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels sum in float32, so float64 inputs use torch."""
    module = importlib.import_module("milora_core.kernels.grouped_lora")  # in the package this name is the function
    monkeypatch.setattr(module, "has_triton", lambda: True)
    case = make_case(**{**SMALL, "dtype": torch.float64})
    result = case["result"].clone()
    module._on_gpu(**{**case, "result": result})
    assert_right(result, case)


# ------------------------------------------------------------------------------------------------------------- Triton


def in_triton(case: dict[str, Any]) -> Tensor:
    from milora_core.kernels.grouped_lora_triton import add_grouped_lora_on_gpu

    result = case["result"].clone()
    add_grouped_lora_on_gpu(**{**case, "result": result})
    return result


needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")


@pytest.mark.interpreted
@settings(deadline=None, max_examples=25)
@given(cases(dtypes=(torch.float32, torch.bfloat16)))
def test_triton_is_the_loop_over_rows(case: Case) -> None:
    assert_right(in_triton(case), case)


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [1, 3])
def test_triton_with_several_blocks_of_everything(tokens: int) -> None:
    # d_in and d_out beyond one block, and more tokens than a block holds, unless there is only one.
    tokens = tokens if tokens == 1 else 70
    case = make_case([40, 3], [1, -1, 0], [0.5, 1.0, 2.0], tokens, 1100, 300, torch.float32)
    assert_right(in_triton(case), case)


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [1, 3])
def test_triton_reads_no_weights_of_idle_rows(tokens: int) -> None:
    case = make_case(**{**SMALL, "tokens": tokens})
    case["lora_a"][0] = torch.nan
    case["lora_b"][0] = torch.nan
    assert not in_triton(case).isnan().any()


@pytest.mark.interpreted
def test_triton_with_views_and_types() -> None:
    case = make_case(**SMALL)
    spread = {name: case[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "result")}
    assert_right(in_triton({**case, **spread}), case)
    mixed = {name: tensor.bfloat16() if name in ("x", "result") else tensor for name, tensor in case.items()}
    assert_right(in_triton(mixed), mixed)


class Launches:
    """A fake kernel that records its launches and the current device at each."""

    def __init__(self, current: list[Any]) -> None:
        self.current = current
        self.devices: list[Any] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        self.devices.append(self.current[-1])
        self.arguments.append((args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    """Replaces the kernels; returns the fakes by name."""
    from milora_core.kernels import grouped_lora_triton

    current: list[Any] = [None]

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.data_ptr())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    found = {name: Launches(current) for name in ("_shrink", "_expand")}
    for name, kernel in found.items():
        monkeypatch.setattr(grouped_lora_triton, name, kernel)
    return found


@needs_triton
def test_triton_runs_on_the_tensors_device(launches: dict[str, Launches]) -> None:
    case = make_case(**SMALL)
    in_triton(case)
    assert [kernel.devices for kernel in launches.values()] == [[case["x"].data_ptr()]] * 2


@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled in the interpreter")
def test_no_variant_is_compiled_for_a_length_or_a_number_of_rows(request: pytest.FixtureRequest) -> None:
    """Computes Triton's own key for kernel variants, so no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from milora_core.kernels import grouped_lora_triton

    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernels = {name: getattr(grouped_lora_triton, name) for name in ("_shrink", "_expand")}
    launches = request.getfixturevalue("launches")
    for rows in (1, 3, 16):
        for tokens in (2, 7, 16):
            in_triton(make_case([8], [0] * rows, [1.0] * rows, tokens, 64, 64, torch.bfloat16))
    for name, kernel in kernels.items():
        variant_of = create_function_from_signature(kernel.signature, kernel.params, backend)
        variants = {str(variant_of(*args, **kwargs)[1]) for args, kwargs in launches[name].arguments}
        assert len(launches[name].arguments) == 9
        assert len(variants) == 1, name


@pytest.mark.skipif(torch.cuda.device_count() < 2 or not has_triton(), reason="needs two GPUs and Triton")
def test_triton_on_a_gpu_that_is_not_the_current_one() -> None:
    case = make_case(**SMALL)
    assert_right(grouped_lora(**{name: tensor.to("cuda:1") for name, tensor in case.items()}).cpu(), case)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(is_interpreted(), reason="this is the process that interprets Triton")
def test_triton_in_its_interpreter() -> None:
    run_interpreted(__file__, passed=6)


@pytest.mark.skipif(not torch.cuda.is_available() or not has_triton(), reason="needs a GPU and Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_triton_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    case = make_case([40, 3], [1, -1, 0, 0], [0.5, 1.0, 2.0, 0.0], tokens, 1100, 300, dtype)
    actual = grouped_lora(**{name: tensor.cuda() for name, tensor in case.items()})
    assert_right(actual.cpu(), case)
