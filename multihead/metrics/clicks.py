"""Figures for foretold clicks: how well they are ordered, and whether the probabilities are true.

Legend: n rows, R resamples. As in `multihead.metrics.text`, every figure takes optional `weights` (R, n), how often
each row counts in each of R resamples, and then comes as an array (R,).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from multihead.metrics.text import FLOOR, Array, grouped, mean, total


def _runs(*keys: Array) -> Array:
    """Where runs of neighbours that are equal in all `keys` begin."""
    new = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.flatnonzero(np.r_[True, new])


def _pairs(probability: Array, clicked: Array, group: Array, weights: Array | None) -> tuple[Array, Array, Array]:
    """Of each group: pairs of a click and a non-click in the right order (ties half), all such pairs, and rows."""
    order = np.lexsort((probability, group))
    p, y, g = probability[order], clicked[order].astype(np.float64), group[order]
    w = np.ones((1, len(p))) if weights is None else np.asarray(weights, dtype=np.float64)[:, order]
    ties = _runs(g, p)
    yes = np.add.reduceat(w * y, ties, axis=1)
    no = np.add.reduceat(w * (1 - y), ties, axis=1)
    of = g[ties]
    starts = _runs(of)
    before = np.cumsum(no, axis=1) - no
    # Non-clicks of earlier groups do not count: what had been reached where this group began.
    base = np.repeat(before[:, starts], np.diff(np.r_[starts, len(of)]), axis=1)
    right = np.add.reduceat(yes * (before - base + no / 2), starts, axis=1)
    clicks, others = np.add.reduceat(yes, starts, axis=1), np.add.reduceat(no, starts, axis=1)
    return right, clicks * others, clicks + others


def auc(probability: Array, clicked: Array, weights: Array | None = None) -> Array:
    """Share of the pairs of a click and a non-click in which the click has the higher probability, ties half: the area
    under the ROC curve (Hanley & McNeil 1982). NaN where all rows are of one kind.

    Args:
        probability: (n,).
        clicked: (n,) bool.
    """
    return grouped_auc(probability, clicked, np.zeros(len(probability)), weights)


def grouped_auc(probability: Array, clicked: Array, group: Array, weights: Array | None = None) -> Array:
    """Mean over groups of the AUC within each, by their rows; groups with clicks alone or none are left out (Zhu et al.
    2017, "Optimized Cost per Click in Taobao Display Advertising", section 5.1, GAUC).

    Args:
        group: (n,) a number for each row's group, the user.
    """
    probability, clicked = np.asarray(probability, dtype=np.float64), np.asarray(clicked)
    if not len(probability):
        return np.array(np.nan)
    right, pairs, rows = _pairs(probability, clicked, np.asarray(group, dtype=np.float64), weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        one = np.where(pairs > 0, right / pairs, 0.0)
        found = (one * rows).sum(1) / np.where(pairs > 0, rows, 0.0).sum(1)
    return found[0] if weights is None else found


def log_loss(probability: Array, clicked: Array, weights: Array | None = None) -> Array:
    """Mean of −ln of the probability of what happened."""
    p = np.clip(np.asarray(probability, dtype=np.float64), FLOOR, 1 - FLOOR)
    return mean(-np.where(clicked, np.log(p), np.log1p(-p)), weights)


def bins_of(probability: Array, bins: int) -> Array:
    """(n,) the bin of each row: as many rows in each as can be without parting equal probabilities."""
    probability = np.asarray(probability, dtype=np.float64)
    if not len(probability):
        return np.zeros(0, dtype=np.int64)
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, probability, side="right")


def calibration_error(probability: Array, clicked: Array, weights: Array | None = None, bins: int = 15) -> Array:
    """Σ over bins of equally many rows of (rows in it / rows) · |share of clicks − mean probability|: clicks are rare,
    and bins of equal width would put nearly all rows into one (Nguyen & O'Connor 2015, section 4, adaptive binning)."""
    probability = np.asarray(probability, dtype=np.float64)
    gap = grouped(np.asarray(clicked, dtype=np.float64) - probability, bins_of(probability, bins), bins, weights)
    rows = len(probability) if weights is None else weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(np.abs(gap).sum(-1), rows)


def expected_over_clicks(probability: Array, clicked: Array, weights: Array | None = None) -> Array:
    """Clicks foretold over clicks made; 1 is right. NaN where there was none."""
    made = total(np.asarray(clicked, dtype=np.float64), weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(made > 0, np.divide(total(probability, weights), made), np.nan)


def reliability(probability: Array, clicked: Array, bins: int = 15) -> dict[str, list[Any]]:
    """The bins behind `calibration_error`: mean probability, share of clicks and number of rows of each."""
    probability, place = np.asarray(probability, dtype=np.float64), bins_of(probability, bins)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    return {
        "confidence": (grouped(probability, place, bins)[held] / count[held]).tolist(),
        "accuracy": (grouped(clicked, place, bins)[held] / count[held]).tolist(),
        "count": count[held].tolist(),
    }
