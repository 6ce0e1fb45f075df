"""The routers' decisions before training on real prompts, for every router norm, pooler and centring.

    python -m reproduction.smollm2.start --backbone FOLDER --data FOLDER > docs/results/smollm2/start.json

An adapter changes nothing before its first step, so one forward pass of the backbone is enough for all variants.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.blocks import find_blocks
from milora.backbone.loading import load_backbone
from milora_core.routing import ROUTER_NORMS, RouterProjection, build_activation, build_pooler, choose
from milora_core.routing.router import expert_probabilities
from reproduction.smollm2.routing import Centred, route_statistics
from reproduction.smollm2.trial import Example, collate, examples_of

TASKS = ("arc-easy", "boolq")
POOLERS = ("attention", "mean", "max", "last")
EXPERTS, TOP_K = 7, 3
TRAIN, DEV = 48, 40
SEEDS = range(5)


@torch.no_grad()
def block_inputs(model: Any, examples: list[Example]) -> tuple[list[Tensor], Tensor]:
    """Each block's input, (rows, tokens, hidden), and the mask of the prompts' tokens."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.module.register_forward_pre_hook(keep, with_kwargs=True) for block in find_blocks(model)]
    batch = collate(examples, 0)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return kept, (batch["attention_mask"] == 1) & (batch["labels"] == -100)


@torch.no_grad()
def statistics_of(
    inputs: tuple[list[Tensor], Tensor], norm: str, pooler: str, centre: bool, seed: int, train: int, of_first: int
) -> dict[str, Any]:
    """Measures the routers of one seed.

    Args:
        inputs: The inputs of the training prompts (for a centred router's mean and size), then of the dev prompts.
        norm: Where the router's input is normalised.
        pooler: Name of the pooler.
        centre: Whether routers read differences from the mean of the training prompts.
        seed: Seed of `W_r`.
        train: Number of training prompts.
        of_first: Number of dev prompts of the first task.
    """
    torch.manual_seed(seed)
    hidden, mask = inputs
    probabilities, chosen = [], []
    for of_block in hidden:
        size = of_block.shape[-1]
        centring, activation = Centred(), build_activation("rational")
        routing: nn.Module = nn.Sequential(centring, activation) if centre else activation
        parts = (build_pooler(pooler, size), routing, RouterProjection(size, EXPERTS))
        if centre:
            expert_probabilities(of_block[:train], mask[:train], *parts, norm=norm)
            centring.eval()
        probabilities.append(expert_probabilities(of_block[train:], mask[train:], *parts, norm=norm))
        chosen.append(choose(probabilities[-1], TOP_K).chosen)
    together, kept = torch.stack(probabilities, dim=1), torch.stack(chosen, dim=1)
    return route_statistics((together[:of_first], together[of_first:]), (kept[:of_first], kept[of_first:]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", default=os.environ.get("MILORA_DATA_DIR"), help="folder of the benchmarks' files")
    options = parser.parse_args()
    model, tokenizer = load_backbone(options.backbone, dtype="float32", device="cpu")
    train, dev = (
        [examples_of(task, split, tokenizer, options.data, rows, 96) for task in TASKS]
        for split, rows in (("train", TRAIN), ("dev", DEV))
    )
    inputs = block_inputs(model, [example for of_task in (*train, *dev) for example in of_task])
    rows = [
        {
            "router_norm": norm,
            "pooler": pooler,
            "centred": centre,
            "seed": seed,
            **statistics_of(inputs, norm, pooler, centre, seed, sum(map(len, train)), len(dev[0])),
        }
        for norm, pooler, centre, seed in product(ROUTER_NORMS, POOLERS, (False, True), SEEDS)
    ]
    print(json.dumps({"prompts": sum(map(len, dev)), "rows": rows}))


if __name__ == "__main__":
    main()
