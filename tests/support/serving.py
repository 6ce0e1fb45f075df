"""A real `milora serve` process."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADMIN = "admin-key"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write_keys(folder: Path, tenants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes the key files and returns the options of `milora serve`. A tenant's key is `NAME-key`."""
    entries = [{"name": name, "key_sha256": digest(f"{name}-key"), **fields} for name, fields in tenants.items()]
    (folder / "keys.yaml").write_text(json.dumps({"tenants": entries}))
    (folder / "admin.sha256").write_text(digest(ADMIN))
    return ["--keys", str(folder / "keys.yaml"), "--admin-key-file", str(folder / "admin.sha256")]


class ServerProcess:
    """A server process; the constructor returns when the server is ready.

    Attributes:
        log: The log lines so far.
        url: The server's address.
    """

    def __init__(self, *options: str | Path) -> None:
        command = [sys.executable, "-m", "milora", "serve", "--port", "0", "--threads", "1", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self.other_lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(120) or self.process.poll() is not None:
            self.kill()
            raise RuntimeError(f"The server did not start: {self.log} {self.other_lines}")
        ready = self.events("ready")[0]
        self.url = f"http://{ready['host']}:{ready['port']}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.other_lines.append(line)
            if self.log and self.log[-1]["event"] == "ready":
                self._ready.set()
        self._ready.set()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout)
        self._reader.join(10)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self._reader.join(10)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
