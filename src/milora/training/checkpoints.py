"""Finds the checkpoints from which a run can resume."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "milora_state.pt"
"""File in a checkpoint with state that transformers does not save, such as the optimiser for dev batches."""

CHECKPOINT_FILES = ("adapter_model.safetensors", STATE_FILE, "trainer_state.json")
"""Files that a checkpoint needs besides an optimiser; transformers writes `trainer_state.json` last."""

OPTIMIZER_STATES = ("optimizer.pt", "latest", "optimizer.bin", "optimizer_0")
"""Location of an optimiser's state: transformers' own file, for DeepSpeed the folder that its file `latest` names, and
for FSDP one file (complete) or a folder (each process's part)."""

KEPT = "; earlier checkpoints are kept: resume with --resume-from-checkpoint last"
"""The end of the message when a run cannot write; see [`milora_core.files.writing`]."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; incomplete ones are skipped."""
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
    """DeepSpeed saves a schedule of its own configuration with its optimiser."""
    return (checkpoint / "scheduler.pt").is_file() or (checkpoint / "latest").is_file()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    return True
