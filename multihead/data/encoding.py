"""Bytes to text as they stream: the encoding found by content, every byte checked, errors with line and byte.

UTF-8 is certain when it holds: other encodings of Chinese almost never form valid UTF-8 by chance. GB18030 (which
contains GBK and GB2312) and UTF-16 accept nearly any bytes, so they are judged by how likely the text is they give.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

from multihead.errors import UserError, tr

WINDOW = 1 << 16  # bytes judged, from the first one that is not ASCII
MAX_LINE = 8_000_000  # characters; a longer line or field is not data that one row of a batch could hold
_LIKELY = 0.8
_RARE = 0.75  # a rare Han counts for less than a common one: names and old poems are full of them
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF16_LE, "utf-16-le"),
         (codecs.BOM_UTF16_BE, "utf-16-be"), (b"\x84\x31\x95\x33", "gb18030"))
_WIDER = {"gbk": "gb18030", "gb2312": "gb18030", "utf-8-sig": "utf-8", "ascii": "utf-8"}
_NOT_FILES = ("unicode-escape", "raw-unicode-escape", "idna", "punycode", "undefined", "mbcs", "oem")
_FREQUENT = frozenset(
    "的一是不了在人有我他这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学么之都好看"
    "起发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动方期它头经长儿回位分爱老因很给名法间斯知世什"
    "两次使身者被高已亲其进此话常与活正感見這來時國們個說為會過對學麼沒發當還樣開從無經長兒愛給間兩親進話與後裡著點電車門風東")
# Ranges of characters that real text is made of; Han is judged one by one in _common.
_PLAIN = re.compile(
    "[\t\n\r\x20-\x7e\u00a0-\u024f\u0370-\u04ff\u2010-\u2bff\u3000-\u30ff\uac00-\ud7a3\uff00-\uffef\U0001f000-\U0001faff]")


@cache
def _common(character: str) -> bool:
    """Whether a character is plain, or among the everyday Han of GB2312 (level 1) or Big5 (level 1)."""
    if _PLAIN.match(character):
        return True
    simplified = character.encode("gb2312", "ignore")
    if simplified and 0xB0 <= simplified[0] <= 0xD7:
        return True
    traditional = character.encode("big5", "ignore")
    return bool(traditional) and 0xA4 <= traditional[0] <= 0xC6


def _likelihood(data: bytes, encoding: str) -> float:
    """Share of `data`'s characters in `encoding` that real text would have.

    ASCII tells nothing of GB18030, which shares it, and much of UTF-16, where it is found by chance almost never.
    """
    wide = encoding.startswith("utf-16")
    text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
    counts = Counter(text)
    if "\0" in counts:
        return 0.0
    beyond = {c: n for c, n in counts.items() if wide or ord(c) > 127}
    total = sum(beyond.values())
    han = sum(n for c, n in beyond.items() if "\u4e00" <= c <= "\u9fff")
    common = sum(n for c, n in beyond.items() if _common(c) and c != "\ufffd")
    rare = sum(n for c, n in beyond.items() if "\u4e00" <= c <= "\u9fff" and not _common(c))
    share = (common + (0.0 if wide else _RARE * rare)) / max(1, total)
    frequent = sum(n for c, n in beyond.items() if c in _FREQUENT)
    # Korean in EUC-KR reads as everyday Han of GB2312, but never as the frequent ones.
    return 0.0 if han >= 50 and frequent < 0.03 * han else share


def _mostly_utf8(data: bytes) -> bool:
    """Whether `data` is UTF-8 with a little damage, so that the damage is what should be reported."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    bad = text.count("\ufffd")
    good = sum(1 for c in text if ord(c) > 127) - bad
    return bad == 0 or good >= 4 * bad


def _with_nul(data: bytes) -> str:
    """UTF-16 (where half of ASCII and all line ends are NUL), damaged UTF-8, or "binary"."""
    utf8 = _mostly_utf8(data)
    if utf8 and data.count(0) < 0.2 * len(data):
        return "utf-8"
    scores = {e: _likelihood(data, e) for e in ("utf-16-le", "utf-16-be")}
    best = max(scores, key=lambda e: scores[e])
    return best if scores[best] >= _LIKELY else "utf-8" if utf8 else "binary"


