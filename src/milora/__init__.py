"""MiLoRA: mixture of LoRA experts, routed once per prompt (Zhang et al., EMNLP 2024 Findings, arXiv 2410.18035).

Importing this package makes its methods known to PEFT.
"""

from importlib.metadata import version

from milora.errors import MiLoraError
from milora.routing import Route, Router
from milora.tuners.milora import MiLoraConfig, MiLoraModel

__version__ = version("milora")

__all__ = ["MiLoraConfig", "MiLoraError", "MiLoraModel", "Route", "Router", "__version__"]
