"""A load generator for OpenAI-compatible servers, with Poisson arrivals, many tenants and several servers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import httpx2

from milora.benchmark.environment import environment
from milora.benchmark.serve_client import Answer, ask
from milora.benchmark.serve_summary import summary
from milora_core.errors import MiLoraError

WORDS = [
    "river",
    "stone",
    "market",
    "green",
    "seven",
    "paper",
    "window",
    "early",
    "garden",
    "silver",
    "music",
    "cloud",
    "winter",
    "table",
    "north",
    "letter",
    "bread",
    "engine",
    "simple",
    "ocean",
    "yellow",
    "friend",
    "mountain",
    "answer",
    "little",
    "hundred",
    "coffee",
    "train",
    "morning",
    "question",
]
"""The words of prompts: common words, mostly one token each for most tokenizers."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Endpoint:
    """A server and the models to request.

    Args:
        name: The name in results.
        url: The URL of the API, such as `http://127.0.0.1:8000/v1`.
        models: The models; empty for all models that the server lists.
    """

    name: str
    url: str
    models: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parses an endpoint `[NAME=]URL[#MODEL,MODEL]`.

        Raises:
            MiLoraError: If the text has no URL.
        """
        name, separator, rest = text.partition("=")
        if not separator or "://" in name:
            name, rest = "", text
        url, _, models = rest.partition("#")
        url = url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise MiLoraError(f"--endpoint {text}: give it as [NAME=]http://HOST:PORT[#MODEL,MODEL].")
        if not url.endswith("/v1"):
            url += "/v1"
        return cls(name or url, url, tuple(model for model in models.split(",") if model))


@dataclass(frozen=True)
class ServeSettings:
    """The settings of a load.

    Args:
        endpoints: The servers. They are measured in turn.
        keys: API keys by model.
        key: The API key of all other models.
        requests: Number of requests per round.
        rate: Requests per second, with Poisson arrivals. 0 sends all requests at once.
        concurrency: Maximum number of concurrent requests; `None` for no limit.
        prompt_words: Minimum and maximum number of words of a prompt.
        shared_words: Number of further words in a prefix that all prompts share.
        new_tokens: Maximum number of new tokens per request.
        ignore_eos: Always generate `new_tokens` tokens. MiLoRA and vLLM support this, other servers may not.
        chat: Use the chat route.
        temperature: The sampling temperature; 0 is greedy.
        rounds: Number of rounds per endpoint. Each round has new arrivals and prompts, the same for all endpoints.
        seed: Seed of arrivals, models and prompts.
        timeout: Seconds after which a request fails.
        body: Further fields of the requests.

    Raises:
        MiLoraError: If a value is out of range.
    """

    endpoints: tuple[Endpoint, ...]
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    key: str | None = field(default=None, repr=False)
    requests: int = 100
    rate: float = 0.0
    concurrency: int | None = None
    prompt_words: tuple[int, int] = (16, 48)
    shared_words: int = 0
    new_tokens: int = 32
    ignore_eos: bool = False
    chat: bool = False
    temperature: float = 0.0
    rounds: int = 1
    seed: int = 0
    timeout: float = 600.0
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.prompt_words
        if not 1 <= low <= high:
            raise MiLoraError(f"--prompt-words takes a range such as 16-48; found {low}-{high}.")
        if len({endpoint.name for endpoint in self.endpoints}) < len(self.endpoints):
            raise MiLoraError("Two endpoints have one name: give them as NAME=URL.")

    def to_dict(self) -> dict[str, Any]:
        """The settings for JSON, without keys."""
        return {name: value for name, value in asdict(self).items() if name not in ("keys", "key")}


@dataclass(frozen=True)
class Planned:
    """A planned request: the time to send it, a random number that selects the model, and the prompt."""

    due: float
    model: int
    prompt: str


def planned(settings: ServeSettings, round_number: int) -> list[Planned]:
    """The requests of a round. The same seed gives the same requests."""
    generator = random.Random(f"{settings.seed}-{round_number}")
    shared = " ".join(generator.choice(WORDS) for _ in range(settings.shared_words))
    due, requests = 0.0, []
    for _ in range(settings.requests):
        words = [generator.choice(WORDS) for _ in range(generator.randint(*settings.prompt_words))]
        requests.append(Planned(due, generator.randrange(2**32), " ".join([shared, *words] if shared else words)))
        due += generator.expovariate(settings.rate) if settings.rate > 0 else 0.0
    return requests


def serve_load(
    settings: ServeSettings, tell: Tell = lambda line: None, watch: Tell = lambda line: None
) -> dict[str, Any]:
    """Sends a load to servers and measures their responses.

    Args:
        settings: The load.
        tell: Called with a line about the next step.
        watch: Called at each response.

    Returns:
        `rows`: one per endpoint and round, see [`milora.benchmark.serve_summary.summary`]; `medians`: each endpoint's
        medians over its rounds, with ratios to the first endpoint; `answers`: all responses, without texts.

    Raises:
        MiLoraError: If a server cannot be reached, or lists no models.
    """
    return asyncio.run(_serve_load(settings, tell, watch))


async def _serve_load(settings: ServeSettings, tell: Tell, watch: Tell) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    limits = httpx2.Limits(max_connections=settings.concurrency)
    async with httpx2.AsyncClient(timeout=settings.timeout, limits=limits) as client:
        models = {each.name: each.models or await _models(client, each, settings) for each in settings.endpoints}
        for round_number in range(settings.rounds):
            requests = planned(settings, round_number)
            # The order rotates every round, so warm-up and throttling affect all endpoints equally.
            turn = round_number % len(settings.endpoints)
            for endpoint in [*settings.endpoints[turn:], *settings.endpoints[:turn]]:
                tell(f"round {round_number + 1}/{settings.rounds}, {endpoint.name}: {len(requests)} requests")
                found = await _run(client, endpoint, models[endpoint.name], requests, settings, watch)
                where = {"endpoint": endpoint.name, "round": round_number}
                rows.append({**where, **summary(found)})
                answers += [{**where, **answer.to_dict(), "text": None} for answer in found]
    return {
        "command": "serve",
        "settings": settings.to_dict(),
        "models": {name: list(of_one) for name, of_one in models.items()},
        "rows": rows,
        "medians": medians(rows),
        "answers": answers,
        "environment": environment("cpu"),
    }


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Each endpoint's medians over its rounds, and the median ratio of its throughput to the first endpoint's."""
    names = list(dict.fromkeys(row["endpoint"] for row in rows))
    of_first = {row["round"]: row["tokens_per_second"] for row in rows if row["endpoint"] == names[0]}
    result: dict[str, dict[str, float | None]] = {}
    for name in names:
        own = [row for row in rows if row["endpoint"] == name]
        ratios = [row["tokens_per_second"] / of_first[row["round"]] for row in own if of_first[row["round"]]]
        result[name] = {
            "tokens_per_second": median(row["tokens_per_second"] for row in own),
            "ratio_to_first": round(median(ratios), 4) if ratios else None,
            "first_token_p50": _median_of(own, "first_token", "p50"),
            "first_token_p99": _median_of(own, "first_token", "p99"),
            "between_tokens_p50": _median_of(own, "between_tokens", "p50"),
            "between_tokens_p99": _median_of(own, "between_tokens", "p99"),
        }
    return result


