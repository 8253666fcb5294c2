"""Mel-cepstral distance: closed forms, and the best path by trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from multihead.metrics.spectra import cepstra, distortion, warped


def best(cost: np.ndarray) -> float:
    """The least sum over all paths from the first pair to the last."""
    n, m = cost.shape

    def go(i: int, j: int) -> float:
        ways = [go(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        return cost[i, j] + (min(ways) if ways else 0.0)

    return go(n - 1, m - 1)


@pytest.mark.parametrize(("n", "m"), list(itertools.product((1, 2, 5), (1, 3, 6))))
def test_the_path_is_the_best_of_all(n: int, m: int) -> None:
    cost = np.random.default_rng(n * 10 + m).random((n, m))
    path = warped(cost)
    assert path[0] == (0, 0) and path[-1] == (n - 1, m - 1)
    assert sum(cost[i, j] for i, j in path) == pytest.approx(best(cost))


def test_stretched_speech_is_no_distance_away_and_loudness_is_none() -> None:
    a = np.random.default_rng(0).normal(size=(20, 40))
    assert distortion(a, np.repeat(a, 3, axis=0)) == pytest.approx(0, abs=1e-6)
    assert distortion(a, a + 5.0) == pytest.approx(0, abs=1e-5)


def test_it_is_the_distance_of_smoothed_spectra_in_decibels() -> None:
    bands, step = 80, 0.3
    ripple = step * np.cos(np.pi * 3 * (np.arange(bands) + 0.5) / bands)  # ln |S| = Σ c cos(n ω), c₃ = step
    flat = np.zeros((4, bands))
    assert distortion(flat + ripple, flat) == pytest.approx(10 / math.log(10) * math.sqrt(2 * step**2))
    decibels = 20 / math.log(10) * ripple
    assert distortion(flat + ripple, flat) == pytest.approx(math.sqrt(np.mean(decibels**2)))
    scipy = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(1).normal(size=(3, bands))
    np.testing.assert_allclose(cepstra(x), scipy.dct(x, norm="ortho")[:, 1:14])
