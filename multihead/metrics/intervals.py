"""How sure a figure is: intervals by resampling the rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

CELLS = 2_000_000
"""Weights held at once on the fast path: resamples × rows."""

Score = Callable[..., Mapping[str, Any]]
Intervals = dict[str, tuple[float, float, float]]
Drawn = dict[str, np.ndarray]


def bootstrap(
    score: Score,
    answers: Sequence[Any],
    rows: Sequence[Any],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Each metric of ``score(answers, rows)`` with its percentile interval: {metric: (value, low, high)}.

    Rows are drawn anew with replacement, `resamples` times; the interval holds the middle `confidence` of the figures
    (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3). It tells how much the figure owes to
    which rows were held out, not what another seed in training would give.

    A score with a parameter ``weights`` is asked many resamples at once: ``score(answers, rows, weights=w)`` with w
    (R, n), how often each of n rows counts in each of R resamples, gives arrays (R,). Any other is called once a
    resample, with the drawn answers and rows. Both draw the same rows for the same seed.

    Raises:
        ValueError: where there is no row, or as many answers as rows there are not.
    """
    if not answers or len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers to {len(rows)} rows")
    answers, rows = list(answers), list(rows)
    values = {name: float(value) for name, value in score(answers, rows).items()}
    rng = np.random.default_rng(seed)
    weighted = "weights" in inspect.signature(score).parameters
    drawn = (_weighted if weighted else _one_by_one)(score, answers, rows, resamples, rng)
    tail = (1 - confidence) / 2
    found = {}
    for name, value in values.items():
        figures = drawn[name][~np.isnan(drawn[name])]
        low, high = np.quantile(figures, (tail, 1 - tail)) if len(figures) else (np.nan, np.nan)
        found[name] = (value, float(low), float(high))
    return found


def paired(
    right: Sequence[bool], other: Sequence[bool], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same rows, with its 95 % percentile interval: (difference, low, high).

    Rows are resampled in pairs, so what makes a row hard for both cancels out.
    """
    difference = np.asarray(right, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    # Only how many rows differ each way matters, so a resample is one draw of three counts.
    shares = [(difference == value).mean() for value in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(len(difference), shares, size=resamples)
    figures = (counts[:, 2] - counts[:, 0]) / len(difference)
    low, high = np.quantile(figures, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def _weighted(score: Score, answers: list, rows: list, resamples: int, rng: np.random.Generator) -> Drawn:
    n, parts = len(rows), []
    size = max(1, CELLS // n)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(count)]).astype(np.float64)
        parts.append(score(answers, rows, weights=weights))
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in (parts[0] if parts else ())}


def _one_by_one(score: Score, answers: list, rows: list, resamples: int, rng: np.random.Generator) -> Drawn:
    found: dict[str, list[float]] = {}
    for _ in range(resamples):
        index = rng.integers(len(rows), size=len(rows)).tolist()
        pick = itemgetter(*index) if len(index) > 1 else lambda held: (held[0],)
        for name, value in score(pick(answers), pick(rows)).items():
            found.setdefault(name, []).append(float(value))
    return {name: np.array(figures) for name, figures in found.items()}
