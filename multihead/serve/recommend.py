"""``/v1/recommend``: a retriever finds some hundreds of items, a ranker puts them in order, and what is too alike may
be thinned out. ``/v1/items``: the catalogue, to search.

Every list belongs to the request it was made for: what is found, ranked and dropped for one user never meets another's.

Legend: N candidates, D width of an item's vector.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field, WithJsonSchema, create_model
from starlette.responses import Response

from multihead.data.rows import Column
from multihead.errors import Problem, UserError, nearest, tr
from multihead.generation.engine import Busy, Draining
from multihead.serve.hosted import Hosted, no_room, value_fault
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.predict import kinds_of
from multihead.serve.problems import ApiError, PlainJSON, of_user_error
from multihead.serve.settings import ServeSettings
from multihead.serve.wire import Body

POOL = 200
"""Candidates that are found where they are ranked or thinned out afterwards …"""
POOL_PER_ITEM = 10
"""… or so many for each item asked for, if that is more …"""
MOST = 1000
"""… but never more; also the longest list."""
INLINE = 20
"""Items to be chosen by thinning out, from which on it is done beside the loop."""
IDS = 10_000
"""Most ids of a history."""
ASKED = ("user", "history", "exclude", "context")
FIELDS = (*ASKED, "requests", "k", "seen", "diversify", "rank", "model", "ranker")
T = TypeVar("T")
Id = str | int
Seen = Literal["drop", "keep"] | None
Ids = Annotated[list[Id], Field(max_length=IDS)] | None


class Item(BaseModel):
    """One item of a list."""

    id: str
    title: str | None = None
    score: float


class List(BaseModel):
    """What one user gets, best first."""

    items: list[Item]
    user: str | None = None
    basis: str | None = None
    """What the list was made from: history, user or popularity."""
    unknown: list[str] = []
    """Ids that the catalogue does not have; they were passed over."""
    unknown_user: str | None = None


class Lists(BaseModel):
    """One list a request, in the order of the requests."""

    model: str
    ranker: str | None
    lists: list[List]


class OneList(List):
    """The list of a single request."""

    model: str
    ranker: str | None


class Found(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str | None = None


class Catalogue(BaseModel):
    """Items, the most popular first."""

    object: str
    model: str
    data: list[Found]


# -- one request to its list -------------------------------------------------------------------------------------------


async def recommend(
    retriever: Hosted, ranker: Hosted | None, asked: Sequence[Mapping[str, Any]], wish: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A list for each of `asked`.

    Args:
        asked: ``{"user", "history", "exclude", "context"}``, what was given.
        wish: "k", and where given "seen" and "diversify".
    """
    k, thinned = wish["k"], wish.get("diversify") or 0.0
    pool = min(MOST, max(POOL, POOL_PER_ITEM * k)) if ranker is not None or thinned else k
    reads = {column.name for column in retriever.task.inputs()}
    rows = [{name: value for name, value in one.items() if name in reads} for one in asked]
    seen = {"seen": wish["seen"]} if "seen" in wish else {}
    assert retriever.batcher is not None
    lists: list[dict[str, Any]] = await _settled(retriever.batcher.answer(rows, {"k": pool, **seen}), len(asked) > 1)
    for one, found in zip(asked, lists, strict=True):
        gone = {str(i) for i in (one.get("exclude") or [])}
        if wish.get("seen") == "drop":
            gone |= {str(i) for i in (one.get("history") or [])}
        found["items"] = [item for item in found["items"] if item["id"] not in gone] if gone else found["items"]
    if ranker is not None:
        await _rank(ranker, asked, lists)
    if thinned:
        def thin() -> list[dict[str, Any]]:
            return [_thinned(retriever, found, k, thinned) for found in lists]

        # A short list takes less time than a thread's coming and going.
        lists = thin() if k * len(lists) <= INLINE else await asyncio.to_thread(thin)
    return [{**found, "items": found["items"][:k]} for found in lists]


async def _settled(work: Awaitable[T], several: bool) -> T:
    """`work`, its errors as answers that name the request at fault."""
    try:
        return await work
    except (Busy, Draining) as error:
        raise no_room(error) from None
    except UserError as error:
        places = [p.where.replace("input[", "requests[") if several else "" for p in error.problems]
        named = UserError.many([Problem(p.message, where) for p, where in zip(error.problems, places, strict=True)])
        raise of_user_error(named, param=places[0] or None, code="invalid_row") from None