def _first_beyond_ascii(data: bytes) -> int:
    found = re.search(rb"[\x80-\xff]", data)
    return found.start() if found else len(data)


def detect(data: bytes, at_start: bool = True) -> str | None:
    """The encoding of `data`: "ascii" while nothing else is seen, None where no known one is likely, "binary".

    `at_start` is False for bytes from the middle of a file, which can no longer turn out to be UTF-16.
    """
    if at_start:
        for mark, encoding in _BOMS:
            if data.startswith(mark):
                return encoding
        if b"\0" in data[:WINDOW]:
            return _with_nul(data[:WINDOW])
    start = _first_beyond_ascii(data)
    if start == len(data):
        return "ascii"
    window = data[start:start + WINDOW]
    if _mostly_utf8(window):
        return "utf-8"
    scores = {"gb18030": _likelihood(window, "gb18030")}
    if at_start:
        scores |= {e: _likelihood(data[:WINDOW], e) for e in ("utf-16-le", "utf-16-be")}
    best = max(scores, key=lambda e: scores[e])
    return best if scores[best] >= _LIKELY else None


def known_encoding(name: str) -> str:
    """`name` as Python knows it. Raises UserError for a name that is no text encoding."""
    try:
        info = codecs.lookup(str(name))
        if not info._is_text_encoding or info.name in _NOT_FILES:
            raise LookupError
    except (LookupError, ValueError):
        raise UserError(tr(
            f"data.encoding '{name}' is not a known encoding; for example: utf-8, gb18030, utf-16, big5, shift_jis, "
            f"latin-1. Leave it out and it is found from the content",
            f"data.encoding '{name}' 不是已知的编码；例如 utf-8、gb18030、utf-16、big5、shift_jis、latin-1。"
            f"不写则按内容自动判断")) from None
    return _WIDER.get(info.name, info.name)


def read_text(chunks: Iterable[bytes], name: str, encoding: str | None = None, whole: bool = True) -> Iterator[str]:
    """`chunks` as text, any BOM removed. With no `encoding`, found by content when first needed.

    `whole` is False for the beginning of a file, which may end in half a character.

    Raises UserError (`name`:line, byte offset): bytes that are not of the encoding, and NUL characters.
    """
    decoder = _Decoder(name, known_encoding(encoding) if encoding else None)
    held = b""
    for chunk in chunks:
        held += chunk
        # Judging needs a full window after the first byte that is not ASCII; until then nothing is lost by waiting.
        if decoder.undecided and not held.isascii() and len(held) < _first_beyond_ascii(held) + WINDOW:
            continue
        yield decoder.decode(held)
        held = b""
    yield decoder.decode(held, final=whole)


