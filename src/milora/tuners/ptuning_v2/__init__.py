"""P-tuning v2 as a PEFT method."""

from milora.tuners.ptuning_v2.config import PTuningV2Config
from milora.tuners.ptuning_v2.model import PTuningV2Model
from milora.tuners.registry import register

register("PTUNING_V2", PTuningV2Config, PTuningV2Model, prefix="ptuning_v2_")

__all__ = ["PTuningV2Config", "PTuningV2Model"]