async def _rank(ranker: Hosted, asked: Sequence[Mapping[str, Any]], lists: Sequence[dict[str, Any]]) -> None:
    """Put each list in the ranker's order, with its scores; of equals the retriever's order stays."""
    full = [i for i, found in enumerate(lists) if found["items"]]
    if not full:
        return
    requests = [{
        "user": None if asked[i].get("user") is None else str(asked[i]["user"]),
        "history": None if asked[i].get("history") is None else [str(one) for one in asked[i]["history"]],
        "context": asked[i].get("context") or {},
        "items": [item["id"] for item in lists[i]["items"]],
    } for i in full]  # fmt: skip
    assert ranker.batcher is not None
    scores = await _settled(ranker.batcher.rank(requests), len(asked) > 1)
    for i, row in zip(full, scores, strict=True):
        values = np.asarray(row, dtype=np.float64)
        items = lists[i]["items"]
        lists[i]["items"] = [{**items[n], "score": float(f"{values[n]:.6g}")}
                             for n in np.argsort(-values, kind="stable").tolist()]  # fmt: skip


def _thinned(retriever: Hosted, found: dict[str, Any], k: int, weight: float) -> dict[str, Any]:
    """A list cut to the first k by maximal marginal relevance over the items' vectors."""
    task, model = retriever.task, retriever.served.model
    items = found["items"]
    numbers, _ = task.codec.encode(item["id"] for item in items)  # type: ignore[attr-defined]
    with torch.inference_mode():
        vectors_ND = task.item_vectors(model)[torch.from_numpy(numbers).long()].float().cpu().numpy()
    scores = np.array([item["score"] for item in items])
    return {**found, "items": [items[n] for n in marginal(scores, vectors_ND, k, weight)]}


def marginal(scores_N: np.ndarray, vectors_ND: np.ndarray, k: int, weight: float) -> list[int]:
    """Maximal marginal relevance (Carbonell & Goldstein 1998): numbers of the k items that are chosen one by one, each
    the best by (1 − weight) · relevance − weight · its greatest cosine to those already chosen.

    Relevance is how many of the candidates an item outranks, as a share: scores of a ranker may lie so close together,
    or so far apart, that a weight between them and a cosine would mean nothing.
    """
    n = len(scores_N)
    if not n:
        return []
    place_N = np.empty(n)
    place_N[np.argsort(-scores_N, kind="stable")] = np.arange(n)
    worth_N = (1 - weight) * (1 - place_N / n)
    unit_ND = vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    chosen: list[int] = []
    alike_N, free_N = np.full(n, -1.0), np.ones(n, bool)
    for _ in range(min(k, n)):
        value_N = worth_N - weight * alike_N if chosen else worth_N
        best = int(np.where(free_N, value_N, -np.inf).argmax())
        chosen.append(best)
        free_N[best] = False
        alike_N = np.maximum(alike_N, unit_ND @ unit_ND[best])
    return chosen


# -- the routes --------------------------------------------------------------------------------------------------------


def context_columns(models: Mapping[str, Hosted]) -> list[Column]:
    """What the served rankers read of a request's context, each name once."""
    columns = [c for hosted in models.values() if hosted.task.ranks for c in hosted.task.context()]
    return list({column.name: column for column in columns}.values())


def bodies(models: Mapping[str, Hosted], settings: ServeSettings) -> type[BaseModel]:
    """The body that is read: one request, or several under ``requests``."""
    columns = context_columns(models)
    schema = {"type": "object", "properties": {c.name: kinds_of(c) for c in columns}, "additionalProperties": False}
    context = Annotated[dict[str, Any], WithJsonSchema(schema)] | None
    wanted: dict[str, Any] = {
        "user": (Id | None, None), "history": (Ids, None), "exclude": (Ids, None), "context": (context, None),
    }
    one = create_model("RecommendRequest", __base__=Body, __doc__="Who asks: a user, or a history.", **wanted)
    several = Annotated[list[one], Field(min_length=1, max_length=settings.max_rows)]  # type: ignore[valid-type]
    return create_model(
        "RecommendBody", __base__=one,
        __doc__="One request, or several under `requests`; what is wished holds for all of them.",
        requests=(several | None, None),
        k=(Annotated[int, Field(ge=1, le=MOST)], 10),
        seen=(Seen, None),
        diversify=(Annotated[float, Field(ge=0, le=1)] | None, None),
        rank=(bool | None, None),
        model=(str | None, None),
        ranker=(str | None, None),
    )


