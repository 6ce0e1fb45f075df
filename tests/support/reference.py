"""MiLoRA's equations in plain torch: one prompt at a time, no padding, no cache, no PEFT, no import of `milora`.

It is slow and short on purpose: tests compare the implementation with it. It reads the two files of the adapter format
(the adapter's tensors and its configuration) and an unmodified Hugging Face backbone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
PROJECTION = ".milora_router.projection.weight"


@dataclass(frozen=True)
class Decision:
    """The routers' decision for one prompt.

    Attributes:
        gates: the weight of each expert, 0 if it was not chosen; (blocks, experts).
        probabilities: the routers' probabilities before top-k; (blocks, experts).

    If blocks differ in their number of experts, the rows of smaller blocks are padded with zeros.
    """

    gates: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Block:
    """A Transformer block and the experts that its router chooses from."""

    path: str
    module: nn.Module
    experts: list[str]  # paths relative to the block, in the order of the router's rows
    activation: str


def unit_rms(x: Tensor) -> Tensor:
    """Divide each vector (..., d) by its root mean square."""
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-6)


def pool(hidden: Tensor, pooler: str, weight: Tensor | None = None) -> Tensor:
    """Reduce the hidden states of a prompt (n, d) to one vector (d); `weight` (1, d) is the attention pooler's."""
    if pooler == "last":
        return hidden[-1]
    if pooler == "mean":
        return hidden.sum(dim=0) / hidden.shape[0]
    if pooler == "max":
        return hidden.max(dim=0).values
    if pooler == "attention":
        assert weight is not None
        scores = hidden @ weight[0]  # (n)
        return torch.softmax(scores, dim=0) @ hidden
    raise ValueError(f"unknown pooler {pooler!r}")


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return sum_{j>=0} a_j x^j / (1 + |sum_{i>=1} b_i x^i|), elementwise."""
    above = sum(a * x**j for j, a in enumerate(numerator))
    below = 1 + torch.abs(sum(b * x**i for i, b in enumerate(denominator, start=1)))
    return above / below


def activate(x: Tensor, name: str, numerator: Tensor | None = None, denominator: Tensor | None = None) -> Tensor:
    """Apply the router activation of this name."""
    if name == "rational":
        assert numerator is not None
        assert denominator is not None
        return rational(x, numerator, denominator)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "relu":
        return x.clamp(min=0)
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "tanh":
        return torch.tanh(x)
    if name == "identity":
        return x
    raise ValueError(f"unknown activation {name!r}")


def choose(probabilities: Tensor, k: int) -> list[int]:
    """Return the indices of the k largest probabilities; ties go to the lower index."""
    values = probabilities.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def gate_weights(probabilities: Tensor, k: int, gate: str) -> Tensor:
    """Return each expert's weight in the forward pass, 0 if it was not chosen; (experts)."""
    chosen = choose(probabilities, k)
    total = sum(probabilities[i] for i in chosen)
    weights = []
    for i, p in enumerate(probabilities):
        if i not in chosen:
            weights.append(torch.zeros_like(p))
        elif gate == "hard":
            # Straight-through. The parentheses make the forward value exactly 1.
            weights.append(1 + (p - p.detach()))
        elif gate == "softmax":
            weights.append(p)
        elif gate == "renormalized":
            weights.append(p / total)
        else:
            raise ValueError(f"unknown gate {gate!r}")
    return torch.stack(weights)


def load_balancing_loss(probabilities: Tensor) -> Tensor:
    """Return N sum_i f_i p_i of one block, from the probabilities of several prompts (prompts, experts)."""
    prompts, experts = probabilities.shape
    share = torch.zeros(experts)
    for row in probabilities:
        share[choose(row, 1)] += 1 / prompts
    return experts * (share * probabilities.mean(dim=0)).sum()


