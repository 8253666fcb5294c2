"""``/v1/images/generations`` in the form of the OpenAI API: pictures of what a prompt says."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from multihead.errors import tr
from multihead.generation.flow import MOST_GUIDANCE, MOST_PICTURES, MOST_STEPS, SEEDS, Method
from multihead.serve.hosted import Hosted
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.problems import ApiError, PlainJSON
from multihead.serve.wire import Body

router = APIRouter(route_class=StrictRoute)
PROMPT = 4000
"""Most characters of a prompt."""


class ImageBody(Body):
    """What is to be drawn, and how. Every limit is checked before anything is computed."""

    prompt: Annotated[str, Field(max_length=PROMPT)]
    """A label or a caption, as the model learned from; empty: whatever it likes."""
    model: str | None = None
    """May be left out where one model draws."""
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: Annotated[str, Field(max_length=20)] | None = None
    """"auto", or the size the model draws in."""
    response_format: Literal["b64_json"] | None = None
    """Pictures come with the answer; nothing is kept that an address could point to."""
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS - MOST_PICTURES)] | None = None
    """Not of the OpenAI API: the same seed gives the same picture; of several, those behind it."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """Not of the OpenAI API: steps from noise to picture."""
    guidance: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)] | None = None
    """Not of the OpenAI API: how strongly the prompt is followed."""
    method: Method | None = None
    """Not of the OpenAI API: how a step is taken."""


class Picture(BaseModel):
    """One picture: a PNG in base64."""

    b64_json: str


class ImageAnswer(BaseModel):
    """The pictures, and the seed of the first."""

    created: int
    data: list[Picture]
    output_format: Literal["png"]
    seed: int


@router.post("/v1/images/generations", responses={**ERRORS, 200: {"model": ImageAnswer}})
async def images(body: ImageBody, request: Request) -> Response:
    """Pictures of what a prompt says."""
    hosted = pick(request, body.model, lambda h: h.task.draws)
    if not hosted.task.draws:
        raise ApiError(404, tr(f"the model '{hosted.name}' draws no pictures; ask it at /v1/predict",
                               f"模型 '{hosted.name}' 不生成图片；请使用 /v1/predict"), "model", "model_not_supported")
    check_size(hosted, body.size)
    ask: dict[str, Any] = {"n": body.n or 1, "seed": secrets.randbelow(1 << 31) if body.seed is None else body.seed}
    ask |= {name: value for name in ("steps", "guidance", "method") if (value := getattr(body, name)) is not None}
    [answer] = await unless_gone(request, hosted.predict([prompted(hosted, body.prompt)], ask))
    data = [{"b64_json": picture.partition(",")[2]} for picture in answer["pictures"]]
    return PlainJSON({"created": int(time.time()), "data": data, "output_format": "png", "seed": answer["seed"]})


def prompted(hosted: Hosted, prompt: str) -> Any:
    """The prompt as a row; a blank one asks for nothing."""
    return prompt if prompt.strip() else {}


def check_size(hosted: Hosted, size: str | None) -> None:
    """ApiError where the model does not draw in that size."""
    side = hosted.task.codec.size  # type: ignore[attr-defined]
    if size not in (None, "auto", f"{side}x{side}"):
        raise ApiError(422, tr(f"size: the model '{hosted.name}' draws {side}x{side} (or \"auto\"), not '{size}'",
                               f"size：模型 '{hosted.name}' 生成 {side}x{side} 的图片（或 \"auto\"），而不是 '{size}'"),
                       "size", "invalid_value")  # fmt: skip
