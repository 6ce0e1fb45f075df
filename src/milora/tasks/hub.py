"""Loads datasets with the `datasets` library and converts its errors to `DataError` with a fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_core.errors import DataError, importing

if TYPE_CHECKING:
    from datasets import Dataset


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """A split of a dataset on the hub, or of a folder for `load_dataset` or from `Dataset.save_to_disk`.

    A single dataset saved to disk has no splits, so `split` is ignored.

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
    """The splits of a dataset, or `None` for a single dataset saved to disk.

    Raises:
        DataError: the dataset cannot be reached, read or built, or has no such configuration.
    """
    with _explained(f"the dataset {full_name(name, config)!r}"):
        import datasets

        # Loading one split prepares all splits, so this adds no work.
        found: Any = datasets.load_from_disk(name) if _was_saved(name) else datasets.load_dataset(name, config)
        return list(found) if isinstance(found, dict) else None


def full_name(name: str, config: str | None) -> str:
    """A dataset and its configuration in the form users write: `owner/name:configuration`."""
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
        # The error of building a dataset is generic; its cause has the reason.
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{what} cannot be loaded: {reason} "
            "(check its name, split and configuration, and that the hub can be reached; a folder works without it)"
        ) from error
