"""Figures for pictures that get one label: whether it is among the first five, and which labels are mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multihead.metrics.text import Array, mean


def top_accuracy(probability: Array, target: Array, k: int, weights: Array | None = None) -> Array:
    """Share of rows whose target (n,) is among the k likeliest classes of probability (n, C); of equally likely ones,
    the first come first.

    Args:
        weights: (R, n) how often each row counts in each of R resamples; the result is then (R,).
    """
    order = np.argsort(-np.asarray(probability), axis=1, kind="stable")[:, :k]
    return mean((order == np.asarray(target)[:, None]).any(1), weights)


def confused_pairs(
    target: Array, guess: Array, names: Sequence[str], sure: Array, most: int = 6
) -> list[dict[str, Any]]:
    """The pairs of classes most often taken for one another, most frequent first.

    Args:
        sure: (n,) probability of each guess.

    Returns:
        dicts with truth, answer, count and rows: the numbers of the rows, the surest mistake first.
    """
    target, guess = np.asarray(target), np.asarray(guess)
    wrong = np.flatnonzero(target != guess)
    cells, counts = np.unique(target[wrong] * len(names) + guess[wrong], return_counts=True)
    found = []
    for at in np.argsort(-counts, kind="stable")[:most]:
        truth, answer = divmod(int(cells[at]), len(names))
        rows = wrong[(target[wrong] == truth) & (guess[wrong] == answer)]
        rows = rows[np.argsort(-np.asarray(sure)[rows], kind="stable")]
        found.append({"truth": names[truth], "answer": names[answer], "count": int(counts[at]), "rows": rows.tolist()})
    return found
