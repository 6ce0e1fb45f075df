"""Several tenants: shared prefixes, fairness, limits, failures, adapters that are loaded and unloaded."""

import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES
from support.tenants import Alone, engine_on, greedy, prompt_of, read, saved_adapters
from support.tokenizer import character_tokenizer

from milora import MiLoraError
from milora.serving.engine import Engine, EngineSettings
from milora.serving.requests import (
    AdapterError,
    AdapterInUseError,
    DeadlineError,
    EngineStoppedError,
    NumericalError,
    QueueFullError,
    UnknownAdapterError,
)

KINDS = {
    "one": {},
    "two": {"gate": "softmax"},
    "window": {"router_window": 6},
    "late": {"adapted_tokens": "completion", "pooler": "last"},
    "late-two": {"adapted_tokens": "completion", "pooler": "last", "r": 2},
    "late-mean": {"adapted_tokens": "completion", "pooler": "mean"},
}
DOCUMENT = prompt_of(random.Random(5), 40)
PAGE = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"), "llama", KINDS)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Alone:
    torch.set_num_threads(1)
    return Alone("llama", folders)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# ------------------------------------------------------------------ prefix cache


def cached(engine: Engine, alone: Alone, prompt: tuple[int, ...], adapter: str | None) -> int:
    """The number of prompt tokens found in the prefix cache; also checks the text."""
    answer = read(engine.submit(greedy(prompt, adapter, 8)))
    assert answer.tokens == [alone(adapter, prompt, 8)]
    return answer.events[0].cached_tokens


def test_late_adapters_and_the_backbone_share_one_cache(folders: dict[str, Path], alone: Alone) -> None:
    with engine_on("llama", folders) as engine:
        assert cached(engine, alone, (*DOCUMENT, 1, 2), "late") == 0
        assert cached(engine, alone, (*DOCUMENT, 3, 4, 5), "late-two") == 40
        assert cached(engine, alone, (*DOCUMENT, 6), None) == 40
        # The document's last token is adapted here, so the bare backbone's last page does not match.
        assert cached(engine, alone, DOCUMENT, "late") == 36
        # Its router reads the whole prompt, which is new.
        assert cached(engine, alone, (*DOCUMENT, 7), "late-mean") == 0
        assert cached(engine, alone, (*DOCUMENT, 7), "late-mean") == 40
        assert engine.statistics().prefix_hit_tokens == 40 + 40 + 36 + 40


def test_pages_of_adapted_prompts_belong_to_adapter_and_route(folders: dict[str, Path], alone: Alone) -> None:
    with engine_on("llama", folders) as engine:
        # Both LoRAs have gate 1 in every module, so they differ only in their weights.
        for adapter in ("one", "two", "window", "lora", "dora", None):
            assert cached(engine, alone, (*DOCUMENT, 1), adapter) == 0
            assert cached(engine, alone, (*DOCUMENT, 1), adapter) == 40
        assert cached(engine, alone, (*DOCUMENT, 2, 3), "one") == 0  # Another prompt needs a new route.
        assert cached(engine, alone, (*DOCUMENT, 2, 3), "window") == 40  # The window is the same.
        assert cached(engine, alone, (1, *DOCUMENT), "window") == 0
        assert cached(engine, alone, (*DOCUMENT, 2, 3), "lora") == 40


def test_a_further_turn_finds_the_reply_where_the_same_adapter_wrote_it(folders: dict[str, Path], alone: Alone) -> None:
    with engine_on("llama", folders) as engine:
        for adapter, expected in (("lora", 48), ("window", 48), ("late", 36), (None, 48)):
            reply = tuple(alone(adapter, DOCUMENT, 12))
            assert read(engine.submit(greedy(DOCUMENT, adapter, 12))).tokens == [list(reply)]
            assert cached(engine, alone, (*DOCUMENT, *reply, 5), adapter) == expected, adapter


def test_a_forced_route_finds_its_own_pages_only(folders: dict[str, Path], alone: Alone) -> None:
    route = alone.model("one").route(torch.tensor([DOCUMENT[::-1]]))
    with engine_on("llama", folders) as engine:
        cached(engine, alone, DOCUMENT, "one")
        for expected in (0, 36):
            answer = read(engine.submit(greedy(DOCUMENT, "one", 8, route=route)))
            assert answer.tokens == [alone("one", DOCUMENT, 8, route=route)]
            assert answer.events[0].cached_tokens == expected


