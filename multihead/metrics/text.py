"""Figures for classification: one label a text, or several.

Legend: n rows, C classes, R resamples. Every figure takes optional `weights` (R, n), how often each row counts in each
of R resamples, and then comes as an array (R,) instead of a number: a bootstrap is a few matrix products instead of R
passes over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
FLOOR = 1e-15
"""Smallest probability whose logarithm is taken."""


def total(values: Array, weights: Array | None = None) -> Array:
    """Sum over rows: values (n, …) → (…), or with weights (R, n) → (R, …)."""
    values = np.asarray(values, dtype=np.float64)
    return values.sum(0) if weights is None else np.asarray(weights, dtype=np.float64) @ values


def mean(values: Array, weights: Array | None = None) -> Array:
    """Mean over rows: (n,) → (), or (R,). Of no rows: NaN."""
    rows = len(values) if weights is None else weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(total(values, weights), rows)


def grouped(values: Array, groups: Array, size: int, weights: Array | None = None) -> Array:
    """Sum of values (n,) within each group 0 … size − 1 of groups (n,): (size,), or (R, size)."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    if weights is None:
        return np.bincount(groups, values, minlength=size)
    out = np.zeros((len(weights), size))
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    if len(present):
        out[:, present] = np.add.reduceat((weights * values)[:, order], starts, axis=1)
    return out


def confusion(target: Array, guess: Array, classes: int) -> Array:
    """(C, C) counts: row = the true class, column = the guessed one."""
    cells = np.asarray(target, dtype=np.int64) * classes + np.asarray(guess, dtype=np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(target: Array, guess: Array, weights: Array | None = None) -> Array:
    """Share of rows whose guess (n,) is the target (n,)."""
    return mean(np.equal(target, guess), weights)


def hits(target: Array, guess: Array, classes: int, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """(right, guessed, true) counts of each class: each (C,), or (R, C)."""
    target, guess = np.asarray(target), np.asarray(guess)
    ones = np.ones(len(target))
    right = grouped(np.equal(target, guess), target, classes, weights)
    return right, grouped(ones, guess, classes, weights), grouped(ones, target, classes, weights)


def label_hits(target: Array, guess: Array, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """The same counts where a row has several labels: target and guess (n, C) bool."""
    target, guess = np.asarray(target, dtype=bool), np.asarray(guess, dtype=bool)
    return total(target & guess, weights), total(guess, weights), total(target, weights)


def per_class(right: Array, guessed: Array, true: Array) -> dict[str, Array]:
    """Precision, recall and F1 of each class (…, C) from its counts; NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": np.divide(right, guessed),
            "recall": np.divide(right, true),
            "f1": np.divide(2 * right, guessed + true),
        }


def class_table(names: Sequence[str], right: Array, guessed: Array, true: Array) -> list[dict[str, Any]]:
    """A line a class: label, support, precision, recall and F1; 0 where there is nothing to divide by."""
    each = per_class(right, guessed, true)
    return [
        {"label": name, "support": int(true[i]), **{key: float(np.nan_to_num(v[i])) for key, v in each.items()}}
        for i, name in enumerate(names)
    ]


def macro_f1(right: Array, guessed: Array, true: Array) -> Array:
    """Mean F1 over classes; one that neither occurs nor is guessed is left out. (…, C) → (…)."""
    f1 = per_class(right, guessed, true)["f1"]
    known = ~np.isnan(f1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(np.where(known, f1, 0.0).sum(-1), known.sum(-1))


def micro_f1(right: Array, guessed: Array, true: Array) -> Array:
    """F1 of all labels thrown together. (…, C) → (…)."""
    return per_class(right.sum(-1), guessed.sum(-1), true.sum(-1))["f1"]


def exact_match(target: Array, guess: Array, weights: Array | None = None) -> Array:
    """Share of rows whose whole set of labels (n, C) is right."""
    return mean(np.equal(target, guess).all(1), weights)


def log_loss(probability: Array, weights: Array | None = None) -> Array:
    """Mean −ln of the probability (n,) given to what is true."""
    return mean(-np.log(np.maximum(probability, FLOOR)), weights)


def binary_log_loss(probability: Array, target: Array, weights: Array | None = None) -> Array:
    """Mean cross-entropy a label, for several labels a row: probability (n, C), target (n, C) bool."""
    given = np.where(target, probability, 1.0 - np.asarray(probability, dtype=np.float64))
    return mean(-np.log(np.maximum(given, FLOOR)).mean(1), weights)


def calibration_error(confidence: Array, right: Array, weights: Array | None = None, bins: int = 15) -> Array:
    """How far confidence and accuracy lie apart: Σ over bins of (rows in it / rows) · |accuracy − mean confidence|.

    Bins are of equal width, (0, 1/bins], … (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2,
    "expected calibration error").

    Args:
        confidence: (n,) probability of each guess.
        right: (n,) whether the guess was right.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    gap = grouped(np.asarray(right, dtype=np.float64) - confidence, _bins(confidence, bins), bins, weights)
    rows = len(confidence) if weights is None else weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(np.abs(gap).sum(-1), rows)


def reliability(confidence: Array, right: Array, bins: int = 15) -> dict[str, list]:
    """The bins behind `calibration_error` that hold rows: mean confidence, accuracy and number of rows of each."""
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = _bins(confidence, bins)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    return {
        "confidence": (grouped(confidence, place, bins)[held] / count[held]).tolist(),
        "accuracy": (grouped(right, place, bins)[held] / count[held]).tolist(),
        "count": count[held].tolist(),
    }


def _bins(confidence: Array, bins: int) -> Array:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