class ReferenceMiLora:
    """A backbone with a MiLoRA or MiDoRA adapter, computed directly from the paper's equations.

    Arguments:
        backbone: a Hugging Face causal language model, used by nothing else (it is frozen and set to eval mode).
        tensors: the contents of `adapter_model.safetensors`. They are used without a copy, so tensors that require a
            gradient get one from `loss` and `load_balancing`.
        config: the contents of `adapter_config.json`.

    Raises:
        ValueError: if the tensors are not exactly those of the adapter format, or if the configuration uses a feature
            that this reference does not compute.
    """

    def __init__(self, backbone: PreTrainedModel, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.backbone = backbone.eval().requires_grad_(False)
        self.tensors = dict(tensors)
        self.config = dict(config)
        for field in ("rank_pattern", "alpha_pattern", "lora_bias"):
            if self.config.get(field):
                raise ValueError(f"the reference does not compute {field}")
        r = config["r"]
        self.scaling = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        self.blocks = self._find_blocks()
        self._check_tensors()

    def _find_blocks(self) -> list[Block]:
        """Find the blocks that have a router, in the order of the backbone."""
        modules = dict(self.backbone.named_modules())
        routed = {key[len(PREFIX) : -len(PROJECTION)] for key in self.tensors if key.endswith(PROJECTION)}
        paths = [path for path in modules if path in routed]
        if len(paths) != len(routed):
            raise ValueError(f"the backbone has no block called {sorted(routed - set(paths))}")
        experts, activation = self.config["experts"], self.config["router_activation"]
        blocks = []
        for index, path in enumerate(paths):
            names = experts[path] if isinstance(experts, Mapping) else experts
            name = activation if isinstance(activation, str) else activation[index]
            blocks.append(Block(path, modules[path], list(names), name))
        return blocks

    def _check_tensors(self) -> None:
        """Compare the names, shapes and types of the tensors with the adapter format."""
        r, (m, n) = self.config["r"], self.config["rational_orders"]
        d = self.backbone.config.hidden_size
        expected: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            router = f"{PREFIX}{block.path}.milora_router."
            expected[router + "projection.weight"] = (len(block.experts), d)
            if self.config["pooler"] == "attention":
                expected[router + "pooler.weight"] = (1, d)
            if self.config.get("router_norm") == "centered":
                expected[router + "pooler.center"] = (d,)
            if block.activation == "rational":
                expected[router + "activation.numerator"] = (m + 1,)
                expected[router + "activation.denominator"] = (n,)
            for name in block.experts:
                rows, columns = weight_of(block.module.get_submodule(name)).shape
                expert = f"{PREFIX}{block.path}.{name}."
                expected[expert + "lora_A.weight"] = (r, columns)
                expected[expert + "lora_B.weight"] = (rows, r)
                if self.config["use_dora"]:
                    expected[expert + "lora_magnitude_vector"] = (rows,)
        found = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))
            raise ValueError(f"the adapter's tensors break the contract: {odd}")
        for key, tensor in self.tensors.items():
            if ".milora_router." in key and tensor.dtype != torch.float32:
                raise ValueError(f"{key} must be float32, not {tensor.dtype}")

    def route(self, input_ids: Tensor) -> Decision:
        """Run the routers on a prompt (1, n). Each block reads the output of the adapted blocks before it."""
        _, decision = self._forward(input_ids, None, input_ids.shape[1])
        return decision

    def logits(self, input_ids: Tensor, prompt_length: int, decision: Decision | None = None) -> Tensor:
        """Return the logits (1, n, vocabulary) of a sequence, routed by its first `prompt_length` tokens.

        A given `decision` replaces the routers'.
        """
        decision = self.route(input_ids[:, :prompt_length]) if decision is None else decision
        return self._forward(input_ids, decision, prompt_length)[0]

    def loss(self, input_ids: Tensor, prompt_length: int) -> Tensor:
        """Return the mean cross-entropy of the tokens after the prompt."""
        logits = self.logits(input_ids, prompt_length)
        return F.cross_entropy(logits[0, prompt_length - 1 : -1].float(), input_ids[0, prompt_length:])

    def load_balancing(self, prompts: Sequence[Tensor]) -> Tensor:
        """Return the load-balancing loss of a batch of prompts, each (1, n): the mean over blocks."""
        probabilities = torch.stack([self.route(prompt).probabilities for prompt in prompts])  # (prompts, blocks, N)
        losses = [load_balancing_loss(probabilities[:, i, : len(b.experts)]) for i, b in enumerate(self.blocks)]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def greedy(self, input_ids: Tensor, new_tokens: int) -> list[int]:
        """Return greedily decoded tokens. The route is decided once, from the prompt alone."""
        decision = self.route(input_ids)
        return self._decode(input_ids, new_tokens, decision)

    @torch.no_grad()
    def backbone_greedy(self, input_ids: Tensor, new_tokens: int) -> list[int]:
        """Return the backbone's greedily decoded tokens without the adapter."""
        return self._decode(input_ids, new_tokens, None)

    @torch.no_grad()
    def backbone_logits(self, input_ids: Tensor) -> Tensor:
        """Return the backbone's logits (1, n, vocabulary) without the adapter."""
        return self.backbone(input_ids, use_cache=False).logits

    def _decode(self, input_ids: Tensor, new_tokens: int, decision: Decision | None) -> list[int]:
        sequence = input_ids
        for _ in range(new_tokens):
            if decision is None:
                logits = self.backbone_logits(sequence)
            else:
                logits = self._forward(sequence, decision, input_ids.shape[1])[0]
            sequence = torch.cat([sequence, logits[:, -1:].argmax(dim=-1)], dim=1)
        return sequence[0, input_ids.shape[1] :].tolist()

    def _forward(self, input_ids: Tensor, decision: Decision | None, prompt_length: int) -> tuple[Tensor, Decision]:
        """Run the adapted backbone on one sequence, with a given decision or (None) deciding block by block."""
        if input_ids.ndim != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"the reference takes one sequence (1, n), not {tuple(input_ids.shape)}")
        run = _Run(self, decision, prompt_length)
        with run.hooked():
            logits = self.backbone(input_ids, use_cache=False).logits
        return logits, run.decision()