def test_texts_are_right_while_pages_run_out(folders: dict[str, Path], alone: Alone) -> None:
    """16 pages of 4 tokens: requests are preempted, wait, and continue at the same token."""
    of_page = 2 * PAGE * 2 * 8 * 2 * 4  # layers, tokens, heads, size, keys and values, bytes
    generator = random.Random(1)
    with engine_on("llama", folders, cache_bytes=16 * of_page) as engine:
        assert engine.statistics().cache_pages_total == 16
        requests = []
        for number in range(24):
            adapter = [None, *folders][number % (1 + len(folders))]
            requests.append((adapter, prompt_of(generator, generator.randrange(4, 20)), 20))
        running = [engine.submit(greedy(prompt, adapter, tokens)) for adapter, prompt, tokens in requests]
        for generation, (adapter, prompt, tokens) in zip(running, requests, strict=True):
            assert read(generation).tokens == [alone(adapter, prompt, tokens)], adapter
        several = read(engine.submit(greedy(DOCUMENT[:9], "one", 8, n=3)))
        assert several.tokens == [alone("one", DOCUMENT[:9], 8)] * 3
        statistics = engine.statistics()
    assert statistics.preempted > 0
    assert statistics.cache_pages_used == 0


# ---------------------------------------------------------------- fairness, limits


def test_one_tenants_flood_does_not_starve_another(folders: dict[str, Path]) -> None:
    """64 requests of 60 new tokens fill the 4 rows for a thousand steps; another tenant's request waits a few steps."""
    with engine_on("llama", folders, most_texts=4, step_tokens=16) as engine:
        flood = [engine.submit(greedy(DOCUMENT, "one", 60, tenant="flood")) for _ in range(64)]
        next(flood[0])
        waits = []
        for _ in range(5):
            before = engine.statistics().steps
            small = engine.submit(greedy(DOCUMENT[:10], "two", 3, tenant="small"))
            next(small)
            waits.append(engine.statistics().steps - before)
            read(small)
        # A step in progress, one step of the flood, the prompt's own steps, and those during this thread's delay.
        assert sorted(waits)[2] <= 8, waits
        assert sum(generation.is_cancelled for generation in flood) == 0
        for generation in flood:
            generation.cancel()


def test_busy_tenants_get_equal_parts(folders: dict[str, Path]) -> None:
    with engine_on("llama", folders, most_texts=4) as engine:
        running = [engine.submit(greedy(DOCUMENT[:6], "one", 30, tenant="many")) for _ in range(40)]
        running += [engine.submit(greedy(DOCUMENT[:6], "one", 30, tenant="few")) for _ in range(10)]
        for generation in running[40:]:
            read(generation)
        done = engine.statistics().generated_tokens
        for generation in running:
            generation.cancel()
    assert done["few"] == 300
    # Served alternately once both were queued. Earlier steps may add some, and each has a request in progress.
    assert done["many"] <= 300 + 8 * 30


