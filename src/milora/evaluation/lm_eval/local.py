"""lm-eval's MMLU, BBH and GSM8K with rows from a folder. Each local task has the suffix `_local`.

Prompts, few-shot examples, filters and metrics are lm-eval's: a local task is a short YAML file that includes lm-eval's
file and names the rows' files. The hub is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from milora.evaluation.lm_eval import hub_rows
from milora.evaluation.lm_eval.task_files import task_files

SUFFIX = "_local"

FAMILIES = ("mmlu", "bbh", "gsm8k")
"""Folders of lm-eval's tasks to search for tasks on the datasets below."""


@dataclass(frozen=True)
class Source:
    """The local files of one of the hub's datasets.

    Attributes:
        reader: Reads a file; a function of `milora.evaluation.lm_eval.hub_rows`.
        files: Path of each split's file in the folder. `{name}` is the dataset's configuration.
    """

    reader: Callable[[Path], list[dict[str, Any]]]
    files: Mapping[str, str]


SOURCES = {
    "cais/mmlu": Source(hub_rows.read_mmlu, {"dev": "mmlu/dev/{name}_dev.csv", "test": "mmlu/test/{name}_test.csv"}),
    "SaylorTwift/bbh": Source(hub_rows.read_bbh, {"test": "bbh/{name}.json"}),
    "openai/gsm8k": Source(
        hub_rows.read_gsm8k, {"train": "gsm8k/train.original.jsonl", "test": "gsm8k/test.original.jsonl"}
    ),
}
"""Sources by the name of the hub's dataset."""


def local_dataset(*, reader: str, files: Mapping[str, str], **_: Any) -> Any:
    """The rows of a local task by split. A task's `custom_dataset` calls this function.

    Args:
        reader: Name of a function in `milora.evaluation.lm_eval.hub_rows`.
        files: Each split's file.
        **_: Arguments that lm-eval adds: `--metadata`, `--model_args`. Ignored.

    Raises:
        DataError: If a file cannot be read, with the line or the row.
    """
    from datasets import Dataset, DatasetDict

    read = getattr(hub_rows, reader)
    return DatasetDict({split: Dataset.from_list(read(Path(file))) for split, file in files.items()})


def write_local_tasks(folder: Path, data_dir: Path | None) -> dict[str, Path | None]:
    """Writes the local tasks and groups for lm-eval's `--include_path`, or for `TaskManager(include_path=folder)`.

    Args:
        folder: An existing folder for the task files.
        data_dir: The folder that contains `mmlu`, `bbh` and `gsm8k`; with `None` nothing is written.

    Returns:
        The name of every local task and group, with its first missing file, or `None` if it was written. A group is
        only written if all its tasks are, so no partial benchmark is reported under the full name.
    """
    tasks: dict[str, tuple[Path, dict[str, Any]]] = {}
    groups: dict[str, dict[str, Any]] = {}
    tags: dict[str, list[str]] = {}
    for path, config in task_files(FAMILIES):
        if "group" in config:
            groups[config["group"]] = config
        elif config.get("dataset_path") in SOURCES and "task" in config:
            tasks[config["task"]] = (path, config)
            for tag in _listed(config.get("tag")):
                tags.setdefault(tag, []).append(config["task"])
    missing: dict[str, Path | None] = {}
    for name, (path, config) in tasks.items():
        source = SOURCES[config["dataset_path"]]
        files = {
            split: (data_dir or Path()) / file.format(name=config["dataset_name"])
            for split, file in source.files.items()
        }
        missing[name] = next((file for file in files.values() if data_dir is None or not file.is_file()), None)
        if missing[name] is None:
            _write(folder, name, _task_yaml(path, config, source, files))
    for name, config in groups.items():
        members = list(_leaves(config["task"], groups, tags))
        if all(member in tasks for member in members):
            missing[name] = next((missing[member] for member in members if missing[member]), None)
            if missing[name] is None:
                _write(folder, name, yaml.safe_dump(_renamed(config), sort_keys=False))
    return {name + SUFFIX: file for name, file in missing.items()}


def _task_yaml(path: Path, config: Mapping[str, Any], source: Source, files: Mapping[str, Path]) -> str:
    lines = {
        "include": str(path),
        "task": config["task"] + SUFFIX,
        # Renames the tags, or lm-eval's tags would include this task.
        "tag": [tag + SUFFIX for tag in _listed(config.get("tag"))],
        "dataset_kwargs": {
            "reader": source.reader.__name__,
            "files": {split: str(file) for split, file in files.items()},
        },
    }
    function = f"{local_dataset.__module__}.{local_dataset.__name__}"
    return yaml.safe_dump(lines, sort_keys=False) + f"custom_dataset: !function {function}\n"


def _leaves(members: list[Any], groups: Mapping[str, dict[str, Any]], tags: Mapping[str, list[str]]) -> Iterator[str]:
    """The tasks of a group, with nested groups and tags expanded."""
    for member in members:
        name = member if isinstance(member, str) else member.get("group") or member["task"]
        if isinstance(member, dict) and isinstance(member.get("task"), list):
            yield from _leaves(member["task"], groups, tags)
        elif name in groups:
            yield from _leaves(groups[name]["task"], groups, tags)
        else:
            yield from tags.get(name, [name])


def _renamed(value: Any) -> Any:
    """A group's configuration with the suffix added to every task, group and tag."""
    if isinstance(value, list):
        return [each + SUFFIX if isinstance(each, str) else _renamed(each) for each in value]
    renamed = dict(value)
    for key in ("group", "task"):
        if isinstance(value.get(key), str):
            renamed[key] = value[key] + SUFFIX
        elif isinstance(value.get(key), list):
            renamed[key] = _renamed(value[key])
    return renamed


def _listed(tag: str | list[str] | None) -> list[str]:
    return [tag] if isinstance(tag, str) else list(tag or [])


def _write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}{SUFFIX}.yaml").write_text(text)
