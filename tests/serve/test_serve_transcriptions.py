"""Recordings sent as OpenAI's client sends them, and as nobody should."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import serve_models as models
from fastapi.testclient import TestClient

from multihead.codec.audio import wav
from multihead.serve.app import ServeSettings, create_app
from multihead.serve.transcriptions import segments, subtitles

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client():
    settings = ServeSettings(max_body_bytes=1 << 20, cors_origins=["http://friend"])
    app = create_app([models.ears(decoder_layers=1, chunk=2)], settings)
    with TestClient(app, base_url="http://127.0.0.1") as found:
        yield found


@pytest.fixture(scope="module")
def speech() -> bytes:
    time = np.arange(24000) / 16000  # tones that change, so that an untrained model writes more than one letter
    return wav((8000 * np.sin(2 * np.pi * (200 + 3000 * (time * 5 % 1).round()) * time)).astype(np.int16))


def test_openai_client(client, speech):
    caller = openai.OpenAI(api_key="x", base_url="http://127.0.0.1/v1", http_client=client, max_retries=0)
    found = caller.audio.transcriptions.create(model="ears", file=("a.wav", speech))
    told = client.post("/v1/predict", json={"input": {"audio": _uri(speech)}}).json()["answers"][0]
    assert found.text == told["text"] and len(found.text) > 1
    make = caller.audio.transcriptions.create
    assert make(model="ears", file=io.BytesIO(speech), response_format="text") == found.text + "\n"
    assert make(model="ears", file=speech, response_format="vtt").startswith("WEBVTT\n\n00:00:0")
    srt = make(model="ears", file=speech, response_format="srt", language="en", prompt="x", temperature=0)
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n\S", srt)
    whole = make(model="ears", file=speech, response_format="verbose_json", timestamp_granularities=["word"])
    assert whole.duration == 1.5 and "".join(w.word for w in whole.words) == whole.text.replace(" ", "")
    times = [t for w in whole.words for t in (w.start, w.end)]
    assert times == sorted(times) and times[-1] <= 1.52


def _uri(raw: bytes) -> str:
    from multihead.data.audio import to_uri

    return to_uri(raw)[0]


@pytest.mark.parametrize(("files", "data", "status", "said"), [
    ({}, {"model": "ears", "x": "y"}, 422, "unknown field 'x'"),
    ({"file": ("a.wav", b"not a sound")}, {}, 422, "no recording"),
    ({"file": ("a.wav", b"")}, {}, 422, "empty"),
    ({"file": ("a.png", b"\x89PNG\r\n\x1a\n" + b"0" * 40)}, {}, 422, "picture"),
    ({"file": ("a.wav", wav(np.zeros(1, np.int16)))}, {}, 422, "1 samples"),
    ({"file": ("a.wav", wav(np.zeros(9000, np.int16)))}, {"response_format": "xml"}, 422, "response_format"),
    ({"file": ("a.wav", wav(np.zeros(9000, np.int16)))}, {"model": "nobody"}, 404, "nobody"),
    ({"file": ("a.wav", wav(np.zeros(900_000, np.int16)))}, {}, 413, "longer"),
])  # fmt: skip
def test_what_is_wrong_is_said(client, files, data, status, said):
    files = files or {"file": ("a.wav", b"RIFF")}
    reply = client.post("/v1/audio/transcriptions", files=files, data=data)
    assert reply.status_code == status and said in reply.json()["error"]["message"], reply.text


def test_only_forms_and_only_of_friends(client, speech):
    assert client.post("/v1/audio/transcriptions", json={}).status_code == 415
    for origin, status in (("http://evil.example", 403), ("http://friend", 200), ("http://127.0.0.1", 200)):
        reply = client.post("/v1/audio/transcriptions", files={"file": speech}, headers={"Origin": origin})
        assert reply.status_code == status, origin


def test_lines_break_at_pauses():
    word = [{"word": w, "start": s, "end": s + 0.3} for w, s in (("你", 0), ("好", 0.4), ("yes", 1.0), ("no", 3661.5))]
    assert [s["text"] for s in segments(word)] == ["你好 yes", "no"]
    assert subtitles(segments(word)[1:], "srt") == "1\n01:01:01,500 --> 01:01:01,800\nno\n\n"
