"""A route: the routers' decisions for the prompts of a batch, as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora_core.errors import MiLoraError
from milora_core.files import whole_file

FORMAT = "milora-route-1"


@dataclass(frozen=True, eq=False)
class Route:
    """The experts that serve each prompt of a batch, in every routed block.

    You can compute a route (`model.route(**inputs)`), inspect, save and force it (`with model.use_route(route):`),
    expand it for beams, and cut and concatenate it by row.

    Attributes:
        gates: (blocks, batch, experts), float32: the weight of each expert's LoRA in the output, 0 where not chosen.
        probabilities: (blocks, batch, experts), float32: the routers' softmax.
        experts: The modules' paths relative to their block, in the order of the last dimension. If blocks have
            different experts, it is the union; an expert that a block lacks has gate and probability 0 there.
        blocks: The blocks' paths in the backbone, in the order of the first dimension.

    Raises:
        MiLoraError: If the shapes do not match each other and the names.
    """

    gates: Tensor
    probabilities: Tensor
    experts: tuple[str, ...]
    blocks: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.gates.shape)
        if len(shape) != 3 or tuple(self.probabilities.shape) != shape:
            raise MiLoraError(
                "A route's gates and probabilities must both be (blocks, batch, experts); found "
                f"{shape} and {tuple(self.probabilities.shape)}."
            )
        if (shape[0], shape[2]) != (len(self.blocks), len(self.experts)):
            raise MiLoraError(
                f"A route over {len(self.blocks)} blocks and {len(self.experts)} experts needs gates of shape "
                f"({len(self.blocks)}, batch, {len(self.experts)}); found {shape}."
            )

    @property
    def batch_size(self) -> int:
        """The number of prompts."""
        return int(self.gates.shape[1])

    @property
    def chosen(self) -> Tensor:
        """(blocks, batch, experts), bool: which experts are active."""
        return self.gates != 0

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.gates.device

    def __len__(self) -> int:
        return self.batch_size

    def __eq__(self, other: object) -> bool:
        """Equal names and bit-identical tensors."""
        if not isinstance(other, Route):
            return NotImplemented
        return (
            (self.experts, self.blocks) == (other.experts, other.blocks)
            and torch.equal(self.gates, other.gates)
            and torch.equal(self.probabilities, other.probabilities)
        )

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Route:
        """The route of some rows; an integer keeps the batch dimension, with one row."""
        if isinstance(rows, int):
            if not -self.batch_size <= rows < self.batch_size:
                raise IndexError(f"Row {rows} of a route over {self.batch_size} prompts.")
            rows = slice(rows, rows + 1 or None)
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.device)
        return self._with(self.gates[:, rows], self.probabilities[:, rows])

    def expand(self, copies: int) -> Route:
        """Repeats each row `copies` times in succession, as beam search and several return sequences order their batch.

        Raises:
            MiLoraError: If `copies` is below 1.
        """
        if copies < 1:
            raise MiLoraError(f"A route can be expanded to 1 or more copies a row; found {copies}.")
        return self._with(
            self.gates.repeat_interleave(copies, dim=1), self.probabilities.repeat_interleave(copies, dim=1)
        )

    def to(self, device: torch.device | str) -> Route:
        """The route with its tensors on a device."""
        return self._with(self.gates.to(device), self.probabilities.to(device))

    @staticmethod
    def cat(routes: Sequence[Route]) -> Route:
        """Joins routes of the same blocks and experts along the batch.

        Raises:
            MiLoraError: If there is none, or their blocks or experts differ.
        """
        if not routes:
            raise MiLoraError("Route.cat needs at least one route; found none.")
        first = routes[0]
        for other in routes[1:]:
            if (other.blocks, other.experts) != (first.blocks, first.experts):
                raise MiLoraError(
                    "Only routes over the same blocks and experts can be joined; found experts "
                    f"{list(first.experts)} in {len(first.blocks)} blocks and {list(other.experts)} in "
                    f"{len(other.blocks)} blocks."
                )
        return first._with(
            torch.cat([route.gates for route in routes], dim=1),
            torch.cat([route.probabilities for route in routes], dim=1),
        )

    def chosen_experts(self, row: int = 0) -> dict[str, list[str]]:
        """The names of the active experts of one row: block path -> experts, in the experts' order."""
        chosen = self[row].chosen[:, 0].tolist()
        return {
            block: [expert for expert, is_chosen in zip(self.experts, of_block, strict=True) if is_chosen]
            for block, of_block in zip(self.blocks, chosen, strict=True)
        }

    def share(self) -> Tensor:
        """(blocks, experts): the share of the batch's prompts that chose each expert."""
        return self.chosen.float().mean(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for JSON."""
        return {
            "blocks": list(self.blocks),
            "experts": list(self.experts),
            "gates": self.gates.tolist(),
            "probabilities": self.probabilities.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Route:
        """The inverse of [`Route.to_dict`].

        Raises:
            MiLoraError: If a field is missing or its shape is wrong.
        """
        missing = {"blocks", "experts", "gates", "probabilities"} - set(values)
        if missing:
            raise MiLoraError(f"A route needs blocks, experts, gates and probabilities; {sorted(missing)} not found.")
        try:
            gates, probabilities = (
                torch.tensor(values[name], dtype=torch.float32) for name in ("gates", "probabilities")
            )
        except (TypeError, ValueError) as error:
            raise MiLoraError(
                f"A route's gates and probabilities must be rectangular lists of numbers: {error}."
            ) from error
        return cls(gates, probabilities, tuple(values["experts"]), tuple(values["blocks"]))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, completely or not at all.

        Raises:
            MiLoraError: If it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "experts": json.dumps(self.experts),
            "blocks": json.dumps(self.blocks),
        }
        tensors = {"gates": self.gates.cpu().contiguous(), "probabilities": self.probabilities.cpu().contiguous()}
        with whole_file(Path(path)) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Route:
        """Reads a file that [`Route.save`] wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            MiLoraError: If the file is not a saved route.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No route at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise MiLoraError(f"{path} is not a saved route: its format is {metadata.get('format')!r}.")
                gates, probabilities = file.get_tensor("gates"), file.get_tensor("probabilities")
        except SafetensorError as error:
            raise MiLoraError(f"{path} is not a saved route: {error}.") from error
        return cls(gates, probabilities, tuple(json.loads(metadata["experts"])), tuple(json.loads(metadata["blocks"])))

    def _with(self, gates: Tensor, probabilities: Tensor) -> Route:
        return Route(gates, probabilities, self.experts, self.blocks)
