"""Exact match and F1 of answers, against cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from multihead.metrics import answers
from multihead.metrics.intervals import bootstrap


@pytest.mark.parametrize(
    ("guess", "truths", "exact", "f1"),
    [
        ("the Norman dynasty", ["Norman Dynasty"], 1, 1),  # case and article
        ("France.", ["in France", "France"], 1, 1),  # punctuation; the best of several
        ("a big red dog", ["red dog house"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # big red dog / red dog house: 2 of 3
        ("10th and 11th centuries", ["11th centuries and 10th"], 0, 1),  # a bag: order does not count
        ("U.S.A", ["USA"], 1, 1),
        ("no", ["yes"], 0, 0),
        ("", ["something"], 0, 0),
        ("", [], 1, 1),  # no answer, and none to be found (SQuAD 2.0)
        ("something", [], 0, 0),
        ("theatre", ["the theatre"], 1, 1),  # an article is a word, not the beginning of one
    ],
)
def test_squad(guess: str, truths: list[str], exact: float, f1: float) -> None:
    assert answers.marks(guess, truths, "squad") == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("guess", "truths", "exact", "f1"),
    [
        ("光荣和ω-force", ["光荣和ω-force"], 1, 1),
        ("《战国无双3》。", ["战国无双3"], 1, 1),  # these marks are passed over
        ("北京市海淀区", ["海淀区"], 0, 2 * 3 / (6 + 3)),  # 3 characters in a row of 6 and 3
        ("海北淀", ["海淀区"], 0, 2 * 1 / 6),  # in a row: 海 or 淀 alone
        ("约1986年7月", ["1986年"], 0, 2 * 2 / (5 + 2)),  # 约 1986 年 7 月: a number is one piece
        ("Windows XP系统", ["windows xp"], 0, 2 * 2 / (4 + 2)),
        ("甲", ["乙", "甲乙"], 0, 2 / 3),
        ("甲", ["乙"], 0, 0),
        ("甲…", ["甲"], 0, 2 * 1 / 3),  # a lone … is none of the script's marks: its list holds two of them as one
    ],
)
def test_cmrc(guess: str, truths: list[str], exact: float, f1: float) -> None:
    assert answers.marks(guess, truths, "cmrc") == pytest.approx((exact, f1))


def test_the_longest_common_run_is_that_of_a_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), size=rng.integers(1, 9))) for _ in range(2))
        runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1) if a[i:j] in b]
        assert answers.common_substring(a, b) == max(map(len, runs), default=0)


def test_rules_follow_the_script_of_the_answers() -> None:
    assert answers.rules_for([["北京"], ["1986年"], ["1986"]]) == "cmrc"
    assert answers.rules_for([["Paris"], ["42"], []]) == "squad"


def test_the_best_threshold_is_that_of_a_search() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        n = int(rng.integers(1, 12))
        none = rng.integers(-3, 4, size=n).astype(float)
        answered, silent = rng.random(n), (rng.random(n) < 0.4).astype(float)
        limits = [none.min() - 1, *none]
        best = max(float(np.where(none > t, silent, answered).mean()) for t in limits)
        value, threshold = answers.best_threshold(none, answered, silent)
        assert value == pytest.approx(best)
        assert np.where(none > threshold, silent, answered).mean() == pytest.approx(best)


def test_weights_are_repeated_rows() -> None:
    rng = np.random.default_rng(3)
    none, answered, silent = rng.normal(size=9), rng.random(9), (rng.random(9) < 0.5).astype(float)
    weights = rng.integers(0, 3, size=(5, 9)).astype(float)
    value, _ = answers.best_threshold(none, answered, silent, weights)
    for w, v in zip(weights.astype(int), value, strict=True):
        drawn = np.repeat(np.arange(9), w)
        assert v == pytest.approx(answers.best_threshold(none[drawn], answered[drawn], silent[drawn])[0])


def test_intervals_of_both_ways_agree() -> None:
    """The figures of the task by weights and by drawn rows."""
    from multihead import task

    kind = task.find("question-answering")
    made = kind(kind.Options(no_answer=True))
    rng = np.random.default_rng(4)
    rows = [{"answers": [{"text": "甲乙丙"[: n % 4]}] if n % 4 else []} for n in range(30)]
    replies = [{"answer": a or None, "best": "甲乙", "none": float(rng.normal())}
               for a in rng.choice(["", "甲", "乙丙"], size=30).tolist()]  # fmt: skip
    fast = bootstrap(made.score, replies, rows, resamples=20)
    slow = bootstrap(lambda answers, rows: made.score(answers, rows), replies, rows, resamples=20)
    assert fast.keys() == slow.keys() == {"f1", "exact_match", "best_f1", "best_threshold"}
    for name in ("f1", "exact_match", "best_f1"):
        assert fast[name] == pytest.approx(slow[name])
