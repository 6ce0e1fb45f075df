"""Makes the runs of a settings file that are not in `--records` yet. You can stop and restart it at any time.

    python -m reproduction.smollm2 reproduction/smollm2/ablation.yaml --backbone FOLDER --data FOLDER --records FILE

A run is identified by its settings. Its record is one line of JSON, written when it ends. Two processes can share a
file of records: each skips the runs of the other. If a settings file has several learning rates, the first seed runs
with each, and the other seeds run with the rate of the lowest dev loss. Start the command again if it says `waiting`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
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

ADDED = ("router_bias", "gradient_to_all", "detach_router_input", "dense_steps")
"""Fields of [`Trial`] that older records lack. At their default they do not change a run's identity."""


def entries_of(settings: dict[str, Any]) -> Iterator[tuple[str, list[Trial]]]:
    """Name and trials of each entry in the file's order: every learning rate with every seed, by seed."""
    known = {field.name for field in fields(Trial)}
    for entry in settings["runs"]:
        values = {**settings.get("common", {}), **entry}
        name, seeds = values.pop("name"), values.pop("seeds")
        rates = values.pop("learning_rates", [values.pop("learning_rate", Trial.learning_rate)])
        if unknown := sorted(values.keys() - known):
            raise SystemExit(f"{name}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        if "tasks" in values:
            values["tasks"] = tuple(values["tasks"])
        yield name, [Trial(**values, learning_rate=float(rate), seed=seed) for seed in seeds for rate in rates]


def best_rate(trials: Iterable[Trial], backbone: str, records: dict[str, dict[str, Any]]) -> float | None:
    """The learning rate with the lowest dev loss; `None` while a trial has no record."""
    losses = {trial.learning_rate: records.get(identity(trial, backbone)) for trial in trials}
    found = {rate: record["dev"]["loss"] for rate, record in losses.items() if record is not None}
    return min(found, key=lambda rate: found[rate]) if len(found) == len(losses) else None


def identity(trial: Trial, backbone: str) -> str:
    """A run's name among the records."""
    settings = {
        name: value for name, value in asdict(trial).items() if name not in ADDED or value != getattr(Trial, name)
    }
    text = json.dumps([settings, backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Identity -> record of the runs that have one."""
    if not file.is_file():
        return {}
    lines = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
    return {record["run"]: record for record in lines}


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
    for name, trials in entries_of(yaml.safe_load(options.settings.read_text())):
        first = [trial for trial in trials if trial.seed == trials[0].seed]
        for trial in trials:
            key = identity(trial, digest)
            records = read_records(options.records)
            label = f"{name} seed {trial.seed} learning rate {trial.learning_rate:g}"
            if trial not in first and len(first) > 1 and key not in records:
                rate = best_rate(first, digest, records)
                if rate is None:
                    print(f"waiting  {key} {label}: the learning rate is not chosen yet", flush=True)
                    continue
                if rate != trial.learning_rate:
                    continue
            if options.list or key in records:
                print(f"{'finished' if key in records else 'missing '} {key} {label}", flush=True)
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
                        **run(trial, str(options.backbone), options.data, options.device),
                        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
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
