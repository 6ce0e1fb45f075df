"""The bodies of requests: OpenAI's fields, vLLM's additions, and `milora`. Unknown fields are rejected unless null."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from milora.serving.requests import Sampling
from milora_core.routing import Route

MOST_PROMPTS = 64
"""Maximum number of prompts per request."""
MOST_TEXTS = 64
"""Maximum value of `n`, the number of texts per prompt."""
LOWEST_TEMPERATURE = 0.01
"""Smaller temperatures above 0 are raised to this value, as in vLLM, because probabilities would overflow."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Row = list[list[list[_Finite]]]


class Body(BaseModel):
    """An immutable request body that rejects unknown fields. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    nulls: ClassVar[frozenset[str]] = frozenset()
    """The fields in which null does not mean the default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        # OpenAI's client sends null for None, and its messages have a null for each field that they do not use.
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name in cls.nulls}


class GivenRoute(Body):
    """A route of one row to follow, in the format of a response's `milora.route` and of `milora route --json`.

    Attributes:
        blocks: The blocks' paths.
        experts: The experts' paths.
        gates: Shape `(blocks, 1, experts)`.
        probabilities: Same shape. Returned in the response, otherwise not used.
    """

    blocks: list[str]
    experts: list[str]
    gates: _Row
    probabilities: _Row | None = None

    def route(self) -> Route:
        """The route.

        Raises:
            MiLoraError: If the shapes do not match.
        """
        probabilities = self.gates if self.probabilities is None else self.probabilities
        return Route.from_dict({**self.model_dump(), "probabilities": probabilities})


class MiLoraOptions(Body):
    """MiLoRA's options.

    Attributes:
        route: `true` returns the route of each prompt. A route replaces the routers' decision.
    """

    route: bool | GivenRoute = False


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: Whether to send a last chunk with the token counts and without choices.
    """

    include_usage: bool = False


class _Generation(Body):
    """The common fields of completions and chats. Defaults are OpenAI's, or vLLM's for its additions."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_TEXTS)
    temperature: _Finite = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 and -1: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _StopText | list[_StopText] | None = None
    stop_token_ids: list[_TokenId] | None = Field(None, max_length=256)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: _Finite = Field(1.0, gt=0)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    use_beam_search: bool = False
    length_penalty: _Finite = 1.0
    user: str | None = Field(None, description="Accepted for OpenAI's clients; it has no effect.")
    milora: MiLoraOptions = MiLoraOptions()

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError(f"at most 16 stop texts are supported; found {len(value)}")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """The engine's sampling parameters.

        Args:
            max_tokens: Maximum number of new tokens of a text.
            logprobs: Number of alternatives per token.

        Raises:
            InvalidRequestError: If options are incompatible.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        temperature = self.temperature
        if self.use_beam_search and "temperature" not in self.model_fields_set:
            temperature = 0.0
        if 0 < temperature < LOWEST_TEMPERATURE:
            temperature = LOWEST_TEMPERATURE
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=self.seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            n=self.n,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            use_beam_search=self.use_beam_search,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    # Without the field, OpenAI's default of 16 counts.
    nulls = frozenset({"max_tokens"})

    prompt: str | list[_TokenId] | list[str] | list[list[_TokenId]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives a token.")

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, value: Any) -> Any:
        if not value:
            raise ValueError("the prompt is empty; give a text or token ids")
        if isinstance(value, list) and not isinstance(value[0], int):
            if len(value) > MOST_PROMPTS:
                raise ValueError(f"at most {MOST_PROMPTS} prompts a request are supported; found {len(value)}")
            if not all(value):
                raise ValueError("one of the prompts is empty; give texts or token ids")
        return value

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def wanted_tokens(self) -> int | None:
        """Maximum number of new tokens; `None` for all remaining positions."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of alternatives per token; `None` for no log-probabilities."""
        return self.logprobs


class TextPart(Body):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A chat message. `content` is a text or a list of text parts, which are joined by line breaks as in vLLM."""

    role: str = Field(pattern=r"^[a-z_]{1,32}$")
    content: str | list[TextPart]
    name: str | None = None

    def as_template_takes_it(self) -> dict[str, str]:
        """The message in the form that the tokenizer's chat template expects."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Maximum number of new tokens; `None` for all remaining positions."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of alternatives per token; `None` for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadBody(Body):
    """`POST /v1/load_lora_adapter`.

    Attributes:
        lora_name: The adapter's name.
        lora_path: Its folder below the root of adapters, absolute or relative to the root.
        load_inplace: Whether to replace a loaded adapter with this name.
    """

    lora_name: str
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = Field(None, description="vLLM's; it has no effect.")
