"""Text to numbers and back: byte-level BPE or characters, and labels.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, over UTF-8 bytes as in GPT-2) starts from all 256 bytes, so no
text is ever unknown to it and decoding gives back exactly what was encoded. A tokenizer that came with weights from
elsewhere is a codec too: `codec/foreign.py`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from multihead.errors import UserError, nearest, tr

Kind = Literal["bpe", "char", "hf"]
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
MASK = "<mask>"
BPE_FILE = "tokenizer.json"
CHAR_FILE = "vocab.json"
FOREIGN_FILE = "foreign.json"
LABELS_FILE = "labels.json"
# BPE is fitted on at most so many characters for each entry of the vocabulary, spread evenly over the texts. Chinese,
# which has no blanks, costs about 300 bytes of memory and 2.5 microseconds a character.
FIT_CHARACTERS = 250
_PIECE = 4096
_SURROGATE = re.compile("[\ud800-\udfff]")


def _byte_of_char() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in byte-level BPE (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Pieces of at most `budget` characters in all, evenly spread over `texts`; the same for the same input."""
    kept: list[str] = []
    held, stride, seen = 0, 1, 0
    for text in texts:
        for start in range(0, len(text), _PIECE):
            if seen % stride == 0:
                piece = text[start:start + _PIECE]
                kept.append(piece)
                held += len(piece)
            seen += 1
            if held > budget and len(kept) > 1:
                kept = kept[::2]
                held = sum(map(len, kept))
                stride *= 2
    return kept


def _whole(text: str) -> str:
    """`text` with lone surrogates (half a character, from broken JSON) as U+FFFD: UTF-8 has no bytes for them."""
    return _SURROGATE.sub("\ufffd", text) if not text.isascii() else text


