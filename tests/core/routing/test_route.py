"""`Route` as a value: it round-trips through rows, files and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milora import MiLoraError, Route


@st.composite
def routes(draw: st.DrawFn, blocks: int | None = None, experts: int | None = None) -> Route:
    blocks = draw(st.integers(1, 4)) if blocks is None else blocks
    experts = draw(st.integers(1, 8)) if experts is None else experts
    batch = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    probabilities = torch.rand(blocks, batch, experts, generator=generator).softmax(dim=-1)
    gates = probabilities * (torch.rand(blocks, batch, experts, generator=generator) < 0.5)
    return Route(
        gates,
        probabilities,
        tuple(f"mlp.expert_{index}" for index in range(experts)),
        tuple(f"model.layers.{index}" for index in range(blocks)),
    )


def small() -> Route:
    gates = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    return Route(gates, torch.full_like(gates, 0.5), ("q", "v"), ("layers.0",))


@given(route=routes(), copies=st.integers(1, 4))
def test_expand_repeats_each_row_in_succession(route: Route, copies: int) -> None:
    expanded = route.expand(copies)
    assert len(expanded) == copies * len(route)
    for row in range(len(expanded)):
        assert expanded[row] == route[row // copies]


@given(route=routes(), data=st.data())
def test_cut_and_cat_are_inverse(route: Route, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(route)))
    parts = [part for part in (route[:at], route[at:]) if len(part)]
    assert Route.cat(parts) == route
    assert Route.cat([route[row] for row in range(len(route))]) == route


@given(route=routes(), data=st.data())
def test_rows_by_integer_list_and_tensor(route: Route, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(route) - 1), min_size=1, max_size=6))
    picked = Route.cat([route[row] for row in rows])
    assert route[rows] == picked
    assert route[torch.tensor(rows)] == picked
    assert route[rows[0] - len(route)] == route[rows[0]]


@given(route=routes())
def test_a_mask_picks_rows(route: Route) -> None:
    mask = torch.arange(len(route)) % 2 == 0
    assert route[mask] == route[::2]
    assert route[mask.tolist()] == route[::2]


@given(route=routes())
def test_a_dictionary_survives_json(route: Route) -> None:
    assert Route.from_dict(json.loads(json.dumps(route.to_dict()))) == route


@given(route=routes())
def test_a_file_gives_back_the_route(route: Route, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("route") / "route.safetensors"
    route.save(path)
    assert Route.load(path) == route
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_view_of_other_rows_can_be_saved(tmp_path: Path) -> None:
    small()[::2].save(tmp_path / "route.safetensors")
    assert Route.load(tmp_path / "route.safetensors") == small()[[0, 2]]


@given(left=routes(), right=routes())
def test_cat_joins_only_what_fits(left: Route, right: Route) -> None:
    if (left.blocks, left.experts) == (right.blocks, right.experts):
        assert len(Route.cat([left, right])) == len(left) + len(right)
    else:
        with pytest.raises(MiLoraError, match="same blocks and experts"):
            Route.cat([left, right])


def test_equality_is_of_names_and_values() -> None:
    route = small()
    assert route == small()
    assert route != Route(route.gates, route.probabilities, ("v", "q"), route.blocks)
    assert route != Route(route.gates * 0.5, route.probabilities, route.experts, route.blocks)
    assert route != "route"


def test_what_it_says() -> None:
    route = small()
    assert route.chosen_experts() == {"layers.0": ["q"]}
    assert route.chosen_experts(2) == {"layers.0": ["q", "v"]}
    torch.testing.assert_close(route.share(), torch.tensor([[2 / 3, 2 / 3]]))


@pytest.mark.parametrize("row", [3, -4])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(IndexError, match=f"Row {row}"):
        small()[row]


@pytest.mark.parametrize(
    ("gates", "probabilities", "experts", "blocks"),
    [
        ((1, 2), (1, 2), 2, 1),
        ((1, 2, 3), (1, 2, 2), 3, 1),
        ((1, 2, 3), (1, 2, 3), 2, 1),
        ((1, 2, 3), (1, 2, 3), 3, 2),
    ],
)
def test_shapes_that_disagree(gates: Any, probabilities: Any, experts: int, blocks: int) -> None:
    with pytest.raises(MiLoraError, match="found"):
        Route(
            torch.zeros(gates),
            torch.zeros(probabilities),
            tuple(map(str, range(experts))),
            tuple(map(str, range(blocks))),
        )


def test_mistakes() -> None:
    with pytest.raises(MiLoraError, match="at least one route"):
        Route.cat([])
    with pytest.raises(MiLoraError, match="1 or more copies"):
        small().expand(0)
    with pytest.raises(MiLoraError, match=r"\['gates'\] not found"):
        Route.from_dict({key: value for key, value in small().to_dict().items() if key != "gates"})
    with pytest.raises(MiLoraError, match="gates"):
        Route.from_dict({**small().to_dict(), "gates": [[[1.0], [1.0, 2.0]]]})


def test_files_that_are_no_routes(tmp_path: Path) -> None:
    path = tmp_path / "route.safetensors"
    with pytest.raises(FileNotFoundError, match="No route at"):
        Route.load(path)
    path.write_bytes(b"not a route")
    with pytest.raises(MiLoraError, match="is not a saved route"):
        Route.load(path)
    small().save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MiLoraError, match="is not a saved route"):
        Route.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "route.safetensors"
    small().save(path)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("milora_core.routing.route.save_file", fails)
    with pytest.raises(MiLoraError, match="cannot be written: disk full"):
        small().expand(2).save(path)
    assert Route.load(path) == small()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
