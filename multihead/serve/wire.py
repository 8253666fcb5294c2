"""The request bodies of the OpenAI API, field by field, and the answers' shapes.

What would change the result and is not supported may only be sent with the value that means "off"; what changes
nothing (``user``, ``metadata`` …) is accepted; anything else is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INT64 = 2**63
Off = Annotated[float, Field(ge=0, le=0)] | None
NoList = Annotated[list[Any], Field(max_length=0)] | None
NoMap = Annotated[dict[str, Any], Field(max_length=0)] | None
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=4)] | None
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Several = Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
Prompt = str | TokenIds | Several | None


class Body(BaseModel):
    """Unknown fields are refused, and "5" is not 5."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(Body):
    """What both text endpoints take."""

    model: str | None = None
    """May be left out where one model is served."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Not of the OpenAI API: only the k likeliest tokens; 0 for all."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Not of the OpenAI API: above 1 repeats less."""
    frequency_penalty: Off = None
    presence_penalty: Off = None
    logit_bias: NoMap = None
    user: str | None = None

    def wishes(self) -> dict[str, Any]:
        """The fields of `Sampling` that were given."""
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "repetition_penalty", "stop", "seed")}
        if self.top_p is not None:
            # 0 asks for the likeliest token, the smallest set there is.
            given["top_p"] = max(self.top_p, 1e-9)
        return {name: value for name, value in given.items() if value is not None}


class CompletionBody(Common):
    """``/v1/completions``."""

    prompt: Prompt = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default 16, as in the OpenAI API."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as a text or as ids."""
        given: Any = self.prompt
        if given is None or isinstance(given, str):
            return [given or ""]
        return [given] if isinstance(given[0], int) else list(given)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    tool_calls: NoList = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class PlainFormat(Body):
    """The only response format there is."""

    type: Literal["text"]


class ChatBody(Common):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    response_format: PlainFormat | None = None
    tools: NoList = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoList = None
    function_call: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None
    moderation: None = None


class EmbeddingBody(Body):
    """``/v1/embeddings``."""

    model: str | None = None
    """May be left out where one model gives vectors."""
    input: str | TokenIds | Several
    encoding_format: Literal["float", "base64"] | None = None
    """Default float."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the model's own."""
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """Each input, as a text or as ids."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


UNSUPPORTED = frozenset({
    "frequency_penalty", "presence_penalty", "logit_bias", "best_of", "suffix", "refusal", "tool_calls", "service_tier",
    "modalities", "response_format", "tools", "tool_choice", "functions", "function_call", "store", "verbosity",
    "audio", "prediction", "reasoning_effort", "web_search_options", "moderation", "name", "tool_call_id",
})
"""Fields of the OpenAI API that must be left out or off."""


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the form of ``/v1/completions``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """Answer of ``/v1/completions``; when streamed, each event has this form too."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatToken(BaseModel):
    """A token and its likely alternatives."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class ChatTokenTop(ChatToken):
    """One emitted token."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the form of ``/v1/chat/completions``."""

    content: list[ChatTokenTop]
    refusal: None = None


class ChatChoice(BaseModel):
    """One turn."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    """One vector; base64 holds float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """Answer of ``/v1/embeddings``, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
