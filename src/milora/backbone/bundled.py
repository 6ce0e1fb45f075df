"""The location of the bundled backbone."""

from __future__ import annotations

from pathlib import Path

TINY_BACKBONE: Path = Path(__file__).parent / "tiny"
"""The folder of the bundled backbone: model, tokenizer and model card, as `from_pretrained` reads them."""
