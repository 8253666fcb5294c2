"""``/v1/completions`` and ``/v1/chat/completions`` in the form of the OpenAI API, plain and as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from multihead.errors import tr
from multihead.generation.engine import Piece, Token
from multihead.serve.hosted import Hosted, Texts, broken
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.problems import ApiError, PlainJSON, dumped
from multihead.serve.wire import ChatAnswer, ChatBody, Common, CompletionAnswer, CompletionBody

router = APIRouter(route_class=StrictRoute)
COMPLETION_TOKENS = 16
EVENTS: dict[str, Any] = {"text/event-stream": {}}


@router.post("/v1/completions", responses={**ERRORS, 200: {"model": CompletionAnswer, "content": EVENTS}})
async def completions(body: CompletionBody, request: Request) -> Response:
    """Go on with a text."""
    hosted = generating(request, body)
    if body.echo and body.logprobs is not None:
        message = tr("echo and logprobs cannot be asked for together", "echo 与 logprobs 不能同时使用")
        raise ApiError(422, message, "echo", "unsupported_parameter")
    given = body.prompts()
    prompts = await asyncio.to_thread(
        lambda: [hosted.prompt(p, f"prompt[{i}]" if len(given) > 1 else "prompt") for i, p in enumerate(given)]
    )
    wished = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    texts = asked(hosted, body, prompts, wished, body.logprobs)
    decode = hosted.task.codec.decode  # type: ignore[attr-defined]
    echoes = [p if isinstance(p, str) else decode(p) for p in given] if body.echo else []
    form = CompletionForm(texts, hosted, body.n or 1, echoes)
    return await answered(form, texts, body, request)


@router.post("/v1/chat/completions", responses={**ERRORS, 200: {"model": ChatAnswer, "content": EVENTS}})
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    hosted = generating(request, body)
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            422,
            tr("max_tokens and max_completion_tokens differ", "max_tokens 与 max_completion_tokens 不一致"),
            "max_completion_tokens",
            "invalid_value",
        )
    if body.top_logprobs is not None and not body.logprobs:
        message = tr("top_logprobs needs logprobs: true", "使用 top_logprobs 时须 logprobs: true")
        raise ApiError(422, message, "top_logprobs", "invalid_value")
    prompt = await asyncio.to_thread(hosted.conversation, [message.plain() for message in body.messages])
    wished = limits.pop() if limits else None
    texts = asked(hosted, body, [prompt], wished, (body.top_logprobs or 0) if body.logprobs else None)
    return await answered(ChatForm(texts, hosted), texts, body, request)


def generating(request: Request, body: Common) -> Hosted:
    """The model that is asked, which must be one that writes texts."""
    hosted = pick(request, body.model, lambda h: h.engine is not None)
    if hosted.engine is None:
        raise ApiError(
            404,
            tr(f"the model '{hosted.name}' does not write texts; ask it at /v1/predict",
                f"模型 '{hosted.name}' 不生成文本；请使用 /v1/predict"),
            "model",
            "model_not_supported",
        )
    if body.stream_options is not None and not body.stream:
        message = tr("stream_options needs stream: true", "使用 stream_options 时须 stream: true")
        raise ApiError(422, message, "stream_options", "invalid_value")
    return hosted


def asked(
    hosted: Hosted, body: Common, prompts: Sequence[list[int]], max_tokens: int | None, logprobs: int | None
) -> Texts:
    """The texts that a body asks for, not yet submitted."""
    n, most = body.n or 1, hosted.settings.max_rows
    if len(prompts) * n > most:
        raise ApiError(422, tr(f"{len(prompts)} prompts × n {n} are more than the {most} this server takes",
                                f"{len(prompts)} 个提示 × n {n} 超过本服务的上限 {most}"), "n", "too_many_rows")
    wishes = body.wishes() | {"max_tokens": hosted.settings.max_tokens if max_tokens is None else max_tokens}
    return Texts(hosted, prompts, hosted.sampling(wishes), n, logprobs)


async def answered(form: Form, texts: Texts, body: Common, request: Request) -> Response:
    """The response: one object, or a stream of events."""
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(texts, lambda: events(form, texts, usage))
    return PlainJSON(form.answer(await unless_gone(request, texts.whole())))


class EventStream(StreamingResponse):
    """Server-sent events of texts that are submitted when the answer begins and cancelled when it ends, in any way."""

    def __init__(self, texts: Texts, source: Callable[[], AsyncIterator[bytes]]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(source(), headers=headers, media_type="text/event-stream")
        self.texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.texts.submit()
        except ApiError as error:
            await error.answer()(scope, receive, send)
            return
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.texts.cancel()


async def events(form: Form, texts: Texts, usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream, in their order, ``[DONE]`` last."""
    extra = {"usage": None} if usage else {}
    form.kind = form.chunk_kind
    for first in form.opening():
        yield event(first | extra)
    async for index, piece in texts:
        try:
            broken(piece.reason)
        except ApiError as error:
            yield event(error.body())
            return
        yield event(form.chunk(index, piece) | extra)
        # Where pieces are ready faster than they are sent, nothing else waits, and a disconnect would go unheard.
        await asyncio.sleep(0)
    if usage:
        yield event(form.head() | {"choices": [], "usage": form.usage()})
    yield b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"


