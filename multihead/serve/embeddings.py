"""``/v1/embeddings`` in the form of the OpenAI API: texts as vectors of length 1, for every model that gives them."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from multihead.errors import tr
from multihead.serve.intake import ERRORS, StrictRoute, pick, unless_gone
from multihead.serve.problems import ApiError, PlainJSON
from multihead.serve.wire import EmbeddingAnswer, EmbeddingBody

router = APIRouter(route_class=StrictRoute)
DECIMALS = 8  # of components of at most 1: as many as float32 holds


@router.post("/v1/embeddings", responses={**ERRORS, 200: {"model": EmbeddingAnswer}})
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """Texts, or token ids, as vectors; the dot product of two says how alike they are."""
    hosted = pick(request, body.model, lambda h: h.embeds)
    if not hosted.embeds:
        raise ApiError(404, tr(f"the model '{hosted.name}' gives no vectors; ask it at /v1/predict",
                               f"模型 '{hosted.name}' 不提供向量；请使用 /v1/predict"), "model", "model_not_supported")
    vectors, read = await unless_gone(request, hosted.embed(body.inputs()))
    if body.dimensions not in (None, len(vectors[0])):
        raise ApiError(422, tr(f"the vectors of '{hosted.name}' have {len(vectors[0])} dimensions, and no others",
                               f"模型 '{hosted.name}' 的向量是 {len(vectors[0])} 维，不能改变"),
                       "dimensions", "unsupported_parameter")  # fmt: skip
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": base64_of(vector) if packed else numbers_of(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return PlainJSON({"object": "list", "data": data, "model": hosted.name, "usage": usage})


def base64_of(vector_D: np.ndarray) -> str:
    """float32, little-endian, in base64: what OpenAI's clients ask for unless told."""
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode("ascii")


def numbers_of(vector_D: np.ndarray) -> list[float]:
    """Plain numbers."""
    return vector_D.astype(np.float64).round(DECIMALS).tolist()
