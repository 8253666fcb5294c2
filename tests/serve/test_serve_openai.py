"""The OpenAI API: its own client is content, and what it sends is what the plain loop says."""

from __future__ import annotations

import json

import openai
import pytest
import serve_models as models
import torch

from multihead.generation.loop import complete
from multihead.generation.sampling import Sampling


@pytest.fixture(scope="module")
def api(process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.address}/v1", api_key="none", max_retries=0)


def alone(prompt: str, **wishes):
    task, model = models.writer()
    with torch.inference_mode():
        return complete(model, task.codec, [task.encode({"text": prompt})["ids"].tolist()], Sampling.of(wishes))[0]


def test_models(api):
    assert [m.id for m in api.models.list()] == ["writer", "mood"]
    assert api.models.retrieve("writer").owned_by == "multihead"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        api.models.retrieve("gpt")


def test_completion_plain_and_streamed_say_the_same(api):
    ask = dict(model="writer", prompt="房间", max_tokens=40, seed=3, temperature=0.9, top_p=0.95)
    whole = api.completions.create(**ask)
    expected = alone("房间", max_tokens=40, seed=3, temperature=0.9, top_p=0.95)
    assert whole.choices[0].text == expected.text and whole.choices[0].finish_reason == expected.reason
    assert whole.usage.completion_tokens == len(expected.ids) and whole.object == "text_completion"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(api.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [expected.reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks[:-1])


def test_completion_defaults_to_sixteen_tokens_several_prompts_and_samples(api):
    whole = api.completions.create(model="writer", prompt=["房间", "The"], n=2, seed=5, echo=True)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    assert [c.text[:2] for c in whole.choices] == ["房间", "房间", "Th", "Th"]
    assert whole.choices[0].text != whole.choices[1].text
    assert whole.choices[0].text == "房间" + alone("房间", max_tokens=16, seed=5).text
    assert whole.usage.completion_tokens <= 64
    ids = api.completions.create(model="writer", prompt=[2, 70, 71], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3


def test_chat_plain_and_streamed_say_the_same(api):
    ask = dict(model="writer", messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": [
        {"type": "text", "text": "早餐"}, {"type": "text", "text": "一般"}]}], max_completion_tokens=30, seed=9, n=2)
    whole = api.chat.completions.create(**ask, user="someone", metadata={"a": "b"}, tools=[], store=False)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    texts, reasons, roles = ["", ""], [None, None], [0, 0]
    for chunk in api.chat.completions.create(**ask, stream=True):
        assert chunk.object == "chat.completion.chunk" and chunk.usage is None
        choice = chunk.choices[0]
        assert "�" not in (choice.delta.content or "") or "�" in whole.choices[choice.index].message.content
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        roles[choice.index] += choice.delta.role == "assistant"
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices] and roles == [1, 1]
    assert texts[0] == alone("be kind\n早餐一般", max_tokens=30, seed=9).text


def test_a_stop_text_is_never_shown_not_even_its_beginning(api):
    free = alone("房间", max_tokens=60, temperature=0).text
    stop = free[10:14]
    ask = dict(model="writer", prompt="房间", max_tokens=60, temperature=0, stop=[stop, "zzzz"])
    whole = api.completions.create(**ask).choices[0]
    assert (whole.text, whole.finish_reason) == (free[: free.index(stop)], "stop")
    seen = ""
    for chunk in api.completions.create(**ask, stream=True):
        seen += chunk.choices[0].text
        assert whole.text.startswith(seen)
    assert seen == whole.text


def test_logprobs(api):
    prompt = "The room"
    old = api.completions.create(model="writer", prompt=prompt, max_tokens=6, temperature=0, logprobs=2).choices[0]
    new = api.chat.completions.create(model="writer", messages=[{"role": "user", "content": prompt}], max_tokens=6,
                                      temperature=0, logprobs=True, top_logprobs=2).choices[0]
    assert old.logprobs.token_logprobs == pytest.approx([t.logprob for t in new.logprobs.content], abs=1e-5)
    assert all(max(top.values()) == pytest.approx(own, abs=1e-5)
               for top, own in zip(old.logprobs.top_logprobs, old.logprobs.token_logprobs, strict=True))
    assert b"".join(bytes(t.bytes) for t in new.logprobs.content).decode("utf-8", "replace") == old.text
    assert all(len(t.top_logprobs) == 2 for t in new.logprobs.content)
    streamed = api.chat.completions.create(model="writer", messages=[{"role": "user", "content": prompt}], max_tokens=6,
                                           temperature=0, logprobs=True, stream=True)
    tokens = [t.token for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert tokens == [t.token for t in new.logprobs.content]


MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 422, "tools"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format"),
        ({"frequency_penalty": 0.5}, 422, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, 422, "logit_bias"),
        ({"reasoning_effort": "high"}, 422, "reasoning_effort"),
        ({"temperature": 2.5}, 422, "temperature"),
        ({"temperature": "1"}, 422, "temperature"),
        ({"n": 0}, 422, "n"),
        ({"n": 128, "extra_body": {"n": 300}}, 422, "n"),
        ({"max_tokens": 5000}, 422, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 422, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, 422, "stop"),
        ({"stream_options": {"include_usage": True}}, 422, "stream_options"),
        ({"top_logprobs": 3}, 422, "top_logprobs"),
        ({"extra_body": {"temprature": 1}}, 422, "temprature"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 422, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "Li"}]}, 422, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, 413, "messages"),
        ({"model": "mood"}, 404, "model"),
        ({"model": "gpt-4o"}, 404, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(api, more, status, param):
    with pytest.raises(openai.APIStatusError) as refused:
        api.chat.completions.create(**{"model": "writer", "messages": MESSAGES} | more)
    assert refused.value.status_code == status
    assert refused.value.param is not None and refused.value.param.startswith(param)
    assert refused.value.type and refused.value.request_id.startswith("req_")


def test_a_fault_in_mid_stream_reaches_the_client(client):
    one = client(("writer",))
    model = one.app.state.models["writer"].served.model
    step = model.step
    model.step = lambda ids, cache: step(ids, cache) if max(cache.lengths) < 9 else 1 / 0
    body = {"prompt": "ab", "max_tokens": 30, "temperature": 0, "stream": True}
    events = one.post("/v1/completions", json=body).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "model_error" and "DONE" not in events[-2]
    assert one.post("/v1/completions", json=body | {"stream": False}).status_code == 500
    model.step = step
    assert one.post("/v1/completions", json=body | {"stream": False}).status_code == 200
