"""Speech as it is spoken: a stream has the texts of its utterances sent as files; what must not come in does not."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import serve_models as models
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from multihead.codec.activity import Listener
from multihead.codec.audio import resampling, wav
from multihead.data.audio import to_uri
from multihead.serve import streams
from multihead.serve.app import ServeSettings, create_app

PATH = "ws://127.0.0.1/v1/audio/stream"


def app_of(**settings):
    return create_app([models.ears(decoder_layers=0, chunk=3)], ServeSettings(**settings))


@pytest.fixture(scope="module")
def client():
    with TestClient(app_of(cors_origins=["http://friend"]), base_url="http://127.0.0.1") as found:
        yield found


def speech(rate: int = 16000) -> np.ndarray:
    """Two utterances of changing tones, 1.2 and 0.8 s, with silence around."""
    time = np.arange(int(1.2 * rate)) / rate
    said = (8000 * np.sin(2 * np.pi * (200 + 2000 * (time * 5 % 1).round()) * time)).astype(np.int16)
    hush = np.random.default_rng(0).normal(0, 5, rate).astype(np.int16)
    return np.concatenate((hush, said, hush, said[: int(0.8 * rate)], hush[: rate // 2]))


def told(client: TestClient, sound: np.ndarray, size: int, query: str = "") -> list[dict]:
    raw = sound.astype("<i2").tobytes()
    with client.websocket_connect(PATH + query) as socket:
        found = [socket.receive_json()]
        for at in range(0, len(raw), size):
            socket.send_bytes(raw[at : at + size])
        socket.send_text('{"type": "end"}')
        while found[-1]["type"] != "done":
            found.append(socket.receive_json())
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1000
    return found


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_texts_are_those_of_the_utterances_alone(client, rate):
    sound = speech(rate)
    found = told(client, sound, 4001, f"?model=ears&rate={rate}")  # odd: samples are cut in half
    assert found[0] == {"type": "ready", "model": "ears", "rate": rate}
    listener, turned = Listener(longest=48000), resampling(rate)
    at16 = np.concatenate((turned(sound, False), turned(np.zeros(0, np.int16), True)))
    parts = [*listener.push(at16), *listener.finish()]
    assert len(parts) == 2
    finals = [one for one in found if one["type"] == "final"]
    for final, part in zip(finals, parts, strict=True):
        reply = client.post("/v1/predict", json={"input": {"audio": to_uri(wav(part.samples))[0]}}).json()
        assert final["text"] == reply["answers"][0]["text"] and len(final["text"]) > 1
        assert final["start"] == pytest.approx(part.start / 16000, abs=1e-3)
    assert found[-1]["seconds"] == pytest.approx(4.5, abs=0.01)


def test_guesses_come_while_somebody_speaks(client, monkeypatch):
    monkeypatch.setattr(streams, "PARTIAL", 0.2)
    monkeypatch.setattr(streams, "SHARE", 1e9)
    kinds = [one["type"] for one in told(client, speech(), 3200)]
    assert kinds[0] == "ready" and kinds[-1] == "done" and kinds.count("final") == 2
    assert "partial" in kinds[: kinds.index("final")]


def test_a_voice_without_a_pause_is_cut_and_silence_says_nothing(client):
    time = np.arange(10 * 16000) / 16000
    tones = 8000 * np.sin(2 * np.pi * (200 + 2000 * (time * 5 % 1).round()) * time) * np.abs(np.sin(25 * time))
    finals = [one for one in told(client, tones.astype(np.int16), 64000) if one["type"] == "final"]
    assert len(finals) >= 4 and all(one["end"] - one["start"] <= 4 for one in finals)
    assert [one["type"] for one in told(client, np.zeros(160_000, np.int16), 64000)] == ["ready", "done"]
    assert [one["type"] for one in told(client, np.zeros(0, np.int16), 1)] == ["ready", "done"]


@pytest.mark.parametrize(("message", "said", "code"), [
    ({"text": "hello"}, "end", 1003),
    ({"text": "[" * 100_000}, "end", 1003),
    ({"text": json.dumps({"type": "start"})}, "end", 1003),
    ({"bytes": bytes(streams.MESSAGE + 2)}, "bytes", 1009),
])  # fmt: skip
def test_what_is_no_sound_is_refused_with_one_message(client, message, said, code):
    with client.websocket_connect(PATH) as socket:
        assert socket.receive_json()["type"] == "ready"
        socket.send({"type": "websocket.receive", **message})
        error = socket.receive_json()
        assert error["type"] == "error" and said in error["error"]["message"]
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == code


def test_who_is_silent_or_goes_on_too_long_is_cut_off(client, monkeypatch):
    monkeypatch.setattr(streams, "IDLE", 0.05)
    with client.websocket_connect(PATH) as socket:
        assert [socket.receive_json()["type"] for _ in range(2)] == ["ready", "error"]
    monkeypatch.undo()
    monkeypatch.setattr(streams, "MOST", 1.0)
    with client.websocket_connect(PATH) as socket:
        socket.send_bytes(bytes(64000))
        assert [socket.receive_json()["type"] for _ in range(2)] == ["ready", "error"]
    with client.websocket_connect(PATH) as socket:
        socket.receive_json()  # and one that just goes


@pytest.mark.parametrize(("query", "headers", "status", "said"), [
    ("?model=nobody", {}, 404, "nobody"),
    ("?rate=4000", {}, 422, "rate"),
    ("?rate=1e9", {}, 422, "rate"),
    ("?rate=²", {}, 422, "rate"),
    ("?loud=1", {}, 422, "loud"),
    ("", {"Origin": "http://evil.example"}, 403, "evil.example"),
    ("", {"Host": "evil.example"}, 400, "evil.example"),
])  # fmt: skip
def test_a_wrong_address_is_refused_before_a_connection_stands(client, query, headers, status, said):
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(PATH + query, headers=headers):
        pass
    assert refused.value.status_code == status and said in refused.value.json()["error"]["message"]


def test_pages_of_friends_and_of_this_server_may_listen(client):
    for origin in ("http://friend", "http://127.0.0.1"):
        with client.websocket_connect(PATH, headers={"Origin": origin}) as socket:
            assert socket.receive_json()["type"] == "ready"


def test_keys_rates_and_the_number_of_streams_are_kept():
    key = "钥匙/+?"
    offered = "key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    app = app_of(api_keys=[key], rate_limit="8/minute", streams=1)
    with TestClient(app, base_url="http://127.0.0.1") as one:
        for wrong in ([], ["multihead"], ["multihead", "key.AAAA"], ["key.%"]):
            with pytest.raises(WebSocketDenialResponse) as refused, one.websocket_connect(PATH, wrong):
                pass
            assert refused.value.status_code == 401
        with one.websocket_connect(PATH, ["multihead", offered]) as first:
            assert first.accepted_subprotocol == "multihead" and first.receive_json()["type"] == "ready"
            with pytest.raises(WebSocketDenialResponse) as refused, one.websocket_connect(PATH, [offered]):
                pass
            assert refused.value.status_code == 503 and refused.value.json()["error"]["code"] == "overloaded"
        with one.websocket_connect(PATH, headers={"Authorization": b"Bearer " + key.encode()}) as again:
            assert again.receive_json()["type"] == "ready"
        for _ in range(9):
            try:
                with one.websocket_connect(PATH, [offered]):
                    pass
            except WebSocketDenialResponse as refused:
                status = refused.status_code
        assert status == 429