@dataclass
class Form:
    """How texts are written down."""

    texts: Texts
    hosted: Hosted
    prefix = kind = chunk_kind = ""

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def head(self) -> dict[str, Any]:
        """What every object of one answer begins with."""
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.hosted.name}

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        read, written = self.texts.read, self.texts.used
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first text."""
        return []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One event."""
        raise NotImplementedError

    def answer(self, whole: Sequence[tuple[str, int, str, list[Token]]]) -> dict[str, Any]:
        """The answer in one object."""
        raise NotImplementedError

    def spelled(self, token: int) -> str:
        """A token for a person; bytes that are no text by themselves as ``bytes:\\xe6\\x88``."""
        raw = self.hosted.task.codec.token(token)  # type: ignore[attr-defined]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


@dataclass
class CompletionForm(Form):
    """The form of ``/v1/completions``. `echoes`: the prompts, where they are to stand before the answers."""

    n: int
    echoes: Sequence[str]
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        logprobs = None
        if self.texts.logprobs is not None:
            tops = [{self.spelled(i): p for i, p in token.top} for token in tokens] if self.texts.logprobs else None
            logprobs = {
                "tokens": [self.spelled(token.id) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": tops,
                "text_offset": [token.offset for token in tokens],
            }
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason or None}

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.n] if self.echoes else ""

    def opening(self) -> list[dict[str, Any]]:
        choices = [self._choice(i, self._echo(i), [], "") for i in range(self.texts.count) if self.echoes]
        return [self.head() | {"choices": [choice]} for choice in choices]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.head() | {"choices": [self._choice(index, piece.text, piece.logprobs, piece.reason)]}

    def answer(self, whole: Sequence[tuple[str, int, str, list[Token]]]) -> dict[str, Any]:
        choices = [
            self._choice(i, self._echo(i) + text, tokens, reason) for i, (text, _, reason, tokens) in enumerate(whole)
        ]
        return self.head() | {"choices": choices, "usage": self.usage()}


@dataclass
class ChatForm(Form):
    """The form of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.texts.logprobs is None:
            return None
        content = [
            self._token(t.id, t.logprob) | {"top_logprobs": [self._token(i, p) for i, p in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.hosted.task.codec.token(token)  # type: ignore[attr-defined]
        return {"token": self.spelled(token), "logprob": logprob, "bytes": list(raw)}

    def _piece(self, index: int, delta: dict[str, Any], tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason or None}
        return self.head() | {"choices": [choice]}

    def opening(self) -> list[dict[str, Any]]:
        return [self._piece(i, {"role": "assistant", "content": ""}, [], "") for i in range(self.texts.count)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._piece(index, {"content": piece.text} if piece.text else {}, piece.logprobs, piece.reason)

    def answer(self, whole: Sequence[tuple[str, int, str, list[Token]]]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(tokens),
                "finish_reason": reason,
            }
            for i, (text, _, reason, tokens) in enumerate(whole)
        ]
        return self.head() | {"choices": choices, "usage": self.usage()}
