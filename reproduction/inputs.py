"""The inputs of runs: the backbone's files, the tasks' rows, a judge. They are read only if there are runs to make."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from milora.backbone.hub_files import commit_of
from milora.backbone.loading import locate
from milora.backbone.shapes import SHAPES, shape_config
from milora.tasks import registry
from milora.tasks.mt_bench import HUB_ID as MT_BENCH_HUB_ID
from milora.tasks.mt_bench import MtBench
from milora.tasks.sources import read_dev_rows, read_rows
from milora_core.errors import MiLoraError
from reproduction.grid import MT_BENCH, ROUTED, Run
from reproduction.settings import Request

PART = 1 << 20


class Inputs:
    """The inputs that the runs of a request need, each read once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.missing: dict[str, str] = {}
        """Why inputs are missing, by the input's name. Filled by [`Inputs.possible`]."""
        self._look = cache(self._look_up)

    def possible(self, run: Run) -> Run | None:
        """Returns a run with its possible tests, or `None` if one of its inputs is missing."""
        run = replace(run, tests=tuple(test for test in run.tests if self._is_tested(run, test)))
        found = self.fingerprints(run)
        needed = (found["backbone"], *found["train"].values(), *found["dev"].values())
        return run if run.tests and None not in needed else None

    def fingerprints(self, run: Run) -> dict[str, Any]:
        """Fingerprints of everything that a run reads. They depend on the contents only, not on the location."""
        return {
            "backbone": self._look(run.backbone, "backbone"),
            "train": {task: self._look(task, "train") for task in run.tasks},
            "dev": {source: self._look(source, "dev") for source in self._dev(run)},
            "test": {task: self._look(task, "test") for task in run.tests},
        }

    def _dev(self, run: Run) -> Sequence[str]:
        """The sources of a run's dev rows."""
        given = self.request.data.get("dev_data") or run.tasks
        return [given] if isinstance(given, str) else given

    def revisions(self, run: Run) -> dict[str, str]:
        """The commits of the hub repositories that a run reads, by repository."""
        found: dict[str, str | None] = (
            {} if _is_local(run.backbone) else {run.backbone: self._look(run.backbone, "backbone")}
        )
        for name in (*run.tasks, *run.tests) if self.request.data_dir is None else ():
            task = registry.get(name)
            repository = getattr(task, "hub_id", MT_BENCH_HUB_ID if name == MT_BENCH else None)
            if repository is not None:
                found[repository] = dataset_revision(repository)
        return {name: revision for name, revision in found.items() if revision is not None}

    def _is_tested(self, run: Run, test: str) -> bool:
        # Without a judge, MT-Bench still gives the routes of its first turns.
        if test == MT_BENCH and self.request.judge_url is None and run.method not in ROUTED:
            self.missing[MT_BENCH] = "a judge grades its answers; name one as judge_url"
            return False
        return self._look(test, "test") is not None

    def _look_up(self, name: str, part: str) -> str | None:
        """The fingerprint of a backbone or of a split's rows; `None` if it is missing."""
        try:
            if part == "backbone":
                return _backbone_fingerprint(name, self.request.data.get("model_revision", "main"))
            return self._rows_fingerprint(name, part)
        except (MiLoraError, OSError) as error:
            key = name if part == "backbone" else f"{name} ({part})"
            self.missing[key] = str(error).strip().splitlines()[0]
            return None

    def _rows_fingerprint(self, source: str, split: Any) -> str:
        names = ["prompt", "completion", "answer"]
        if source == MT_BENCH:
            found: Sequence[Any] = MtBench(self.request.data_dir).questions()
            names = ["id", "category", "turns", "references"]
        elif source in registry.names():
            found = registry.get(source, self.request.data_dir).examples(split)
        else:
            found = read_dev_rows(source) if split == "dev" else read_rows(source)
        rows = list(map(attrgetter(*names), found))
        if not rows:
            raise MiLoraError(f"{source} has no rows in its split {split}")
        return hashlib.blake2b("".join(f"{row!r}\n" for row in rows).encode(), digest_size=8).hexdigest()


def backbone_config(backbone: str, *, network: bool) -> Any:
    """The transformers configuration of a backbone: `tiny`, a shape's name, a folder or a hub id.

    If it is not found, raises a [`MiLoraError`]; without `network`, which allows access to the hub, returns `None`.
    """
    if _is_local(backbone) or backbone in SHAPES:
        return shape_config(backbone)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(backbone), local_files_only=not network)
    except (OSError, ValueError) as error:
        if not network:
            return None
        raise MiLoraError(f"The backbone {backbone} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def dataset_revision(repository: str) -> str | None:
    """The last read commit of a hub data set, from the hub's cache; `None` if nothing is cached."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="dataset") / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime)
    return found[-1].name if found else None


def _backbone_fingerprint(backbone: str, revision: str = "main") -> str:
    """The fingerprint of a folder (sizes, starts and ends of its files), or the commit of a hub id."""
    if not _is_local(backbone):
        if backbone in SHAPES:
            raise MiLoraError(f"{backbone} is a shape without weights; name a folder or a hub id as backbone")
        return commit_of(backbone, revision) or revision
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(locate(backbone))
    if not (folder / "config.json").is_file():
        raise MiLoraError(f"{backbone} has no config.json")
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(PART))
            file.seek(max(path.stat().st_size - PART, 0))
            digest.update(file.read())
    return digest.hexdigest()


def _is_local(backbone: str) -> bool:
    try:
        return Path(locate(backbone)).is_dir()
    except MiLoraError:
        return False
