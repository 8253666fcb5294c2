"""``/v1/predict``: rows in, answers out, for every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from starlette.responses import Response

from multihead.data.rows import Column
from multihead.errors import tr
from multihead.serve.hosted import Hosted
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.problems import ApiError, PlainJSON
from multihead.serve.settings import ServeSettings
from multihead.serve.wire import Body, StopText
from multihead.task import Task

OPTIONS: dict[str, Any] = {
    "max_tokens": Annotated[int, Field(ge=1)] | None,
    "temperature": Annotated[float, Field(ge=0, le=10)] | None,
    "top_k": Annotated[int, Field(ge=0)] | None,
    "top_p": Annotated[float, Field(gt=0, le=1)] | None,
    "repetition_penalty": Annotated[float, Field(gt=0, le=10)] | None,
    "stop": StopText | Annotated[list[StopText], Field(max_length=16)] | None,
    "seed": int | None,
}


class PredictAnswer(BaseModel):
    """One answer a row, in the order of the rows."""

    model_config = ConfigDict(extra="forbid")
    model: str
    answers: list[Any]


def kinds_of(column: Column, blank: bool = False) -> dict[str, Any]:
    """The JSON schema of a column's values, as `hosted.value_fault` checks them."""
    kinds: dict[str, dict[str, Any]] = {
        "text": {"type": "string"} if blank else {"type": "string", "pattern": r"\S"},
        "number": {"type": "number"},
        "labels": {"type": "array", "items": {"type": "string"}},
        "ids": {"type": "array", "items": {"type": ["string", "integer"]}},
        "any": {},
    }
    return kinds.get(column.kind, {"type": ["string", "integer"]})


def shape(hosted: Hosted) -> dict[str, Any]:
    """The JSON schema of a model's row, for the description of the API; ``Hosted.rows`` is what checks."""
    if type(hosted.task).request is not Task.request:
        return {"type": "object"}
    columns = hosted.task.inputs()
    return {
        "type": "object",
        "properties": {c.name: kinds_of(c, blank=hosted.engine is not None) for c in columns},
        "required": [c.name for c in columns if c.required],
        "additionalProperties": False,
    }


def router(models: Mapping[str, Hosted], settings: ServeSettings) -> APIRouter:
    """The route, with the options of the models that are served."""
    names = {name: OPTIONS.get(name, Any) for hosted in models.values() for name in hosted.asks}
    options: dict[str, Any] = {name: (kind | None if kind is not Any else Any, None) for name, kind in names.items()}
    row = Annotated[dict[str, Any], WithJsonSchema({"anyOf": [shape(hosted) for hosted in models.values()]})]
    item = str | row
    body_model = create_model(
        "PredictBody",
        __base__=Body,
        __doc__="Rows and options.",
        model=(str | None, None),
        input=(item | Annotated[list[item], Field(min_length=1, max_length=settings.max_rows)], ...),
        **options,
    )

    async def predict(body: Any, request: Request) -> Response:
        """Answer one row or several: a text, or an object with the task's columns."""
        hosted = pick(request, body.model)
        ask = {name: value for name in options if (value := getattr(body, name)) is not None}
        for name in ask:
            if name not in hosted.asks:
                raise ApiError(422, tr(f"the model '{hosted.name}' has no option '{name}'",
                                        f"模型 '{hosted.name}' 没有选项 '{name}'"), name, "unsupported_parameter")
        items = body.input if isinstance(body.input, list) else [body.input]
        if len(items) > hosted.settings.max_rows:
            most = hosted.settings.max_rows
            message = tr(f"{len(items)} rows are more than the {most} this model takes",
                          f"{len(items)} 行超过这个模型的上限 {most}")
            raise ApiError(422, message, "input", "too_many_rows")
        answers = await unless_gone(request, hosted.predict(items, ask))
        return PlainJSON({"model": hosted.name, "answers": answers})

    # The body's model is known only here, where the options of the served models are.
    predict.__annotations__["body"] = body_model
    found = APIRouter(route_class=StrictRoute)
    found.post("/v1/predict", responses={**ERRORS, 200: {"model": PredictAnswer}})(predict)
    return found
