"""The server's parts, and the one way from a request's body to the engine's events."""

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
from milora.serving.requests import (
    AdapterError,
    AdapterInfo,
    AdapterInUseError,
    GenerationRequest,
    UnknownAdapterError,
)
from milora.serving.tenants import Tenant, Tenants
from milora_core.errors import MiLoraError

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceSettings:
    """What a server does besides generating.

    Args:
        model: The name by which requests ask for the bare backbone.
        positions: The most tokens of a prompt and its text; `None` for no limit.
        queue_seconds: How long a request may wait to begin.
        stall_seconds: How long a client may leave a stream unread.
        body_bytes: The largest body of a request.
    """

    model: str
    positions: int | None = None
    queue_seconds: float = 60.0
    stall_seconds: float = 60.0
    body_bytes: int = 8 * 2**20


class Service:
    """The parts of a running server.

    Args:
        engine: What generates.
        prompts: What makes prompts.
        tenants: Who may use it.
        admission: What adapters may be loaded.
        settings: The rest.

    Attributes:
        is_draining: Whether new requests are refused, as the server is about to end.
        metrics: What `/metrics` shows.
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
        # Tokenizers are used in one thread only, and never in the event loop's: a prompt of megabytes takes a second.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="milora-tokenizer")
        self._changing_adapters = asyncio.Lock()

    async def load_adapter(self, name: str, path: str, *, replace: bool) -> None:
        """Checks and loads an adapter while the server runs.

        Raises:
            MiLoraError: If it may not be loaded, its name is taken, or the one of its name is in use.
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
            if before is not None:
                await asyncio.to_thread(self.engine.unload_adapter, name)
            try:
                await self._in_tokenizer_thread(self._prompts.add, name, folder)
                await asyncio.to_thread(self.engine.load_adapter, name, folder)
            except MiLoraError:
                self._prompts.remove(name)
                raise

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter.

        Raises:
            ServingError: If there is none, or it is in use.
        """
        async with self._changing_adapters:
            await asyncio.to_thread(self.engine.unload_adapter, name)
            self._prompts.remove(name)

    def visible_adapters(self, tenant: Tenant) -> list[AdapterInfo]:
        """The adapters that a tenant sees, by name."""
        return sorted(
            (each for each in self.engine.adapters() if tenant.may_use(each.name)), key=lambda each: each.name
        )

    def adapter_of(self, model: str, tenant: Tenant) -> str | None:
        """The adapter that a request's `model` stands for; `None` for the bare backbone.

        Raises:
            ApiError: If the tenant may not use it. An adapter of somebody else is answered like one that is not there.
        """
        if model == self.settings.model:
            if tenant.backbone:
                return None
        elif tenant.may_use(model):
            return model
        raise no_such_model(model)

    async def token_texts(self, adapter: str | None, tokens: Sequence[int]) -> dict[int, str]:
        """The text of each token id, alone."""

        def decode() -> dict[int, str]:
            tokenizer = self._prompts.tokenizer(adapter)
            return {token: tokenizer.decode([token]) for token in set(tokens)}

        return await self._in_tokenizer_thread(decode)

    async def begin(self, body: CompletionBody | ChatBody, tenant: Tenant, arrived: float) -> Exchange:
        """Makes a request's prompts and hands them to the engine.

        Args:
            body: The request.
            tenant: Whose it is.
            arrived: When it came, in seconds of `time.monotonic()`.

        Raises:
            ApiError: If the tenant may not, or not now.
            MiLoraError: If the prompt or the options are wrong, or the engine refuses.
        """
        adapter = self.adapter_of(body.model, tenant)
        chat = [message.as_template_takes_it() for message in body.messages] if isinstance(body, ChatBody) else None
        given: Sequence[Any] = [chat] if chat is not None else body.prompts()  # type: ignore[union-attr]
        prompts = await self._in_tokenizer_thread(lambda: [self._prompts.encode(adapter, each) for each in given])
        longest = max(map(len, prompts))
        asked = sum(map(len, prompts))
        max_tokens = body.wanted_tokens or self._default_tokens(longest, asked, len(prompts) * body.n, tenant)
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
        """Ends the engine and the tokenizers' thread."""
        self.engine.close()
        self._tokenizing.shutdown()

    def _default_tokens(self, longest: int, asked: int, texts: int, tenant: Tenant) -> int:
        """The most new tokens of a request that sets no limit: what positions and the tenant's minute leave."""
        tokens = 16 if self.settings.positions is None else self.settings.positions - longest
        if tenant.tokens_per_minute is not None:
            tokens = min(tokens, (tenant.tokens_per_minute - asked) // texts)
        return max(tokens, 1)

    async def _in_tokenizer_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *arguments)


def admitted(adapters: Mapping[str, Path], backbone: str, admission: Admission, prompts: Prompts) -> dict[str, Path]:
    """The adapters that may be served, when a server starts; the others are logged and left out.

    Args:
        adapters: Folders by name.
        backbone: The backbone's name for requests, which no adapter may have.
        admission: What may be loaded.
        prompts: Learns their tokenizers.

    Returns:
        The real folders by name.
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
    """Refuses the backbone's name for an adapter.

    Raises:
        AdapterError: If it is.
    """
    if name == backbone:
        raise AdapterError(f"{name!r} is the backbone's name here: call the adapter something else.")


def no_such_model(model: str) -> ApiError:
    """The answer about a model that is not there, and about one that is not the caller's."""
    return ApiError(
        404, f"The model {model[:128]!r} does not exist, or this key may not use it.", "model_not_found", param="model"
    )
