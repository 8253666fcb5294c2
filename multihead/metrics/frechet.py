"""How far two sets of things are apart, as sets: Fréchet's distance of two Gaussians fitted to their features."""

from __future__ import annotations

import numpy as np


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features a (n, D) and b (m, D).

    The square of the 2-Wasserstein distance, ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Dowson & Landau 1982; for
    pictures Heusel et al. 2017, section 2). It depends on the features, and falls with n: compare only figures of the
    same features and as many things.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return gaussians(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def gaussians(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance of N(mean_a, cov_a) and N(mean_b, cov_b), each mean (D,) and covariance (D, D).

    tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½: real, and not negative, however singular they are.
    """
    cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    return float(max(0.0, ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(x, rowvar=False))


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
