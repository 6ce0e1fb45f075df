"""`SSPConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from milora.tuners.attachment import AttachmentConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError

LORA = "lora"
BITFIT = "bitfit"
KINDS = (LORA, BITFIT)
"""The kinds of candidates of a module, in order."""


@dataclass
class SSPConfig(AttachmentConfig):
    """Configuration of SSP: sparse structure search (S3PET, Hu et al. 2022) over LoRA and BitFit at every module.

    An adapter without `structure` searches: it has all candidates, each with a gate. [`SSPModel.harden`] keeps the most
    probable candidates that fit the budget and lists them in `structure`. An adapter with a `structure` is fixed.

    By default the candidates are the MiLoRA paper's baselines: LoRA of rank 32 and BitFit projected from 64, with
    79.95M and 87.05M parameters on Llama-2 7B. The default budget is the share of them that gives the paper's 80.6M.

    Args:
        r: Rank of the LoRA candidates.
        lora_alpha: The output of the LoRA candidates is scaled by `lora_alpha / r`; `None` means `2 * r`.
        projection_dim: Length of the vectors that are projected to the BitFit candidates' biases; `None` learns the
            biases directly.
        budget: Number of parameters to keep, or a share of all candidates' parameters (a float of at most 1). A share
            is replaced by the number when the adapter is created.
        temperature: Temperature of the binary-concrete distribution. Towards 0 the gates become binary.
        structure: The kept candidates: `[[module path, "lora" | "bitfit"], ...]`.

    Raises:
        MiLoraError: If a value is out of range, or `structure` names an unknown kind.
    """

    r: int = 32
    lora_alpha: int | None = None
    projection_dim: int | None = 64
    budget: int | float = 0.4827
    temperature: float = 1.0
    structure: list[list[str]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SSP")
        if self.r < 1:
            raise MiLoraError(f"r must be at least 1; found {self.r}.")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.projection_dim is not None and self.projection_dim < 1:
            raise MiLoraError(f"projection_dim must be at least 1, or None; found {self.projection_dim}.")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise MiLoraError(
                "budget must be a number of parameters, or a share of the candidates' above 0 and at most 1; "
                f"found {self.budget}."
            )
        if not self.temperature > 0:
            raise MiLoraError(f"temperature must be above 0; found {self.temperature}.")
        if self.structure is not None:
            self.structure = [list(entry) for entry in self.structure]
            wrong = [entry for entry in self.structure if len(entry) != 2 or entry[1] not in KINDS]
            if wrong or not self.structure:
                found = repr(wrong[0]) if wrong else "an empty list"
                raise MiLoraError(f"structure must list [module path, one of {list(KINDS)}]; found {found}.")

    @property
    def share(self) -> float | None:
        """The budget as a share of all candidates' parameters, or `None` if it is a number of parameters."""
        return self.budget if isinstance(self.budget, float) and self.budget <= 1 else None
