"""From a request's bytes to a checked body and the model it asks for."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from multihead.errors import nearest, tr
from multihead.serve.hosted import Hosted
from multihead.serve.problems import ApiError, ErrorAnswer
from multihead.serve.wire import UNSUPPORTED

T = TypeVar("T")
STATUSES = {
    400: "The request is not HTTP that this server understands",
    401: "No API key, or an unknown one",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "Body or prompt too long",
    415: "The body is not application/json",
    422: "The body's fields are not right",
    429: "Too many requests",
    500: "The model failed",
    503: "Busy or stopping",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in STATUSES.items()
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadBody(HTTPException):
    """A body that is no JSON; an `HTTPException`, because FastAPI lets no other pass while it reads a body."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(text)
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(text)


def read_json(raw: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no infinity, no half characters, not nested beyond reason.

    Raises:
        ApiError: 422.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_float=_number, parse_int=_integer, parse_constant=_constant)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        fault = tr("half of a surrogate pair in a text", "文本中有不成对的代理字符")
    except UnicodeDecodeError:
        fault = tr("the body is not UTF-8", "请求体不是 UTF-8")
    except RecursionError:
        fault = tr("the body is nested too deeply", "请求体嵌套过深")
    except json.JSONDecodeError as error:
        fault = tr(f"the body is not JSON (at character {error.pos})", f"请求体不是 JSON（第 {error.pos} 个字符处）")
    except ValueError:
        fault = tr("a number in the body is no JSON number, or too large", "请求体中有非 JSON 的数或过大的数")
    raise ApiError(422, fault, code="invalid_json")


class StrictRequest(Request):
    """A request whose JSON is strict."""

    async def json(self) -> Any:
        try:
            return read_json(await self.body())
        except ApiError as error:
            raise BadBody(error) from None


class StrictRoute(APIRoute):
    """A route that reads strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            # A page of another origin can send any other kind without asking first.
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                message = tr("send Content-Type: application/json", "请使用 Content-Type: application/json")
                raise ApiError(415, message, code="unsupported_media_type")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def pick(request: HTTPConnection, name: str | None, suits: Callable[[Hosted], bool] = lambda h: True) -> Hosted:
    """The model called `name`; without a name, the only one that suits.

    Raises:
        ApiError: 404 or 422.
    """
    models: Mapping[str, Hosted] = request.app.state.models
    if name is not None:
        if name in models:
            return models[name]
        known = ", ".join(models)
        raise ApiError(
            404,
            tr(f"there is no model '{name}'; there are: {known}", f"没有模型 '{name}'；现有：{known}"),
            "model",
            "model_not_found",
        )
    suitable = [hosted for hosted in models.values() if suits(hosted)]
    if len(suitable) == 1:
        return suitable[0]
    known = ", ".join(hosted.name for hosted in suitable or models.values())
    raise ApiError(422, tr(f"say which model: {known}", f"请指明模型：{known}"), "model", "model_missing")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def of_validation(error: RequestValidationError, fields: Sequence[str]) -> ApiError:
    """Faulty fields as one error: every field named once, in plain words."""
    faults: dict[str, str] = {}
    for fault in error.errors():
        where, words = _path(fault["loc"]), _words(fault, fields)
        if faults.setdefault(where, words) != words and fault["type"] != "extra_forbidden":
            # One field, several shapes it might have had: the first is as good as any.
            continue
    shown = [f"{where}: {words}" if where else words for where, words in list(faults.items())[:20]]
    first = next(iter(faults), "") or None
    code = "unsupported_parameter" if first and first.split("[")[0].split(".")[-1] in UNSUPPORTED else "invalid_value"
    return ApiError(422, "; ".join(shown), first, code)


def _path(loc: Sequence[Any]) -> str:
    """``("body", "messages", 0, "content", "str")`` → ``messages[0].content``: the places, without pydantic's types."""
    path = ""
    for i, part in enumerate(loc[1:]):
        if isinstance(part, int):
            path += f"[{part}]"
        elif i == 0 or (part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool")):
            path += f".{part}" if path else part
    return path


WORDS: dict[str, tuple[str, str]] = {
    "missing": ("is missing", "缺少这个字段"),
    "string_type": ("must be a text", "应是文本"),
    "int_type": ("must be a whole number", "应是整数"),
    "float_type": ("must be a number", "应是数字"),
    "bool_type": ("must be true or false", "应是 true 或 false"),
    "list_type": ("must be a list", "应是列表"),
    "dict_type": ("must be an object", "应是对象"),
    "model_attributes_type": ("must be an object", "应是对象"),
    "model_type": ("must be an object", "应是对象"),
    "none_required": ("must be null", "应是 null"),
}


def _words(fault: Mapping[str, Any], fields: Sequence[str]) -> str:
    name = next((part for part in reversed(fault["loc"]) if isinstance(part, str) and part in UNSUPPORTED), None)
    if name is not None:
        return tr("is not supported by this server; leave it out", "本服务不支持这个参数；请去掉")
    kind = fault["type"]
    if kind == "extra_forbidden":
        hint = nearest(str(fault["loc"][-1]), fields)
        return tr(f"unknown field{hint}", f"没有这个字段{hint}")
    if len(fault["loc"]) == 1 and kind in ("missing", "model_attributes_type", "dict_type"):
        return tr("the body must be a JSON object", "请求体应是 JSON 对象")
    if kind in WORDS:
        return tr(*WORDS[kind])
    context = fault.get("ctx", {})
    limits = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bound = next((f"{sign} {context[key]}" for key, sign in limits.items() if key in context), None)
    if bound is not None:
        return tr(f"must be {bound}", f"应 {bound}")
    if "expected" in context:
        return tr(f"must be {context['expected']}", f"应是 {context['expected']}")
    return str(fault["msg"])