class TextCodec:
    """Text ↔ token ids. Make one with ``fit`` or ``load``.

    ids 0 … are the special tokens in the order given, then bytes and merges ("bpe") or characters by frequency
    ("char"). Special tokens are never read from text: "<eos>" in a review is five characters.
    """

    mask: int | None
    """The id that hides a token, where the codec has one (``fit`` with the special token "<mask>")."""
    begin: tuple[int, ...]
    """What stands before a document that is learned as a stream, and before a prompt."""
    ends: frozenset[int]
    """Ids that end a text that is generated."""
    chat_template: str | None = None

    def __init__(self, kind: Kind, special: Sequence[str], normalize: str | None,
                 tokenizer: Tokenizer | None = None, characters: Sequence[str] = ()) -> None:
        self.kind: Kind = kind
        self.special = tuple(special)
        self.normalize = normalize
        self.pad, self.unk, self.bos, self.eos = (self.special.index(name) for name in SPECIAL)
        self.mask = self.special.index(MASK) if MASK in self.special else None
        self.begin, self.ends = (self.eos,), frozenset((self.eos,))
        self._tokenizer, self._characters = tokenizer, None  # type: Tokenizer | None, Tokenizer | None
        self._bytes: list[bytes] = [b""] * len(self.special)
        if tokenizer is not None:
            tokenizer.encode_special_tokens = True
            table = _byte_of_char()
            size = tokenizer.get_vocab_size()
            names = (tokenizer.id_to_token(i) for i in range(len(self.special), size))
            self._bytes += [bytes(table[c] for c in name or "") for name in names]
        else:
            self._bytes += [c.encode() for c in characters]
            self._table = np.full(max((ord(c) for c in characters), default=0) + 2, self.unk, dtype=np.int32)
            for i, c in enumerate(characters):
                self._table[ord(c)] = len(self.special) + i
            self._normalizer = normalizers.NFKC() if normalize == "nfkc" else None

    @classmethod
    def fit(cls, texts: Iterable[str], kind: Kind = "bpe", vocab_size: int = 8000,
            special: Sequence[str] = SPECIAL, normalize: Literal["nfkc"] | None = None) -> TextCodec:
        """Fit to `texts`, read once and never held as a whole; the same texts give the same codec.

        `vocab_size` counts special tokens and is an upper bound: little text gives fewer. `special` holds the four
        standard names first or anywhere, and may add others. `normalize="nfkc"` folds full-width and compatibility
        forms (and decoding then gives the folded text). Raises UserError for a `vocab_size` too small for `kind`.
        """
        if kind not in ("bpe", "char") or normalize not in (None, "nfkc"):
            raise ValueError(f"kind is 'bpe' or 'char' and normalize None or 'nfkc', not {kind!r} and {normalize!r}")
        _check_special(special)
        least = len(special) + (256 if kind == "bpe" else 1)
        if vocab_size < least:
            raise UserError(tr(f"vocab_size {vocab_size} is too small: {kind} needs at least {least}",
                               f"vocab_size {vocab_size} 太小：{kind} 至少需要 {least}"))
        whole = (_whole(text) for text in texts)
        if kind == "bpe":
            return cls("bpe", special, normalize, tokenizer=_train_bpe(whole, vocab_size, special, normalize))
        fold = normalizers.NFKC() if normalize else None
        counts: Counter[str] = Counter()
        for text in whole:
            counts.update(fold.normalize_str(text) if fold else text)
        if not counts:
            raise UserError(tr("there is no text to fit characters on", "没有文字可以用来建立字符表"))
        ordered = sorted(counts, key=lambda c: (-counts[c], c))
        return cls("char", special, normalize, characters=ordered[:vocab_size - len(special)])

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """(T,) int32 ids of `text`; no special token is added."""
        if self._tokenizer is not None:
            return np.array(self._tokenizer.encode(_whole(text), add_special_tokens=False).ids, dtype=np.int32)
        text = _whole(text)
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        # The table's last place is <unk>'s, for every character beyond the highest fitted one.
        return self._table[np.minimum(points, len(self._table) - 1)]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``[encode(t) for t in texts]``, on all cores for BPE."""
        if self._tokenizer is None:
            return [self.encode(text) for text in texts]
        found = self._tokenizer.encode_batch_fast([_whole(t) for t in texts], add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in found]

    def frame(self, ids: np.ndarray) -> np.ndarray:
        """The ids as one text, the way the weights were trained: unchanged; [CLS] ids [SEP] for a BERT's tokenizer."""
        return ids

    def frame_pair(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two texts as one: <bos> a <eos> b <eos> (a foreign tokenizer's own form), and their segments, 0 and 1."""
        ids = np.concatenate(([self.bos], a, [self.eos], b, [self.eos])).astype(np.int32)
        return ids, (np.arange(len(ids)) >= len(a) + 2).astype(np.int32)

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids (T,) of `text` and which of its characters each stands for: (T, 2) int32, start and end.

        A blank before a word belongs to its token but not to its span. Pieces of one character share its span.
        """
        if self._tokenizer is None and self._normalizer is None:
            ids = self.encode(text)
            start = np.arange(len(ids), dtype=np.int32)
            return ids, np.stack((start, start + 1), axis=1)
        found = self.as_tokenizer().encode(_whole(text), add_special_tokens=False)
        spans = np.array(found.offsets, dtype=np.int32).reshape(-1, 2)
        for span in spans:
            while span[1] - span[0] > 1 and text[span[0]].isspace():
                span[0] += 1
        return np.array(found.ids, dtype=np.int32), spans

    def as_tokenizer(self) -> Tokenizer:
        """This codec as a `Tokenizer` of the library `tokenizers`: the same ids for the same text."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self._characters is None:
            self._characters = self._word_level()
        return self._characters

    def _word_level(self) -> Tokenizer:
        names = [*self.special, *(c.decode() for c in self._bytes[len(self.special):])]
        model = models.WordLevel({name: i for i, name in enumerate(names)}, self.special[self.unk])
        tokenizer = Tokenizer(model)
        if self._normalizer is not None:
            tokenizer.normalizer = self._normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in self.special])
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", "replace")

    def token(self, id: int) -> bytes:
        """The bytes an id stands for; empty for special tokens."""
        return self._bytes[int(id)]

    def stream(self) -> Any:
        """A decoder that takes one id at a time and never gives out half a character."""
        return TextStream(self._bytes)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write one JSON file into `folder`: ``tokenizer.json`` (readable by `tokenizers`) or ``vocab.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._tokenizer is not None:
            text = self._tokenizer.to_str(pretty=True)
        else:
            characters = [c.decode() for c in self._bytes[len(self.special):]]
            held = {"kind": "char", "special": self.special, "normalize": self.normalize, "characters": characters}
            text = json.dumps(held, ensure_ascii=False, indent=0)
        (folder / (BPE_FILE if self._tokenizer is not None else CHAR_FILE)).write_bytes((text + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TextCodec:
        """Read what ``save`` wrote. Raises UserError where it is missing or broken."""
        folder = Path(folder)
        if (folder / FOREIGN_FILE).exists():
            from multihead.codec.foreign import ForeignCodec

            return ForeignCodec.load(folder)
        path = folder / (BPE_FILE if (folder / BPE_FILE).exists() else CHAR_FILE)
        text = _read(path)
        try:
            held = json.loads(text)
            if path.name == BPE_FILE:
                added = sorted(held["added_tokens"], key=lambda t: t["id"])
                fold = "nfkc" if held["normalizer"] else None
                return cls("bpe", [t["content"] for t in added], fold, tokenizer=Tokenizer.from_str(text))
            return cls("char", held["special"], held["normalize"], characters=held["characters"])
        except Exception as error:  # `tokenizers` raises plain Exception for a file it cannot read
            raise _broken(path, error) from None


class TextStream:
    """Decodes ids as they come; bytes of an unfinished character are held back until the rest arrives."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes; often none, sometimes several."""
        return self._decoder.decode(self._table[int(id)])

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the stream is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _check_special(special: Sequence[str]) -> None:
    if len(set(special)) != len(special) or any(name not in special for name in SPECIAL):
        raise ValueError(f"special tokens are distinct and contain {SPECIAL}, not {tuple(special)}")
    # A name of letters alone could come out of a merge and would then share the special token's id.
    odd = [name for name in special if not re.fullmatch(r"[<\[].*\w.*[>\]]", name)]
    if odd:
        raise ValueError(f"a special token is written <name> or [name], not {odd[0]!r}")


def _train_bpe(texts: Iterator[str], vocab_size: int, special: Sequence[str], normalize: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalize:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_sample(texts, FIT_CHARACTERS * vocab_size), trainer=trainer)
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Any) -> UserError:
    return UserError(tr(f"this codec cannot be read ({error}); run `multihead prepare` again",
                        f"这个编码器文件无法读取（{error}）；请重新运行 `multihead prepare`"), where=str(path))


class LabelCodec:
    """Label names ↔ 0 … n-1, in a fixed order: numbers by value, then other names by code point."""

    def __init__(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names):
            raise ValueError("label names must be distinct")
        self.names: list[str] = list(names)
        self._ids = {name: i for i, name in enumerate(self.names)}

    @classmethod
    def fit(cls, labels: Iterable[str]) -> LabelCodec:
        """The distinct `labels`. Raises UserError where there are none."""
        names = {str(label) for label in labels}
        if not names:
            raise UserError(tr("there are no labels to learn", "没有可以学习的标签"))
        return cls(sorted(names, key=_label_order))

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, label: str) -> int:
        """The number of `label`. Raises UserError with the known labels and the nearest one."""
        try:
            return self._ids[str(label)]
        except KeyError:
            shown = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
            raise UserError(tr(
                f"label '{label}' is not one of the {len(self.names)} labels in the training data: {shown}"
                f"{nearest(label, self.names)}",
                f"标签 '{label}' 不在训练数据的 {len(self.names)} 个标签之中：{shown}{nearest(label, self.names)}",
            )) from None

    def decode(self, id: int) -> str:
        """The name of label number `id`."""
        return self.names[int(id)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``labels.json`` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"names": self.names}, ensure_ascii=False, indent=1) + "\n"
        (folder / LABELS_FILE).write_bytes(text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LabelCodec:
        """Read what ``save`` wrote. Raises UserError where it is missing or broken."""
        path = Path(folder) / LABELS_FILE
        text = _read(path)
        try:
            return cls([str(name) for name in json.loads(text)["names"]])
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path, error) from None


def _label_order(name: str) -> tuple[int, float, str]:
    try:
        value = float(name)
    except ValueError:
        value = float("nan")
    return (0, value, name) if value == value else (1, 0.0, name)
