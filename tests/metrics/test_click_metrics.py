"""Figures for clicks against scikit-learn's and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from multihead.metrics import clicks

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    p = np.round(rng.beta(1, 4, size=700), 2)  # many ties
    return p, rng.random(700) < p, rng.integers(60, size=700)


def test_auc_and_log_loss_are_scikit_learns_weighted_or_not(rows: tuple[np.ndarray, ...]) -> None:
    p, y, _ = rows
    assert clicks.auc(p, y) == pytest.approx(metrics.roc_auc_score(y, p))
    assert clicks.log_loss(p, y) == pytest.approx(metrics.log_loss(y, np.clip(p, 1e-15, 1 - 1e-15)))
    drawn = np.stack([np.bincount(np.random.default_rng(i).integers(700, size=700), minlength=700) for i in range(5)])
    weights = drawn.astype(float)
    for found, w in zip(clicks.auc(p, y, weights), weights, strict=True):
        assert found == pytest.approx(metrics.roc_auc_score(y, p, sample_weight=w))
    for found, w in zip(clicks.log_loss(p, y, weights), weights, strict=True):
        assert found == pytest.approx(metrics.log_loss(y, np.clip(p, 1e-15, 1 - 1e-15), sample_weight=w))


def test_grouped_auc_is_the_mean_of_each_groups_own(rows: tuple[np.ndarray, ...]) -> None:
    p, y, group = rows
    pairs = [(metrics.roc_auc_score(y[group == g], p[group == g]), (group == g).sum())
             for g in range(60) if 0 < y[group == g].sum() < (group == g).sum()]
    right = sum(value * many for value, many in pairs) / sum(many for _, many in pairs)
    assert clicks.grouped_auc(p, y, group) == pytest.approx(right)
    weights = np.ones((1, 700)) * 3.0
    assert clicks.grouped_auc(p, y, group, weights)[0] == pytest.approx(right)
    assert np.isnan(clicks.grouped_auc(p, np.ones(700, bool), group))


def test_calibration_takes_bins_of_equally_many_rows(rows: tuple[np.ndarray, ...]) -> None:
    _, _, _ = rows
    rng = np.random.default_rng(1)
    p = rng.random(3000) ** 4  # nearly all small: bins of equal width would hold nearly all rows in one
    y = rng.random(3000) < p
    drawn = clicks.reliability(p, y, 10)
    assert drawn["count"] == [300] * 10
    from sklearn.calibration import calibration_curve

    share, said = calibration_curve(y, p, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(drawn["accuracy"], share)
    np.testing.assert_allclose(drawn["confidence"], said)
    assert clicks.calibration_error(p, y, bins=10) == pytest.approx(np.abs(share - said).mean())
    assert clicks.calibration_error(p, y, np.ones((2, 3000)), 10) == pytest.approx([np.abs(share - said).mean()] * 2)
    assert clicks.expected_over_clicks(p, y) == pytest.approx(p.sum() / y.sum())
