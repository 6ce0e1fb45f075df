"""BitFit as a PEFT method."""

from milora.tuners.bitfit.config import BitFitConfig
from milora.tuners.bitfit.model import BitFitModel
from milora.tuners.registry import register

register("BITFIT", BitFitConfig, BitFitModel, prefix="bitfit_")

__all__ = ["BitFitConfig", "BitFitModel"]
