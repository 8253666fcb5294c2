"""What is refused and why: errors in the form of the OpenAI API, in the caller's language, never with a traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from multihead.errors import UserError

RETRY_SECONDS = 1

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ErrorDetail(BaseModel):
    """The inside of an error answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: the HTTP status.
        param: the field at fault, ``input[3].text``.
        code: a name that programs can compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_SECONDS))

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def answer(self) -> JSONResponse:
        """The whole response."""
        return PlainJSON(self.body(), self.status, self.headers)


def spoken(accept: str) -> str:
    """The first of Chinese and English that an ``Accept-Language`` header names; empty where it names neither."""
    for part in accept.split(","):
        name = part.split(";")[0].strip().lower()
        if name.startswith("zh"):
            return "zh"
        if name.startswith("en"):
            return "en"
    return ""


def of_user_error(error: UserError, status: int = 422, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the package as an answer."""
    return ApiError(status, "; ".join(str(problem) for problem in error.problems), param, code)


def sound(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): sound(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [sound(inner) for inner in value]
    return value


def dumped(value: Any) -> bytes:
    """Compact JSON of anything a task may answer: numbers that are none become null, broken characters ``?``."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(sound(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


class PlainJSON(JSONResponse):
    """A response of ``dumped`` JSON."""

    def render(self, content: Any) -> bytes:
        return dumped(content)
