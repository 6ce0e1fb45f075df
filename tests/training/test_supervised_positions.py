"""A training step computes logits at supervised positions only, also on a CPU."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from trl.trainer import utils as trl_utils

from milora.backbone.loading import load_backbone
from milora.training import supervised_positions
from milora.training.supervised_positions import score_supervised_positions_only


def test_trl_still_asks_where_we_answer() -> None:
    # If this fails, TRL now chooses the scored positions elsewhere: see supervised_positions.py.
    assert callable(getattr(trl_utils, supervised_positions.CHOICE))
    assert f"compact = {supervised_positions.CHOICE}(" in _source(trl_utils.add_fused_lm_head)


def test_only_supervised_positions_reach_the_head_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = load_backbone("tiny", dtype="float32", device="cpu")
    reference = copy.deepcopy(backbone)
    trl_utils.add_fused_lm_head(backbone, outputs=("log_probs", "is_top1"))
    score_supervised_positions_only()
    seen: list[int] = []
    apply = trl_utils._ChunkedLogProbFunction.apply

    def counting(hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", counting)
    ids = torch.randint(3, 500, (3, 20))
    labels = ids.clone()
    labels[0, :15] = labels[1, :19] = labels[2, :10] = -100

    output = backbone(input_ids=ids, labels=labels, fused_lm_head=True)
    output.loss.backward()

    expected = reference(input_ids=ids, labels=labels)
    expected.loss.backward()
    assert seen == [5 + 1 + 10]
    torch.testing.assert_close(output.loss, expected.loss)
    for ours, theirs in zip(backbone.model.layers.parameters(), reference.model.layers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def _source(function: Any) -> str:
    return inspect.getsource(function)
