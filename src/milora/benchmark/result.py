"""The result of a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from milora.benchmark.rounds import Turn

MIB = 2**20
GIGA = 1e9


@dataclass(frozen=True)
class Result:
    """Rows, and what is needed to judge them.

    Attributes:
        command: `decode`, `prefill`, `train` or `tenants`.
        settings: What was asked for.
        rows: One for each method and case.
        order: The turns as they were taken.
        environment: See [`milora.benchmark.environment.environment`].
    """

    command: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    order: list[Turn]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "command": self.command,
            "settings": self.settings,
            "rows": self.rows,
            "order": [list(asdict(turn).values()) for turn in self.order],
            "environment": self.environment,
        }
