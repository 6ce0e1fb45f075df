"""SSP (S3PET), sparse structure search, as a PEFT method."""

from milora.tuners.registry import register
from milora.tuners.ssp.config import SSPConfig
from milora.tuners.ssp.model import SSPModel

register("SSP", SSPConfig, SSPModel, prefix="ssp_")

__all__ = ["SSPConfig", "SSPModel"]
