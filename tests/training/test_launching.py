"""Launcher options that accelerate ignores."""

from __future__ import annotations

import pytest
from accelerate import DistributedType, PartialState

from milora import MiLoraError
from milora.training.launching import check_launch


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_fsdp_on_cpus_is_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    state = PartialState()
    monkeypatch.setattr(state, "distributed_type", kind)
    check_launch()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MiLoraError, match="requests FSDP"):
        check_launch()
    # A launcher whose configuration has no FSDP sets "false".
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_launch()


def test_deepspeed_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--use_cpu` of the launcher or of the command turns DeepSpeed off."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(MiLoraError, match="remove --use_cpu"):
        check_launch()


def test_deepspeed_processes_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setattr(PartialState(), "num_processes", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MiLoraError, match="launched in 2 processes"):
        check_launch()


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("ACCELERATE_USE_FSDP", DistributedType.MULTI_GPU),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ],
)
def test_what_is_given_is_not_refused(asked: str, kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState(), "distributed_type", kind)
    monkeypatch.setenv(asked, "true")
    check_launch()
