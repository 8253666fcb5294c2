"""BLEU and chrF of translations, by sacrebleu, which also says how they were counted (its signature).

Legend: n rows, R resamples, S counts a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multihead.errors import UserError, tr

HAN = range(0x4E00, 0xA000)
KANA = range(0x3040, 0x3100)
HANGUL = range(0xAC00, 0xD7B0)


def sacrebleu() -> Any:
    """The package. UserError where it is not installed."""
    try:
        import sacrebleu as package
    except ImportError:
        raise UserError(tr(
            "translations are measured by sacrebleu, which is not installed: pip install 'multihead[translation]'",
            "翻译的评分需要 sacrebleu，尚未安装：pip install 'multihead[translation]'",
        )) from None
    return package


def tokenizer_for(references: Sequence[str]) -> str:
    """How sacrebleu should cut `references` into words for BLEU: "zh" where most letters are Chinese, "char" for
    Japanese and Korean, else its default, "13a"."""
    letters = [ord(c) for text in references[:1000] for c in text if c.isalpha()]
    if sum(c in KANA or c in HANGUL for c in letters) > 0.2 * len(letters):
        return "char"
    return "zh" if sum(c in HAN for c in letters) > 0.3 * len(letters) else "13a"


class TranslationScores:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of translations against one reference each.

    Args:
        tokenize: sacrebleu's tokenizer for BLEU; None: by the references, see `tokenizer_for`.
    """

    def __init__(self, translations: Sequence[str], references: Sequence[str], tokenize: str | None = None) -> None:
        package = sacrebleu()
        self.bleu = package.metrics.BLEU(tokenize=tokenize or tokenizer_for(references))
        self.chrf = package.metrics.CHRF()
        texts, truths = list(translations), [list(references)]
        self._counts = [
            np.array(metric._extract_corpus_statistics(texts, truths), dtype=np.float64).reshape(len(texts), -1)
            for metric in (self.bleu, self.chrf)
        ]

    def signatures(self) -> dict[str, str]:
        """How each figure was counted, in sacrebleu's words."""
        return {"bleu": str(self.bleu.get_signature()), "chrf": str(self.chrf.get_signature())}

    def scores(self, weights: np.ndarray | None = None) -> dict[str, Any]:
        """``{"bleu", "chrf"}``, 0 to 100.

        Args:
            weights: (R, n), how often each row counts in each of R resamples; figures are then arrays (R,).
        """
        found: dict[str, Any] = {}
        for name, metric, counts_nS in zip(("bleu", "chrf"), (self.bleu, self.chrf), self._counts, strict=True):
            sums = counts_nS.sum(0)[None] if weights is None else np.asarray(weights) @ counts_nS
            figures = [metric._compute_score_from_stats(np.rint(row).astype(int).tolist()).score for row in sums]
            found[name] = figures[0] if weights is None else np.array(figures)
        return found
