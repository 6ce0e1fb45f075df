"""The checkpoint from which a run resumes: the newest complete one, for every layout of optimiser state."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora.training.checkpoints import last_checkpoint

COMMON = ("adapter_model.safetensors", "milora_state.pt")
LAYOUTS = {
    "transformers": ("optimizer.pt", "scheduler.pt"),
    "deepspeed": ("latest", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "scheduler.pt"),
    "deepspeed's own schedule": ("latest", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "fsdp, whole": ("optimizer.bin", "scheduler.pt"),
    "fsdp, in parts": ("optimizer_0/__0_0.distcp", "scheduler.pt"),
}


def write(folder: Path, names: tuple[str, ...], state: str = "{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "trainer_state.json").write_text(state)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(tmp_path: Path, layout: str) -> None:
    whole = write(tmp_path / "checkpoint-2", (*COMMON, *LAYOUTS[layout]))
    write(tmp_path / "checkpoint-10", COMMON)  # Without an optimiser.
    write(tmp_path / "checkpoint-11", (*COMMON, *LAYOUTS[layout]), state='{"epoch"')
    (tmp_path / "checkpoint-last").mkdir()
    assert last_checkpoint(tmp_path) == whole


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10):
        write(tmp_path / f"checkpoint-{step}", (*COMMON, *LAYOUTS["transformers"]))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_there_may_be_none(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-3", (*COMMON, "optimizer.pt"))  # Interrupted before the scheduler was written.
    assert last_checkpoint(tmp_path) is None
