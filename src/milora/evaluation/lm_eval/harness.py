"""`milora lm-eval`: lm-eval's command line, with our model class and the local tasks known to it."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from milora.tasks.folder import VARIABLE, data_folder
from milora_core.errors import MiLoraError, did_you_mean

MODEL = "milora"

_NOT_FOUND = "Tasks not found: "
_HINT = "Custom kwargs can be passed to `--metadata`"


def run(flags: Sequence[str], data_dir: str | os.PathLike[str] | None = None) -> None:
    """Runs lm-eval's command line, which prints its tables on standard output.

    `--model` is `milora` where neither the flags nor a file after `--config` say otherwise.

    Args:
        flags: lm-eval's own.
        data_dir: The folder that the local tasks (`mmlu_local`, `bbh_local`, ...) read; by default that of
            [`milora.tasks.folder.data_folder`].

    Raises:
        MiLoraError: If lm-eval is missing or refuses the flags, there is no such task, the files of a local task are
            not there, or the model cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MiLoraError("lm-eval is not installed: pip install 'milora[eval]'.")
    from milora.evaluation.lm_eval.local import write_local_tasks
    from milora.evaluation.lm_eval.upstream import parse

    command_line, arguments = parse(flags)
    config = _config(arguments)
    missing: Mapping[str, Path | None] = {}
    data_dir = data_folder(data_dir)
    with tempfile.TemporaryDirectory(prefix="milora-lm-eval-") as folder, _without_hints():
        if "include_path" in arguments:
            missing = write_local_tasks(Path(folder), data_dir)
            _check_local_tasks(_tasks(arguments.tasks if "tasks" in arguments else None, config), missing, data_dir)
            theirs = arguments.include_path or config.get("include_path") or []
            arguments.include_path = [folder, *([theirs] if isinstance(theirs, str) else theirs)]
        if "model" in arguments:
            # Registers the class; only where it may be wanted, since it takes seconds.
            import milora.evaluation.lm_eval.model  # noqa: F401

            arguments.model = arguments.model or config.get("model") or MODEL
        try:
            command_line.execute(arguments)
        except ValueError as error:
            if not str(error).startswith(_NOT_FOUND):
                raise
            name = str(error).removeprefix(_NOT_FOUND)
            raise MiLoraError(
                f"lm-eval has no task {name}{did_you_mean(name, missing)}. See milora lm-eval ls tasks."
            ) from error


def _config(arguments: Namespace) -> Mapping[str, Any]:
    """What stands in the file after `--config`."""
    if getattr(arguments, "config", None) is None:
        return {}
    try:
        config = yaml.safe_load(Path(arguments.config).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MiLoraError(f"{arguments.config} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, Mapping):
        raise MiLoraError(f"{arguments.config} must hold a YAML mapping of lm-eval's arguments.")
    return config


def _tasks(flags: Any, config: Mapping[str, Any]) -> list[str]:
    tasks = flags or config.get("tasks") or []
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return [name.strip() for task in tasks if isinstance(task, str) for name in task.split(",")]


def _check_local_tasks(tasks: Sequence[str], missing: Mapping[str, Path | None], data_dir: Path | None) -> None:
    for task in tasks:
        if task in missing and data_dir is None:
            raise MiLoraError(f"{task} reads a folder: name it with --data_dir or {VARIABLE}.")
        if missing.get(task) is not None:
            raise MiLoraError(f"{task} needs {missing[task]}, which is not there: check --data_dir or {VARIABLE}.")


@contextmanager
def _without_hints() -> Iterator[None]:
    """Without lm-eval's advice on custom datasets, which it gives once for every subject."""

    def keep(record: logging.LogRecord) -> bool:
        return _HINT not in record.getMessage()

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
