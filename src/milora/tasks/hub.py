"""The one door to the `datasets` library's loading: its many errors come out as one, with a fix."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from milora.errors import DataError


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """A split of a dataset: by its hub id, or from a folder that `load_dataset` or `Dataset.save_to_disk` can read.

    A single dataset that was saved to disk is its own split, whatever `split` says.

    Raises:
        DataError: the dataset cannot be reached, read or built, or has no such split or configuration.
    """
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            saved = load_from_disk(name)
            if not isinstance(saved, DatasetDict):
                return saved
            if split not in saved:
                raise DataError(f"{name} has no split {split!r}; its splits: {', '.join(saved)}")
            return saved[split]
        return load_dataset(name, config, split=split)
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"split {split!r} of the dataset {name!r} cannot be loaded: {reason} "
            "(check its name, split and configuration, and that the hub can be reached; a folder works without it)"
        ) from error
