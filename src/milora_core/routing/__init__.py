"""Routing a prompt to experts, in pure torch: neither transformers nor PEFT is needed here."""

from milora_core.routing.balance import load_balancing_loss
from milora_core.routing.pooling import POOLERS, Pooler, build_pooler
from milora_core.routing.rational import ACTIVATIONS, RationalActivation, build_activation
from milora_core.routing.route import Route
from milora_core.routing.router import (
    GATES,
    ROUTER_NORMS,
    Decision,
    Router,
    RouterProjection,
    check_router_norm,
    check_top_k,
    choose,
    expert_probabilities,
)

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "POOLERS",
    "ROUTER_NORMS",
    "Decision",
    "Pooler",
    "RationalActivation",
    "Route",
    "Router",
    "RouterProjection",
    "build_activation",
    "build_pooler",
    "check_router_norm",
    "check_top_k",
    "choose",
    "expert_probabilities",
    "load_balancing_loss",
]