class _Run:
    """One forward pass: its hooks, and the decisions that they make or follow."""

    def __init__(self, reference: ReferenceMiLora, given: Decision | None, prompt_length: int) -> None:
        self.reference = reference
        self.given = given
        # Late adaptation starts at the last prompt token, which predicts the first new one.
        self.first_adapted = prompt_length - 1 if reference.config.get("adapted_tokens") == "completion" else 0
        self.gates: dict[int, Tensor] = {}
        self.probabilities: dict[int, Tensor] = {}
        self.calls: set[tuple[int, int]] = set()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the blocks and their experts during the pass."""
        handles = []
        for b, block in enumerate(self.reference.blocks):
            handles.append(block.module.register_forward_pre_hook(self._router_hook(b), with_kwargs=True))
            for e, name in enumerate(block.experts):
                module = block.module.get_submodule(name)
                handles.append(module.register_forward_hook(self._expert_hook(b, e), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        expected = {(b, e) for b, block in enumerate(self.reference.blocks) for e in range(len(block.experts))}
        if self.calls != expected:
            # Otherwise a model that reads a module's weight without calling the module would silently stay unadapted.
            raise RuntimeError(f"experts that were never called (block, expert): {sorted(expected - self.calls)}")

    def decision(self) -> Decision:
        """Stack the decisions of the blocks."""
        if self.given is not None:
            return self.given
        widest = max(len(block.experts) for block in self.reference.blocks)

        def stack(rows: dict[int, Tensor]) -> Tensor:
            return torch.stack([F.pad(rows[b], (0, widest - len(rows[b]))) for b in range(len(rows))])

        return Decision(stack(self.gates), stack(self.probabilities))

    def _router_hook(self, b: int) -> Any:
        def decide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.given is not None:
                self.gates[b] = self.given.gates[b]
                return
            hidden = args[0] if args else kwargs["hidden_states"]  # (1, n, d), before the block's norm
            self._decide(b, hidden[0])

        return decide

    def _decide(self, b: int, hidden: Tensor) -> None:
        """Run the router of a block on its input (n, d)."""
        config, block = self.reference.config, self.reference.blocks[b]
        window = config.get("router_window")
        hidden = hidden if window is None else hidden[:window]

        def router(name: str) -> Tensor | None:
            return self.reference.tensors.get(f"{PREFIX}{block.path}.milora_router.{name}")

        projection = router("projection.weight")
        assert projection is not None
        hidden = hidden.float()
        norm = config.get("router_norm", "none")
        if norm in ("tokens", "centered"):
            hidden = unit_rms(hidden)
        pooled = pool(hidden, config["pooler"], router("pooler.weight"))
        if norm == "pooled":
            pooled = unit_rms(pooled)
        if norm == "centered":
            center = router("pooler.center")
            assert center is not None
            pooled = pooled - center
        features = activate(pooled, block.activation, router("activation.numerator"), router("activation.denominator"))
        self.probabilities[b] = torch.softmax(projection @ features, dim=0)
        self.gates[b] = gate_weights(self.probabilities[b], config["top_k"], config["gate"])

    def _expert_hook(self, b: int, e: int) -> Any:
        block = self.reference.blocks[b]
        tensors = self.reference.tensors
        key = f"{PREFIX}{block.path}.{block.experts[e]}."

        def adapt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            self.calls.add((b, e))
            gate = self.gates[b][e]
            if gate == 0:
                return None
            (x,) = (*args, *kwargs.values())
            delta = expert_delta(
                module,
                x,
                tensors[key + "lora_A.weight"],
                tensors[key + "lora_B.weight"],
                self.reference.scaling,
                tensors.get(key + "lora_magnitude_vector"),
            )
            adapted = output + (gate * delta).to(output.dtype)
            first = self.first_adapted  # tokens are second to last, also where a block flattens them
            return torch.cat([output[..., :first, :], adapted[..., first:, :]], dim=-2)

        return adapt


def weight_of(module: nn.Module) -> Tensor:
    """Return a linear module's weight as (d_out, d_in)."""
    # transformers' Conv1D stores the transpose.
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def expert_delta(
    module: nn.Module, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None
) -> Tensor:
    """Return the output that an expert adds to its module's.

    LoRA: s B A x. DoRA: m / |W + s B A| (W x + s B A x) - W x.
    """
    x = x.to(lora_a.dtype)
    low_rank = scaling * ((x @ lora_a.T) @ lora_b.T)
    if magnitude is None:
        return low_rank
    weight = weight_of(module).to(lora_a.dtype)
    # One norm per output row, without a gradient (the DoRA paper's section 4.3; PEFT does the same).
    norm = (weight + scaling * (lora_b @ lora_a)).norm(dim=1).detach()
    # Without the bias, which is neither scaled nor adapted.
    plain = x @ weight.T
    return magnitude / norm * (plain + low_rank) - plain


