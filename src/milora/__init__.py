"""MiLoRA: mixture of LoRA experts, routed once per prompt (Zhang et al., EMNLP 2024 Findings, arXiv 2410.18035).

Importing this package registers its methods with PEFT: MiLoRA and the paper's baselines that PEFT does not have.
"""

import sys
from importlib.metadata import version

from milora_core.encoding import use_utf8
from milora_core.interruption import handle_signals

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "milora":
    # `python -m milora` imports this package, which takes seconds, before its `__main__`.
    handle_signals()
    use_utf8()

from milora.tuners.bitfit import BitFitConfig
from milora.tuners.ia3 import IA3ProjectedConfig
from milora.tuners.iapt import IAPTConfig
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.milora import MiLoraConfig, MiLoraModel
from milora.tuners.moelora import MoeLoraConfig
from milora.tuners.parallel_adapter import ParallelAdapterConfig
from milora.tuners.ptuning_v2 import PTuningV2Config
from milora.tuners.ssp import SSPConfig
from milora_core.errors import MiLoraError
from milora_core.routing import Route, Router

__version__ = version("milora")

__all__ = [
    "BitFitConfig",
    "IA3ProjectedConfig",
    "IAPTConfig",
    "LearnedAdapterConfig",
    "MiLoraConfig",
    "MiLoraError",
    "MiLoraModel",
    "MoeLoraConfig",
    "PTuningV2Config",
    "ParallelAdapterConfig",
    "Route",
    "Router",
    "SSPConfig",
    "__version__",
]
