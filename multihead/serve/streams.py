"""``/v1/audio/stream``: speech as it is spoken, over WebSocket. 16-bit PCM comes in, in pieces of any size; what was
heard goes out as JSON, first as a guess that may change, then, after a pause, as it stays.

    ws://…/v1/audio/stream?model=NAME&rate=16000
    → bytes: samples, little-endian, one channel            ← {"type": "ready", "model": "…", "rate": 16000}
                                                            ← {"type": "partial", "text": "…", "start": 0.4, "end": 1.1}
    → {"type": "end"}                                       ← {"type": "final", "text": "…", "start": 0.4, "end": 2.3}
                                                            ← {"type": "done", "seconds": 2.6}

A connection holds one utterance (``Listener``) and asks for one text at a time; while it waits it reads nothing, so
that a sender who is too fast is slowed down by the network.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from multihead.codec.activity import Heard, Listener
from multihead.codec.audio import RATE, resampling, wav
from multihead.data.audio import to_uri
from multihead.errors import tr
from multihead.serve.hosted import Hosted
from multihead.serve.intake import pick
from multihead.serve.problems import ApiError, dumped
from multihead.serve.transcriptions import hears, own

router = APIRouter()
log = logging.getLogger(__name__)
RATES = (8000, 48000)
MESSAGE = 1 << 18
"""Most bytes of one message; the server reads no more of it."""
IDLE, MOST = 30.0, 3600.0
"""Seconds: without a message, and of a connection in all, by its sound and by the clock."""
PARTIAL = 0.5
"""Seconds of sound, and of time, between two guesses; more where the model is slow."""
SHARE = 0.5
"""Share of its time in which a connection may keep the model busy with guesses."""
UTTERANCE = 20.0
"""Seconds after which somebody who makes no pause is cut off."""
PARAMETERS = ("model", "rate")
CLOSED = {408: 1008, 413: 1009, 415: 1003, 422: 1003, 500: 1011, 503: 1013}
"""What WebSocket (RFC 6455, section 7.4.1, and IANA's registry) calls our statuses."""


@router.websocket("/v1/audio/stream")
async def listen(socket: WebSocket) -> None:
    """Texts of a stream of sound."""
    streams: Counter[str] = socket.app.state.__dict__.setdefault("streams", Counter())
    name = ""
    try:
        hosted, rate = wanted(socket)
        if streams[hosted.name] >= hosted.settings.streams:
            raise ApiError(503, tr(f"{hosted.settings.streams} streams are open already; try again shortly",
                                   f"已有 {hosted.settings.streams} 路音频流，请稍后再试"), code="overloaded")
        name = hosted.name
        streams[name] += 1
        offered = socket.headers.get("sec-websocket-protocol", "").split(",")[0].strip()
        await socket.accept(subprotocol="multihead" if offered == "multihead" else None)
        await Stream(socket, hosted, rate).run()
    except ApiError as error:
        await refuse(socket, error)
    except WebSocketDisconnect:
        pass
    except Exception:
        log.exception("a stream to %s", name)
        await refuse(socket, ApiError(500, tr("something went wrong in the server; its log says what",
                                              "服务器内部出错；详情见服务器日志"), code="internal_error"))
    finally:
        streams[name] -= bool(name)


def wanted(socket: WebSocket) -> tuple[Hosted, int]:
    """The model and the rate that the address asks for.

    Raises:
        ApiError: a page of another origin, an unknown parameter, no such model, one that hears nothing, no such rate.
    """
    own(socket.headers, socket.app.state.settings.cors_origins)
    given = socket.query_params
    unknown = next((name for name in given if name not in PARAMETERS), None)
    if unknown is not None:
        raise ApiError(422, tr(f"unknown parameter '{unknown[:60]}'; there are: {', '.join(PARAMETERS)}",
                               f"没有参数 '{unknown[:60]}'；可用：{'、'.join(PARAMETERS)}"), unknown, "invalid_value")
    hosted = pick(socket, given.get("model"), hears)
    if not hears(hosted):
        raise ApiError(404, tr(f"the model '{hosted.name}' writes down no recordings",
                               f"模型 '{hosted.name}' 不做语音识别"), "model", "model_not_supported")  # fmt: skip
    rate = given.get("rate", str(RATE))
    if not (rate.isascii() and rate.isdigit() and len(rate) < 7 and RATES[0] <= int(rate) <= RATES[1]):
        raise ApiError(422, tr(f"rate is {rate[:20]!r}; it must be {RATES[0]} to {RATES[1]} samples a second",
                               f"rate 是 {rate[:20]!r}，应为每秒 {RATES[0]} 到 {RATES[1]} 个采样"),
                       "rate", "invalid_value")  # fmt: skip
    return hosted, int(rate)


async def refuse(socket: WebSocket, error: ApiError) -> None:
    """Say what is wrong, once, and close: as an HTTP answer before the connection stands, as a message after."""
    try:
        if socket.application_state == WebSocketState.CONNECTING:
            if "websocket.http.response" in socket.scope.get("extensions", {}):
                await socket.send_denial_response(error.answer())
            else:
                await socket.close()
        else:
            await socket.send_text(dumped({"type": "error", **error.body()}).decode())
            await socket.close(CLOSED.get(error.status, 1008))
    except (WebSocketDisconnect, RuntimeError):
        pass


class Stream:
    """One connection that stands."""

    def __init__(self, socket: WebSocket, hosted: Hosted, rate: int) -> None:
        self.socket, self.hosted, self.rate = socket, hosted, rate
        longest = min(UTTERANCE, float(getattr(hosted.task.options, "chunk", UTTERANCE)))
        self.listener = Listener(longest=int(longest * RATE))
        self.resampled = resampling(rate)
        self.odd = b""
        self.since = time.monotonic()
        self.guessed, self.rest, self.heard = self.since, 0.0, 0
        """When the last guess went out, how long to rest after it, and at which sample it was made."""

    async def run(self) -> None:
        """Until the sender ends or goes. ApiError where something cannot be; WebSocketDisconnect."""
        await self._say("ready", model=self.hosted.name, rate=self.rate)
        while (raw := await self._next()) is not None:
            await self._take(self.resampled(self._samples(raw), False))
        await self._take(self.resampled(np.zeros(0, np.int16), True))
        for one in self.listener.finish():
            await self._tell(one)
        await self._say("done", seconds=round(self.listener.read / RATE, 3))
        await self.socket.close()

    async def _next(self) -> bytes | None:
        """The next piece of sound; None at its end."""
        left = MOST - (time.monotonic() - self.since)
        try:
            async with asyncio.timeout(min(IDLE, left)):
                message = await self.socket.receive()
        except TimeoutError:
            raise ApiError(408, tr(f"nothing was heard for {IDLE:g} seconds, or the stream is older than {MOST:g}: "
                                   "connect again", f"{IDLE:g} 秒内没有收到数据，或连接已超过 {MOST:g} 秒：请重新连接"),
                           code="timeout") from None  # fmt: skip
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        raw, text = message.get("bytes"), message.get("text")
        if len(raw or text or "") > MESSAGE:
            raise ApiError(413, tr(f"a message has at most {MESSAGE:,} bytes", f"一条消息至多 {MESSAGE:,} 字节"),
                           code="message_too_large")
        if raw is not None:
            return raw
        if not _is_end(text):
            raise ApiError(422, tr('send sound as bytes, and the text {"type": "end"} at its end',
                                   '请以二进制发送声音，结束时发送文本 {"type": "end"}'), code="invalid_message")
        return None

    def _samples(self, raw: bytes) -> np.ndarray:
        """Bytes → (n,) int16; half a sample waits for its other half."""
        raw = self.odd + raw
        whole = len(raw) // 2 * 2
        self.odd = raw[whole:]
        return np.frombuffer(raw[:whole], "<i2").astype(np.int16)

    async def _take(self, samples: np.ndarray) -> None:
        for first in range(0, len(samples), RATE):
            await asyncio.sleep(0)  # others are served between two seconds, though the sender be faster
            for one in self.listener.push(samples[first : first + RATE]):
                await self._tell(one)
            await self._guess()
        if self.listener.read > MOST * RATE:
            raise ApiError(413, tr(f"a stream has at most {MOST:g} seconds: connect again",
                                   f"一路音频流至多 {MOST:g} 秒：请重新连接"), code="stream_too_long")

    async def _guess(self) -> None:
        current = self.listener.current
        if current is None or self.listener.read - self.heard < PARTIAL * RATE:
            return
        if time.monotonic() - self.guessed < self.rest:
            return
        begun, self.heard = time.monotonic(), self.listener.read
        await self._tell(current)
        self.guessed = time.monotonic()
        self.rest = max(PARTIAL, (self.guessed - begun) / SHARE)

    async def _tell(self, one: Heard) -> None:
        """Ask for the text of an utterance and send it: a guess by the fastest way of decoding."""
        uri, _ = to_uri(wav(one.samples))
        ask = {} if one.whole or "decoding" not in self.hosted.asks else {"decoding": "greedy"}
        answer = (await self.hosted.predict([{self.hosted.task.inputs()[0].name: uri}], ask))[0]
        end = one.start + len(one.samples)
        if one.whole and not answer["text"]:
            return
        await self._say("final" if one.whole else "partial", text=answer["text"], start=round(one.start / RATE, 3),
                        end=round(end / RATE, 3))

    async def _say(self, kind: str, **more: Any) -> None:
        await self.socket.send_text(dumped({"type": kind, **more}).decode())


def _is_end(text: str | None) -> bool:
    try:
        return json.loads(text or "") == {"type": "end"}
    except (ValueError, RecursionError):
        return False
