"""Bootstrap intervals against the closed form, their coverage, and the fast path against the slow one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from multihead.metrics.intervals import bootstrap, paired


def slow(answers: Sequence[float], rows: Sequence[float]) -> dict[str, float]:
    return {"right": float(np.mean(np.equal(answers, rows))), "spread": float(np.std(answers))}


def fast(answers: Sequence[float], rows: Sequence[float], weights: np.ndarray | None = None) -> dict[str, Any]:
    right, a = np.equal(answers, rows).astype(float), np.asarray(answers, dtype=float)
    w = np.ones((1, len(a))) if weights is None else weights
    n = w.sum(1)
    found = {"right": w @ right / n, "spread": np.sqrt(np.maximum(w @ a**2 / n - (w @ a / n) ** 2, 0))}
    return found if weights is not None else {k: v[0] for k, v in found.items()}


def test_the_interval_of_a_share_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    answers = (rng.random(2000) < 0.85).astype(int).tolist()
    value, low, high = bootstrap(fast, answers, [1] * 2000, resamples=4000)["right"]
    half = 1.96 * math.sqrt(value * (1 - value) / 2000)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    inner = bootstrap(fast, answers, [1] * 2000, resamples=4000, confidence=0.5)["right"]
    assert low < inner[1] < value < inner[2] < high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        answers = (rng.random(200) < 0.7).astype(int).tolist()
        _, low, high = bootstrap(fast, answers, [1] * 200, resamples=300, seed=trial)["right"]
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_both_paths_draw_the_same_rows() -> None:
    rng = np.random.default_rng(2)
    answers, rows = rng.integers(3, size=50).tolist(), rng.integers(3, size=50).tolist()
    one, other = bootstrap(slow, answers, rows, 200, seed=5), bootstrap(fast, answers, rows, 200, seed=5)
    for name in ("right", "spread"):
        assert one[name] == pytest.approx(other[name])
    assert bootstrap(slow, answers, rows, 200, seed=5) == one != bootstrap(slow, answers, rows, 200, seed=6)


def test_edges() -> None:
    assert bootstrap(slow, [1], [1], 20)["right"] == (1.0, 1.0, 1.0)
    nan = bootstrap(lambda answers, rows: {"x": float("nan")}, [1, 2], [1, 2], 5)["x"]
    assert all(math.isnan(v) for v in nan)
    for answers, rows in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="answers to"):
            bootstrap(slow, answers, rows)


def test_a_paired_difference_is_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    right, other = rng.random(3000) < 0.88, rng.random(3000) < 0.85
    value, low, high = paired(right.tolist(), other.tolist())
    difference = right.astype(float) - other.astype(float)
    half = 1.96 * difference.std() / math.sqrt(3000)
    assert value == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    assert paired(right.tolist(), right.tolist()) == (0.0, 0.0, 0.0)
