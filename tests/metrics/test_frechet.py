"""The Fréchet distance against closed forms."""

from __future__ import annotations

import numpy as np

from multihead.metrics.frechet import frechet, gaussians


def test_of_gaussians_whose_covariances_commute_it_is_the_difference_of_means_and_deviations() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    a, b, shift = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5), rng.standard_normal(5)
    covariances = [(turn * deviation**2) @ turn.T for deviation in (a, b)]
    found = gaussians(np.zeros(5), covariances[0], shift, covariances[1])
    np.testing.assert_allclose(found, (shift**2).sum() + ((a - b) ** 2).sum())


def test_of_any_gaussians_it_is_the_formula_with_the_matrix_root() -> None:
    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.standard_normal((2, 4, 4)))
    values, vectors = np.linalg.eig(a @ b)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = np.trace(a + b) - 2 * np.trace(root).real
    np.testing.assert_allclose(gaussians(np.ones(4), a, np.ones(4), b), expected, rtol=1e-8)


def test_of_things_it_is_that_of_their_mean_and_covariance_and_zero_of_the_same() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((300, 3)), 2 * rng.standard_normal((200, 3)) + 1
    expected = gaussians(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    np.testing.assert_allclose([frechet(a, b), frechet(b, a)], expected)
    assert frechet(a, a) < 1e-9 and frechet(a[:2], a[:2]) < 1e-9  # fewer things than features: still defined
    np.testing.assert_allclose(frechet(a + 3, a), 27, rtol=1e-6)
