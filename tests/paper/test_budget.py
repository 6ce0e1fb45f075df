import pytest

from milora.backbone.shapes import shape_config
from milora.methods import METHODS
from milora.paper.budget import TOLERANCE, equal_budgets, paper_backbone
from milora_core.errors import MiLoraError

# The bundled backbone: 4 blocks, hidden size 224, 2 of 4 heads of 56 for keys and values, feed-forward size 640.
HIDDEN, KEYS, INNER, BLOCKS = 224, 112, 640, 4
LORA_OF_RANK_1 = BLOCKS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER))
ROUTERS = BLOCKS * (7 * HIDDEN + HIDDEN + 12)


@pytest.mark.slow
def test_all_methods_are_within_the_tolerance_of_milora() -> None:
    budgets = equal_budgets("tiny")
    assert list(budgets) == list(METHODS)
    target = 32 * LORA_OF_RANK_1 + ROUTERS
    assert budgets["milora"].counts.tunable == target
    for budget in budgets.values():
        assert abs(budget.counts.tunable - target) <= TOLERANCE * target


def test_sizes_by_hand() -> None:
    target = 200_000
    budgets = equal_budgets("tiny", ["parallel-adapter", "bitfit", "lora", "moelora", "ssp"], target)
    # Down and up, at two places of a block.
    bottleneck = round(target / (BLOCKS * 2 * 2 * HIDDEN))
    assert budgets["parallel-adapter"].settings == {"bottleneck": bottleneck}
    # A seed of numbers and its projection, for every module.
    outputs = 2 * HIDDEN + 2 * KEYS + 2 * INNER + HIDDEN
    assert budgets["bitfit"].settings == {"projection_dim": round(target / (BLOCKS * (outputs + 7)))}
    assert budgets["lora"].settings == {"r": round(target / LORA_OF_RANK_1)}
    assert budgets["ssp"].settings == {"budget": target}
    moelora = budgets["moelora"].settings
    experts = moelora.get("num_experts", 8)
    by_hand = moelora["r"] * LORA_OF_RANK_1 + BLOCKS * 7 * HIDDEN * experts
    assert budgets["moelora"].counts.tunable == by_hand
    assert moelora["r"] % experts == 0
    assert moelora.get("top_k", 4) == experts // 2


def test_the_paper_s_backbones_have_the_paper_s_settings() -> None:
    config = shape_config("llama-2-7b")
    config.vocab_size = 50_000
    assert paper_backbone(config) == "llama-2-7b"
    assert paper_backbone(shape_config("tiny")) is None
    budgets = equal_budgets("llama-2-7b", ["lora", "moelora"])
    assert [budget.settings for budget in budgets.values()] == [{}, {}]
    assert budgets["moelora"].counts.tunable == pytest.approx(87.3e6, rel=0.001)


def test_a_budget_that_no_size_meets() -> None:
    with pytest.raises(MiLoraError, match=r"No size brings lora within 5% of 10,000.*with 16,640"):
        equal_budgets("tiny", ["lora"], 10_000)
