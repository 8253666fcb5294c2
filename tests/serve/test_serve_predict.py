"""/v1/predict: answers as the task gives them, and refusals that name the field."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serve_models as models
import torch

from multihead.generation.loop import complete
from multihead.generation.sampling import Sampling
from multihead.serve.batcher import Batcher


def post(client, body, **headers):
    return client.post("/v1/predict", json=body, headers=headers)


@pytest.mark.parametrize("name", ["mood", "labeller"])
def test_answers_are_the_tasks_own_one_by_one_and_together(client, name):
    one = client((name,))
    texts = [line[:n] for line in models.LINES for n in (1, 5, 9, 30)]
    task, model = one.app.state.models[name].task, one.app.state.models[name].served.model

    def alone(text):
        with torch.inference_mode():
            return task.predict(model, task.collate([task.encode({"text": text})]), {})[0]

    together = post(one, {"input": texts}).json()["answers"]
    with ThreadPoolExecutor(12) as pool:
        apart = list(pool.map(lambda text: post(one, {"input": text}).json()["answers"][0], texts))
    for text, a, b in zip(texts, together, apart, strict=True):
        assert a["label"] == b["label"] == alone(text)["label"]
        for label, score in alone(text)["scores"].items():
            assert a["scores"][label] == pytest.approx(score, abs=1e-5)
            assert b["scores"][label] == pytest.approx(score, abs=1e-5)
    assert f'multihead_batch_rows_count{{model="{name}"}}' in one.get("/metrics").text


def test_a_text_is_gone_on_with_as_the_plain_loop_does(client):
    one = client(("writer",), max_length=96)
    hosted = one.app.state.models["writer"]
    ask = {"max_tokens": 12, "seed": 4, "temperature": 0.8}
    answers = post(one, {"input": models.LINES, **ask}).json()["answers"]
    prompts = [hosted.task.encode({"text": line})["ids"].tolist() for line in models.LINES]
    with torch.inference_mode():
        done = [complete(hosted.served.model, hosted.task.codec, [p], Sampling.of(ask))[0] for p in prompts]
    assert answers == [{"text": d.text, "tokens": len(d.ids), "finish_reason": d.reason} for d in done]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"input": ""}, 422, "input[0].text", "empty"),
        ({"input": 3}, 422, "input", ""),
        ({"input": []}, 422, "input", ""),
        ({}, 422, "input", "missing"),
        ({"input": {"txt": "a"}}, 422, "input[0].txt", "did you mean 'text'"),
        ({"input": ["a", {"text": 5}]}, 422, "input[1].text", "text"),
        ({"input": {"text": "a", "stars": "5"}}, 422, "input[0].stars", "number"),
        ({"input": {"text": "a", "label": "good"}}, 422, "input[0].label", "not a field"),
        ({"input": "a", "modle": "x"}, 422, "modle", "did you mean 'model'"),
        ({"input": "a", "temperature": 1.0}, 422, "temperature", "unknown"),
        ({"input": "a", "model": "other"}, 404, "model", "there are: mood"),
        ({"input": ["unreadable", "a", "unreadable"]}, 422, "input[0]", "input[2]: this text is unreadable"),
        ({"input": "crash"}, 422, "input[0]", "cannot be read"),
        ({"input": "☠"}, 500, None, "log"),
        ({"input": ["a"] * 257}, 422, "input", ""),
    ],
)
def test_refusals_name_the_field(client, body, status, param, words):
    answer = post(client(("mood",)), body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"] and "secret" not in answer.text and "Traceback" not in answer.text


def test_refusals_in_chinese(client):
    answer = post(client(("mood",)), {"input": [""]}, **{"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.5"})
    assert answer.json()["error"]["message"] == "input[0].text: 内容为空"


def test_one_bad_request_does_not_spoil_its_batch(client):
    one = client(("mood",), wait_ms=200)
    gate = threading.Barrier(3)

    def ask(text):
        gate.wait()
        return post(one, {"input": text}).status_code

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, ["fine", "☠", "also fine"])) == [200, 500, 200]


def test_which_model_must_be_said_where_there_are_two(client):
    both = client()
    assert post(both, {"input": "a"}).json()["error"]["code"] == "model_missing"
    assert post(both, {"input": "a", "model": "mood"}).status_code == 200
    refused = post(both, {"input": "a", "model": "mood", "top_k": 5})
    assert refused.json()["error"]["param"] == "top_k"


def test_a_full_queue_says_when_to_come_back(client):
    one = client(("mood",), queue=1, max_batch=1)
    release, inside = threading.Event(), threading.Event()
    task = one.app.state.models["mood"].task
    encode = task.encode
    task.encode = lambda row: (inside.set(), release.wait(20), encode(row))[2]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, one, {"input": "a"})
        inside.wait(20)
        second = pool.submit(post, one, {"input": "b"})
        while one.app.state.models["mood"].batcher.waiting < 1:
            pass
        refused = post(one, {"input": "c"})
        release.set()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert first.result().status_code == second.result().status_code == 200


def test_who_has_gone_is_not_answered():
    seen, release = [], threading.Event()
    task = models.Mood()
    encode = task.encode
    task.encode = lambda row: (seen.append(row["text"]), release.wait(20), encode(row))[2]  # type: ignore[method-assign]
    batcher = Batcher(task, models.Mean().eval(), max_batch=1, wait_ms=0)

    async def three() -> list:
        waiting = [asyncio.ensure_future(batcher.answer([{"text": text}], {})) for text in "abc"]
        while not seen:
            await asyncio.sleep(0.001)
        waiting[1].cancel()
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    answers = asyncio.run(three())
    assert seen == ["a", "c"] and isinstance(answers[1], asyncio.CancelledError)
    assert answers[0][0]["label"] and answers[2][0]["label"]
    assert batcher.drain(5)


def test_answers_that_json_has_no_word_for(client):
    one = client(("mood",))
    task = one.app.state.models["mood"].task
    task.predict = lambda model, batch, ask: [{"x": float("nan"), "y": [float("inf"), "\ud800"]}]
    assert json.loads(post(one, {"input": "a"}).text)["answers"] == [{"x": None, "y": [None, "?"]}]
