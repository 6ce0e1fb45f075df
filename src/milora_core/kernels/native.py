"""Compiles the C kernels for this machine's CPU on first use.

The matrices of a decode step are so thin that a BLAS call costs more than the product, and a router consists of many
small operators whose overhead exceeds their work. The C files in this folder replace them with loops. The machine's C
compiler builds them once in a second or two, and the library is kept in the user's cache. Without a compiler, or with
`MILORA_NATIVE=0`, torch's operators are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("row_lora.c", "routing.c", "paged_attention.c"))
HEADER = FOLDER / "numbers.h"
SWITCH = "MILORA_NATIVE"
"""Environment variable: `0` selects torch's operators."""

FLAGS = (
    ("-O3", "-march=native", "-fopenmp"),
    # Apple's clang has no OpenMP, and some compilers lack the native target: one thread and generic code.
    ("-O3", "-march=native", "-Wno-unknown-pragmas"),
    ("-O3", "-Wno-unknown-pragmas"),
)
BUILD_SECONDS = 120
_building = Lock()


def library() -> ctypes.CDLL | None:
    """The kernels, built on first use; `None` if they cannot be built or are disabled."""
    if os.environ.get(SWITCH) == "0":
        return None
    with _building:
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        _log.info("No C compiler found: on the CPU, routers and decode steps use torch's operators.")
        return None
    for flags in FLAGS:
        try:
            return ctypes.CDLL(str(_built(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            _log.info("%s cannot build the kernels: %s", " ".join([compiler, *flags]), str(reason).strip()[:500])
    return None


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((found for found in map(shutil.which, filter(None, names)) if found), None)


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, cached or newly built; two processes that build at once both get a complete one."""
    folder = _cache()
    path = folder / f"kernels-{_digest(compiler, flags)}.so"
    if path.is_file():
        return path
    handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *flags, "-shared", "-fPIC", "-o", partial, *map(str, SOURCES), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    """A digest of the sources, the build flags and the processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=BUILD_SECONDS).stdout
    digest = hashlib.blake2b(digest_size=10)
    sources = [source.read_bytes() for source in (HEADER, *SOURCES)]
    for part in (*sources, " ".join(flags).encode(), version, _processor().encode()):
        digest.update(part + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    """Machines with different processors may share the home folder of the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    of_kind = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {sorted(set(of_kind))}"


def _cache() -> Path:
    """A folder that only this user can write to, because its contents are executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "milora"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()):
            return folder
    except (OSError, RuntimeError) as error:
        _log.info("%s cannot be used: %s", folder, error)
    return _own_folder()


@cache
def _own_folder() -> Path:
    """A temporary folder for this process only."""
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="milora-", ignore_cleanup_errors=True)
