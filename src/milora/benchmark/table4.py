"""The measurements behind the paper's Table 4."""

from __future__ import annotations

from dataclasses import replace

from milora.benchmark.decode import DecodeSettings, decode
from milora.benchmark.result import Result
from milora.benchmark.rounds import Progress

ROUND_SECONDS = 30.0
"""DoRA as PEFT ships it needs seconds a token on a CPU; it writes fewer of them, so that the others get their turns."""

TABLE_4_METHODS = ("base", "dora", "dora-cached", "moelora", "milora")
"""DoRA as PEFT ships it and with its caching; the backbone is the limit of all."""


def table4(settings: DecodeSettings | None = None, progress: Progress = lambda line: None) -> Result:
    """Decoding of DoRA, MOELoRA and MiLoRA with 1 and 3 beams.

    Args:
        settings: The shape and the rounds; methods and beams are the table's. By default a benchmark's own, with
            [`ROUND_SECONDS`].
        progress: Is told how far it is.

    Returns:
        What [`decode`] returns: each row has `method`, `beam`, `tokens_per_second`, `peak_memory_mib`, and in `ratios`
        the ratios to every other method, measured in the same rounds.
    """
    settings = settings or DecodeSettings(round_seconds=ROUND_SECONDS)
    return decode(replace(settings, methods=TABLE_4_METHODS, beams=(1, 3)), progress)
