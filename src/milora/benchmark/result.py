"""The result of a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from milora.benchmark.rounds import Turn

MIB = 2**20
GIGA = 1e9


@dataclass(frozen=True)
class Result:
    """Rows, with the settings, order and environment of their measurement.

    Attributes:
        command: `decode`, `prefill`, `train` or `tenants`.
        settings: The settings.
        rows: One row per method and case.
        order: The turns in the order of measurement.
        environment: See [`milora.benchmark.environment.environment`].
    """

    command: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    order: list[Turn]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        return {
            "command": self.command,
            "settings": self.settings,
            "rows": self.rows,
            "order": [list(asdict(turn).values()) for turn in self.order],
            "environment": self.environment,
        }
