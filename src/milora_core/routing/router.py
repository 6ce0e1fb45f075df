"""The router: hidden states of a prompt become probabilities over a block's experts, and the chosen k get gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from milora_core.errors import MiLoraError
from milora_core.routing.pooling import Pooler, build_pooler, root_mean_square_norm
from milora_core.routing.precision import KeepFloat32
from milora_core.routing.rational import build_activation

GATES: tuple[str, ...] = ("hard", "softmax", "renormalized")

ROUTER_NORMS: tuple[str, ...] = ("centered", "tokens", "pooled", "none")
"""Where the router's input is divided by its root mean square, `x * rsqrt(mean(x^2) + 1e-6)` in float32, which has no
parameters. `tokens`: each token of the prompt, before the pooler. `centered`: as `tokens`, then the running mean of the
pooled vectors seen in training is subtracted ([`milora_core.routing.pooling.Pooler.centered`]). `pooled`: the pooled
vector. `none`: nowhere, as in the paper.

The first token of a pretrained model is often a hundred times as long as the others. With `pooled` and `none` this
token alone decides, so all prompts get nearly the same route. With `tokens`, the pooled vectors of all prompts still
point in nearly the same direction; `centered` keeps only their difference."""


class Decision(NamedTuple):
    """A router's decision for each prompt of a batch."""

    gates: Tensor
    """(batch, experts), float32: each expert's weight in the output, zero where it was not chosen."""
    probabilities: Tensor
    """(batch, experts), float32, rows summing to one."""
    chosen: Tensor
    """(batch, experts), bool: exactly k true per row."""


class RouterProjection(KeepFloat32):
    """`W_r` of equation 3, without a bias.

    Attributes:
        weight: `W_r` transposed, shape (experts, hidden), float32.
    """

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, dtype=torch.float32))
        nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, hidden) to (batch, experts), float32."""
        return x.float() @ self.weight.float().T


def expert_probabilities(
    hidden: Tensor,
    mask: Tensor,
    pooler: Pooler,
    activation: nn.Module,
    projection: nn.Module,
    *,
    norm: str = "tokens",
) -> Tensor:
    """`softmax(g(pool(H)) W_r)` (equations 2 and 3), in float32 under any autocast.

    Args:
        hidden: (batch, tokens, hidden), the input of the block, before its norm.
        mask: (batch, tokens), bool: the tokens of the prompt.
        pooler: See [`milora_core.routing.pooling`].
        activation: `g`.
        projection: `W_r`.
        norm: One of [`ROUTER_NORMS`].

    Returns:
        (batch, experts), float32.
    """
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        pooled = pooler(hidden, mask, normalize=norm in ("tokens", "centered"))
        if norm == "pooled":
            pooled = root_mean_square_norm(pooled)
        elif norm == "centered":
            is_trained = any(weight.requires_grad for weight in projection.parameters())
            pooled = pooler.centered(pooled, learn=is_trained and pooler.training and torch.is_grad_enabled())
        logits: Tensor = projection(activation(pooled))
        return logits.softmax(dim=-1)


def choose(probabilities: Tensor, top_k: int, gate: str = "hard") -> Decision:
    """Keeps the k most probable experts of each prompt; a tie goes to the lowest index.

    Gates of the chosen experts: `hard`: exactly 1, with the gradient of `p_i` passed straight through; `softmax`:
    `p_i`; `renormalized`: `p_i / sum of the chosen`. Experts that were not chosen have gate 0 and no gradient. With
    `hard` and k = experts there is nothing to decide: all gates are 1, and the method is LoRA.

    Args:
        probabilities: (batch, experts), float32.
        top_k: 1 to experts.
        gate: One of [`GATES`].

    Raises:
        MiLoraError: If `top_k` is out of range or the gate is unknown.
    """
    experts = probabilities.shape[-1]
    check_top_k(top_k, experts)
    # A stable sort keeps the order of equal values; torch.topk does not guarantee which of them it returns.
    order = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, True)
    mask = chosen.to(probabilities.dtype)
    if gate == "hard":
        # Grouped so that the forward value is exactly 1: (p - p) is 0, while (1 + p) - p is not always 1.
        is_constant = top_k == experts or not (probabilities.requires_grad and torch.is_grad_enabled())
        gates = mask if is_constant else mask + mask * (probabilities - probabilities.detach())
    elif gate == "softmax":
        gates = probabilities * mask
    elif gate == "renormalized":
        kept = probabilities * mask
        gates = kept / kept.sum(dim=-1, keepdim=True)
    else:
        raise _unknown_gate(gate)
    return Decision(gates, probabilities, chosen)


def check_top_k(top_k: int, experts: int) -> None:
    """Raises a [`MiLoraError`] unless 1 <= top_k <= experts."""
    if not 1 <= top_k <= experts:
        raise MiLoraError(f"top_k must lie between 1 and the number of experts of a block, {experts}; found {top_k}.")


def check_router_norm(norm: str) -> None:
    """Raises a [`MiLoraError`] unless `norm` is one of [`ROUTER_NORMS`]."""
    if norm not in ROUTER_NORMS:
        raise MiLoraError(f"Unknown router_norm {norm!r}; choose one of {list(ROUTER_NORMS)}.")


def _unknown_gate(gate: str) -> MiLoraError:
    return MiLoraError(f"Unknown gate {gate!r}; choose one of {list(GATES)}.")


class Router(nn.Module):
    """A block's router on its own, for engines that use neither PEFT nor transformers (equations 2, 3, 6 and 8).

    Args:
        hidden_size: Size of the block's hidden states.
        experts: Number of the block's experts.
        top_k: Number of experts chosen per prompt.
        pooler: `attention`, `mean`, `max` or `last`.
        activation: `rational` or a fixed activation's name.
        rational_orders: Degrees of the rational.
        gate: `hard`, `softmax` or `renormalized`.
        norm: Where to divide by the root mean square: `centered`, `tokens`, `pooled` or `none`; see [`ROUTER_NORMS`].

    Raises:
        MiLoraError: If one of the arguments is out of range or unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        *,
        top_k: int = 3,
        pooler: str = "attention",
        activation: str = "rational",
        rational_orders: tuple[int, int] = (6, 5),
        gate: str = "hard",
        norm: str = "tokens",
    ) -> None:
        super().__init__()
        check_top_k(top_k, experts)
        if gate not in GATES:
            raise _unknown_gate(gate)
        check_router_norm(norm)
        self.pooler = build_pooler(pooler, hidden_size, centered=norm == "centered")
        self.activation = build_activation(activation, rational_orders)
        self.projection = RouterProjection(hidden_size, experts)
        self.top_k, self.gate, self.norm = top_k, gate, norm

    def forward(self, hidden: Tensor, mask: Tensor) -> Decision:
        """Routes each prompt: `hidden` is (batch, tokens, hidden), `mask` is (batch, tokens), true on the prompt."""
        probabilities = expert_probabilities(
            hidden, mask, self.pooler, self.activation, self.projection, norm=self.norm
        )
        return choose(probabilities, self.top_k, self.gate)
