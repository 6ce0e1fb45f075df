"""The tokens that decide a route, and the contents of block hashes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from milora_core.errors import MiLoraError
from milora_vllm.adapter import Routing, request_routing
from milora_vllm.scheduling import RoutedScheduling, with_routes

extra_keys = with_routes(getattr(generate_block_hash_extra_keys, "__wrapped__", generate_block_hash_extra_keys))


def request(folder: Path, tokens: list[int], number: int = 1, salt: str | None = None, **settings: Any) -> Any:
    """A request as block hashing sees it, with an adapter of the given settings; without settings, the base model's."""
    lora = None
    if settings:
        path = folder / "-".join(map(str, settings.values()))
        path.mkdir(exist_ok=True)
        config = {"peft_type": "MILORA", "pooler": "attention", "experts": ["mlp.up_proj"], **settings}
        (path / "adapter_config.json").write_text(json.dumps(config))
        lora = LoRARequest("tenant", number, str(path))
    return SimpleNamespace(
        lora_request=lora,
        prompt_token_ids=tokens,
        sampling_params=None,
        mm_features=[],
        cache_salt=salt,
        prompt_embeds=None,
        num_output_placeholders=0,
    )


def routing(folder: Path, length: int, **settings: Any) -> Routing:
    found = request_routing(request(folder, list(range(length)), **settings))
    assert found is not None
    return found


ALL, LATE = {"adapted_tokens": "all"}, {"adapted_tokens": "completion"}


@pytest.mark.parametrize(
    ("settings", "length", "first", "end", "adapted"),
    [
        (ALL, 100, 0, 100, 0),
        ({**ALL, "router_window": 48}, 100, 0, 48, 0),
        ({**ALL, "router_window": 48}, 20, 0, 20, 0),
        ({**ALL, "pooler": "last"}, 100, 0, 100, 0),
        ({**LATE, "pooler": "last"}, 100, 99, 100, 99),
        ({**LATE, "pooler": "last"}, 1, 0, 1, 0),
        ({**LATE, "pooler": "mean"}, 100, 0, 100, 99),
        ({**LATE, "pooler": "last", "router_window": 48}, 100, 0, 48, 99),
    ],
)
def test_the_tokens_that_decide(
    tmp_path: Path, settings: dict[str, Any], length: int, first: int, end: int, adapted: int
) -> None:
    found = routing(tmp_path, length, **settings)
    assert (found.first, found.end, found.adapted) == (first, end, adapted)


def test_requests_share_a_route_only_if_adapter_and_deciding_tokens_are_equal(tmp_path: Path) -> None:
    def key(tokens: list[int], number: int = 1, **settings: Any) -> bytes:
        found = request_routing(request(tmp_path, tokens, number, **settings))
        assert found is not None
        return found.key

    tokens = list(range(100))
    window = {**ALL, "router_window": 48}
    assert key(tokens, **window) == key([*tokens[:48], 7], **window)
    assert key(tokens, **window) != key([*tokens[:47], 7, *tokens[48:]], **window)
    assert key(tokens, **ALL) != key([*tokens, 7], **ALL)
    assert key(tokens, **ALL) != key(tokens, **window)
    # Loaded again under a new number.
    assert key(tokens, **ALL) != key(tokens, number=2, **ALL)


def test_blocks_before_the_last_prompt_token_are_the_base_models_with_late_adaptation(tmp_path: Path) -> None:
    tokens = list(range(65))
    of_late = request(tmp_path, tokens, **LATE, pooler="last")
    for start in (0, 32):
        assert extra_keys(of_late, start, start + 32, 0) == extra_keys(request(tmp_path, tokens), start, start + 32, 0)
    keys, _ = extra_keys(of_late, 64, 96, 0)
    longer = request(tmp_path, tokens * 2, **LATE, pooler="last")
    assert extra_keys(longer, 64, 96, 0)[0] is None
    assert keys != extra_keys(request(tmp_path, tokens, 2, **LATE, pooler="last"), 64, 96, 0)[0]
    assert keys != extra_keys(request(tmp_path, [*tokens, 1], **LATE, pooler="last"), 64, 96, 0)[0]
    # A prompt of 64 tokens fills two blocks. Its last token is adapted, so the second block belongs to the adapter.
    aligned = request(tmp_path, tokens[:64], **LATE, pooler="last")
    assert extra_keys(aligned, 0, 32, 0)[0] is None
    assert extra_keys(aligned, 32, 64, 0)[0] is not None


def test_a_callers_salt_stays_in_the_first_block(tmp_path: Path) -> None:
    salted = request(tmp_path, list(range(65)), salt="mine", **LATE, pooler="last")
    assert extra_keys(salted, 0, 32, 0)[0] == (("cache_salt", "mine"),)


def test_the_first_block_names_the_route_where_all_tokens_are_adapted(tmp_path: Path) -> None:
    first = extra_keys(request(tmp_path, list(range(65)), **ALL), 0, 32, 0)[0]
    assert first != extra_keys(request(tmp_path, list(range(66)), **ALL), 0, 32, 0)[0]
    assert first == extra_keys(request(tmp_path, list(range(65)), **ALL), 0, 32, 0)[0]
    plain = [("lora", "tenant", str(tmp_path / "all"))]
    assert extra_keys(request(tmp_path, list(range(65)), **ALL), 32, 64, 0)[0] == tuple(plain)


@pytest.mark.parametrize("length", [0, 4, True, "2", 1.5])
def test_a_prompt_length_that_cannot_be_is_refused(tmp_path: Path, length: Any) -> None:
    of = request(tmp_path, [1, 2, 3], **ALL)
    of.sampling_params = SimpleNamespace(extra_args={"milora_prompt_tokens": length})
    with pytest.raises(MiLoraError, match="between 1 and the 3 tokens"):
        request_routing(of)


class HybridScheduler:
    """vLLM's scheduler of a model with Mamba layers: it calls the hook whether or not there are MiLoRA requests."""

    need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(self, request: Any, tokens: int, local: int = 0, external: int = 0) -> int:
        return (tokens + local + external) // 16 * 16


def test_hybrid_models_without_milora_requests_keep_vllms_chunks() -> None:
    scheduler: Any = type("Scheduler", (RoutedScheduling, HybridScheduler), {})()
    assert scheduler._mamba_block_aligned_split(SimpleNamespace(num_computed_tokens=0), 40, 3, 7) == 48
