"""The server's components, and the path from a request's body to the engine's events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from milora.serving.admission import Admission
from milora.serving.answers import Form
from milora.serving.engine import Engine
from milora.serving.errors import ApiError
from milora.serving.exchange import Exchange
from milora.serving.logs import log
from milora.serving.metrics import Metrics
from milora.serving.prompts import Prompts
from milora.serving.protocol import ChatBody, CompletionBody, GivenRoute
from milora.serving.requests import AdapterError, AdapterInfo, AdapterInUseError, GenerationRequest, UnknownAdapterError
from milora.serving.tenants import Tenant, Tenants
from milora_core.errors import MiLoraError

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a server besides the engine's.

    Args:
        model: The name of the bare backbone in requests.
        positions: Maximum number of tokens of a prompt and its text; `None` for no limit.
        queue_seconds: Maximum time that a request may wait to start.
        stall_seconds: Maximum time that a client may leave a stream unread.
        body_bytes: Maximum size of a request's body.
    """

    model: str
    positions: int | None = None
    queue_seconds: float = 60.0
    stall_seconds: float = 60.0
    body_bytes: int = 8 * 2**20


class Service:
    """The components of a running server.

    Args:
        engine: The engine.
        prompts: Tokenizes prompts.
        tenants: The tenants and their keys.
        admission: Checks adapters before they are loaded.
        settings: Further settings.

    Attributes:
        is_draining: Whether the server is shutting down and rejects new requests.
        metrics: The metrics for `/metrics`.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        tenants: Tenants,
        admission: Admission,
        settings: ServiceSettings,
    ) -> None:
        self.engine = engine
        self.tenants = tenants
        self.admission = admission
        self.settings = settings
        self.is_draining = False
        self.metrics = Metrics(engine.statistics, lambda: self.is_draining)
        self._prompts = prompts
        # Tokenizers run in one separate thread: a prompt of megabytes would block the event loop for a second.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="milora-tokenizer")
        self._changing_adapters = asyncio.Lock()

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and one text: what the positions allow and the cache can hold."""
        held = self._cached_tokens(1)
        return held if self.settings.positions is None else min(held, self.settings.positions)

    async def load_adapter(self, name: str, path: str, *, replace: bool) -> None:
        """Checks and loads an adapter. If this fails, the adapter that it was to replace stays in service.

        Raises:
            MiLoraError: If it may not be loaded, its name is taken, or the adapter that it replaces is in use.
        """
        async with self._changing_adapters:
            check_name(name, self.settings.model)
            folder = self.admission.folder(path)
            await asyncio.to_thread(self.admission.check, name, folder)
            before = next((each for each in self.engine.adapters() if each.name == name), None)
            if before is not None and not replace:
                raise AdapterInUseError(
                    f"There is an adapter {name!r} already: unload it first, or set load_inplace to true."
                )
            # The old adapter and its tokenizer are replaced only after the new ones have been loaded.
            tokenizer = await self._in_tokenizer_thread(self._prompts.load, folder)
            await asyncio.to_thread(self.engine.load_adapter, name, folder, replace=replace)
            self._prompts.set(name, tokenizer)

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter.

        Raises:
            ServingError: If there is no such adapter, or it is in use.
        """
        async with self._changing_adapters:
            await asyncio.to_thread(self.engine.unload_adapter, name)
            self._prompts.remove(name)

    def visible_adapters(self, tenant: Tenant) -> list[AdapterInfo]:
        """The adapters visible to a tenant, sorted by name."""
        return sorted(
            (each for each in self.engine.adapters() if tenant.may_use(each.name)), key=lambda each: each.name
        )

    def adapter_of(self, model: str, tenant: Tenant) -> str | None:
        """The adapter that a request's `model` names; `None` for the bare backbone.

        Raises:
            ApiError: If the tenant may not use it. Another tenant's adapter gives the same error as a missing one.
        """
        if model == self.settings.model:
            if tenant.backbone:
                return None
        elif tenant.may_use(model):
            return model
        raise no_such_model(model)

    async def token_texts(self, adapter: str | None, tokens: Sequence[int]) -> dict[int, str]:
        """The text of each token id, decoded separately."""

        def decode() -> dict[int, str]:
            tokenizer = self._prompts.tokenizer(adapter)
            return {token: tokenizer.decode([token]) for token in set(tokens)}

        return await self._in_tokenizer_thread(decode)

    async def begin(self, body: CompletionBody | ChatBody, tenant: Tenant, arrived: float) -> Exchange:
        """Tokenizes a request's prompts and submits them to the engine.

        Args:
            body: The request.
            tenant: The tenant that sent it.
            arrived: Time of arrival in seconds of `time.monotonic()`.

        Raises:
            ApiError: If the tenant may not use the model, or has reached a limit.
            MiLoraError: If the prompt or the options are invalid, or the engine rejects the request.
        """
        adapter = self.adapter_of(body.model, tenant)
        chat = [message.as_template_takes_it() for message in body.messages] if isinstance(body, ChatBody) else None
        given: Sequence[Any] = [chat] if chat is not None else body.prompts()  # type: ignore[union-attr]
        prompts = await self._in_tokenizer_thread(lambda: [self._prompts.encode(adapter, each) for each in given])
        longest = max(map(len, prompts))
        asked = sum(map(len, prompts))
        max_tokens = body.wanted_tokens or self._default_tokens(longest, asked, len(prompts), body.n, tenant)
        if self.settings.positions is not None and longest + max_tokens > self.settings.positions:
            raise ApiError(
                400,
                f"The prompt has {longest} tokens, which with {max_tokens} new tokens exceeds the model's "
                f"{self.settings.positions} positions: shorten it, or lower max_tokens.",
                "context_length_exceeded",
            )
        route = body.milora.route
        sampling = body.sampling(max_tokens, body.wanted_logprobs)
        form = Form(isinstance(body, ChatBody), body.model, sampling.logprobs is not None, route is not False)
        exchange = Exchange(
            tenant,
            partial(self.token_texts, adapter),
            form,
            self.metrics,
            arrived=arrived,
            texts_per_prompt=body.n,
            prompt_tokens=asked,
            most_new_tokens=len(prompts) * body.n * max_tokens,
        )
        try:
            for prompt in prompts:
                request = GenerationRequest(
                    prompt,
                    sampling,
                    adapter,
                    tenant.name,
                    route.route() if isinstance(route, GivenRoute) else None,
                    return_route=route is not False,
                    deadline=time.monotonic() + self.settings.queue_seconds,
                )
                exchange.add(self.engine.submit(request))
        except BaseException as error:
            exchange.close()
            if isinstance(error, UnknownAdapterError):
                # The engine's message may name adapters of other tenants.
                raise no_such_model(body.model) from error
            raise
        return exchange

    def close(self) -> None:
        """Stops the engine and the tokenizers' thread."""
        self.engine.close()
        self._tokenizing.shutdown()

    def _default_tokens(self, longest: int, asked: int, prompts: int, n: int, tenant: Tenant) -> int:
        """The default `max_tokens` of a request: as many as positions, cache and the tenant's rate limit allow."""
        tokens = 16 if self.settings.positions is None else self.settings.positions - longest
        tokens = min(tokens, self._cached_tokens(n) - longest)
        if tenant.tokens_per_minute is not None:
            tokens = min(tokens, (tenant.tokens_per_minute - asked) // (prompts * n))
        return max(tokens, 1)

    def _cached_tokens(self, n: int) -> int:
        """Maximum number of tokens of a prompt and its text in the cache, if a request has `n` texts or beams."""
        # The engine's check counts whole pages, and the prompt's pages once per text.
        statistics = self.engine.statistics()
        return statistics.cache_pages_total // n * statistics.page_tokens

    async def _in_tokenizer_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *arguments)


