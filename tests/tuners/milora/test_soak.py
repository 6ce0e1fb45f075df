"""Many tenants at once: adapters are replaced under their names while threads and asyncio tasks generate."""

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.adapted import adapted, add_adapter, assert_nothing_in_force, saved
from support.architectures import pad, random_prompts

from milora import MiLoraError

ADAPTERS = [f"tenant{number}" for number in range(20)]
VERSIONS = 3
GENERATIONS = 500
NEW = 4
PROMPTS = random_prompts(6, (3, 8), seed=11)


def seed_of(name: str, version: int) -> int:
    return 100 + 10 * ADAPTERS.index(name) + version


def settings_of(name: str) -> dict[str, object]:
    number = ADAPTERS.index(name)
    late = {"adapted_tokens": "completion"} if number % 4 == 3 else {}
    return {"top_k": 1 + number % 3, "r": 2 + number % 3, "gate": ("hard", "softmax")[number % 2], **late}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_every_text_is_its_adapters_or_refused(tmp_path: Path) -> None:
    # The texts of each adapter version alone.
    alone: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    single = adapted().model
    for name in ADAPTERS:
        for version in range(VERSIONS):
            add_adapter(single, "one", seed=seed_of(name, version), **settings_of(name))
            single.set_adapter("one")
            for place, prompt in enumerate(PROMPTS):
                text = single.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
                alone.setdefault((name, place), set()).add(tuple(text[0, len(prompt) :].tolist()))
            single.set_adapter("default")
            single.delete_adapter("one")
    with single.disable_adapter():
        for place, prompt in enumerate(PROMPTS):
            text = single.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            alone["__base__", place] = {tuple(text[0, len(prompt) :].tolist())}

    # Loaded from disk, as in a server.
    for name in ADAPTERS:
        for version in range(VERSIONS):
            saved(tmp_path / f"{name}-{version}", seed=seed_of(name, version), **settings_of(name))
    model = adapted().model
    for name in ADAPTERS:
        model.load_adapter(tmp_path / f"{name}-0", name)
    model.eval()
    counts: Counter[str] = Counter()
    stop = threading.Event()

    def request(number: int) -> None:
        draw = random.Random(number)
        rows = draw.sample(range(len(PROMPTS)), 4)
        names = [draw.choice([*ADAPTERS, "__base__"]) for _ in rows]
        input_ids, mask = pad([PROMPTS[row] for row in rows], "left")
        try:
            texts = model.generate(
                input_ids=input_ids, attention_mask=mask, adapter_names=names, max_new_tokens=NEW, do_sample=False
            )[:, input_ids.shape[1] :].tolist()
        except MiLoraError:
            counts["refused"] += 1
            return
        for name, row, text in zip(names, rows, texts, strict=True):
            counts["right" if tuple(text) in alone[name, row] else f"wrong: {name}"] += 1

    def come_and_go() -> None:
        draw = random.Random(0)
        while not stop.is_set():
            name = draw.choice(ADAPTERS)
            model.delete_adapter(name)
            model.load_adapter(
                tmp_path / f"{name}-{draw.randrange(VERSIONS)}", name, low_cpu_mem_usage=draw.random() < 0.5
            )
            counts["replaced"] += 1

    async def tasks(numbers: range) -> None:
        limit = asyncio.Semaphore(2)

        async def one(number: int) -> None:
            async with limit:
                await asyncio.to_thread(request, number)

        await asyncio.gather(*map(one, numbers))

    changes = threading.Thread(target=come_and_go)
    changes.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            threads = pool.map(request, range(GENERATIONS // 2))
            asyncio.run(tasks(range(GENERATIONS // 2, GENERATIONS)))
            list(threads)
    finally:
        stop.set()
        changes.join(60)
    assert not [key for key in counts if key.startswith("wrong")], counts
    assert counts["right"] > 4 * GENERATIONS * 0.8, counts
    assert counts["replaced"] > 20, counts
    assert_nothing_in_force(model)
