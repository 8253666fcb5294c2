"""Error rates of transcripts: words, characters, whole texts right; and which words are taken for which.

Counted by jiwer (edit distance with the fewest substitutions, deletions and insertions).

Legend: n rows, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from multihead.errors import UserError, tr


def jiwer() -> Any:
    """The package. UserError where it is not installed."""
    try:
        import jiwer as package
    except ImportError:
        raise UserError(tr("transcripts are measured by jiwer, which is not installed: pip install 'multihead[speech]'",
                           "转写的评分需要 jiwer，尚未安装：pip install 'multihead[speech]'")) from None
    return package


class ErrorRates:
    """Errors of transcripts against one true text each.

    Args:
        answers, truths: both in the form that is compared.
        words: how a text is cut into words.
    """

    def __init__(self, answers: Sequence[str], truths: Sequence[str], words: Callable[[str], list[str]]) -> None:
        self._words = [(words(truth), words(answer)) for truth, answer in zip(truths, answers, strict=True)]
        cut = [(list(truth.replace(" ", "")), list(answer.replace(" ", ""))) for truth, answer in
               zip(truths, answers, strict=True)]
        self.word_errors, self.word_count = _counts(self._words)
        self.character_errors, self.character_count = _counts(cut)
        self.right = self.word_errors == 0

    def scores(self, weights: np.ndarray | None = None) -> dict[str, Any]:
        """``wer``, ``cer``: errors over the true words and characters; ``exact``: share of texts without one.

        Args:
            weights: (R, n), how often each row counts in each of R resamples; figures are then arrays (R,).
        """
        w_Rn = np.ones((1, len(self.right))) if weights is None else np.asarray(weights)

        def share(errors_n: np.ndarray, count_n: np.ndarray) -> Any:
            found = (w_Rn @ errors_n) / np.maximum(w_Rn @ count_n, 1)
            return found if weights is not None else float(found[0])

        return {
            "wer": share(self.word_errors, self.word_count),
            "cer": share(self.character_errors, self.character_count),
            "exact": share(self.right.astype(float), np.ones(len(self.right))),
        }

    def confused(self, most: int = 30) -> list[dict[str, Any]]:
        """The most frequent errors: true word, what was written in its place, how often. A word left out has "" for an
        answer, one put in "" for a truth."""
        package, found = jiwer(), Counter[tuple[str, str]]()
        for truth, answer in self._words:
            if truth == answer:
                continue
            for chunk in _process(package, truth, answer).alignments[0]:
                a, b = truth[chunk.ref_start_idx : chunk.ref_end_idx], answer[chunk.hyp_start_idx : chunk.hyp_end_idx]
                if chunk.type == "substitute":
                    found.update(zip(a, b, strict=True))
                elif chunk.type == "delete":
                    found.update((word, "") for word in a)
                elif chunk.type == "insert":
                    found.update(("", word) for word in b)
        ranked = sorted(found.items(), key=lambda one: (-one[1], one[0]))[:most]
        return [{"truth": truth, "answer": answer, "count": count} for (truth, answer), count in ranked]


def _process(package: Any, truth: list[str], answer: list[str]) -> Any:
    """jiwer's alignment of two lists, which it wants as texts: each item stands for one letter."""
    ids = {word: chr(0x4E00 + i) for i, word in enumerate(dict.fromkeys([*truth, *answer]))}
    return package.process_words(" ".join(ids[w] for w in truth), " ".join(ids[w] for w in answer))


def _counts(pairs: Sequence[tuple[list[str], list[str]]]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and true items of each row, (n,) each."""
    package = jiwer()
    errors = np.zeros(len(pairs))
    for i, (truth, answer) in enumerate(pairs):
        if truth == answer:
            continue
        if not truth or not answer:
            errors[i] = max(len(truth), len(answer))
        else:
            found = _process(package, truth, answer)
            errors[i] = found.substitutions + found.deletions + found.insertions
    return errors, np.array([len(truth) for truth, _ in pairs], dtype=float)
