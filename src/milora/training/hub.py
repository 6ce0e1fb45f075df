"""The hub repository that a run is pushed to: checked before the first step, with errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import create_repo

from milora.training.arguments import TrainingArguments
from milora_core.errors import MiLoraError


def check_hub(arguments: TrainingArguments, output: Path) -> None:
    """Creates the repository of a run if missing, so no training time is lost to a missing token.

    Raises:
        MiLoraError: If the hub cannot be reached, or refuses.
    """
    if not arguments.push_to_hub or arguments.process_index > 0:
        return
    name = arguments.hub_model_id or output.absolute().name
    with pushing(name, "leave --push_to_hub out and push the adapter later, or log in with `hf auth login`"):
        create_repo(name, token=arguments.hub_token, private=arguments.hub_private_repo, exist_ok=True)


@contextmanager
def pushing(name: str, advice: str) -> Iterator[None]:
    """Turns exceptions of the hub's client into a user's error.

    Args:
        name: The repository.
        advice: The fix; the end of the message.

    Raises:
        MiLoraError: If the hub cannot be reached, or refuses.
    """
    try:
        yield
    except Exception as error:  # from the client, its HTTP library or the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MiLoraError(f"The hub's repository {name} cannot be written to: {reason}; {advice}.") from error
