"""Files of an adapter, in a folder or on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


def adapter_file(adapter: str | os.PathLike[str], name: str) -> Path | None:
    """A file of an adapter, downloaded where it is on the hub; `None` if there is none of that name.

    Args:
        adapter: The adapter's folder or hub id.
        name: The file's name.

    Raises:
        OSError: If the hub cannot be reached, or refuses.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(adapter), name))
    except EntryNotFoundError:
        # Offline, a file that is not in the cache counts as one that there is not.
        return None
