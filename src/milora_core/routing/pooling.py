"""Poolers: the hidden states of a prompt's tokens become one vector (equations 2 and 8 of the MiLoRA paper)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora_core.errors import MiLoraError
from milora_core.kernels import routing as kernels
from milora_core.routing.precision import KeepFloat32


def root_mean_square_norm(x: Tensor) -> Tensor:
    """`x * rsqrt(mean(x^2) + 1e-6)` over the last dimension; `x` is float32 of any shape."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class Pooler(KeepFloat32):
    """Pools (batch, tokens, hidden) to (batch, hidden) over the prompt's tokens; padding is ignored.

    Call it with `hidden` (batch, tokens, hidden) of any floating dtype and `mask` (batch, tokens), true where a token
    belongs to the prompt, at least once per row. With `normalize`, each token is divided by its root mean square first
    ([`root_mean_square_norm`]). The result is float32.

    Attributes:
        center: The running mean of the vectors pooled in training, shape (hidden), float32, initially zero; `None`
            unless [`build_pooler`] was called with `centered`.
    """

    center: Tensor | None
    momentum = 0.1
    """How far a batch moves the running mean towards its own mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def forward(self, hidden: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
        """See the class."""
        pooled = self.pooled_at_once(hidden, mask, normalize)
        if pooled is not None:
            return pooled
        hidden = prompt_states(hidden, mask, normalize)
        return torch.einsum("bt,bth->bh", self.weights(hidden, mask), hidden)

    def centered(self, pooled: Tensor, *, learn: bool) -> Tensor:
        """`pooled - center`, (batch, hidden), float32.

        With `learn`, the batch then moves the center: the first batch to its mean, later ones by a tenth of the way. A
        batch is centered with the mean of those before it, so a prompt's route does not depend on its neighbours.
        """
        assert self.center is not None
        if not learn:
            return pooled - self.center
        mean = pooled.detach().mean(dim=0)
        # Computed on the device without synchronisation.
        center = torch.where(self.center.any(), self.center, mean)
        with torch.no_grad():
            self.center.copy_(torch.lerp(center, mean, self.momentum))
        return pooled - center

    def pooled_at_once(self, hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor | None:
        """The result of a fused kernel, or `None` if there is none."""
        return None

    def weights(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Each token's share in the pooled vector: (batch, tokens), zero outside the mask."""
        raise NotImplementedError(f"{type(self).__name__} does not define how it weights tokens.")


class MeanPooler(Pooler):
    """The mean over the prompt's tokens (the paper's MiLoRA-1)."""

    def pooled_at_once(self, hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor | None:
        """See [`Pooler`]."""
        return kernels.pool(hidden, mask, None, normalize=normalize)

    def weights(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """1 / (tokens of the prompt) on the prompt."""
        return mask.float() / mask.sum(dim=1, keepdim=True)


class LastPooler(Pooler):
    """The prompt's last token (the paper's MiLoRA-2)."""

    def forward(self, hidden: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
        """See [`Pooler`]."""
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)
        state = hidden[torch.arange(len(last), device=last.device), last].float()
        return root_mean_square_norm(state) if normalize else state


class MaxPooler(Pooler):
    """The maximum of each feature over the prompt's tokens."""

    def forward(self, hidden: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
        """See [`Pooler`]."""
        if normalize:
            hidden = prompt_states(hidden, mask, normalize)
        return hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1).float()


class AttentionPooler(Pooler):
    """Self-attention pooling, the paper's default (equation 8).

    `U = H w_sa`, `A = softmax over the prompt's tokens of U`, `p = A^T H`. `w_sa` is initialised to 0, which is the
    mean. A random initialisation would let the few large features of pretrained models select one token.

    Attributes:
        weight: `w_sa` transposed, shape (1, hidden), float32.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def pooled_at_once(self, hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor | None:
        """See [`Pooler`]."""
        return kernels.pool(hidden, mask, self.weight, normalize=normalize)

    def weights(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The attention that each token of the prompt gets."""
        scores = torch.einsum("bth,h->bt", hidden, self.weight.float()[0])
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=1)


def prompt_states(hidden: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """The hidden states in float32, zero outside the mask, optionally divided by their root mean square."""
    # Set to zero, not only weighted by zero: padding may hold NaN, and 0 * NaN is NaN. Before the cast there is half as
    # much to write.
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0).float()
    return root_mean_square_norm(hidden) if normalize else hidden


POOLERS: tuple[str, ...] = ("attention", "mean", "max", "last")


def build_pooler(name: str, hidden_size: int, *, centered: bool = False) -> Pooler:
    """Builds the pooler that a configuration names.

    Args:
        name: One of [`POOLERS`].
        hidden_size: Size of the hidden states.
        centered: Whether to keep a running mean and subtract it ([`Pooler.centered`]).

    Raises:
        MiLoraError: If the name is unknown.
    """
    pooler: Pooler
    if name == "attention":
        pooler = AttentionPooler(hidden_size)
    elif name == "mean":
        pooler = MeanPooler()
    elif name == "max":
        pooler = MaxPooler()
    elif name == "last":
        pooler = LastPooler()
    else:
        raise MiLoraError(f"Unknown pooler {name!r}; choose one of {list(POOLERS)}.")
    if centered:
        pooler.center = torch.zeros(hidden_size, dtype=torch.float32)
    return pooler