def test_more_requests_than_may_wait_are_refused(folders: dict[str, Path]) -> None:
    with engine_on("llama", folders, most_texts=1, most_waiting=2) as engine:
        first = engine.submit(greedy(DOCUMENT, "one", 80))
        next(first)
        others = [engine.submit(greedy(DOCUMENT, "one", 2)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            engine.submit(greedy(DOCUMENT, "one", 2))
        assert engine.statistics().waiting == 2
        for generation in (first, *others):
            generation.cancel()
            read(generation)
        read(engine.submit(greedy(DOCUMENT, "one", 2)))


def test_requests_that_wait_beyond_their_deadline_end(folders: dict[str, Path]) -> None:
    with engine_on("llama", folders, most_texts=1) as engine:
        first = engine.submit(greedy(DOCUMENT, "one", 80))
        next(first)
        late = engine.submit(greedy(DOCUMENT, "one", 2, deadline=time.monotonic() - 1))
        with pytest.raises(DeadlineError):
            read(late)
        first.cancel()
        assert read(engine.submit(greedy(DOCUMENT, "one", 2, deadline=time.monotonic() + 60))).events


# --------------------------------------------------------------------- failures


def test_nan_fails_its_own_request_only(folders: dict[str, Path], alone: Alone, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["one"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    huge = next(name for name in tensors if "down_proj.lora_B" in name)
    tensors[huge] = torch.full_like(tensors[huge], 3e38)  # Finite, because the file is checked; its products overflow.
    save_file(tensors, broken / "adapter_model.safetensors")
    save_file({name: tensor * 1 for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    prompts = [prompt_of(random.Random(seed), 12) for seed in range(12)]
    with engine_on("llama", {**folders, "broken": broken}, cache_bytes=2**17) as engine:
        ends = []
        for prompt in prompts:
            bad, good = engine.submit(greedy(prompt, "broken", 6)), engine.submit(greedy(prompt, "late", 6))
            try:
                read(bad)
            except NumericalError:
                ends.append("NaN")
            assert read(good).tokens == [alone("late", prompt, 6)]
        assert "NaN" in ends
        assert engine.healthy() is None
        assert engine.statistics().failed == len(ends)


def test_an_error_in_one_request_leaves_the_others(
    folders: dict[str, Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_on("llama", folders) as engine:
        original = engine._runner._forward

        def failing(tokens: list[int], *rest: object) -> torch.Tensor:
            if 13 in tokens:
                raise RuntimeError("an unlucky token")
            return original(tokens, *rest)

        monkeypatch.setattr(engine._runner, "_forward", failing)
        prompts = [(5, 6, 7, 8), (5, 13, 7, 8), (9, 6, 7), (13,)]
        running = [engine.submit(greedy(prompt, "one", 1)) for prompt in prompts]
        for prompt, generation in zip(prompts, running, strict=True):
            if 13 in prompt:
                with pytest.raises(MiLoraError, match="an unlucky token"):
                    read(generation)
            else:
                assert read(generation).tokens == [alone("one", prompt, 1)]
        assert engine.healthy() is None


# --------------------------------------------------------------------- adapters


def test_adapters_are_loaded_and_unloaded_while_others_run(folders: dict[str, Path], alone: Alone) -> None:
    with engine_on("llama") as engine:
        engine.load_adapter("one", folders["one"])
        running = engine.submit(greedy(DOCUMENT, "one", 60))
        next(running)
        engine.load_adapter("two", folders["two"])
        assert read(engine.submit(greedy(DOCUMENT, "two", 8))).tokens == [alone("two", DOCUMENT, 8)]
        with pytest.raises(AdapterInUseError, match="already"):
            engine.load_adapter("two", folders["one"])
        with pytest.raises(AdapterInUseError, match="1 requests use"):
            engine.unload_adapter("one")
        engine.unload_adapter("two")
        with pytest.raises(UnknownAdapterError):
            engine.submit(greedy(DOCUMENT, "two", 8))
        with pytest.raises(UnknownAdapterError):
            engine.unload_adapter("two")
        engine.load_adapter("two", folders["late"])  # The new adapter shares nothing with the old one of that name.
        assert read(engine.submit(greedy(DOCUMENT, "two", 8))).tokens == [alone("late", DOCUMENT, 8)]
        assert read(running).tokens[0] == alone("one", DOCUMENT, 60)[1:]
        assert [(info.name, info.kind, info.in_memory) for info in engine.adapters()] == [
            ("one", "MILORA", True),
            ("two", "MILORA", True),
        ]


@pytest.mark.parametrize("in_memory", [1, 2, 3])
def test_a_replacement_that_fails_leaves_the_old_adapter(
    folders: dict[str, Path], alone: Alone, tmp_path: Path, in_memory: int
) -> None:
    """The old adapter stays, also if the new files have overwritten its own and memory is full."""
    own = tmp_path / "own"
    shutil.copytree(folders["one"], own)
    with engine_on("llama", {"own": own, "two": folders["two"]}, adapters_in_memory=in_memory) as engine:
        for name, kind in (("two", "two"), ("own", "one")):
            assert read(engine.submit(greedy(DOCUMENT, name, 8))).tokens == [alone(kind, DOCUMENT, 8)]
        tensors = load_file(own / "adapter_model.safetensors")
        router = next(name for name in tensors if "router" in name)
        save_file({n: each for n, each in tensors.items() if n != router}, own / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="cannot be loaded"):
            engine.load_adapter("own", own, replace=True)
        assert read(engine.submit(greedy(DOCUMENT, "own", 8))).tokens == [alone("one", DOCUMENT, 8)]

        running = engine.submit(greedy(DOCUMENT, "own", 60))
        next(running)
        with pytest.raises(AdapterInUseError, match="1 requests use"):
            engine.load_adapter("own", folders["late"], replace=True)
        assert read(running).tokens == [alone("one", DOCUMENT, 60)[1:]]

        engine.load_adapter("own", folders["late"], replace=True)
        for name, kind in (("own", "late"), ("two", "two"), ("own", "late")):
            assert read(engine.submit(greedy(DOCUMENT, name, 8))).tokens == [alone(kind, DOCUMENT, 8)]
        assert engine.statistics().adapters == 2
        assert engine.statistics().adapters_in_memory == min(in_memory, 2)
        engine.load_adapter("new", folders["one"], replace=True)
        assert engine.statistics().adapters_in_memory == min(in_memory, 3)


def test_folders_that_cannot_be_served_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with engine_on("llama") as engine:
        with pytest.raises(AdapterError, match="no such adapter"):
            engine.load_adapter("a", tmp_path / "nothing")
        pickled = tmp_path / "pickled"
        shutil.copytree(folders["one"], pickled)
        (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
        with pytest.raises(AdapterError, match=r"pickled|holds no adapter"):
            engine.load_adapter("a", pickled)
        foreign = saved_adapters(tmp_path, "qwen3", {"one": {}})["one"]
        with pytest.raises(AdapterError, match="another backbone"):
            engine.load_adapter("a", foreign)
        assert engine.adapters() == ()
        engine.load_adapter("a", folders["one"])
        assert read(engine.submit(greedy(DOCUMENT, "a", 4))).events


def test_more_adapters_than_memory_come_and_go(folders: dict[str, Path], alone: Alone) -> None:
    names = {f"{name}-{copy}": name for copy in range(3) for name in folders}
    generator = random.Random(0)
    with engine_on("llama", {name: folders[kind] for name, kind in names.items()}, adapters_in_memory=3) as engine:
        order = [*names] * 2
        generator.shuffle(order)
        running = [(name, engine.submit(greedy(DOCUMENT[:12], name, 6))) for name in order]
        for name, generation in running:
            assert read(generation).tokens == [alone(names[name], DOCUMENT[:12], 6)], name
        statistics = engine.statistics()
        assert (statistics.adapters, statistics.adapters_in_memory) == (len(names), 3)


def test_an_adapter_takes_the_place_of_one_of_the_same_shapes(tmp_path: Path) -> None:
    """Its weights overwrite the other's; DoRA's factors are recomputed."""
    kinds = {"a": {}, "b": {}, "dora-a": {"use_dora": True}, "dora-b": {"use_dora": True}, "rank": {"r": 2}}
    folders = saved_adapters(tmp_path, "llama", kinds)
    alone = Alone("llama", folders)
    assert len({tuple(alone(name, DOCUMENT, 8)) for name in folders}) == len(folders)
    broken = tmp_path / "broken"
    shutil.copytree(folders["a"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    save_file(tensors, broken / "adapter_model.safetensors")
    with engine_on("llama", {**folders, "broken": broken}, adapters_in_memory=2) as engine:
        made = []
        original = engine._pool.slots.make
        engine._pool.slots.make = lambda adapter: (made.append(adapter.name), original(adapter))[1]
        for name in ["a", "dora-a", *["b", "dora-b", "a", "dora-a"] * 2]:
            assert read(engine.submit(greedy(DOCUMENT, name, 8))).tokens == [alone(name, DOCUMENT, 8)], name
        assert made == ["a", "dora-a"]
        for _ in range(3):
            with pytest.raises(AdapterError, match="NaN"):
                read(engine.submit(greedy(DOCUMENT, "broken", 8)))
        assert {info.name for info in engine.adapters() if info.in_memory} == {"a", "dora-a"}
        for name in ["rank", "lora", "a", "b", "dora"]:
            assert read(engine.submit(greedy(DOCUMENT, name, 8))).tokens == [alone(name, DOCUMENT, 8)], name


def test_a_load_that_fails_unexpectedly_is_the_callers_alone(
    folders: dict[str, Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, folder: Path, *, replaces: bool) -> None:
        raise RuntimeError("the disk is gone")

    with engine_on("llama", {"one": folders["one"]}) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._pool, "open", fails)
            with pytest.raises(RuntimeError, match="the disk is gone"):
                engine.load_adapter("two", folders["two"])
        assert engine.healthy() is None
        assert read(engine.submit(greedy(DOCUMENT, "one", 4))).tokens == [alone("one", DOCUMENT, 4)]
        engine.load_adapter("two", folders["two"])


def test_files_that_changed_since_loading_are_not_taken_for_the_old_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(folders["one"], own)
    with engine_on("llama", {"own": own, "two": folders["two"]}, adapters_in_memory=1) as engine:
        read(engine.submit(greedy(DOCUMENT, "own", 2)))
        read(engine.submit(greedy(DOCUMENT, "two", 2)))
        shutil.copy(folders["two"] / "adapter_model.safetensors", own / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="have changed"):
            read(engine.submit(greedy(DOCUMENT, "own", 2)))
        engine.unload_adapter("own")
        engine.load_adapter("own", own)
        assert read(engine.submit(greedy(DOCUMENT, "own", 2))).events


# ------------------------------------------------------------------------- ends


@pytest.mark.parametrize("timeout", [30, 1e12, float("inf")])
def test_draining_ends_what_runs_and_takes_nothing_new(folders: dict[str, Path], timeout: float) -> None:
    engine = engine_on("llama", folders)
    running = engine.submit(greedy(DOCUMENT, "one", 40))
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(engine.drain(timeout)))
    thread.start()
    wait_for(lambda: engine._is_draining)
    with pytest.raises(EngineStoppedError, match="takes no more"):
        engine.submit(greedy(DOCUMENT, "one", 2))
    assert len(read(running).tokens[0]) == 40
    thread.join()
    assert done == [True]
    engine.close()
    assert engine.healthy() == "The engine is closed."


def test_closing_ends_requests_and_gives_the_backbone_back(folders: dict[str, Path], alone: Alone) -> None:
    backbone = ARCHITECTURES["llama"]()
    engine = Engine(backbone, character_tokenizer(), folders, EngineSettings(cache_bytes=2**20))
    running = engine.submit(greedy(DOCUMENT, "one", 80))
    next(running)
    engine.close()
    with pytest.raises(EngineStoppedError):
        read(running)
    with pytest.raises(EngineStoppedError):
        engine.load_adapter("x", folders["one"])
    with torch.no_grad():
        text = backbone.generate(input_ids=torch.tensor([DOCUMENT]), max_new_tokens=5, do_sample=False)
    assert text[0, len(DOCUMENT) :].tolist() == alone(None, DOCUMENT, 5)


@pytest.mark.parametrize("backbone", ["bloom", "falcon", "mpt"])
def test_backbones_that_cannot_be_served_are_refused_by_name(backbone: str) -> None:
    with pytest.raises(MiLoraError, match="attention interface"):
        engine_on(backbone)


@pytest.mark.parametrize("backbone", ["mistral", "olmo2", "cohere2", "phi3", "gpt2", "gpt_neox", "mixtral", "opt"])
def test_other_architectures_pass_the_engines_own_check(backbone: str) -> None:
    generator = random.Random(0)
    alone = Alone(backbone, {})
    with engine_on(backbone, step_tokens=8) as engine:
        running = []
        for _ in range(6):
            prompt = prompt_of(generator, generator.randrange(1, 30))
            running.append((prompt, engine.submit(greedy(prompt, None, 8))))
        for prompt, generation in running:
            assert read(generation).tokens == [alone(None, prompt, 8)]
