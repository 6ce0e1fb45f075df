"""Small tasks without a download: their rows are generated, and the bundled backbone was pretrained for them."""

from milora.tasks.bundled.arithmetic import ArithmeticTask
from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.choice import ChoiceTask
from milora.tasks.bundled.extraction import ExtractionTask
from milora.tasks.bundled.yesno import YesNoTask
from milora.tasks.task import Task

BUNDLED_TASKS: dict[str, Task] = {
    task.name: task for task in (YesNoTask(), ChoiceTask(), ArithmeticTask(), ExtractionTask())
}
"""The bundled tasks by name."""

__all__ = ["BUNDLED_TASKS", "ArithmeticTask", "ChoiceTask", "ExtractionTask", "GeneratedTask", "YesNoTask"]
