"""/v1/recommend: lists that belong to whom they were made for, ranked and thinned out; refusals that name the field."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import serve_models as models
import torch

from multihead.serve.recommend import marginal


def post(client: Any, body: Any, **headers: str) -> Any:
    return client.post("/v1/recommend", json=body, headers=headers)


def ids(found: dict[str, Any]) -> list[str]:
    return [item["id"] for item in found["items"]]


def retrieved(client: Any, row: dict[str, Any], **ask: Any) -> dict[str, Any]:
    """What the retriever itself answers, without a server."""
    hosted = client.app.state.models["finder"]
    with torch.inference_mode():
        return hosted.task.predict(hosted.served.model, hosted.task.collate([hosted.task.encode(row)]), ask)[0]


def test_a_retriever_alone_answers_in_its_own_order_with_titles(client):
    one = client(("finder",))
    row = {"history": ["i4", "i7", "new"], "exclude": ["i9", "?"]}
    found = post(one, {**row, "k": 5}).json()
    assert found.pop("model") == "finder" and found.pop("ranker") is None
    assert found == retrieved(one, row, k=5)
    assert found["unknown"] == ["new", "?"] and not {"i4", "i7", "i9"} & set(ids(found))
    assert found["items"][0]["title"].startswith("<b>Film</b>")
    assert len(ids(post(one, {"history": []}).json())) == 10
    assert len(ids(post(one, {**row, "k": 1000}).json())) == 27
    assert "i4" in ids(post(one, {**row, "k": 30, "seen": "keep"}).json())


def test_a_ranker_orders_what_was_found_by_user_and_context(client):
    both = client(("finder", "taste"))
    found = post(both, {"user": "a", "k": 27, "context": {"hour": 3}}).json()
    assert found["ranker"] == "taste" and found["basis"] == "history"
    assert ids(found) == [f"i{n}" for n in range(29, 0, -1) if n not in (1, 2)]  # the best first, seen ones gone
    scores = [item["score"] for item in found["items"]]
    assert scores == pytest.approx([models.taste("a", i, 3) for i in ids(found)], rel=1e-5)
    assert ids(post(both, {"user": "z", "k": 2}).json()) == ["i0", "i1"]
    unranked = post(both, {"user": "a", "k": 5, "rank": False}).json()
    assert unranked["ranker"] is None and ids(unranked) == ids(retrieved(both, {"user": "a"}, k=5))
    told = both.app.state.models["taste"].task.told
    assert [one["id"] for one in told] == both.app.state.models["finder"].task.codec.names and "title" in told[0]


def test_lists_never_mix(client):
    """In one request, and in many that share batches, with users that are known, unknown, and without a history."""
    both = client(("finder", "taste"), wait_ms=30)
    asked = [{"user": user, "exclude": [f"i{n}"]} for n in range(8) for user in ("a", "zoe", "b", "c")]
    asked += [{"history": [f"i{n}", "odd" + str(n)], "user": "mia"} for n in range(12)]
    together = post(both, {"requests": asked, "k": 30}).json()["lists"]
    with ThreadPoolExecutor(12) as pool:
        apart = list(pool.map(lambda one: post(both, {**one, "k": 30}).json(), asked))
    known = both.app.state.models["finder"].task.known
    for one, a, b in zip(asked, together, apart, strict=True):
        had = one.get("history") or known.get(one["user"], {"history": []})["history"]
        left = {f"i{n}" for n in range(30)} - set(had) - set(one.get("exclude", ()))
        expected = sorted(left, key=lambda i: -models.taste(one["user"], i))
        for found in (a, b):
            assert found["user"] == one["user"] and ids(found) == expected
            assert found.get("unknown", []) == [i for i in had if i.startswith("odd")]
            assert found.get("unknown_user") == ("zoe" if one["user"] == "zoe" else None)
            assert found["basis"] == ("history" if any(i[1:].isdigit() for i in had) else "popularity")


def test_thinning_out_is_maximal_marginal_relevance():
    rng = np.random.default_rng(0)
    scores, vectors = rng.normal(size=40), rng.normal(size=(40, 4))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    worth = {int(n): 1 - place / 40 for place, n in enumerate(np.argsort(-scores))}
    for weight in (0.0, 0.3, 0.8):
        expected: list[int] = []
        while len(expected) < 12:
            def value(n: int, taken: list[int] = expected, w: float = weight) -> float:
                return (1 - w) * worth[n] - w * max((float(unit[n] @ unit[m]) for m in taken), default=0.0)

            expected.append(max((n for n in range(40) if n not in expected), key=value))
        assert marginal(scores, vectors, 12, weight) == expected
    assert marginal(scores, vectors, 99, 0.0) == np.argsort(-scores).tolist()
    assert marginal(np.zeros(0), np.zeros((0, 4)), 3, 0.5) == []
    # Two kinds of things: by relevance all of one kind, thinned out both.
    scores, kinds = np.array([5.0, 4, 3, 2]), np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert marginal(scores, kinds, 2, 0.0) == [0, 1] and marginal(scores, kinds, 2, 0.7) == [0, 3]


def test_a_list_thinned_out_holds_less_alike_items(client):
    one = client(("finder",))
    task, model = (getattr(one.app.state.models["finder"].served, name) for name in ("task", "model"))

    def alike(found: dict[str, Any]) -> float:
        numbers = torch.from_numpy(task.codec.encode(ids(found))[0]).long()
        unit = torch.nn.functional.normalize(task.item_vectors(model)[numbers].detach(), dim=1)
        return float((unit @ unit.T).triu(1).sum())

    plain, thinned = (post(one, {"history": ["i3"], "k": 8, "diversify": d}).json() for d in (0, 0.9))
    assert ids(plain)[0] == ids(thinned)[0] and len(set(ids(thinned))) == 8 and alike(thinned) < alike(plain)
    assert "i3" not in ids(thinned)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 422, None, "no 'history'"),
        ({"history": ["i1"], "k": 0}, 422, "k", "≥ 1"),
        ({"history": ["i1"], "k": 1001}, 422, "k", "≤ 1000"),
        ({"history": ["i1"], "k": "5"}, 422, "k", "whole number"),
        ({"history": "i1"}, 422, "history", "list"),
        ({"history": [1.5]}, 422, "history[0]", ""),
        ({"history": [True]}, 422, "history[0]", ""),
        ({"history": ["i1"], "seen": "hide"}, 422, "seen", ""),
        ({"history": ["i1"], "diversify": 2}, 422, "diversify", "≤ 1"),
        ({"histroy": ["i1"]}, 422, "histroy", "did you mean 'history'"),
        ({"history": ["i1"], "context": {"hour": "late"}}, 422, "context.hour", "number"),
        ({"history": ["i1"], "context": {"houre": 3}}, 422, "context.houre", "did you mean 'hour'"),
        ({"history": ["i1"], "context": {"hour": 3}, "rank": False}, 422, "context.hour", "not a field"),
        ({"history": ["i1"], "context": {"device": "broken"}}, 422, None, "device is broken"),
        ({"history": ["i1"], "model": "taste"}, 404, "model", "cannot serve as model"),
        ({"history": ["i1"], "ranker": "finder"}, 404, "ranker", "cannot serve as ranker"),
        ({"history": ["i1"], "model": "other"}, 404, "model", "there are: finder"),
        ({"requests": []}, 422, "requests", ""),
        ({"requests": [{"user": "a"}], "user": "b"}, 422, "user", "goes into each"),
        ({"requests": [{"user": "a"}, {"context": {}}]}, 422, "requests[1]", "no 'history'"),
        ({"requests": [{"user": "a"}, {"user": "a", "context": {"x": 1}}]}, 422, "requests[1].context.x", "field"),
        ({"requests": [{"user": "a", "k": 3}]}, 422, "requests[0].k", "unknown field"),
        ({"requests": [{"user": "a"}] * 257}, 422, "requests", ""),
        ({"history": ["i1"] * 10_001}, 422, "history", ""),
    ],
)
def test_refusals_name_the_field(client, body, status, param, words):
    answer = post(client(("finder", "taste")), body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"] and "Traceback" not in answer.text


def test_a_model_that_finds_nothing_has_no_such_address(client):
    assert post(client(("mood",)), {"history": []}).status_code == 404


def test_which_retriever_is_meant_must_be_said_where_there_are_two(client):
    two = client(("finder", "taste"))
    models_of = two.app.state.models
    models_of["other"] = models_of["finder"]
    refused = post(two, {"user": "a"})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "model"
    assert post(two, {"user": "a", "model": "other"}).status_code == 200


def test_ids_of_any_size_and_form(client):
    one = client(("finder",))
    found = post(one, {"history": [2**64 + 1, "一 二", "i1", 7], "user": 2**63}).json()
    assert found["unknown"] == [str(2**64 + 1), "一 二", "7"] and found["user"] == str(2**63)


def test_the_catalogue_is_searched_by_words_of_titles_and_ids(client):
    one = client(("finder",))

    def search(**query: Any) -> Any:
        return one.get("/v1/items", params=query)

    assert [item["id"] for item in search(limit=3).json()["data"]] == ["i0", "i1", "i2"]
    assert search(q="FILM 12").json()["data"] == [{"id": "i12", "title": "<b>Film</b> 12"}]
    found = search(q="2", limit=100).json()["data"]
    assert [item["id"] for item in found] == [f"i{n}" for n in (2, 12, *range(20, 30))]
    assert [item["id"] for item in search(id=["i5", "?", "i3"]).json()["data"]] == ["i5", "i3"]
    assert search(q="nothing like it").json()["data"] == []
    assert search(limit=0).json()["error"]["param"] == "limit" and search(model="x").status_code == 404
