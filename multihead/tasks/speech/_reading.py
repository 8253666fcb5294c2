"""Texts as they are read aloud: one plain form, then characters or Mandarin syllables, in sentences."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from multihead.codec.text import TextCodec
from multihead.codec.transcript import HAN, PinyinCodec
from multihead.errors import UserError, tr

Units = Literal["char", "pinyin"]
_HAN = re.compile(f"[{HAN}]")
# "3.5" is one number: a sign ends a sentence before a blank or a Chinese character.
_SENTENCE = re.compile(f"(?<=[.!?;])(?:\\s+|(?=[{HAN}]))|(?<=。)\\s*")
_CLAUSE = re.compile(f"(?<=[,:])(?:\\s+|(?=[{HAN}]))|(?<=、)\\s*")
_SIGNS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})


def plain(text: str) -> str:
    """Full-width folded (NFKC), lower case, signs in their simple form, no control characters, single blanks."""
    folded = unicodedata.normalize("NFKC", text.translate(_SIGNS)).lower()
    shown = "".join(" " if c.isspace() else c for c in folded if c.isspace() or unicodedata.category(c)[0] != "C")
    return re.sub(r"([.!?,;:])[.!?,;: ]*(?=[.!?,;:])", "", " ".join(shown.split()))


def sentences(text: str, longest: int) -> list[str]:
    """A text in pieces of at most `longest` characters: at the ends of sentences, else of clauses, else of
    words, else anywhere."""
    found: list[str] = []
    for sentence in filter(None, _SENTENCE.split(text)):
        if len(sentence) <= longest:
            found.append(sentence)
            continue
        for clause in filter(None, _CLAUSE.split(sentence)):
            found += textwrap.wrap(clause, longest, break_on_hyphens=False)
    joined: list[str] = []
    for piece in found:
        if joined and len(joined[-1]) + len(piece) < longest:
            joined[-1] += " " + piece
        else:
            joined.append(piece)
    return joined


class Reading:
    """Texts → ids (S,) int32: <bos>, units, <eos>; of a long text several of these, one after the other.

    Args:
        longest: characters of the longest text learned from; longer ones are cut into sentences.
    """

    def __init__(self, kind: Units, units: TextCodec | PinyinCodec, longest: int) -> None:
        self.kind, self.units, self.longest = kind, units, longest
        self.bos, self.eos, self.vocab_size = units.bos, units.eos, units.vocab_size

    @classmethod
    def fit(cls, texts: Iterable[str], kind: Units | Literal["auto"] = "auto") -> Reading:
        """The units of `texts`, which may be read again; "auto": pinyin where most characters are Chinese."""
        longest = total = chinese = 0
        for text in texts:
            size = len(plain(text))
            longest, total, chinese = max(longest, size), total + size, chinese + len(_HAN.findall(text))
        if kind == "auto":
            kind = "pinyin" if 2 * chinese > total else "char"
        shown = map(plain, texts)
        units = PinyinCodec.fit(shown) if kind == "pinyin" else TextCodec.fit(shown, "char", 4000)
        return cls(kind, units, max(longest, 8))

    def encode(self, text: str) -> np.ndarray:
        """UserError where nothing of the text can be read."""
        parts = []
        for piece in sentences(plain(text), self.longest):
            ids = self.units.encode(piece)
            ids = ids[ids != self.units.unk]
            if len(ids):
                parts.append(np.concatenate(([self.bos], ids, [self.eos])))
        if not parts:
            raise UserError(tr(f"there is nothing in {text[:40]!r} that this model can read aloud",
                               f"{text[:40]!r} 里没有这个模型能读出的内容"))
        return np.concatenate(parts).astype(np.int32)

    def parts(self, ids: np.ndarray) -> list[np.ndarray]:
        """The sentences of what `encode` gave."""
        return np.split(ids, np.flatnonzero(ids == self.bos)[1:])

    def shown(self, ids: np.ndarray) -> list[str]:
        """What each id reads."""
        names = {self.bos: "⟨", self.eos: "⟩"}
        if isinstance(self.units, PinyinCodec):
            return [names.get(int(i)) or self.units.pieces([int(i)])[0] for i in ids]
        return [names.get(int(i)) or self.units.decode([int(i)]) for i in ids]

    def save(self, folder: Path) -> None:
        """Write the units into `folder`."""
        self.units.save(folder / "units")

    @classmethod
    def load(cls, folder: Path, kind: Units, longest: int) -> Reading:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        held = PinyinCodec if kind == "pinyin" else TextCodec
        return cls(kind, held.load(folder / "units"), longest)
