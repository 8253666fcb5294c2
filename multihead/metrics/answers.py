"""Exact match and F1 of short answers, each as its data set's own script counts them.

"squad": SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, section 6.1; 2018, section 4): lower case, without punctuation and
articles, words split at blanks; F1 of the two bags of words.

"cmrc": CMRC 2018 (Cui et al. 2019, section 4.1), and DRCD and other Chinese sets: Chinese by characters, other scripts
by words, without punctuation; F1 of the longest common substring.

Of several true answers the best fitting counts. Where there is none to be found, the empty answer is the right one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

Rules = Literal["squad", "cmrc"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_MARKS = str.maketrans("", "", string.punctuation)
# The marks that the script of CMRC 2018 passes over; others, such as the ASCII comma, stay.
_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
# Stands for NLTK's word_tokenize on what is not Chinese: numbers and words whole, every other mark alone.
_WORDS = re.compile(r"[^\W_]+(?:[.,'][^\W_]+)*|[^\w\s]|_")


def normal(text: str, rules: Rules) -> str:
    """The text as exact match compares it."""
    if rules == "squad":
        return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_MARKS)).split())
    return "".join(c for c in text.lower().strip() if c not in _MARKS)


def pieces(text: str, rules: Rules) -> list[str]:
    """The words, or characters and words, that F1 counts."""
    if rules == "squad":
        return normal(text, rules).split()
    found: list[str] = []
    rest = ""
    for c in text.lower().strip():
        if c in _MARKS:
            continue
        if _CHINESE.match(c):
            found += [*_WORDS.findall(rest), c]
            rest = ""
        else:
            rest += c
    return found + _WORDS.findall(rest)


def common_substring(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest run of pieces that stands in both."""
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0] * (len(b) + 1)
        for j, y in enumerate(b):
            if x == y:
                row[j + 1] = above[j] + 1
                best = max(best, row[j + 1])
    return best


def overlap(guess: Sequence[str], truth: Sequence[str], rules: Rules) -> float:
    """F1 of two lists of pieces; of two empty ones 1."""
    if not guess or not truth:
        return float(list(guess) == list(truth))
    if rules == "squad":
        same = sum((Counter(guess) & Counter(truth)).values())
    else:
        same = common_substring(guess, truth)
    return 2 * same / (len(guess) + len(truth))


def marks(guess: str, truths: Sequence[str], rules: Rules) -> tuple[float, float]:
    """(exact match, F1) of one answer against the true ones; none of them: against no answer."""
    truths = truths or [""]
    if rules == "squad" and any(kept := [t for t in truths if normal(t, rules)]):
        truths = kept
    exact = max(float(normal(guess, rules) == normal(truth, rules)) for truth in truths)
    found = pieces(guess, rules)
    return exact, max(overlap(found, pieces(truth, rules), rules) for truth in truths)


def each(guesses: Iterable[str], truths: Iterable[Sequence[str]], rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each question: two arrays (n,)."""
    found = [marks(guess, true, rules) for guess, true in zip(guesses, truths, strict=True)]
    exact, f1 = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return exact, f1


def rules_for(truths: Iterable[Sequence[str]]) -> Rules:
    """"cmrc" where most of the true answers that hold a letter hold a Chinese one, else "squad"."""
    chinese = other = 0
    for answers in truths:
        for text in answers[:1]:
            if _CHINESE.search(text):
                chinese += 1
            elif any(c.isalpha() for c in text):
                other += 1
    return "cmrc" if chinese > other else "squad"


def best_threshold(
    none: np.ndarray, answered: np.ndarray, silent: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(best mean, its threshold) where a question is answered unless its `none` lies above the threshold.

    SQuAD 2.0's script looks for it in the same way.

    Args:
        none: (n,) how much speaks for no answer.
        answered: (n,) the mark of the answer.
        silent: (n,) the mark of giving none.
        weights: (R, n), see `metrics.intervals.bootstrap`; both results are then (R,).
    """
    order = np.argsort(none, kind="stable")
    w = np.ones((1, len(none))) if weights is None else weights[:, order]
    gain = np.cumsum(w * (answered - silent)[order], axis=1)
    # Behind each question, if the next one lies truly above it; or before all of them.
    last = np.append(np.diff(none[order]) > 0, True)
    gain = np.where(last, gain, -np.inf)
    at = gain.argmax(1)
    gained = gain[np.arange(len(gain)), at]
    rows = np.maximum(w.sum(1), 1)
    base = (w * silent[order]).sum(1) / rows
    value = base + np.maximum(gained, 0) / rows
    threshold = np.where(gained > 0, none[order][at], none[order][:1] - 1)
    return (value[0], threshold[0]) if weights is None else (value, threshold)
