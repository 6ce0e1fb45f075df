"""Which folders hold a checkpoint that a run can go on from."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "milora_state.pt"
"""In a checkpoint: what transformers does not keep, above all the optimiser of what trains on dev batches."""

CHECKPOINT_FILES = ("adapter_model.safetensors", STATE_FILE, "trainer_state.json")
"""What a checkpoint needs to be resumed from, beside an optimiser; transformers writes `trainer_state.json` last."""

OPTIMIZER_STATES = ("optimizer.pt", "latest", "optimizer.bin", "optimizer_0")
"""Where an optimiser's state is: in transformers' own file, by DeepSpeed in the folder that its file `latest` names,
and by FSDP in one file (whole) or in a folder (each process's part)."""

KEPT = "; earlier checkpoints are kept: resume with --resume-from-checkpoint last"
"""The end of the message when a run cannot write, as of [`milora_core.files.writing`]."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; one whose writing was cut off is passed over."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (
            all((path / name).is_file() for name in CHECKPOINT_FILES)
            and any((path / name).exists() for name in OPTIMIZER_STATES)
            and _has_schedule(path)
            and _is_json(path / "trainer_state.json")
        ):
            return path
    return None


def _has_schedule(checkpoint: Path) -> bool:
    """DeepSpeed keeps a schedule of its own configuration with its optimiser."""
    return (checkpoint / "scheduler.pt").is_file() or (checkpoint / "latest").is_file()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    return True
