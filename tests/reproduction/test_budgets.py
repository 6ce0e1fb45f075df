import pytest

from milora.backbone.shapes import shape_config
from milora.methods import METHODS, parameter_counts
from milora_core.errors import MiLoraError
from reproduction.budgets import TOLERANCE, is_paper_backbone, size_at

# The bundled backbone: 4 blocks, hidden size 224, 4 query heads and 2 key-value heads of 56, feed-forward size 640.
HIDDEN, KEYS, INNER, BLOCKS = 224, 112, 640, 4
LORA_OF_RANK_1 = BLOCKS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER))
ROUTERS = BLOCKS * (7 * HIDDEN + HIDDEN + 12)


@pytest.mark.slow
def test_all_methods_are_within_the_tolerance_of_milora() -> None:
    config = shape_config("tiny")
    target = 32 * LORA_OF_RANK_1 + ROUTERS
    for name in METHODS:
        tunable = parameter_counts(name, config, **size_at(name, config, "milora")).tunable
        assert abs(tunable - target) <= TOLERANCE * target, name
        assert name != "milora" or tunable == target


def test_sizes_by_hand() -> None:
    config, target = shape_config("tiny"), 200_000
    # Down and up, at two places per block.
    bottleneck = round(target / (BLOCKS * 2 * 2 * HIDDEN))
    assert size_at("parallel-adapter", config, target) == {"bottleneck": bottleneck}
    # Per module, a seed vector and its projection.
    outputs = 2 * HIDDEN + 2 * KEYS + 2 * INNER + HIDDEN
    assert size_at("bitfit", config, target) == {"projection_dim": round(target / (BLOCKS * (outputs + 7)))}
    assert size_at("lora", config, target) == {"r": round(target / LORA_OF_RANK_1)}
    assert size_at("ssp", config, target) == {"budget": target}
    moelora = size_at("moelora", config, target)
    experts = moelora.get("num_experts", 8)
    by_hand = moelora["r"] * LORA_OF_RANK_1 + BLOCKS * 7 * HIDDEN * experts
    assert parameter_counts("moelora", config, **moelora).tunable == by_hand
    assert abs(by_hand - target) <= TOLERANCE * target
    assert moelora["r"] % experts == 0
    assert moelora.get("top_k", 4) == experts // 2


def test_the_papers_backbones_have_the_papers_settings() -> None:
    config = shape_config("llama-2-7b")
    config.vocab_size = 50_000
    assert is_paper_backbone(config)
    assert not is_paper_backbone(shape_config("tiny"))
    assert size_at("moelora", config, "milora") == size_at("moelora", shape_config("tiny"), "paper") == {}


def test_a_budget_that_no_size_meets() -> None:
    with pytest.raises(MiLoraError, match=r"No size brings lora within 5% of 10,000.*with 16,640"):
        size_at("lora", shape_config("tiny"), 10_000)
