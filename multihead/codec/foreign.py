"""A tokenizer that came with weights from elsewhere: any ``tokenizer.json`` of the library `tokenizers`, as a codec.

What the weights were trained with stays inside it: lower-casing, accents, how a text or a pair of texts is framed.
Special tokens are looked up where Hugging Face folders name them; frames are read off the tokenizer's post-processor.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from multihead.codec.text import BPE_FILE, FOREIGN_FILE, TextCodec, _broken, _byte_of_char, _read, _whole
from multihead.errors import UserError, tr

MOST_BYTES = 256 << 20  # the largest tokenizer.json known has 40 MB
ROLES = ("pad", "unk", "bos", "eos", "mask")
# Where each special id is looked for, first found wins; a classifying encoder's [CLS] and [SEP] are its ends of text.
NAMES = {
    "pad": ("pad_token",), "unk": ("unk_token",), "bos": ("cls_token", "bos_token"), "eos": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
}
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
FILES = (BPE_FILE, *SETTINGS, "generation_config.json", "chat_template.jinja")
"""What a Hugging Face folder says of its tokenizer."""
_BYTES = _byte_of_char()
_PROBES = ("a", "the", "0", "的", ".", "é")


def read_json(path: Path, most: int = 32 << 20) -> Any:
    """A JSON object from a folder of somebody else's. UserError where it is missing, too large or none."""
    try:
        size = path.stat().st_size
        if size > most:
            raise UserError(tr(f"has {size:,} bytes; at most {most:,} are read",
                               f"有 {size:,} 字节，至多读取 {most:,} 字节"), str(path))
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(tr(f"cannot be read ({error.strerror})", f"无法读取（{error.strerror}）"), str(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(tr(f"is no JSON ({error}); download it again", f"不是 JSON（{error}），请重新下载"),
                        str(path)) from None
    if not isinstance(found, dict):
        raise UserError(tr("holds no JSON object; download it again", "不是 JSON 对象，请重新下载"), str(path))
    return found


def parse(text: str, path: Path) -> Tokenizer:
    """The tokenizer written in `text`, without truncation and padding. UserError where it cannot be read."""
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        size = tokenizer.get_vocab_size()
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # plain Exception for what it cannot read; its Rust side may also panic
        raise UserError(tr(f"this tokenizer cannot be read ({error}); is it of the library `tokenizers`, and whole?",
                           f"无法读取这个分词器（{error}）；它是 `tokenizers` 库的文件吗？是否完整？"),
                        str(path)) from None
    if not size:
        raise UserError(tr("this tokenizer is empty", "这个分词器是空的"), str(path))
    return tokenizer


class ForeignCodec(TextCodec):
    """Text ↔ ids by a tokenizer of others. Make one with ``open`` (a Hugging Face folder) or ``load``.

    Args:
        tokenizer: as ``parse`` gives it.
        size: rows of the embedding table, which may be more than the tokenizer has ids.
        roles: ids of pad, unk, bos, eos, mask.
        ends: ids that end a generated text.
        chat_template: a Jinja template that makes a prompt of a conversation.
        family: the family of models whose weights it came with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        size: int,
        roles: Mapping[str, int | None],
        ends: Iterable[int] = (),
        chat_template: str | None = None,
        family: str = "",
    ) -> None:
        self.family, self._roles = family, {role: roles.get(role) for role in ROLES}
        self.kind, self.normalize, self._tokenizer, self._size = "hf", None, tokenizer, size
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i: token for i, token in added.items() if token.special}
        self.special = tuple(token.content for token in self._special.values())
        self.mask = roles.get("mask")
        known = [roles.get(name) for name in ("pad", "eos", "bos", "unk")]
        any_special = next((i for i in known if i is not None), min(self._special, default=0))
        self.pad, self.unk, self.bos, self.eos = (_or(roles.get(r), any_special) for r in ("pad", "unk", "bos", "eos"))
        self._probe(encoder=roles.get("mask") is not None)
        # A word-level or unigram model may know the name of a special token as a word.
        self._forbidden = self._special.keys() - {roles.get("unk")}
        self._instead = _or(roles.get("unk"), next(iter(tokenizer.encode("?", add_special_tokens=False).ids), self.unk))
        self.begin = tuple(self._prefix) or (self.bos,)
        self.ends = frozenset((self.eos, *ends, *self.begin))  # where another text begins, this one has ended
        self.chat_template = chat_template
        self._table: dict[int, bytes] = {}  # type: ignore[assignment]
        self._parsing: Tokenizer | None = None
        decoder = b"{}" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self._byte_level = json.loads(decoder).get("type") == "ByteLevel"
        self._byte_fallback = b"ByteFallback" in decoder

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], config: Mapping[str, Any], size: int, family: str = ""
    ) -> ForeignCodec:
        """The tokenizer of a Hugging Face folder.

        Args:
            config: what config.json says (ids of special tokens, where the tokenizer names none).
            size: rows of the embedding table.

        Raises:
            UserError: where there is no tokenizer.json, it is broken, or it has ids beyond the table.
        """
        folder = Path(folder)
        path = folder / BPE_FILE
        if not path.is_file():
            raise UserError(tr(
                "there is no tokenizer.json; only this form is read. With the library transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) writes one",
                "没有 tokenizer.json，只支持这种形式。可用 transformers 库生成："
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"), str(folder))
        if (held := path.stat().st_size) > MOST_BYTES:
            raise UserError(tr(f"has {held:,} bytes; at most {MOST_BYTES:,} are read",
                               f"有 {held:,} 字节，至多读取 {MOST_BYTES:,} 字节"), str(path))
        tokenizer = parse(_read(path), path)
        most = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if most > size:
            raise UserError(tr(
                f"the tokenizer has {most:,} ids, the weights {size:,} embeddings; they do not belong together",
                f"分词器有 {most:,} 个编号，而权重只有 {size:,} 个词嵌入，二者不配套"), str(path))
        settings = [read_json(folder / name) if (folder / name).is_file() else {} for name in SETTINGS]
        roles = {role: _role(role, tokenizer, settings, config) for role in ROLES}
        ends = [i for held in (config, _maybe(folder / "generation_config.json")) for i in _ids(held, "eos_token_id")]
        return cls(tokenizer, size, roles, [i for i in ends if i < size], _template(folder, settings[1]), family)

    # -- frames -------------------------------------------------------------------------------------------------------

    def _probe(self, encoder: bool) -> None:
        """Read the frames off the post-processor: what it puts around one text and around two."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        probe = next((p for p in _PROBES if tokenizer.encode(p, add_special_tokens=False).ids), None)
        one = [] if probe is None else _outline(tokenizer.encode(probe))
        two = [] if probe is None else _outline(tokenizer.encode(probe, probe))
        if encoder and all(isinstance(part, str) for part, _ in one):
            one = [(self.bos, 0), ("a", 0), (self.eos, 0)]
        if all(isinstance(part, str) for part, _ in two):
            two = [(self.bos, 0), ("a", 0), (self.eos, 0), ("b", 1), (self.eos, 1)]
        elif not any(isinstance(part, int) for part, _ in two[2:]):  # only a prefix: <s> a b
            two = [*two[:2], (self.eos, 0), ("b", 1), (self.eos, 1)]
        place = next((i for i, (part, _) in enumerate(one) if part == "a"), 0)
        self._prefix = [part for part, _ in one[:place] if isinstance(part, int)]
        self._suffix = [part for part, _ in one[place + 1:] if isinstance(part, int)]
        self._pair = two

    def frame(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate((self._prefix, ids, self._suffix)).astype(np.int32)

    def frame_pair(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [(a if part == "a" else b if part == "b" else [part], kind) for part, kind in self._pair]
        ids = np.concatenate([part for part, _ in parts]).astype(np.int32)
        return ids, np.concatenate([np.full(len(part), kind) for part, kind in parts]).astype(np.int32)

    # -- text and ids -------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> np.ndarray:
        return self._plain(self.as_tokenizer().encode(_whole(text), add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.as_tokenizer().encode_batch_fast([_whole(text) for text in texts], add_special_tokens=False)
        return [self._plain(one.ids) for one in found]

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, spans = super().spans(text)
        return self._plain(ids.tolist()), spans

    def _plain(self, ids: list[int]) -> np.ndarray:
        if not self._forbidden.isdisjoint(ids):
            ids = [self._instead if id in self._forbidden else id for id in ids]
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` by the tokenizer's own decoder; special tokens give nothing."""
        if self._byte_level or self._byte_fallback:
            stream = ByteStream(self)
            return "".join([*map(stream.push, ids), stream.flush()])
        kept = [i for i in map(int, ids) if i not in self._special]
        return self.as_tokenizer().decode(kept, skip_special_tokens=False)

    def token(self, id: int) -> bytes:
        """The bytes an id adds to a running text; empty for special tokens and for ids the tokenizer does not know."""
        id = int(id)
        if id not in self._table:
            self._table[id] = self._bytes_of(id)
        return self._table[id]

    def _bytes_of(self, id: int) -> bytes:
        name = self.as_tokenizer().id_to_token(id)
        if name is None or id in self._special:
            return b""
        if self._byte_level:
            return bytes(_BYTES[c] for c in name) if all(c in _BYTES for c in name) else name.encode()
        if self._byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        first = next(i for i in self._anchors() if i not in self._special)
        before, after = (self.as_tokenizer().decode(ids, skip_special_tokens=False) for ids in ([first], [first, id]))
        return after.removeprefix(before).encode()

    def _anchors(self) -> Iterable[int]:
        return self.as_tokenizer().encode("a 0 的", add_special_tokens=False).ids + list(range(self._size))

    def stream(self) -> ByteStream | WholeStream:
        """A decoder that takes one id at a time; the pieces together are the ``decode`` of all ids."""
        return ByteStream(self) if self._byte_level or self._byte_fallback else WholeStream(self)

    def first(self, id: int) -> bytes:
        """As ``token``, for the first of a text: some tokenizers write words with a blank and take that one off."""
        found = self.token(id)
        if self._byte_level or not found.startswith(b" "):
            return found
        alone = self.as_tokenizer().decode([int(id)], skip_special_tokens=False)
        return found if alone.startswith(" ") else found[1:]

    # -- conversations ------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation as the ids of a prompt, by the chat template. Special tokens are read from the template alone:
        "<|im_end|>" inside a message stays the characters it is.

        Raises:
            UserError: the template refuses the conversation, or jinja2 is not installed.
        """
        from multihead.codec.chat import disguise, pieces, render

        assert self.chat_template is not None
        names = self.special
        marked, marker = disguise(messages, names)
        named = {f"{role}_token": self._name(role) for role in ("bos", "eos", "pad", "unk")}
        text = render(self.chat_template, marked, named)
        if marker is None:
            return self._reading().encode(_whole(text), add_special_tokens=False).ids
        found: list[int] = []
        for piece, special in pieces(text, names, marker):
            if special:
                found.append(int(self.as_tokenizer().token_to_id(piece) or 0))
            else:
                found += self.encode(piece).tolist()
        return found

    def _name(self, role: str) -> str:
        return self.as_tokenizer().id_to_token(getattr(self, role)) or ""

    def _reading(self) -> Tokenizer:
        """The same tokenizer, reading special tokens from text: for what a template wrote."""
        if self._parsing is None:
            self._parsing = Tokenizer.from_str(self.as_tokenizer().to_str())
            self._parsing.encode_special_tokens = False
        return self._parsing

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and, beside it, what else is known: ``foreign.json``."""
        folder = Path(folder)
        held = {"size": self._size, **self._roles, "ends": sorted(self.ends), "chat_template": self.chat_template,
                "family": self.family}
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((BPE_FILE, self.as_tokenizer().to_str(pretty=True)),
                           (FOREIGN_FILE, json.dumps(held, ensure_ascii=False, indent=1))):
            (folder / name).write_bytes((text + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ForeignCodec:
        path = Path(folder) / FOREIGN_FILE
        try:
            held = json.loads(_read(path))
            file = path.with_name(BPE_FILE)
            tokenizer, template = parse(_read(file), file), held["chat_template"]
            return cls(tokenizer, held["size"], held, held["ends"], template, held.get("family", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path, error) from None


class ByteStream:
    """Decodes ids of a tokenizer that falls back on bytes, as they come; half a character is held back."""

    def __init__(self, codec: ForeignCodec) -> None:
        self._codec, self._begun = codec, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes; often none, sometimes several."""
        if self._begun:
            return self._decoder.decode(self._codec.token(id))
        self._begun = self._codec.token(id) != b""
        return self._decoder.decode(self._codec.first(id))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the stream is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._begun = False
        return rest


class WholeStream:
    """Decodes ids of any other tokenizer: the whole is decoded with each, and what is new and whole is given out."""

    def __init__(self, codec: ForeignCodec) -> None:
        self._codec, self._ids, self._given = codec, [], ""  # type: tuple[ForeignCodec, list[int], str]

    def push(self, id: int) -> str:
        """The text that `id` adds; bytes of an unfinished character are held back."""
        self._ids.append(int(id))
        return self._new(self._codec.decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        """What is still held back; the stream is then as new."""
        rest = self._new(self._codec.decode(self._ids))
        self._ids, self._given = [], ""
        return rest

    def _new(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new, self._given = text[len(self._given):], text
        return new


def _outline(found: Encoding) -> list[tuple[int | str, int]]:
    """What an encoded probe is made of: special ids, and "a" and "b" for the texts; each with its segment."""
    parts: list[tuple[int | str, int]] = []
    for id, place, kind in zip(found.ids, found.sequence_ids, found.type_ids, strict=True):
        part: int | str = id if place is None else "ab"[place]
        if isinstance(part, int) or not parts or parts[-1][0] != part:
            parts.append((part, kind))
    return parts


def _role(
    role: str, tokenizer: Tokenizer, settings: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> int | None:
    for name in NAMES[role]:
        for held in settings:
            value = held.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str) and (id := tokenizer.token_to_id(content)) is not None:
                return id
    for name in NAMES[role]:
        if found := _ids(config, f"{name}_id"):
            return found[0]
    unknown = getattr(tokenizer.model, "unk_token", None) if role == "unk" else None
    return None if unknown is None else tokenizer.token_to_id(unknown)


def _ids(held: Mapping[str, Any], key: str) -> list[int]:
    value = held.get(key)
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _maybe(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path, held = folder / "chat_template.jinja", settings.get("chat_template")
    if path.is_file() and path.stat().st_size <= 1 << 20:
        return _read(path)
    if isinstance(held, list):  # several, each with a name
        named = {one.get("name"): one.get("template") for one in held if isinstance(one, dict)}
        held = named.get("default")
    return held if isinstance(held, str) else None


def _or(value: int | None, other: int) -> int:
    return other if value is None else value
