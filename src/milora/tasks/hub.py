"""The one door to the `datasets` library's loading: its many errors come out as one, with a fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_core.errors import DataError, importing

if TYPE_CHECKING:
    from datasets import Dataset


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """A split of a dataset: by its hub id, or from a folder that `load_dataset` or `Dataset.save_to_disk` can read.

    A single dataset that was saved to disk is its own split, whatever `split` says.

    Raises:
        DataError: the dataset cannot be reached, read or built, or has no such split or configuration.
    """
    with _explained(f"split {split!r} of the dataset {full_name(name, config)!r}"):
        import datasets

        if not _was_saved(name):
            return datasets.load_dataset(name, config, split=split)
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise DataError(f"{name} has no split {split!r}; its splits: {', '.join(saved)}")
        return saved[split]


def split_names(name: str, config: str | None = None) -> list[str] | None:
    """The splits of a dataset; `None` for a single one that was saved to disk, and is its own.

    Raises:
        DataError: the dataset cannot be reached, read or built, or has no such configuration.
    """
    with _explained(f"the dataset {full_name(name, config)!r}"):
        import datasets

        # A split is not loaded without the others either, so that this costs nothing where one is.
        found: Any = datasets.load_from_disk(name) if _was_saved(name) else datasets.load_dataset(name, config)
        return list(found) if isinstance(found, dict) else None


def full_name(name: str, config: str | None) -> str:
    """A dataset and its configuration, as a user writes them: `owner/name:configuration`."""
    return f"{name}:{config}" if config else name


def _was_saved(name: str) -> bool:
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    with importing("train", what):
        from datasets.exceptions import DatasetsError

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        # What building a dataset raises says nothing itself.
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{what} cannot be loaded: {reason} "
            "(check its name, split and configuration, and that the hub can be reached; a folder works without it)"
        ) from error
