"""Makes the runs of a settings file that are not in `--records` yet. You can stop and restart it at any time.

    python -m reproduction.smollm2 reproduction/smollm2/ablation.yaml --backbone FOLDER --data FOLDER --records FILE

A run is identified by its settings. Its record is one line of JSON, written when it ends. Two processes can share a
file of records: each skips the runs of the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from reproduction.smollm2.trial import Trial, run

LIBRARIES = ("torch", "transformers", "peft", "trl", "scikit-learn")


def trials_of(settings: dict[str, Any]) -> Iterator[tuple[str, Trial]]:
    """Name and trial of each run in the file's order: every `run` with each of its seeds and learning rates."""
    known = {field.name for field in fields(Trial)}
    for entry in settings["runs"]:
        values = {**settings.get("common", {}), **entry}
        name, seeds = values.pop("name"), values.pop("seeds")
        rates = values.pop("learning_rates", [values.pop("learning_rate", Trial.learning_rate)])
        if unknown := sorted(values.keys() - known):
            raise SystemExit(f"{name}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        if "tasks" in values:
            values["tasks"] = tuple(values["tasks"])
        for rate in rates:
            for seed in seeds:
                yield name, Trial(**values, learning_rate=float(rate), seed=seed)


def identity(trial: Trial, backbone: str) -> str:
    """A run's name among the records."""
    text = json.dumps([asdict(trial), backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(records: Path) -> set[str]:
    """The identities of the runs that have a record."""
    if not records.is_file():
        return set()
    return {json.loads(line)["run"] for line in records.read_text().splitlines() if line.strip()}


def backbone_digest(folder: Path) -> str:
    """A fingerprint of the weights, so records of another conversion are not reused."""
    digest = hashlib.sha256()
    with open(folder / "model.safetensors", "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()[:16]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--data", default=os.environ.get("MILORA_DATA_DIR"), help="folder of the benchmarks' files")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--revision", help="of the code; by default what git says")
    parser.add_argument("--list", action="store_true", help="say what is finished and what is missing, and run nothing")
    options = parser.parse_args()
    digest = backbone_digest(options.backbone)
    revision = (
        options.revision
        or subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], text=True, cwd=Path(__file__).parent
        ).strip()
    )
    options.records.parent.mkdir(parents=True, exist_ok=True)
    for name, trial in trials_of(yaml.safe_load(options.settings.read_text())):
        key = identity(trial, digest)
        is_there = key in finished(options.records)
        label = f"{name} seed {trial.seed} learning rate {trial.learning_rate:g}"
        if options.list or is_there:
            print(f"{'finished' if is_there else 'missing '} {key} {label}", flush=True)
            continue
        try:
            with FileLock(options.records.with_suffix(f".{key}.lock"), timeout=0):
                print(f"running  {key} {label}", flush=True)
                record = {
                    "run": key,
                    "name": name,
                    "experiment": options.settings.stem,
                    **asdict(trial),
                    "backbone": digest,
                    **run(trial, str(options.backbone), options.data),
                    "revision": revision,
                    "versions": {library: version(library) for library in LIBRARIES},
                    "python": platform.python_version(),
                    "threads": torch.get_num_threads(),
                    "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
                # One write of a whole line: another process's lines stay whole.
                with open(options.records, "a") as file:
                    file.write(json.dumps(record) + "\n")
        except Timeout:
            print(f"elsewhere {key} {label}", flush=True)


if __name__ == "__main__":
    main()
