"""Step 5, serve: several models behind one address.

``create_app`` makes the application, ``run`` listens until it is told to stop: then it takes no new work, lets what is
under way end, and returns.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from multihead import __version__
from multihead.errors import UserError, tr
from multihead.serve import embeddings, images, openai, predict, recommend, speech, streams, transcriptions
from multihead.serve.guard import LOCAL, Guard
from multihead.serve.hosted import Hosted, Served
from multihead.serve.intake import ERRORS, BadBody, of_validation, pick
from multihead.serve.metrics import Metrics
from multihead.serve.problems import ApiError, PlainJSON
from multihead.serve.settings import ServeSettings
from multihead.serve.wire import ChatBody, CompletionBody, EmbeddingBody

__all__ = ["ServeSettings", "Served", "create_app", "run"]
PAGE = Path(__file__).with_name("page.html")


class State:
    """Where the server stands, and how many requests it is answering."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.ready = False
        self.draining = False
        self.under_way = 0

    def count(self, by: int) -> None:
        """A request more, or one less."""
        self.under_way += by
        self.metrics.under_way.set(self.under_way)


def create_app(served: Sequence[Served], settings: ServeSettings | None = None) -> FastAPI:
    """The application that answers for all of `served`.

    Raises:
        UserError: two models of one name, or none at all.
    """
    settings = settings or ServeSettings()
    names = [one.name for one in served]
    if not names or len(set(names)) < len(names):
        raise UserError(tr(f"served models need names of their own, and there must be one at least: {names}",
                           f"至少要有一个模型，且名称不可重复：{names}"))
    metrics = Metrics()
    state = State(metrics)
    models = {one.name: Hosted(one, one.settings or settings, metrics) for one in served}

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        for hosted in models.values():
            hosted.start()
        state.ready, state.draining = True, False
        yield
        state.draining, state.ready = True, False
        await drain(app)

    app = FastAPI(title="multihead", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.models, app.state.settings, app.state.server, app.state.metrics = models, settings, state, metrics
    state.ready = True
    app.include_router(openai.router)
    app.include_router(embeddings.router)
    app.include_router(images.router)
    if any(transcriptions.hears(hosted) for hosted in models.values()):
        app.include_router(transcriptions.router)
        app.include_router(streams.router)
    if any(hosted.task.speaks for hosted in models.values()):
        app.include_router(speech.router)
    app.include_router(predict.router(models, settings))
    app.include_router(recommend.router(models, settings))
    _add_plain_routes(app, models, state)
    _add_handlers(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics, under_way=state.count)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


async def drain(app: FastAPI, seconds: float = 0.0) -> bool:
    """Stop every model's thread after at most `seconds`; True where nothing was cut off."""
    ended = await asyncio.gather(*(asyncio.to_thread(h.drain, seconds) for h in app.state.models.values()))
    return all(ended)


def _add_plain_routes(app: FastAPI, models: dict[str, Hosted], state: State) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> Response:
        """Every served model."""
        return PlainJSON({"object": "list", "data": [hosted.card() for hosted in models.values()]})

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(name: str, request: Request) -> Response:
        """One served model."""
        return PlainJSON(pick(request, name).card())

    @app.get("/livez", response_class=PlainTextResponse)
    async def live() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Loading or stopping"}})
    async def ready() -> Response:
        """New requests are welcome."""
        if state.draining or not state.ready:
            return PlainTextResponse("draining" if state.draining else "loading", 503, {"Retry-After": "1"})
        return PlainTextResponse("ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' exposition format."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_handlers(app: FastAPI) -> None:
    fields = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *EmbeddingBody.model_fields,
                     *images.ImageBody.model_fields, *recommend.FIELDS})

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.answer()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error, fields).answer()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error, BadBody):
            return error.error.answer()
        words = {
            404: tr(f"there is nothing at {request.url.path}", f"{request.url.path} 处没有内容"),
            405: tr(f"{request.method} is not possible here", f"这里不能使用 {request.method}"),
        }
        message = words.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).answer()


def _page() -> tuple[str, str]:
    """The page, and the policy that lets the browser run what stands in it and nothing else."""
    text = PAGE.read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in found)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


# -- listening ---------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A server that goes on listening while it drains, so that ``/readyz`` can say so."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.app, self.told = app, started
        self._stopping: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.told()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one cuts off. Neither is raised again: a drained server ends well."""
        state: State = self.app.state.server
        seconds = 0.0 if state.draining else self.app.state.settings.drain_seconds
        state.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._drain, seconds)

    def _drain(self, seconds: float) -> None:
        self._stopping.append(asyncio.ensure_future(self._finish(seconds)))

    async def _finish(self, seconds: float) -> None:
        state = self.app.state.server
        await drain(self.app, seconds)
        deadline = asyncio.get_running_loop().time() + 2
        while state.under_way and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket that says TCP does asyncio turn off Nagle's delay, which holds an answer's end back for 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise UserError(tr(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with serve.host and serve.port "
            "(port 0 takes any free one)",
            f"无法监听 {host}:{port}：{error.strerror}；请用 serve.host 与 serve.port 另选（端口 0 表示任选空闲端口）",
        )) from None
    return found


def run(
    app: FastAPI,
    host: str | None = None,
    port: int | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Listen until SIGTERM or SIGINT, drain, return.

    Args:
        host, port: None for the settings'.
        started: called once with the address, ``http://127.0.0.1:8000``; by default it is printed.

    Raises:
        UserError: the address cannot be had.
    """
    settings: ServeSettings = app.state.settings
    host = settings.host if host is None else host
    found = listen(host, settings.port if port is None else port)
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{found.getsockname()[1]}"
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5,
        timeout_keep_alive=30, ws_max_size=streams.MESSAGE, ws_per_message_deflate=False,
    )
    server = _Server(config, app, lambda: (started or (lambda a: announce(app, a, host)))(address))
    gc.collect()
    gc.freeze()  # what was loaded stays: looking through a catalogue of 100,000 titles for waste stops all for 0.1 s
    with found:
        server.run(sockets=[found])


def announce(app: FastAPI, address: str, host: str) -> None:
    """Print where the server is, and what a person should know."""
    names = ", ".join(app.state.models)
    print(tr(f"serving {names} at {address} (Ctrl-C stops)", f"正在提供 {names}：{address}（Ctrl-C 停止）"), flush=True)
    if host not in LOCAL and not app.state.settings.open_with():
        print(tr("anyone who reaches this machine may use it; set serve.api_keys or MULTIHEAD_API_KEYS to change that",
                 "任何能访问这台机器的人都可以使用；设置 serve.api_keys 或 MULTIHEAD_API_KEYS 可加以限制"), flush=True)


