"""The gate in front of every route: names, keys, rates and sizes, checked before a byte is parsed.

Written against ASGI itself, because a body must be refused while it is still coming in.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from multihead.errors import SPEAKS, tr
from multihead.serve.metrics import Metrics
from multihead.serve.problems import ApiError, spoken
from multihead.serve.settings import ServeSettings

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/livez", "/readyz")
BODY_SECONDS = 30.0
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Refuses what must not come in, and counts what does.

    Args:
        under_way: told +1 when a request comes in and −1 when its answer has gone out.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, under_way: Callable[[int], None]
    ) -> None:
        self.app, self.settings, self.metrics, self.under_way = app, settings, metrics, under_way
        self.keys = [key.encode() for key in settings.open_with()]
        self.hosts = {h.lower() for h in settings.allowed_hosts} or (set(LOCAL) if settings.host in LOCAL else None)
        self.limiter: Any = None
        if settings.rate_limit:
            from limits import parse
            from limits.storage import MemoryStorage
            from limits.strategies import MovingWindowRateLimiter

            self.rate, self.limiter = parse(settings.rate_limit), MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        token = SPEAKS.set(spoken(headers.get("accept-language", "")))
        request_id, status, since = f"req_{uuid.uuid4().hex}", 500, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id
                for name, value in SECURITY.items():
                    out.setdefault(name, value)
            await send(message)

        self.under_way(1)
        try:
            try:
                self.check(scope, headers)
                receive = await self.body(headers, receive)
            except ApiError as error:
                await error.answer()(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except Exception:
            log.exception("%s %s %s", request_id, scope["method"], scope["path"])
            if status == 500:
                await self._failed(scope, receive, answer)
        finally:
            self.under_way(-1)
            self._count(scope, status, time.perf_counter() - since)
            SPEAKS.reset(token)

    async def socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As for requests, before a WebSocket stands. Its endpoint bounds what comes through it."""
        headers, since, status = Headers(scope=scope), time.perf_counter(), 101
        token = SPEAKS.set(spoken(headers.get("accept-language", "")))
        self.under_way(1)
        try:
            self.check(scope, headers)
            await self.app(scope, receive, send)
        except ApiError as error:
            status = error.status
            if "websocket.http.response" in scope.get("extensions", {}):
                await WebSocket(scope, receive, send).send_denial_response(error.answer())
            else:
                await send({"type": "websocket.close", "code": 1008})
        finally:
            self.under_way(-1)
            self._count({**scope, "method": "GET"}, status, time.perf_counter() - since)
            SPEAKS.reset(token)

    async def _failed(self, scope: Scope, receive: Receive, answer: Send) -> None:
        error = ApiError(500, tr("something went wrong in the server; its log says what",
                                  "服务器内部出错；详情见服务器日志"), code="internal_error")
        await error.answer()(scope, receive, answer)

    def _count(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, scope["method"], str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Host, rate, key.

        Raises:
            ApiError: 400, 401, 429.
        """
        host = headers.get("host", "").lower()
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(
                400,
                tr(f"this server is not called '{_name(host)}'; see serve.allowed_hosts",
                    f"本服务不叫 '{_name(host)}'；见 serve.allowed_hosts"),
                code="unknown_host",
            )
        path = scope["path"]
        if path in OPEN:
            return
        key = headers.get("authorization", "").removeprefix("Bearer ").strip().encode("latin-1") or _offered(headers)
        known = self.known(key)
        self._rate(scope, key if known else b"")
        if self.keys and not known:
            raise ApiError(
                401,
                tr("send a valid API key: Authorization: Bearer KEY",
                    "请提供有效的 API 密钥：Authorization: Bearer 密钥"),
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def known(self, key: bytes) -> bool:
        """Whether `key` is one of the server's; takes as long for a wrong key as for a right one."""
        return any([hmac.compare_digest(hashlib.sha256(key).digest(), hashlib.sha256(k).digest()) for k in self.keys])

    def _rate(self, scope: Scope, key: bytes) -> None:
        if self.limiter is None:
            return
        caller = hashlib.sha256(key).hexdigest() if key else (scope.get("client") or ("unknown",))[0]
        if not self.limiter.hit(self.rate, caller):
            wait = max(1, int(self.limiter.get_window_stats(self.rate, caller).reset_time - time.time()) + 1)
            raise ApiError(
                429,
                tr(f"more than {self.settings.rate_limit}; wait {wait} s",
                    f"超过 {self.settings.rate_limit}；请等待 {wait} 秒"),
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )

    async def body(self, headers: Headers, receive: Receive) -> Receive:
        """The whole body, read here and handed on as one message; refused at the first byte too many.

        Raises:
            ApiError: 400, 408, 413.
        """
        most = self.settings.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise self._too_long(most)
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise self._too_long(most)
        except TimeoutError:
            raise ApiError(408, tr("the body did not arrive in time", "请求体未能按时到达"), code="timeout",
                           headers={"Connection": "close"}) from None
        given: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def replay() -> Message:
            nonlocal given
            if given is not None:
                message, given = given, None
                return message
            return await receive()

        return replay

    def _too_long(self, most: int) -> ApiError:
        message = tr(f"the body is longer than {most} bytes", f"请求体超过 {most} 字节")
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _offered(headers: Headers) -> bytes:
    """The key that a browser sends with a WebSocket, where it may set no header but the list of protocols:
    ``new WebSocket(url, ["multihead", "key." + base64url(key)])``."""
    for name in headers.get("sec-websocket-protocol", "")[:4096].split(","):
        if name.strip().startswith("key."):
            try:
                return base64.urlsafe_b64decode(name.strip().removeprefix("key.") + "==")
            except ValueError:
                return b""
    return b""


def _name(host: str) -> str:
    """The name in a Host header, without the port and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if ":" in host else host
