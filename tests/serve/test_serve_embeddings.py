"""/v1/embeddings: OpenAI's own client gets the vectors that the task gives."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import serve_models as models
import torch

TEXTS = [line[:n] for line in models.LINES for n in (1, 5, 16, 40)]


@pytest.fixture
def api(client):
    """OpenAI's client, speaking to an application in this process."""

    def make(*names: str, **settings) -> tuple[openai.OpenAI, object]:
        one = client(names or ("filler",), **settings)
        made = openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=one)
        return made, one.app.state.models.get("filler")

    return make


def vector(hosted, text: str) -> np.ndarray:
    with torch.inference_mode():
        task, model = hosted.task, hosted.served.model
        return task.embed(model, task.collate([task.encode({"text": text})]))[0].numpy()


def test_both_forms_are_the_tasks_own_vectors_one_by_one_and_together(api):
    one, hosted = api()
    # Unless told, the client asks for base64 and makes numbers of it.
    packed = one.embeddings.create(model="filler", input=TEXTS)
    plain = one.embeddings.create(model="filler", input=TEXTS, encoding_format="float")
    with ThreadPoolExecutor(6) as pool:
        apart = list(pool.map(lambda text: one.embeddings.create(model="filler", input=text).data[0].embedding, TEXTS))
    assert [e.index for e in packed.data] == list(range(len(TEXTS))) and packed.object == "list"
    for text, a, b, c in zip(TEXTS, packed.data, plain.data, apart, strict=True):
        own = vector(hosted, text)
        assert math.isclose(np.linalg.norm(own), 1, abs_tol=1e-6)
        for served in (a.embedding, b.embedding, c):
            assert served == pytest.approx(own, abs=1e-5)
    tokens = sum(len(hosted.task.codec.encode(text)) for text in TEXTS)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == tokens
    assert hosted.batcher.waiting == 0


def test_token_ids_are_the_text_they_stand_for(api):
    one, hosted = api()
    ids = [hosted.task.codec.encode(text).tolist() for text in TEXTS[:3]]
    several = one.embeddings.create(model="filler", input=ids, dimensions=32, user="someone")
    alone = one.embeddings.create(model="filler", input=ids[2])
    for text, given in zip(TEXTS[:3], several.data, strict=True):
        assert given.embedding == pytest.approx(vector(hosted, text), abs=1e-5)
    assert alone.data[0].embedding == pytest.approx(vector(hosted, TEXTS[2]), abs=1e-5)


def test_the_only_model_with_vectors_need_not_be_named(api):
    one, _ = api("writer", "filler", "mood")
    assert one.post("/embeddings", body={"input": "房间"}, cast_to=object)["model"] == "filler"
    cards = {card.id: card.model_extra["embeds"] for card in one.models.list()}
    assert cards == {"writer": False, "filler": True, "mood": False}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ""}, 422, "input"),
        ({"input": ["a", " "]}, 422, "input[1]"),
        ({"input": []}, 422, "input"),
        ({"input": [[]]}, 422, "input"),
        ({"input": [5, "a"]}, 422, "input"),
        ({"input": [5, 99999]}, 422, "input"),
        ({"input": [[5], [-1]]}, 422, "input"),
        ({"input": ["a"] * 4}, 422, "input"),
        ({"input": "房" * 101}, 413, "input"),
        ({"input": ["a", [5] * 101]}, 422, "input"),
        ({"input": [[5], [5] * 101]}, 413, "input[1]"),
        ({"input": "a", "dimensions": 16}, 422, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "a", "top_k": 3}, 422, "top_k"),
        ({"input": "a", "model": "writer"}, 404, "model"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(api, body, status, param):
    one, _ = api("writer", "filler", max_rows=3, max_prompt_tokens=100)
    with pytest.raises(openai.APIStatusError) as refused:
        one.post("/embeddings", body={"model": "filler"} | body, cast_to=object)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert refused.value.code and refused.value.request_id.startswith("req_")


def test_a_full_server_says_when_to_come_back(api):
    one, hosted = api()
    hosted.batcher.drain(5)
    with pytest.raises(openai.APIStatusError) as refused:
        one.embeddings.create(model="filler", input="房间")
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "1")


def test_a_text_without_a_gap_is_refused_where_gaps_are_filled(client):
    one = client(("filler",))
    good = one.post("/v1/predict", json={"input": ["房间很<mask>净", "[MASK]间很<mask>"], "top_k": 2}).json()
    assert [[len(f) for f in a["fillings"]] for a in good["answers"]] == [[2], [2, 2]]
    bad = one.post("/v1/predict", json={"input": ["房间很<mask>净", "房间"]})
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "input[1]") and "<mask>" in bad.text
    far = one.post("/v1/predict", json={"input": "<mask>" + "房" * 20 + "<mask>"})
    assert far.status_code == 422 and "one by one" in far.text
