"""Runs lm-eval's tasks, including the local ones, with `lm_eval.simple_evaluate`."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora.tasks.folder import VARIABLE, data_folder
from milora_core.errors import MiLoraError, did_you_mean, importing
from milora_core.files import require_writable

MODEL = "milora"

_HINT = "Custom kwargs can be passed to `--metadata`"


def run(
    tasks: Sequence[str],
    model_args: str = "",
    *,
    model: str = MODEL,
    data_dir: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    output_path: str | os.PathLike[str] | None = None,
    log_samples: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates a model on lm-eval's tasks.

    Args:
        tasks: Names of tasks, groups and tags, or patterns such as `mmlu_*_local`.
        model_args: Arguments of the model class, such as `peft=out/adapter,dtype=bfloat16`.
        model: `milora`, or another of lm-eval's model classes.
        data_dir: The folder that the local tasks (`mmlu_local`, `bbh_local`, ...) read; by default
            [`milora.tasks.folder.data_folder`].
        include_path: A folder with further tasks.
        output_path: A folder (or a `.json` file) for the results, in lm-eval's format.
        log_samples: Whether to save every request there too.
        **settings: Arguments of `lm_eval.simple_evaluate`: `num_fewshot`, `batch_size`, `limit`, `gen_kwargs`, ...

    Returns:
        The results of `lm_eval.simple_evaluate`, without the samples.

    Raises:
        MissingExtraError: If lm-eval is not installed.
        MiLoraError: If there is no such task, the files of a local task are missing, the model cannot be loaded, or
            lm-eval rejects a setting.
    """
    if log_samples and output_path is None:
        raise MiLoraError("--log-samples needs a folder: pass --output-path too.")
    # Checked early, because lm-eval only logs that results could not be saved.
    if output_path is not None:
        folder = Path(output_path).parent if Path(output_path).suffix == ".json" else Path(output_path)
        require_writable(folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with importing("eval", "lm-eval's tasks"):
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import simple_parse_args_string

    with tempfile.TemporaryDirectory(prefix="milora-lm-eval-") as local, _without_hints():
        missing = local_tasks(Path(local), tasks, data_folder(data_dir))
        of_model = simple_parse_args_string(model_args)
        manager = TaskManager(
            include_path=[local, *([] if include_path is None else [str(include_path)])], metadata=dict(of_model)
        )
        found = _matching(manager, tasks, missing)
        # Registers the class, which takes seconds.
        import milora.evaluation.lm_eval.model  # noqa: F401

        tracker = None if output_path is None else EvaluationTracker(output_path=str(output_path))
        try:
            results = simple_evaluate(
                model=model,
                model_args=of_model,
                tasks=found,
                task_manager=manager,
                evaluation_tracker=tracker,
                log_samples=log_samples,
                metadata=dict(of_model),
                **settings,
            )
        except ValueError as error:
            raise MiLoraError(f"lm-eval refuses this: {' '.join(str(error).split())}") from error
        samples = results.pop("samples", {})
        if tracker is not None:
            tracker.save_results_aggregated(results=results, samples=samples or None)
            for name, of_task in samples.items():
                tracker.save_results_samples(task_name=name, samples=of_task)
    return dict(results)


def local_tasks(folder: Path, wanted: Sequence[str], data_dir: Path | None) -> Mapping[str, Path | None]:
    """Writes the local tasks for lm-eval; see [`milora.evaluation.lm_eval.local.write_local_tasks`].

    Raises:
        MiLoraError: If the files of a requested task are missing.
    """
    from milora.evaluation.lm_eval.local import write_local_tasks

    missing = write_local_tasks(folder, data_dir)
    for task in wanted:
        if task in missing and data_dir is None:
            raise MiLoraError(f"{task} reads a folder: name it with --data-dir or {VARIABLE}.")
        if missing.get(task) is not None:
            raise MiLoraError(f"{task} needs {missing[task]}, which does not exist: check --data-dir or {VARIABLE}.")
    return missing


def task_names(data_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """The names of lm-eval's tasks, groups and tags, and of the local ones whose files exist."""
    with importing("eval", "lm-eval's tasks"):
        from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="milora-lm-eval-") as local:
        local_tasks(Path(local), [], data_folder(data_dir))
        return list(TaskManager(include_path=local).all_tasks)


def _matching(manager: Any, tasks: Sequence[str], known: Mapping[str, Path | None]) -> list[str]:
    found: dict[str, None] = {}
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            raise MiLoraError(
                f"lm-eval has no task {task}{did_you_mean(task, known)}. See milora lm-eval --list-tasks."
            )
        found |= dict.fromkeys(matches)
    return list(found)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Suppresses lm-eval's hint about custom datasets, which it repeats for every subject."""

    def keep(record: logging.LogRecord) -> bool:
        return _HINT not in record.getMessage()

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
