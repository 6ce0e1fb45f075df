"""`MiLoraConfig`: the contents of a MiLoRA adapter's `adapter_config.json`."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

from peft import LoraConfig

from milora.tuners.adapter_file import CheckedFileConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError
from milora_core.routing import ACTIVATIONS, GATES, POOLERS, ROUTER_NORMS

WEIGHT_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""They move a part of the backbone's weight into the adapter, so modules that are not chosen would lack that part."""

UNSUPPORTED_FIELDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

ADAPTED_TOKENS = ("all", "completion")

PARTS = "|"
"""Separator of the activations of equal parts of the blocks."""


def activations_by_block(activation: str | list[str], blocks: int) -> str | list[str]:
    """Expands `a|b` to a list with one activation per block; other values are returned unchanged.

    If the blocks cannot be divided evenly, the lower parts have one more block.

    Raises:
        MiLoraError: If there are fewer blocks than parts.
    """
    if isinstance(activation, list) or PARTS not in activation:
        return activation
    parts = activation.split(PARTS)
    if len(parts) > blocks:
        raise MiLoraError(f"router_activation={activation!r} names {len(parts)} parts, but there are {blocks} blocks.")
    each, more = divmod(blocks, len(parts))
    return [name for place, name in enumerate(parts) for _ in range(each + (place < more))]


