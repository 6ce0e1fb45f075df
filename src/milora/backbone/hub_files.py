"""Files of adapters and backbones, in a folder or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def adapter_file(adapter: str | os.PathLike[str], name: str) -> Path | None:
    """A file of an adapter, downloaded if it is on the hub; `None` if it does not exist.

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
        # Offline, a file that is not cached counts as missing.
        return None


def commit_of(backbone: str, revision: str) -> str | None:
    """The current commit of a revision of a backbone on the hub: branches and tags can move.

    Args:
        backbone: The hub id.
        revision: A branch, tag or commit.

    Returns:
        The commit's hash; `None` if the cache does not keep files by commit.

    Raises:
        OSError: If there is no such revision, or the hub cannot be reached.
    """
    # The cache stores files in `snapshots/{commit}`.
    commit = Path(hf_hub_download(backbone, "config.json", revision=revision)).parent.name
    return commit if _COMMIT.fullmatch(commit) else None