class _Decoder:
    """An incremental strict decoder that knows the line and the byte it is at."""

    def __init__(self, name: str, encoding: str | None) -> None:
        self.name = name
        self.line = 1
        self.offset = 0
        self._given = encoding
        self._encoding: str | None = encoding
        self._codec: codecs.IncrementalDecoder | None = None

    @property
    def undecided(self) -> bool:
        return self._encoding is None

    def decode(self, data: bytes, final: bool = False) -> str:
        if self._codec is None and data:
            self._start(data)
        if self._codec is None:
            text = data.decode("ascii")
            self.offset += len(data)
        else:
            text = self._strict(data, final)
        if "\0" in text:
            line = self.line + text.count("\n", 0, text.index("\0"))
            raise UserError(tr(
                "there is a NUL character here: the file is damaged, or is not text",
                "这里有一个 NUL 字符：文件已损坏，或者不是文本文件"), where=f"{self.name}:{line}")
        self.line += text.count("\n")
        return text

    def _start(self, data: bytes) -> None:
        encoding = self._encoding or detect(data, at_start=self.offset == 0)
        if encoding == "ascii" and data.isascii():
            return
        if encoding is None:
            raise self._unknown(data)
        if encoding == "binary":
            raise UserError(tr("this is not a text file; give TXT, CSV, TSV, JSONL, JSON or Parquet",
                               "这不是文本文件；请提供 TXT、CSV、TSV、JSONL、JSON 或 Parquet"), where=self.name)
        self._encoding = encoding
        self._codec = codecs.getincrementaldecoder(encoding)("strict")
        if self.offset == 0:
            mark = next((m for m, e in _BOMS if data.startswith(m) and e == encoding), b"")
            self._skip = len(mark)

    _skip = 0

    def _strict(self, data: bytes, final: bool) -> str:
        assert self._codec is not None
        if self._skip:
            self.offset, data, self._skip = self.offset + self._skip, data[self._skip:], 0
        waiting = self._codec.getstate()[0]
        begin = self.offset - len(waiting)
        try:
            text = self._codec.decode(data, final)
        except UnicodeDecodeError as error:
            before = error.object[:error.start].decode(self._encoding or "ascii", "ignore").count("\n")
            raise self._undecodable(begin + error.start, self.line + before,
                                    error.object[error.start:error.start + 4]) from None
        except UnicodeError as error:
            raise UserError(tr(f"cannot be read as {self._encoding}: {error}; set data.encoding to what it is, or "
                               "leave it out and it is found from the content",
                               f"无法按 {self._encoding} 读取：{error}；请把 data.encoding 设为实际的编码，"
                               "或不写，由内容自动判断"), where=f"{self.name}:{self.line}") from None
        self.offset += len(data)
        return text

    def _undecodable(self, offset: int, line: int, data: bytes) -> UserError:
        shown = data.hex(" ")
        chosen_en = "data.encoding says" if self._given else "the file is otherwise"
        chosen_zh = "data.encoding 指定的" if self._given else "文件其余部分的"
        return UserError(tr(
            f"byte {offset} ({shown}) is not {self._encoding}, which {chosen_en}; repair this line, or set "
            f"data.encoding if the guess is wrong",
            f"第 {offset} 字节（{shown}）不符合{chosen_zh}编码 {self._encoding}；请修复这一行，"
            f"如果编码判断有误请设置 data.encoding"),
            where=f"{self.name}:{line}")

    def _unknown(self, data: bytes) -> UserError:
        start = _first_beyond_ascii(data)
        scores = {e: _likelihood(data[start:start + WINDOW], e) for e in ("big5", "shift_jis", "euc_kr", "cp1251")}
        best = max(scores, key=lambda e: scores[e])
        likely = best if scores[best] >= _LIKELY and best != "cp1251" else "latin-1"
        line = self.line + data.count(b"\n", 0, start)
        return UserError(tr(
            f"the text is not UTF-8, GB18030 or UTF-16 (first at byte {self.offset + start}); save it as UTF-8, or "
            f"name its encoding in data.encoding, perhaps {likely}. If the file is not text, name another one",
            f"文本不是 UTF-8、GB18030 或 UTF-16 编码（从第 {self.offset + start} 字节起）；请另存为 UTF-8，"
            f"或用 data.encoding 指定编码，也许是 {likely}。如果它不是文本文件，请换一个文件"),
            where=f"{self.name}:{line}")


def unix_newlines(texts: Iterable[str], lone: bool = True) -> Iterator[str]:
    r"""`texts` with ``\r\n`` as ``\n``, and with `lone` a ``\r`` of its own too."""
    held = ""
    for text in texts:
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        text = text[:len(text) - len(held)]
        if "\r" in text:
            text = text.replace("\r\n", "\n")
            text = text.replace("\r", "\n") if lone else text
        if text:
            yield text
    if held:
        yield "\n" if lone else held


def read_lines(texts: Iterable[str], name: str) -> Iterator[str]:
    """The lines of `texts`, each with its end. Raises UserError for a line of more than ``MAX_LINE`` characters."""
    rest, number = "", 0
    for text in texts:
        lines = (rest + text).split("\n")
        rest = lines.pop()
        for line in lines:
            number += 1
            yield line + "\n"
        if len(rest) > MAX_LINE:
            raise UserError(tr(f"this line has more than {MAX_LINE:,} characters; is it data, one row a line?",
                               f"这一行超过 {MAX_LINE:,} 个字符；这是一行一条的数据吗？"), where=f"{name}:{number + 1}")
    if rest:
        yield rest