def admitted(adapters: Mapping[str, Path], backbone: str, admission: Admission, prompts: Prompts) -> dict[str, Path]:
    """Checks adapters when a server starts. Those that may not be served are logged and skipped.

    Args:
        adapters: Folders by name.
        backbone: The backbone's name in requests. No adapter may have it.
        admission: Checks the adapters.
        prompts: The adapters' tokenizers are added to it.

    Returns:
        The resolved folders of the remaining adapters, by name.
    """
    result = {}
    for name, folder in adapters.items():
        try:
            check_name(name, backbone)
            real = admission.folder(str(folder.absolute()))
            admission.check(name, real)
            prompts.add(name, real)
        except MiLoraError as error:
            log("adapter_refused", level=logging.ERROR, adapter=name, reason=str(error))
        else:
            result[name] = real
    return result


def check_name(name: str, backbone: str) -> None:
    """Checks that an adapter does not have the backbone's name.

    Raises:
        AdapterError: If it does.
    """
    if name == backbone:
        raise AdapterError(f"{name!r} is the backbone's name here: call the adapter something else.")


def no_such_model(model: str) -> ApiError:
    """The error for a model that does not exist or that the caller may not use."""
    return ApiError(
        404, f"The model {model[:128]!r} does not exist, or this key may not use it.", "model_not_found", param="model"
    )
