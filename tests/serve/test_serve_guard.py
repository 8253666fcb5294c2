"""What must not come in: sizes, keys, rates, names; and nothing of the inside goes out."""

from __future__ import annotations

import json
import time

import pytest

from multihead.serve.settings import ServeSettings

JSON = {"Content-Type": "application/json"}


def test_alive_ready_and_counted(client):
    one = client()
    assert (one.get("/livez").text, one.get("/readyz").text) == ("ok", "ok")
    one.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "temperature": 0})
    text = one.get("/metrics").text
    assert 'multihead_requests_total{method="POST",path="/v1/completions",status="200"} 1.0' in text
    assert 'multihead_tokens_total{kind="generated",model="writer"}' in text
    assert 'multihead_slots{model="writer"} 16.0' in text
    one.app.state.server.draining = True
    assert (one.get("/livez").status_code, one.get("/readyz").status_code) == (200, 503)
    one.app.state.server.draining = False


def test_a_key_opens_and_nothing_else_does(client, monkeypatch):
    monkeypatch.setenv("MULTIHEAD_API_KEYS", "from-environment, 钥匙")
    one = client(("mood",), api_keys=["from-recipe"])
    for key, status in {
        "from-recipe": 200, "from-environment": 200, "from-recipe2": 401, "from": 401, "": 401, "Bearer": 401,
    }.items():
        answer = one.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status, key
    assert one.get("/v1/models", headers={"Authorization": "Bearer 钥匙".encode()}).status_code == 200
    for path, status in {"/v1/models": 401, "/metrics": 401, "/openapi.json": 401, "/nowhere": 401,
                         "/": 200, "/livez": 200, "/readyz": 200}.items():
        answer = one.get(path)
        assert answer.status_code == status, path
        assert status == 200 or answer.json()["error"]["code"] == "invalid_api_key"
    assert one.post("/v1/predict", json={"input": "a"}).status_code == 401


def test_rates_are_kept_by_caller(client):
    one = client(("mood",), rate_limit="3/minute", api_keys=["a", "b"])
    a, b = ({"Authorization": f"Bearer {key}"} for key in "ab")
    assert [one.get("/v1/models", headers=a).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = one.get("/v1/models", headers=a)
    assert 0 < int(refused.headers["retry-after"]) <= 61 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert one.get("/v1/models", headers=b).status_code == 200
    assert one.get("/livez").status_code == 200


@pytest.mark.parametrize("rate", ["fast", "0/minute", "60", "60/fortnight"])
def test_a_rate_that_cannot_be_read_is_refused_in_the_recipe(rate):
    with pytest.raises(ValueError, match="60/minute"):
        ServeSettings(rate_limit=rate)


def test_a_long_body_is_refused_while_it_comes_in(client):
    one = client(("mood",), max_body_bytes=2000)
    sent = []

    def chunks():
        yield b'{"input": "'
        for _ in range(1000):
            sent.append(1)
            yield b"a" * 100
        yield b'"}'

    whole = one.post("/v1/predict", json={"input": "a" * 3000})
    assert (whole.status_code, whole.json()["error"]["code"]) == (413, "body_too_large")
    assert one.post("/v1/predict", content=chunks(), headers=JSON).status_code == 413
    assert one.post("/v1/predict", json={"input": "a" * 1900}).status_code == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"null", 422),
        (b"[]", 422),
        (b"\xff\xfe", 422),
        (b'{"input": NaN}', 422),
        (b'{"input": {"text": "a", "stars": Infinity}}', 422),
        (b'{"input": {"text": "a", "stars": 1e999}}', 422),
        (b'{"input": {"text": "a", "stars": ' + b"9" * 5000 + b"}}", 422),
        (b'{"input": {"text": "a", "stars": ' + b"9" * 400 + b"}}", 422),
        (b'{"input": "\\ud83d"}', 422),
        (b'{"input": "a", "\\udc00": 1}', 422),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 422),
        (b'{"input": {"text": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}}", 422),
        (b'{"input": "a\\u0000b"}', 200),
        (b'{"input": "\\ud83d\\ude00"}', 200),
        (b'{"input": [' + b",".join([b'"a"'] * 200_000) + b"]}", 422),
        (b'{"input": [' + b"1," * 1_000_000 + b"1]}", 413),
    ],
)
def test_odd_bodies(client, raw, status):
    one = client(("mood",))
    answer = one.post("/v1/predict", content=raw, headers=JSON)
    assert answer.status_code == status
    assert len(answer.content) < 5000 and b"Traceback" not in answer.content
    assert one.post("/v1/predict", json={"input": "a"}).status_code == 200


def test_a_million_rows_where_the_body_may_be_that_long(client):
    one = client(("mood",), max_body_bytes=1 << 23)
    since = time.monotonic()
    answer = one.post("/v1/predict", content=b'{"input": [' + b"1," * 1_000_000 + b"1]}", headers=JSON)
    assert answer.status_code == 422 and len(answer.content) < 5000
    assert time.monotonic() - since < 60


def test_only_json_is_read(client):
    one = client(("mood",))
    body = json.dumps({"input": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert one.post("/v1/predict", content=body, headers={"Content-Type": kind}).status_code == 415
    assert one.post("/v1/predict", content=body, headers={"Content-Type": "application/json; charset=utf-8"}).is_success


def test_a_private_server_answers_to_its_own_names_only(client):
    one = client(("mood",))
    hosts = {"localhost:8000": 200, "127.0.0.1": 200, "[::1]:8000": 200, "evil.example": 400, "": 400}
    for host, status in hosts.items():
        assert one.get("/v1/models", headers={"Host": host}).status_code == status, host
    public = client(("mood",), host="0.0.0.0")
    assert public.get("/v1/models", headers={"Host": "shop.example"}).status_code == 200
    named = client(("mood",), host="0.0.0.0", allowed_hosts=["Shop.example"])
    assert named.get("/v1/models", headers={"Host": "shop.example:80"}).status_code == 200
    assert named.get("/v1/models", headers={"Host": "localhost"}).status_code == 400


def test_other_pages_may_call_only_where_they_are_named(client):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "content-type"}
    closed, opened = client(("mood",)), client(("mood",), cors_origins=["https://a.example"], api_keys=["k"])
    assert "access-control-allow-origin" not in closed.options("/v1/predict", headers=ask).headers
    assert opened.options("/v1/predict", headers=ask).headers["access-control-allow-origin"] == "https://a.example"
    refused = opened.post("/v1/predict", json={"input": "a"}, headers={"Origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in opened.get("/v1/models", headers={"Origin": "https://b.example"}).headers


def test_every_answer_carries_its_headers_and_every_error_its_form(client):
    one = client()
    for answer in (one.get("/"), one.get("/nowhere"), one.get("/v1/predict"), one.delete("/v1/models"),
                   one.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})):
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-request-id"]
        assert answer.is_success or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert one.get("/v1/predict").status_code == 405 and one.get("/v1/predict").headers["allow"] == "POST"
    assert one.get("/v1/models/%00%ff/..;<b>").status_code == 404
