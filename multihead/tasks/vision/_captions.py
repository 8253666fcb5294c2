"""Captions of a picture: several may lie behind one another in a row, each of pieces; training shows one at a time.

A caption is <bos>, then each of its pieces with <eos> behind it. It has one piece, or with `keywords` as many as it
lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from multihead.codec.text import TextCodec
from multihead.errors import UserError, tr

_PIECES = re.compile(r"[,，、;；|\n]+")


def read(texts: Iterable[str], words: TextCodec, most: int, keywords: bool) -> np.ndarray:
    """The ids of all captions of a picture, int32. UserError where one has more than `most`."""
    return np.concatenate([_one(text, words, most, keywords) for text in texts]).astype(np.int32)


def _one(caption: str, words: TextCodec, most: int, keywords: bool) -> np.ndarray:
    pieces = _PIECES.split(caption) if keywords else [caption]
    parts = [[*words.encode(piece.strip()), words.eos] for piece in pieces if piece.strip()]
    ids = np.array([words.bos, *(id for part in parts for id in part)], dtype=np.int32)
    if len(ids) > most:
        raise UserError(tr(f"the caption has {len(ids)} pieces; at most {most} are read (options.caption_length)",
                           f"描述有 {len(ids)} 个片段；至多读 {most} 个（options.caption_length）"))
    return ids


def drawn(ids: np.ndarray, words: TextCodec, keywords: bool, rng: np.random.Generator) -> np.ndarray:
    """One of a picture's captions; of keywords, some of them in any order."""
    starts = np.flatnonzero(ids == words.bos)
    chosen = np.split(ids, starts[1:])[int(rng.integers(len(starts)))]
    if not keywords:
        return chosen
    pieces = np.split(chosen[1:], np.flatnonzero(chosen[1:] == words.eos)[:-1] + 1)
    order = rng.permutation(len(pieces))[: int(rng.integers(len(pieces))) + 1]
    return np.concatenate([chosen[:1], *(pieces[i] for i in order)])


def first(ids: np.ndarray, words: TextCodec) -> np.ndarray:
    """The first of a picture's captions."""
    return ids[: np.flatnonzero(np.append(ids[1:], words.bos) == words.bos)[0] + 1]