@dataclass
class MiLoraConfig(CheckedFileConfig, LoraConfig):  # type: ignore[misc]
    """Configuration of MiLoRA (Zhang et al., EMNLP 2024 Findings): the LoRA of each linear module of a block is an
    expert, and a router per block chooses `top_k` of them once per prompt.

    Extends `LoraConfig`; fields that cannot be combined with routing are refused. `use_dora=True` is the paper's
    MiDoRA. Fields that differ or are new:

    Args:
        r: Rank of each expert; the paper's 32.
        lora_alpha: The output of an expert is scaled by `lora_alpha / r`; `None` means `2 * r`.
        target_modules: The experts: `all-linear` (every linear module of the blocks, and nothing outside them), or as
            in PEFT a list of name endings or a regular expression for modules inside the blocks.
        top_k: How many experts of a block serve a prompt, from 1 to the number of its experts.
        pooler: How the prompt's hidden states become one vector: `attention` (self-attention), `mean`, `max`, `last`.
        router_activation: `rational` (learnable, initialised to GeLU; `rational-relu` and so on for other
            initialisations), a fixed one (`gelu`, `relu`, `silu`, `tanh`, `identity`), several for equal parts of the
            blocks from the lowest on (`relu|gelu`: ReLU in the lower half, GeLU in the upper), or a list with one per
            block, the form in which several are saved.
        rational_orders: Degrees of the rational's numerator and denominator.
        gate: Weight of a chosen expert: `hard` (1, with a straight-through gradient), `softmax` (its probability),
            `renormalized` (its share of the chosen ones' probability).
        load_balancing_coef: Coefficient of the load-balancing loss, which is added to the loss in training.
        router_norm: Where the router's input is divided by its root mean square, `x * rsqrt(mean(x^2) + 1e-6)`:
            `tokens` (each token of the prompt, before the pooler), `centered` (as `tokens`, then the running mean of
            the pooled vectors seen in training is subtracted), `pooled` (the pooled vector), or `none`, as in the
            paper. `None` means `tokens`; in a file saved before this field existed it means `none`. Pretrained models
            need `tokens` or `centered`: their first token's hidden state is often a hundred times as long as the
            others, and with `none` it alone would decide.
        normalize_router_input: The former name of `router_norm`: `True` means `pooled`, `False` means `none`.
        adapted_tokens: `all`, as in the paper, or `completion` (late adaptation): all prompt tokens but the last go
            through the bare backbone, and the last one and every token after it are adapted. A prompt's keys and
            values are then the same for every adapter and the backbone.
        router_window: Route on at most this many tokens from the beginning of the prompt; `None` reads all of it.
        blocks: Path of the list of Transformer blocks, for models where it cannot be found.
        experts: The modules' paths relative to the block, in the order of the router's rows, or a mapping from block
            to list where blocks differ. Filled in when the adapter is created.

    Raises:
        MiLoraError: If a value is unknown or out of range, or a LoRA feature does not work with routing.
    """

    r: int = 32
    lora_alpha: int | None = None
    target_modules: list[str] | str | None = "all-linear"
    task_type: str | None = "CAUSAL_LM"
    top_k: int = 3
    pooler: str = "attention"
    router_activation: str | list[str] = "rational"
    rational_orders: list[int] | tuple[int, int] = field(default_factory=lambda: [6, 5])
    gate: str = "hard"
    load_balancing_coef: float = 1e-2
    router_norm: str | None = None
    normalize_router_input: InitVar[bool | None] = None
    adapted_tokens: str = "all"
    router_window: int | None = None
    blocks: str | None = None
    experts: list[str] | dict[str, list[str]] | None = None

    def __post_init__(self, normalize_router_input: bool | None) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.router_norm is None:
            # Only a saved configuration contains its type. One without `router_norm` is older than the field, when only
            # `normalize_router_input` enabled normalisation.
            is_saved = getattr(self, "peft_type", None) is not None
            if normalize_router_input is None and not is_saved:
                self.router_norm = "tokens"
            else:
                self.router_norm = "pooled" if normalize_router_input else "none"
        every = self.target_modules == "all-linear"
        if every:
            # PEFT accepts layers_to_transform only with a list, and "all-linear" becomes one.
            self.target_modules = None
        super().__post_init__()
        if every:
            self.target_modules = "all-linear"
        self.peft_type = add_peft_type("MILORA")
        self.rational_orders = list(self.rational_orders)
        self._check_choices()
        self._check_lora_features()

    @property
    def leaves_prompt_bare(self) -> bool:
        """Whether the prompt's keys and values are those of the bare backbone, so other adapters can share them.

        With late adaptation they are, unless the adapter also has its own embeddings, norms or biases.
        """
        others = (self.modules_to_save, self.trainable_token_indices, self.bias != "none")
        return self.adapted_tokens == "completion" and not any(others)

    def _check_choices(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise MiLoraError(f"top_k must be an integer of at least 1; found {self.top_k!r}.")
        choices = {"pooler": POOLERS, "gate": GATES, "router_norm": ROUTER_NORMS, "adapted_tokens": ADAPTED_TOKENS}
        for setting, values in choices.items():
            if getattr(self, setting) not in values:
                raise MiLoraError(f"Unknown {setting} {getattr(self, setting)!r}; choose one of {list(values)}.")
        window = self.router_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise MiLoraError(f"router_window must be a whole number of at least 1, or None; found {window!r}.")
        if self.load_balancing_coef < 0:
            raise MiLoraError(f"load_balancing_coef must not be negative; found {self.load_balancing_coef}.")
        orders = self.rational_orders
        if len(orders) != 2 or any(not isinstance(order, int) or order < 1 for order in orders):
            raise MiLoraError(f"rational_orders must be two integers of at least 1, such as [6, 5]; found {orders!r}.")
        names = self.router_activation
        for name in names if isinstance(names, list) else names.split(PARTS):
            kind, _, start = name.partition("-")
            known = kind == "rational" and (not start or start in ACTIVATIONS)
            if not known and name not in ACTIVATIONS:
                raise MiLoraError(
                    f"Unknown router_activation {name!r}; choose 'rational' or one of {sorted(ACTIVATIONS)}."
                )

    def _check_lora_features(self) -> None:
        for name in UNSUPPORTED_FIELDS:
            if getattr(self, name, None):
                raise MiLoraError(f"{name} cannot be combined with MiLoRA's routing; leave it unset.")
        initialisation = self.init_lora_weights
        if isinstance(initialisation, str) and initialisation.lower().startswith(WEIGHT_CHANGING_INITIALISATIONS):
            raise MiLoraError(
                f"init_lora_weights={initialisation!r} changes the backbone's weights, but modules that are not chosen"
                " need the original weights; choose True, 'gaussian', 'orthogonal' or 'eva'."
            )
