"""What a language model makes of a text while it is being found: shallow fusion (Gulcehre et al. 2015, section 4.1).

A search over one vocabulary asks a model of another: texts are written out, as far as their words are complete, and
read by the model's own tokenizer. Its states are kept by the tokens they have read.

Legend: V vocabulary, n texts.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from multihead.codec.transcript import HAN, KANA
from multihead.generation.loop import Emitter, padded
from multihead.transformer.cache import Cache

Tokens = tuple[int, ...]
STATES = 128
"""States that are kept: as many as the beams of a search need, the least lately used are let go."""
NUMBERS = 1 << 23
"""Log-probabilities that are kept (32 MB)."""
TOTALS = 1 << 16
_OPEN = re.compile(f"[^\\s{HAN}{KANA}]+\\Z")


class TextScorer:
    """Texts → log P of each by a language model that has ``start`` and ``step``.

    Args:
        codec: its tokenizer.
    """

    def __init__(self, model: Emitter, codec: Any) -> None:
        self.model, self.codec = model, codec
        self.begin: Tokens = tuple(codec.begin)
        self.letters = getattr(codec, "kind", "") == "char"
        """True where each character is a token, so that a word is judged before it is complete."""
        self._states: OrderedDict[Tokens, Cache] = OrderedDict()
        self._next: OrderedDict[Tokens, np.ndarray] = OrderedDict()
        self._totals: dict[Tokens, float] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """log P of the tokens of each text after the beginning of one: (n,). An empty text has 0."""
        ids = [self.begin + tuple(self.codec.encode(text).tolist()) for text in texts]
        if len(self._totals) > TOTALS:
            self._totals.clear()
        while True:
            missing = list(OrderedDict.fromkeys(p for one in ids if (p := self._first_unknown(one)) is not None))
            if not missing:
                return np.array([self._totals.get(one, 0.0) for one in ids])
            for first in range(0, len(missing), STATES // 2):
                self._read(missing[first : first + STATES // 2])

    def _first_unknown(self, ids: Tokens) -> Tokens | None:
        """Sums up as far as is known: what must be read for one token more, None where the sum is there."""
        known = len(ids)
        while known > len(self.begin) and ids[:known] not in self._totals:
            known -= 1
        for end in range(known, len(ids)):
            prefix = self._window(ids[:end])
            if prefix not in self._next:
                return prefix
            self._next.move_to_end(prefix)
            total = self._totals.get(ids[:end], 0.0) if end > len(self.begin) else 0.0
            self._totals[ids[: end + 1]] = total + float(self._next[prefix][ids[end]])
        return None

    def _window(self, ids: Tokens) -> Tokens:
        """The last tokens that the model can hold and go on from; it moves by halves, so that states can be kept."""
        over = len(ids) - (self.model.max_length - 1)
        half = max(1, self.model.max_length // 2)
        return ids if over <= 0 else ids[-(-over // half) * half :]

    def _read(self, prefixes: Sequence[Tokens]) -> None:
        """The next token's log-probabilities after each of `prefixes`, by one step where the state before is known."""
        stepped = [p for p in prefixes if p[:-1] in self._states]
        begun = [p for p in prefixes if p[:-1] not in self._states]
        if begun:
            self._keep(begun, *self.model.start(padded(begun, next(self.model.parameters()).device)))
        if stepped:
            state = self._states[stepped[0][:-1]].select([0])
            for prefix in stepped[1:]:
                state.join(self._states[prefix[:-1]])
            last = torch.tensor([prefix[-1] for prefix in stepped], device=next(self.model.parameters()).device)
            logits_nV = self.model.step(last, state)
            for prefix in stepped:
                self._states.move_to_end(prefix[:-1])
            self._keep(stepped, state, logits_nV)

    def _keep(self, prefixes: Sequence[Tokens], state: Cache, logits_nV: torch.Tensor) -> None:
        logp_nV = logits_nV.float().log_softmax(-1).cpu().numpy()
        for i, prefix in enumerate(prefixes):
            self._states[prefix], self._next[prefix] = state.select([i]), logp_nV[i]
        while len(self._states) > STATES:
            self._states.popitem(last=False)
        while len(self._next) > max(2 * STATES, NUMBERS // logp_nV.shape[1]):
            self._next.popitem(last=False)


@dataclass
class Fusion:
    """Prefixes of a search → what a language model adds to their scores.

    Args:
        write: the search's ids → their text, the last word perhaps not complete.
        weight: of the language model's log-probability.
    """

    texts: TextScorer
    write: Callable[[Sequence[int]], str]
    weight: float

    def scores(self, prefixes: Sequence[Sequence[int]], whole: bool = False) -> np.ndarray:
        """weight · log P of each, (n,); unless it is `whole`, without a word at its end that may go on."""
        texts = [self.write(prefix) for prefix in prefixes]
        if not whole and not self.texts.letters:
            texts = [completed(text) for text in texts]
        return self.weight * self.texts([text.strip().rstrip("\ufffd") for text in texts])


def completed(text: str) -> str:
    """The text without a word at its end to which letters may still come; a Chinese or Japanese character is complete.
    """
    return _OPEN.sub("", text.rstrip("\ufffd"))
