"""The thirteen methods by name: parameter counts against the paper's, and that each works on a tiny backbone."""

import re
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapted import ALL_ARCHITECTURES
from support.architectures import ARCHITECTURES, EXPERTS, random_prompts

from milora import MiLoraError
from milora.backbone.blocks import find_blocks
from milora.backbone.shapes import shape_config
from milora.methods import METHODS, PAPER_BACKBONE, Counts, block_linears, config_for, parameter_counts

NAMES = [
    "parallel-adapter",
    "learned-adapter",
    "p-tuning-v2",
    "iapt",
    "bitfit",
    "ia3",
    "ssp",
    "lora",
    "adalora",
    "moelora",
    "dora",
    "milora",
    "midora",
]
NOT_DERIVABLE = {"ssp", "learned-adapter"}
REQUIRED = {"adalora": {"total_step": 100}}

# By hand for Llama-2 7B: 32 blocks, four modules of 4096 x 4096, three of 4096 x 11008, LoRA of rank 32.
ATTENTION, FEED_FORWARD = 32 * (4096 + 4096), 32 * (4096 + 11008)
LORA = 32 * (4 * ATTENTION + 3 * FEED_FORWARD)
# W_r for 7 experts, the pooler's vector, the rational's 7 + 5 coefficients.
ROUTERS = 32 * (7 * 4096 + 4096 + 12)


@cache
def counted(name: str) -> Counts:
    """A method's counts on the paper's backbone."""
    return parameter_counts(name, PAPER_BACKBONE)


def test_all_thirteen_are_there() -> None:
    assert list(METHODS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tunable_parameters_are_the_papers(name: str) -> None:
    counts = counted(name)
    assert counts.tunable == pytest.approx(METHODS[name].paper_tunable, rel=0.03 if name in NOT_DERIVABLE else 0.005)
    assert 0 < counts.activated_mean <= counts.activated_max <= counts.tunable
    if name not in {"milora", "midora", "moelora"}:
        assert counts.activated_mean == counts.activated_max == counts.tunable


@pytest.mark.parametrize("top_k", [1, 3])
def test_activated_parameters_of_milora(top_k: int) -> None:
    counts = counted("milora") if top_k == 3 else parameter_counts("milora", PAPER_BACKBONE, top_k=top_k)
    assert counts.tunable == LORA + ROUTERS
    assert counts.activated_mean == pytest.approx(LORA * top_k / 7 + ROUTERS, abs=1)
    # A feed-forward module's LoRA is larger than an attention module's.
    assert counts.activated_max == 32 * top_k * FEED_FORWARD + ROUTERS
    if top_k == 1:
        # The paper's "12.3M" and "at most 16.4M".
        assert counts.activated_mean == pytest.approx(12.3e6, rel=0.015)
        assert counts.activated_max == pytest.approx(16.4e6, rel=0.015)


def test_exact_counts_where_the_arithmetic_is_simple() -> None:
    assert counted("lora").tunable == LORA
    assert counted("dora").tunable == LORA
    # Plus one singular value per rank.
    assert counted("adalora").tunable == LORA + 32 * 7 * 32
    assert counted("midora") == counted("milora")
    moelora = counted("moelora")
    routers = 32 * 7 * 4096 * 8
    assert (moelora.tunable, moelora.activated_mean) == (LORA + routers, LORA // 2 + routers)


def test_counting_takes_a_configuration_and_overrides() -> None:
    config = shape_config("tinyllama-1.1b")
    config.num_hidden_layers = 3
    small, large = (parameter_counts("lora", config, r=r).tunable for r in (4, 8))
    assert large == 2 * small
    assert small == 3 * 4 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 5632))


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_peft_method_on_its_backbone(name: str) -> None:
    backbone = ARCHITECTURES["llama"]()
    model = get_peft_model(backbone, config_for(name, backbone, **REQUIRED.get(name, {})))
    tokens = torch.tensor(random_prompts(2, 5))
    labels = tokens.masked_fill(torch.arange(5) < 3, -100)
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_paper_s_settings() -> None:
    backbone = ARCHITECTURES["llama"]()
    lora, dora = config_for("lora", backbone), config_for("dora", backbone)
    assert (lora.r, lora.lora_alpha, lora.use_dora, dora.r, dora.use_dora) == (32, 64, False, 32, True)
    adalora = config_for("adalora", backbone, total_step=1000)
    assert (adalora.init_r, adalora.target_r, adalora.total_step) == (64, 32, 1000)
    milora, midora = config_for("milora", backbone), config_for("midora", backbone)
    assert (milora.r, milora.top_k, milora.use_dora, midora.use_dora) == (32, 3, False, True)
    assert config_for("lora", backbone, r=4).lora_alpha == 8
    assert config_for("lora", backbone, r=4, lora_alpha=5).lora_alpha == 5


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_lora_takes_the_blocks_linear_modules_and_nothing_else(name: str) -> None:
    backbone = ALL_ARCHITECTURES[name]()
    pattern = block_linears(backbone)
    linears = {f"{block.path}.{path}" for block in find_blocks(backbone) for path in block.linears}
    assert {path for path, _ in backbone.named_modules() if re.fullmatch(pattern, path)} == linears


def test_peft_agrees_on_what_is_targeted() -> None:
    backbone = ARCHITECTURES["opt_post_norm"]()
    model = get_peft_model(backbone, LoraConfig(target_modules=block_linears(backbone)))
    assert len(model.base_model.targeted_module_names) == 2 * len(EXPERTS["opt_post_norm"])


def test_mistakes() -> None:
    backbone = ARCHITECTURES["llama"]()
    with pytest.raises(MiLoraError, match=r"no method 'mi-lora'.*did you mean 'milora'"):
        config_for("mi-lora", backbone)
    with pytest.raises(MiLoraError, match=r"MiLoraConfig has no field 'topk'.*'top_k'"):
        config_for("milora", backbone, topk=2)
    with pytest.raises(MiLoraError, match="pass their number as total_step"):
        config_for("adalora", backbone)
    with pytest.raises(MiLoraError, match="no method 'lor'"):
        parameter_counts("lor", PAPER_BACKBONE)
    with pytest.raises(MiLoraError, match="no backbone shape 'llama'"):
        parameter_counts("lora", "llama")