def random_adapter(
    backbone: PreTrainedModel, blocks: str, config: Mapping[str, Any], seed: int = 0
) -> dict[str, Tensor]:
    """Draw a random adapter in the adapter format, strong enough to change a tiny backbone's greedy tokens.

    Arguments:
        backbone: gives the shapes; it is not changed.
        blocks: the path of the list of blocks, such as `model.layers`.
        config: the configuration, as for `ReferenceMiLora`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    d, r, (m, n) = backbone.config.hidden_size, config["r"], config["rational_orders"]
    activation = config["router_activation"]
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(backbone.get_submodule(blocks)):
        path = f"{blocks}.{index}"
        names = config["experts"][path] if isinstance(config["experts"], Mapping) else config["experts"]
        for name in names:
            weight = weight_of(block.get_submodule(name)).detach().float()
            expert = f"{PREFIX}{path}.{name}."
            tensors[expert + "lora_A.weight"] = normal(r, weight.shape[1], std=0.25)
            tensors[expert + "lora_B.weight"] = normal(weight.shape[0], r, std=0.25)
            if config["use_dora"]:
                spread = 1 + normal(weight.shape[0], std=0.2)
                tensors[expert + "lora_magnitude_vector"] = weight.norm(dim=1) * spread
        router = f"{PREFIX}{path}.milora_router."
        tensors[router + "projection.weight"] = normal(len(names), d, std=0.3)
        if config["pooler"] == "attention":
            tensors[router + "pooler.weight"] = normal(1, d, std=0.2)
        if config.get("router_norm") == "centered":
            tensors[router + "pooler.center"] = normal(d, std=0.3)
        if (activation if isinstance(activation, str) else activation[index]) == "rational":
            # Near (x/2 + x^2/4) / (1 + x^2/4), cut to the given orders: bounded on the range of the pooled values.
            numerator, denominator = torch.zeros(m + 1), torch.zeros(n)
            numerator[1:3] = torch.tensor([0.5, 0.25])[:m]
            denominator[1:2] = 0.25
            # Every coefficient matters, with smaller noise on high powers, which would otherwise dominate.
            powers = 0.2 ** torch.arange(m + n + 1)
            tensors[router + "activation.numerator"] = numerator + normal(m + 1, std=0.2) * powers[: m + 1]
            tensors[router + "activation.denominator"] = denominator + normal(n, std=0.2) * powers[1 : n + 1]
    return tensors
