"""``/v1/audio/speech`` in the form of the OpenAI API: a text read aloud, as a WAV, FLAC, MP3 or Opus file."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from multihead.codec.voice import KINDS, Format, encoded
from multihead.errors import UserError, tr
from multihead.serve.hosted import Hosted
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.problems import ApiError, of_user_error
from multihead.serve.wire import Body

router = APIRouter(route_class=StrictRoute)
INPUT = 4096
"""Most characters of a text, as in the OpenAI API; a model may take fewer."""
FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS.values()}}
}


class SpeechBody(Body):
    """What is to be read aloud, and how. Every limit is checked before anything is computed."""

    input: Annotated[str, Field(min_length=1, max_length=INPUT)]
    model: str | None = None
    """May be left out where one model speaks."""
    voice: Annotated[str, Field(max_length=200)] | None = None
    """One of the model's voices; a model of one voice has that whatever is asked."""
    response_format: Format | None = None
    """mp3 unless asked otherwise, as in the OpenAI API."""
    speed: Annotated[float, Field(ge=0.25, le=4)] | None = None
    instructions: Annotated[str, Field(max_length=0)] | None = None
    stream_format: Literal["audio"] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    """Not of the OpenAI API: the same seed gives the same recording."""
    steps: Annotated[int, Field(ge=1, le=100)] | None = None
    """Not of the OpenAI API: steps from noise to speech."""


@router.post("/v1/audio/speech", responses={**ERRORS, **FILE}, response_class=Response)
async def speech(body: SpeechBody, request: Request) -> Response:
    """A text read aloud."""
    hosted = pick(request, body.model, lambda h: h.task.speaks)
    if not hosted.task.speaks:
        raise ApiError(404, tr(f"the model '{hosted.name}' does not speak; ask it at /v1/predict",
                               f"模型 '{hosted.name}' 不做语音合成；请使用 /v1/predict"),
                       "model", "model_not_supported")  # fmt: skip
    row = {"text": body.input} | voiced(hosted, body.voice)
    ask = {name: value for name in ("speed", "seed", "steps") if (value := getattr(body, name)) is not None}
    [answer] = await unless_gone(request, hosted.predict([row], ask))
    form: Format = body.response_format or "mp3"
    try:
        file = await asyncio.to_thread(filed, answer["audio"], form)
    except UserError as error:
        raise of_user_error(error, param="response_format", code="invalid_value") from None
    return Response(file, media_type=KINDS[form])


def voiced(hosted: Hosted, voice: str | None) -> dict[str, str]:
    """The voice as a column. ApiError where the model has several and this is none of them."""
    names = list(hosted.task.voices)
    if voice is None or len(names) < 2:
        return {}
    if voice not in names:
        shown = ", ".join(names[:20])
        raise ApiError(422, tr(f"voice: the model '{hosted.name}' has no voice '{voice[:60]}'; it has: {shown}",
                               f"voice：模型 '{hosted.name}' 没有声音 '{voice[:60]}'；现有：{shown}"),
                       "voice", "invalid_value")  # fmt: skip
    return {"speaker": voice}


def filed(uri: str, form: Format) -> bytes:
    """A WAV data URI of the task → the bytes of a file."""
    raw = base64.b64decode(uri.partition(",")[2])
    if form == "wav":
        return raw
    with wave.open(io.BytesIO(raw)) as file:
        return encoded(np.frombuffer(file.readframes(file.getnframes()), "<i2"), form, file.getframerate())
