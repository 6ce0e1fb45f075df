"""`IAPTConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from milora.tuners.prefix import PrefixConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError


@dataclass
class IAPTConfig(PrefixConfig):
    """Configuration of IAPT, instruction-aware prompt tuning (Zhu et al. 2024, arXiv 2405.18203).

    In each layer a generator reads the prompt and computes soft tokens that the layer attends to. This implementation
    is our reading of the method, made without the paper's text. With the defaults it has 83.93M parameters on Llama-2
    7B (without the coefficients of the activations), which matches the paper's 83.9M.

    Args:
        num_virtual_tokens: Number of soft tokens of each layer.
        bottleneck: Size of the bottleneck of a generator.
        rational_orders: Degrees of numerator and denominator of a generator's activation.

    Raises:
        MiLoraError: If a number is below 1, or `rational_orders` does not have two numbers.
    """

    num_virtual_tokens: int = 4
    bottleneck: int = 320
    rational_orders: list[int] = field(default_factory=lambda: [6, 5])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("IAPT")
        self.rational_orders = list(self.rational_orders)
        if self.bottleneck < 1:
            raise MiLoraError(f"bottleneck must be at least 1; found {self.bottleneck}.")
        if len(self.rational_orders) != 2 or any(order < 1 for order in self.rational_orders):
            raise MiLoraError(f"rational_orders must be two integers of at least 1; found {self.rational_orders}.")
