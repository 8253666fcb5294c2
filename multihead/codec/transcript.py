"""Texts of recordings: in one plain form, as words, and as Mandarin syllables with tones.

A syllable is written as it is typed, ``zhong1``: two units, its initial ``zh`` and its final with the tone, ``ong1``;
the neutral tone is 5. A final ends a syllable, so units read in a row give the syllables back.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multihead.codec.text import SPECIAL
from multihead.errors import UserError, tr
from multihead.run import write_json

FILE = "pinyin.json"
INITIALS = ("zh", "ch", "sh", *"bpmfdtnlgkhjqxrzcsyw")
HAN = "\u3400-\u9fff\uf900-\ufaff"
KANA = "\u3040-\u30ff"
_HAN = re.compile(f"[{HAN}]")
_WORD = re.compile(f"[{HAN}{KANA}]|[^\\s{HAN}{KANA}]+")
_SYLLABLE = re.compile(r"([zcs]h|[bpmfdtnlgkhjqxrzcsyw])?([a-zê]*[aeiouvê][a-zê]*)([1-5])\Z")
_HUMMED = re.compile(r"h?(m|ng?)[1-5]\Z")


def plain(text: str) -> str:
    """A text as it is compared: full-width folded (NFKC), lower case, no punctuation but apostrophes within words,
    single blanks, none between Chinese characters."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PSC" and c != "'" else c for c in folded)
    kept = re.sub(r"(?<!\w)'|'(?!\w)", " ", kept)
    kept = " ".join(kept.split())
    return re.sub(f"(?<=[{HAN}{KANA}]) (?=[{HAN}{KANA}])", "", kept)


def words(text: str) -> list[str]:
    """What a word error rate counts: words between blanks, and each Chinese or Japanese character for itself."""
    return _WORD.findall(text)


def syllables(text: str) -> list[str]:
    """Chinese text as syllables with tones, numbers read out; what is written as syllables already is left as it is,
    and so is what is not Chinese.

    Raises:
        UserError: pypinyin is not installed.
    """
    if not _HAN.search(text):
        return text.replace("ü", "v").lower().split()
    try:
        import pypinyin
    except ImportError:
        raise UserError(tr("options.units: pinyin needs pypinyin: pip install 'multihead[speech]'",
                           "options.units: pinyin 需要 pypinyin：pip install 'multihead[speech]'")) from None
    found = pypinyin.lazy_pinyin(_read_out(text), pypinyin.Style.TONE3, neutral_tone_with_five=True, v_to_u=False)
    return [one for part in found for one in part.lower().split()]


def _read_out(text: str) -> str:
    """30 → 三十; the tones of syllables are no numbers."""
    if not re.search(r"\d", text) or re.search(r"[a-z]\d", text):
        return text
    try:
        import cn2an

        return cn2an.transform(text, "an2cn")
    except (ImportError, ValueError):
        return text


def toneless(text: str) -> str:
    """Syllables without their tones."""
    return re.sub(r"(?<=[a-zê])[1-5](?=\s|\Z)", "", text)


def units_of(syllable: str) -> list[str]:
    """``zhong1`` → zh, ong1; a syllable without an initial is one unit; what is no syllable, its characters."""
    found = _SYLLABLE.match(syllable)
    if not found:
        return [syllable] if _HUMMED.match(syllable) else list(syllable)
    initial, final, tone = found.groups()
    return [initial, final + tone] if initial else [final + tone]


class PinyinCodec:
    """Chinese text or syllables ↔ ids of initials and toned finals. Ids 0 … 3 are those of `TextCodec`."""

    def __init__(self, units: Sequence[str]) -> None:
        self.units = list(units)
        self.pad, self.unk, self.bos, self.eos = range(4)
        self._ids = {unit: i for i, unit in enumerate([*SPECIAL, *self.units])}

    @classmethod
    def fit(cls, texts: Iterable[str]) -> PinyinCodec:
        """The units of `texts`, the most frequent first."""
        counts: Counter[str] = Counter()
        for text in texts:
            for syllable in syllables(text):
                counts.update(units_of(syllable))
        if not counts:
            raise UserError(tr("there is no text to learn syllables from", "没有可以学习音节的文字"))
        return cls(sorted(counts, key=lambda unit: (-counts[unit], unit)))

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(self.units)

    def encode(self, text: str) -> np.ndarray:
        """(L,) int32."""
        ids = [self._ids.get(unit, self.unk) for syllable in syllables(text) for unit in units_of(syllable)]
        return np.array(ids, dtype=np.int32)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id writes; a final with its tone ends a syllable with a blank."""
        written = [self.units[i - len(SPECIAL)] if i >= len(SPECIAL) else "" for i in map(int, ids)]
        return [unit + (" " if unit[-1:].isdigit() and len(unit) > 1 else "") for unit in written]

    def decode(self, ids: Iterable[int]) -> str:
        """Syllables with blanks between them."""
        return " ".join("".join(self.pieces(ids)).split())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``pinyin.json`` into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / FILE, {"units": self.units})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PinyinCodec:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        path = Path(folder) / FILE
        try:
            held: Any = json.loads(path.read_text("utf-8"))
            return cls([str(unit) for unit in held["units"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(path)) from None