async def _run(
    client: httpx2.AsyncClient,
    endpoint: Endpoint,
    models: Sequence[str],
    requests: Sequence[Planned],
    settings: ServeSettings,
    watch: Tell,
) -> list[Answer]:
    start = time.perf_counter()

    async def one(request: Planned) -> Answer:
        answer = Answer(models[request.model % len(models)], request.due)
        await asyncio.sleep(max(request.due - (time.perf_counter() - start), 0))
        route = "chat/completions" if settings.chat else "completions"
        key = settings.keys.get(answer.model, settings.key)
        await ask(client, f"{endpoint.url}/{route}", _body(answer.model, request.prompt, settings), key, answer, start)
        watch(answer.error or "ok")
        return answer

    return list(await asyncio.gather(*(one(request) for request in requests)))


def _body(model: str, prompt: str, settings: ServeSettings) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": prompt}
    if settings.chat:
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return {
        "model": model,
        **asked,
        "max_tokens": settings.new_tokens,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if settings.ignore_eos else {}),
        **settings.body,
    }


async def _models(client: httpx2.AsyncClient, endpoint: Endpoint, settings: ServeSettings) -> tuple[str, ...]:
    """The models that an endpoint lists for any of the keys."""
    found: dict[str, None] = {}
    try:
        for key in {settings.key, *settings.keys.values()} if settings.keys else {settings.key}:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            response = await client.get(f"{endpoint.url}/models", headers=headers)
            if response.status_code == 200:
                found |= dict.fromkeys(str(card["id"]) for card in response.json()["data"])
            elif not settings.keys:
                raise MiLoraError(
                    f"{endpoint.url}/models answers {response.status_code}: set OPENAI_API_KEY, or give --keys FILE."
                )
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise MiLoraError(f"{endpoint.url}/models does not answer as OpenAI's API does: {error}.") from error
    if not found:
        raise MiLoraError(f"{endpoint.url} lists no models for the keys given.")
    return tuple(sorted(found))


def _median_of(rows: Sequence[Mapping[str, Any]], what: str, percent: str) -> float | None:
    values = [row[what][percent] for row in rows if row[what] is not None]
    return median(values) if values else None
