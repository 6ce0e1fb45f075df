"""Builds the kernels that are written in C, for the CPU that runs them, when they are first needed.

A decode step multiplies matrices so thin that preparing a call of a BLAS costs more than the product, and a router is
many small operators whose calls cost more than what they do. The C files beside this one have loops for that; they take
a second or two to build with the machine's own C compiler, once: the library is kept in the user's cache. Where there
is no compiler, or `MILORA_NATIVE=0` is set, torch's operators are used.
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
"""Environment variable: `0` for torch's operators alone."""

FLAGS = (
    ("-O3", "-march=native", "-fopenmp"),
    # Apple's clang has no OpenMP, and some compilers do not know the machine: one thread, and plain code.
    ("-O3", "-march=native", "-Wno-unknown-pragmas"),
    ("-O3", "-Wno-unknown-pragmas"),
)
BUILD_SECONDS = 120
_building = Lock()


def library() -> ctypes.CDLL | None:
    """The kernels, built if they have not been yet; `None` where they cannot be or are switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    with _building:
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        _log.info("There is no C compiler: on the CPU, routers and decode steps use torch's operators.")
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
    """The library's file, from the cache or new; two processes that build at once both get a whole one."""
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
    """Names what the library depends on: its sources, how it is built, and the processor that it is built for."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=BUILD_SECONDS).stdout
    digest = hashlib.blake2b(digest_size=10)
    sources = [source.read_bytes() for source in (HEADER, *SOURCES)]
    for part in (*sources, " ".join(flags).encode(), version, _processor().encode()):
        digest.update(part + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    """A cache may be in a home that machines of several kinds share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    of_kind = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} {sorted(set(of_kind))}"


def _cache() -> Path:
    """A folder that only this user can write to, as what lies in it is run."""
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
    """For this process alone."""
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="milora-", ignore_cleanup_errors=True)
