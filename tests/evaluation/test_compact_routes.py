import torch

from milora.evaluation.compact_routes import compact_route, expert_shares
from milora_core.routing import Route

# Two blocks and two prompts; the first block has no `down`.
GATES = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.6, 0.0]], [[1.0, 0.0, 1.0], [0.0, 0.4, 0.6]]])
ROUTE = Route(GATES, GATES, ("attn.q", "mlp.up", "mlp.down"), ("model.layers.3", "model.layers.10"))


def test_a_route_lists_the_blocks_of_each_expert() -> None:
    assert compact_route(ROUTE) == {"attn.q": [3, 10], "mlp.up": [], "mlp.down": [10]}
    assert compact_route(ROUTE, 1) == {"attn.q": [], "mlp.up": [3, 10], "mlp.down": [10]}


def test_shares_are_those_of_the_routes() -> None:
    rows = [{"route": compact_route(ROUTE, row)} for row in (0, 1, 1, 1)]
    expected = ROUTE[[0, 1, 1, 1]].share()
    shares = expert_shares([*rows, {"route": None}, {}])
    assert list(shares) == list(ROUTE.experts)
    for column, expert in enumerate(ROUTE.experts):
        assert list(shares[expert]) == [3, 10]
        assert list(shares[expert].values()) == expected[:, column].tolist()
    assert expert_shares([{"route": None}]) == {}
