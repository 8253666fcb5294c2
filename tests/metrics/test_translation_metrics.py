"""BLEU and chrF: the same as sacrebleu's own functions, whole and resampled; which tokenizer is taken."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from multihead.errors import UserError
from multihead.metrics.intervals import bootstrap
from multihead.metrics.translation import TranslationScores, tokenizer_for

sacrebleu = pytest.importorskip("sacrebleu")

TRUTHS = ["Ein Mann läuft durch den Park .", "Zwei Hunde spielen im Schnee.", "Das ist ein kleines Haus.", "Sie singt."]
GUESSES = ["Ein Mann läuft im Park .", "Zwei Hunde spielen im Schnee.", "Dies ist ein Haus.", "Er tanzt laut."]


def test_the_figures_are_sacrebleus() -> None:
    found = TranslationScores(GUESSES, TRUTHS)
    assert found.scores()["bleu"] == pytest.approx(sacrebleu.corpus_bleu(GUESSES, [TRUTHS]).score, abs=1e-9)
    assert found.scores()["chrf"] == pytest.approx(sacrebleu.corpus_chrf(GUESSES, [TRUTHS]).score, abs=1e-9)
    assert "tok:13a" in found.signatures()["bleu"] and sacrebleu.__version__ in found.signatures()["bleu"]


def test_a_resample_is_what_its_rows_would_score() -> None:
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 3, 1]])
    found = TranslationScores(GUESSES, TRUTHS).scores(weights)
    for i, row in enumerate(weights):
        chosen = [j for j, count in enumerate(row) for _ in range(count)]
        guesses, truths = [GUESSES[j] for j in chosen], [TRUTHS[j] for j in chosen]
        assert found["bleu"][i] == pytest.approx(sacrebleu.corpus_bleu(guesses, [truths]).score, abs=1e-9)
        assert found["chrf"][i] == pytest.approx(sacrebleu.corpus_chrf(guesses, [truths]).score, abs=1e-9)


def test_intervals_hold_the_figure() -> None:
    def score(answers: list[str], rows: list[str], weights: np.ndarray | None = None) -> dict[str, object]:
        return TranslationScores(answers, rows).scores(weights)

    value, low, high = bootstrap(score, GUESSES * 5, TRUTHS * 5, resamples=200)["bleu"]
    assert low <= value <= high


def test_chinese_is_cut_as_chinese() -> None:
    assert tokenizer_for(["我们昨天去了公园。", "他说 OK。"]) == "zh"
    assert tokenizer_for(["私は学生です。"]) == "char"
    assert tokenizer_for(["Ein Haus.", "Straße"]) == tokenizer_for([]) == "13a"
    found = TranslationScores(["我们去公园。"], ["我们去了公园。"])
    assert "tok:zh" in found.signatures()["bleu"] and found.scores()["bleu"] > 20


def test_without_the_package_a_person_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"multihead\[translation\]"):
        TranslationScores(["a"], ["a"])
