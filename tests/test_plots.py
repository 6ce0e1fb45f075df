import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from milora import plots
from milora.plots import MOST_BLOCKS_WITH_VALUES, route_heat_map, short_blocks, short_experts
from milora_core.errors import MiLoraError
from milora_core.routing import Route

EXPERTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def route(prompts: int, blocks: int = 3, experts: tuple[str, ...] = EXPERTS) -> Route:
    probabilities = torch.rand(blocks, prompts, len(experts)).softmax(-1)
    gates = (probabilities == probabilities.amax(-1, keepdim=True)).float()
    return Route(gates, probabilities, experts, tuple(f"model.layers.{block}" for block in range(blocks)))


def test_a_picture_is_written_whole_without_touching_pyplot(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    for name, routes in {
        "one.png": route(1),
        "many.png": route(5),
        "deep.png": route(2, MOST_BLOCKS_WITH_VALUES + 1),
        "panels.png": {"arc-easy": route(4), "boolq": route(2)},
    }.items():
        route_heat_map(routes, tmp_path / name)
        assert image.imread(tmp_path / name).shape[0] > 100
    route_heat_map(route(1), tmp_path / "one.svg", title="A title")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert not list(tmp_path.glob(".*"))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_cell_is_as_dark_as_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (save(figure, path), drawn.append(figure)))
    gates = torch.tensor([[[1.0, 0.0, 0.0]]])
    route_heat_map(Route(gates, gates, EXPERTS, ("model.layers.0",)), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[..., :3].mean(-1)
    (figure,) = drawn

    def shade(column: int) -> float:
        # In the upper part of the cell, above the number; `savefig` has its origin at the top.
        x, y = figure.axes[0].transData.transform((column, -0.35)) / figure.dpi * 160
        return float(pixels[len(pixels) - int(y), int(x)])

    assert shade(0) < 0.4 < 0.9 < shade(1)


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_experts(EXPERTS) == ["q_proj", "k_proj", "down_proj"]
    assert short_experts(["attn.c_proj", "mlp.c_proj", "mlp.c_fc", "fc1"]) == [
        "attn.c_proj",
        "mlp.c_proj",
        "c_fc",
        "fc1",
    ]
    assert short_experts(["a.b", "c.a.b"]) == ["a.b", "c.a.b"]
    assert short_blocks(["model.layers.0", "model.layers.1"]) == ["0", "1"]
    assert short_blocks(["encoder.0", "decoder.0"]) == ["encoder.0", "decoder.0"]


def test_mistakes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MiLoraError, match="no route"):
        route_heat_map({}, tmp_path / "a.png")
    with pytest.raises(MiLoraError, match="different"):
        route_heat_map({"a": route(1), "b": route(1, 2)}, tmp_path / "a.png")
    with pytest.raises(MiLoraError, match="no prompts"):
        route_heat_map({"a": route(2)[:0]}, tmp_path / "a.png")
    with pytest.raises(MiLoraError, match=r"\.docx"):
        route_heat_map(route(1), tmp_path / "a.docx")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MiLoraError, match=r'A picture needs matplotlib: pip install "milora\[plot\]"'):
        route_heat_map(route(1), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
