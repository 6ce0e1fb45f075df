"""MOELoRA as a PEFT method."""

from milora.tuners.moelora.config import MoeLoraConfig
from milora.tuners.moelora.model import MoeLoraModel
from milora.tuners.moelora.tasks import hand_on_task_ids
from milora.tuners.registry import register

register("MOELORA", MoeLoraConfig, MoeLoraModel, prefix="moelora_")
hand_on_task_ids(MoeLoraModel)

__all__ = ["MoeLoraConfig", "MoeLoraModel"]