def router(models: Mapping[str, Hosted], settings: ServeSettings) -> APIRouter:
    """The routes; none where no served model retrieves."""
    found = APIRouter(route_class=StrictRoute)
    retrievers = [hosted for hosted in models.values() if hosted.task.retrieves]
    if not retrievers:
        return found
    _introduce(models, retrievers)

    async def answer(body: Any, request: Request) -> Response:
        """The items to show a user next: retrieved, ranked if a ranker is served, with titles and scores."""
        retriever = chosen(request, body.model, "model", lambda h: h.task.retrieves)
        ranker = None
        if body.ranker is not None or (body.rank is not False and any(h.task.ranks for h in models.values())):
            ranker = chosen(request, body.ranker, "ranker", lambda h: h.task.ranks)
        asked = _requests(body)
        _check(asked, ranker, body.requests is not None)
        wish = {name: getattr(body, name) for name in ("k", "diversify") if getattr(body, name) is not None}
        if body.seen is not None:
            if "seen" not in retriever.asks:
                raise ApiError(422, tr(f"the model '{retriever.name}' has no option 'seen'",
                                       f"模型 '{retriever.name}' 没有选项 'seen'"), "seen", "unsupported_parameter")
            wish["seen"] = body.seen
        lists = await unless_gone(request, recommend(retriever, ranker, asked, wish))
        about = {"model": retriever.name, "ranker": ranker.name if ranker else None}
        return PlainJSON({**about, **lists[0]} if body.requests is None else {**about, "lists": lists})

    answer.__annotations__["body"] = bodies(models, settings)
    found.post("/v1/recommend", responses={**ERRORS, 200: {"model": OneList | Lists}})(answer)
    found.include_router(_items())
    return found


def _introduce(models: Mapping[str, Hosted], retrievers: Sequence[Hosted]) -> None:
    """Tell the rankers what may be found, so that they can encode it ahead."""
    rankers = [hosted for hosted in models.values() if hosted.task.ranks]
    if not rankers:
        return
    items = {one["id"]: one for h in reversed(retrievers) for one in h.task.codec.described()}  # type: ignore[attr-defined]
    for hosted in rankers:
        hosted.task.catalogue(list(items.values()))


def chosen(request: Request, name: str | None, field: str, suits: Any) -> Hosted:
    """The model that is meant, which must suit."""
    try:
        hosted = pick(request, name, suits)
    except ApiError as error:
        raise ApiError(error.status, error.message, field, error.code) from None
    if not suits(hosted):
        raise ApiError(404, tr(f"the model '{hosted.name}' cannot serve as {field} of a recommendation",
                               f"模型 '{hosted.name}' 不能用作推荐的 {field}"), field, "model_not_supported")
    return hosted


def _requests(body: Any) -> list[dict[str, Any]]:
    """What is asked, a dict each of what was given."""
    own = _given(body)
    if body.requests is None:
        return [own]
    if own:
        name = next(iter(own))
        raise ApiError(422, tr(f"where 'requests' is given, '{name}' goes into each of them",
                               f"给出 requests 时，'{name}' 应写在其中的每一项里"), name, "invalid_value")
    return [_given(one) for one in body.requests]


def _given(one: Any) -> dict[str, Any]:
    return {name: value for name in ASKED if (value := getattr(one, name)) is not None}


def _check(asked: Sequence[Mapping[str, Any]], ranker: Hosted | None, several: bool) -> None:
    """Refuse a context that the ranker does not read."""
    columns = {c.name: c for c in ranker.task.context()} if ranker is not None else {}
    for i, one in enumerate(asked):
        for name, value in one.get("context", {}).items():
            where = f"requests[{i}].context.{name}" if several else f"context.{name}"
            if name not in columns:
                shown = ", ".join(columns) or "–"
                hint = nearest(name, columns)
                fault = tr(f"not a field of the context{hint}; it holds: {shown}",
                           f"上下文没有这个字段{hint}；可用：{shown}")
            else:
                fault = value_fault(columns[name], value)
            if fault:
                raise ApiError(422, f"{where}: {fault}", where, "invalid_value")


def _items() -> APIRouter:
    found = APIRouter()
    texts: dict[str, list[str]] = {}

    def matching(hosted: Hosted, words: list[str], limit: int) -> list[dict[str, Any]]:
        codec = hosted.task.codec  # type: ignore[attr-defined]
        if hosted.name not in texts:
            shown = (codec.shown(i) for i in range(len(codec)))
            texts[hosted.name] = [f"{one['id']} {one.get('title', '')}".casefold() for one in shown]
        numbers = (i for i, text in enumerate(texts[hosted.name]) if all(word in text for word in words))
        return [codec.shown(i) for _, i in zip(range(limit), numbers, strict=False)]

    @found.get("/v1/items", responses={**ERRORS, 200: {"model": Catalogue}})
    async def items(
        request: Request,
        q: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        model: str | None = None,
        id: Annotated[list[str] | None, Query(max_length=100)] = None,
    ) -> Response:
        """Items whose title or id holds every word of `q`, the most popular first; without `q`, the most popular. With
        `id`, those items, without what the catalogue does not have."""
        hosted = chosen(request, model, "model", lambda h: h.task.retrieves)
        if id is not None:
            codec = hosted.task.codec  # type: ignore[attr-defined]
            known = [codec.shown(number) for number in codec.encode(id)[0].tolist()]
            return PlainJSON({"object": "list", "model": hosted.name, "data": known})
        data = await asyncio.to_thread(matching, hosted, q.casefold().split(), limit)
        return PlainJSON({"object": "list", "model": hosted.name, "data": data})

    return found
