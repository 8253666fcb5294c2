"""``/v1/audio/transcriptions`` in the form of the OpenAI API: a recording as a file of a form, its text as JSON, plain
text or subtitles (SRT, WebVTT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from multihead.data import audio
from multihead.errors import nearest, tr
from multihead.serve.hosted import Hosted
from multihead.serve.intake import ERRORS, pick, unless_gone
from multihead.serve.problems import ApiError, PlainJSON

router = APIRouter()
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "timestamp_granularities[]",
          "timestamp_granularities", "stream")
PAUSE, LINE, LONG = 0.8, 42, 7.0
"""A subtitle ends at a pause of so many seconds, after so many characters, or when it has stood so long."""
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {
            "type": "object",
            "required": ["file"],
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "model": {"type": "string"},
                "response_format": {"type": "string", "enum": list(FORMATS)},
                "language": {"type": "string"},
                "prompt": {"type": "string"},
                "temperature": {"type": "number"},
            },
        }}},
    }
}  # fmt: skip


class Transcript(BaseModel):
    """The answer in the format ``json``."""

    text: str
    usage: dict[str, Any]


def hears(hosted: Hosted) -> bool:
    """Whether a model writes down recordings."""
    return [c.kind for c in hosted.task.inputs()] == ["audio"] and any(c.kind == "text" for c in hosted.task.columns)


@router.post("/v1/audio/transcriptions", responses={**ERRORS, 200: {"model": Transcript}}, openapi_extra=BODY)
async def transcribe(request: Request) -> Response:
    """A recording's text."""
    own(request.headers, request.app.state.settings.cors_origins)
    form = await _form(request)
    try:
        name, kind = _word(form, "model"), _word(form, "response_format") or "json"
        if kind not in FORMATS:
            raise ApiError(422, tr(f"response_format is {kind!r}; there are: {', '.join(FORMATS)}",
                                   f"response_format 是 {kind!r}；可选：{'、'.join(FORMATS)}"),
                           "response_format", "invalid_value")  # fmt: skip
        hosted = pick(request, name, hears)
        if not hears(hosted):
            raise ApiError(404, tr(f"the model '{hosted.name}' writes down no recordings",
                                   f"模型 '{hosted.name}' 不做语音识别"), "model", "model_not_supported")  # fmt: skip
        uri = await _recording(form)
    finally:
        await form.close()
    ask = {"timestamps": True} if kind in ("srt", "vtt", "verbose_json") else {}
    answer = (await unless_gone(request, hosted.predict([{hosted.task.inputs()[0].name: uri}], ask)))[0]
    return written(answer, kind)


def own(headers: Headers, friends: Sequence[str]) -> None:
    """403 where a page of another origin sends the form: browsers let it without asking first."""
    origin = headers.get("origin")
    if not origin or "*" in friends or origin in friends:
        return
    if origin.partition("://")[2].lower() != headers.get("host", "").lower():
        raise ApiError(403, tr(f"pages of {origin} may not call this server; see serve.cors_origins",
                               f"{origin} 的网页不能调用本服务；见 serve.cors_origins"), code="foreign_origin")


async def _form(request: Request) -> FormData:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, tr("send the recording as multipart/form-data, in the field 'file'",
                               "请用 multipart/form-data 发送录音，字段名为 'file'"), code="unsupported_media_type")
    try:
        form = await request.form(max_files=1, max_fields=len(FIELDS) + 4)
    except HTTPException as error:
        raise ApiError(422, tr(f"the form cannot be read: {error.detail}", f"表单无法读取：{error.detail}"),
                       code="invalid_form") from None
    unknown = next((name for name in form if name not in FIELDS), None)
    if unknown is not None:
        raise ApiError(422, tr(f"unknown field '{unknown}'{nearest(unknown, FIELDS)}",
                               f"没有字段 '{unknown}'{nearest(unknown, FIELDS)}"), unknown, "invalid_value")
    if _word(form, "stream") in ("true", "True", "1"):
        raise ApiError(422, tr("transcripts are not streamed; leave 'stream' out",
                               "转写不支持 stream；请去掉"), "stream", "unsupported_parameter")  # fmt: skip
    return form


def _word(form: FormData, name: str) -> str | None:
    found = form.get(name)
    if isinstance(found, UploadFile):
        raise ApiError(422, tr(f"'{name}' is a text and no file",
                               f"'{name}' 应是文本而不是文件"), name, "invalid_value")  # fmt: skip
    return found or None


async def _recording(form: FormData) -> str:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(422, tr("the recording is missing: a file in the field 'file'",
                               "缺少录音：请放在字段 'file' 中"), "file", "missing")  # fmt: skip
    uri, fault = audio.to_uri(await file.read())
    if fault:
        raise ApiError(422, fault, "file", "invalid_file")
    return uri


# -- answers -----------------------------------------------------------------------------------------------------------


def written(answer: dict[str, Any], kind: str) -> Response:
    """An answer of the task in one of `FORMATS`."""
    text, words = answer["text"], answer.get("words", [])
    if kind == "text":
        return PlainTextResponse(text + "\n")
    if kind in ("srt", "vtt"):
        return PlainTextResponse(subtitles(segments(words), kind), media_type="text/vtt" if kind == "vtt" else None)
    usage = {"type": "duration", "seconds": answer["seconds"]}
    if kind == "json":
        return PlainJSON({"text": text, "usage": usage})
    parts = [{"id": i, "start": s["start"], "end": s["end"], "text": s["text"]} for i, s in enumerate(segments(words))]
    return PlainJSON({"task": "transcribe", "duration": answer["seconds"], "text": text, "segments": parts,
                      "words": words, "usage": usage})


def segments(words: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Words with times as lines with times."""
    found: list[dict[str, Any]] = []
    for word in words:
        last = found[-1] if found else None
        joined = word["word"] if last is None else _joined(last["text"], word["word"])
        if last is None or word["start"] - last["end"] > PAUSE or len(joined) > LINE or (
            word["end"] - last["start"] > LONG
        ):
            found.append({"start": word["start"], "end": word["end"], "text": word["word"]})
        else:
            last |= {"end": word["end"], "text": joined}
    return found


def _joined(text: str, word: str) -> str:
    """Chinese characters and kana stand without blanks."""
    return text + ("" if ord(text[-1]) > 0x2E7F and ord(word[0]) > 0x2E7F else " ") + word


def subtitles(parts: Sequence[dict[str, Any]], kind: str) -> str:
    """SRT or WebVTT."""
    point = "," if kind == "srt" else "."
    lines = [] if kind == "srt" else ["WEBVTT", ""]
    for i, part in enumerate(parts, 1):
        lines += [str(i)] if kind == "srt" else []
        lines += [f"{_clock(part['start'], point)} --> {_clock(part['end'], point)}", part["text"], ""]
    return "\n".join(lines) + "\n"


def _clock(seconds: float, point: str) -> str:
    whole = round(seconds * 1000)
    return f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:{whole // 1000 % 60:02}{point}{whole % 1000:03}"
