"""Classification figures against scikit-learn and by hand; the weighted form against repeating rows."""

from __future__ import annotations

import numpy as np
import pytest

from multihead.metrics import text as metrics

sklearn = pytest.importorskip("sklearn.metrics")


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True classes, guesses, probabilities (n, C). The last class occurs in neither."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes - 1), size=n)
    p = np.concatenate((p, np.zeros((n, 1))), axis=1)
    return rng.integers(classes - 1, size=n), p.argmax(1), p


@pytest.mark.parametrize("seed", range(3))
def test_one_label_agrees_with_scikit_learn(seed: int) -> None:
    target, guess, p = drawn(200, 5, seed)
    hits = metrics.hits(target, guess, 5)
    assert metrics.accuracy(target, guess) == pytest.approx(sklearn.accuracy_score(target, guess))
    assert metrics.macro_f1(*hits) == pytest.approx(sklearn.f1_score(target, guess, average="macro"))
    assert metrics.micro_f1(*hits) == pytest.approx(sklearn.f1_score(target, guess, average="micro"))
    assert (metrics.confusion(target, guess, 5) == sklearn.confusion_matrix(target, guess, labels=range(5))).all()
    likely = np.clip(p[np.arange(200), target], 1e-12, None)
    assert metrics.log_loss(likely) == pytest.approx(sklearn.log_loss(target, p[:, :4], labels=range(4)))
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        target, guess, labels=range(5), zero_division=0
    )
    for i, line in enumerate(metrics.class_table("abcde", *hits)):
        assert line == {
            "label": "abcde"[i],
            "support": support[i],
            "precision": pytest.approx(precision[i]),
            "recall": pytest.approx(recall[i]),
            "f1": pytest.approx(f1[i]),
        }


def test_several_labels_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target, p = rng.random((150, 6)) < 0.3, rng.random((150, 6))
    guess = p > 0.6
    hits = metrics.label_hits(target, guess)
    assert metrics.micro_f1(*hits) == pytest.approx(sklearn.f1_score(target, guess, average="micro"))
    assert metrics.macro_f1(*hits) == pytest.approx(sklearn.f1_score(target, guess, average="macro"))
    assert metrics.exact_match(target, guess) == pytest.approx(sklearn.accuracy_score(target, guess))
    each = [sklearn.log_loss(target[:, c], p[:, c]) for c in range(6)]
    assert metrics.binary_log_loss(p, target) == pytest.approx(np.mean(each))


def test_calibration_error_by_hand() -> None:
    # Two bins of ten hold rows: (0.8, 0.9] with mean 0.85, half right; (0.9, 1] with mean 1, all right.
    sure = np.array([0.84, 0.86, 1.0, 1.0])
    right = np.array([True, False, True, True])
    assert metrics.calibration_error(sure, right, bins=10) == pytest.approx(0.5 * abs(0.5 - 0.85))
    held = metrics.reliability(sure, right, bins=10)
    assert held["count"] == [2, 2] and held["accuracy"] == [0.5, 1.0]
    assert held["confidence"] == pytest.approx([0.85, 1.0])
    assert metrics.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_a_model_that_means_what_it_says_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random(200_000)
    assert metrics.calibration_error(sure, rng.random(200_000) < sure) < 0.01
    assert metrics.calibration_error(np.ones(10), np.arange(10) < 7) == pytest.approx(0.3)


def test_weights_are_rows_repeated() -> None:
    target, guess, p = drawn(40, 4, 7)
    sure, right = p.max(1), target == guess
    several, given = p > 0.3, p > 0.25
    weights = np.random.default_rng(1).integers(0, 4, size=(9, 40)).astype(float)

    def figures(index: np.ndarray | slice, w: np.ndarray | None = None) -> dict[str, np.ndarray]:
        t, g, s, m, v = target[index], guess[index], sure[index], several[index], given[index]
        return {
            "accuracy": metrics.accuracy(t, g, w),
            "macro": metrics.macro_f1(*metrics.hits(t, g, 4, w)),
            "calibration": metrics.calibration_error(s, right[index], w),
            "log_loss": metrics.log_loss(s, w),
            "micro": metrics.micro_f1(*metrics.label_hits(m, v, w)),
            "macro of several": metrics.macro_f1(*metrics.label_hits(m, v, w)),
            "exact": metrics.exact_match(m, v, w),
            "binary": metrics.binary_log_loss(p[index], m, w),
        }

    at_once = figures(slice(None), weights)
    for r, w in enumerate(weights):
        alone = figures(np.repeat(np.arange(40), w.astype(int)))
        assert {k: v[r] for k, v in at_once.items()} == pytest.approx({k: float(v) for k, v in alone.items()})


def test_a_resample_without_a_class_or_a_row_is_no_number() -> None:
    target = np.array([0, 1])
    weights = np.array([[2.0, 0.0], [0.0, 0.0]])
    macro = metrics.macro_f1(*metrics.hits(target, target, 2, weights))
    assert macro[0] == 1 and np.isnan(macro[1])
    assert np.isnan(metrics.accuracy(target, target, weights)[1])
