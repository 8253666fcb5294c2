"""A JSON file as rows, streamed: an array of objects, or an object that holds one such array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from multihead.data.encoding import MAX_LINE
from multihead.data.files import Source
from multihead.data.formats import Record, not_object, texts
from multihead.errors import UserError, tr

_BLANKS = " \t\n\r"
_DECODER = json.JSONDecoder()


def read_json(source: Source, encoding: str | None) -> Iterator[Record]:
    """The objects of the file's array, each with the line it begins on. Raises UserError where the JSON is broken."""
    return _JsonFile(source, encoding).rows()


class _JsonFile:
    """A window on the text that moves on as values are read; it never holds more than one value and a chunk."""

    def __init__(self, source: Source, encoding: str | None) -> None:
        self._name = source.name
        self._texts = texts(source, encoding)
        self._held = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def rows(self) -> Iterator[Record]:
        start = self._peek()
        if start == "[":
            self._move(1)
            yield from self._array()
        else:
            self._take("{")
            yield from self._object()
        if self._peek():
            raise self._error(tr("there is more after the end of the JSON value; write one object a line (JSONL), "
                                 "or one array", "JSON 值结束后还有内容；请一行写一个对象（JSONL），或写成一个数组"))

    def _object(self) -> Iterator[Record]:
        array = ""
        while self._peek() != "}":
            key, _ = self._value()
            self._take(":")
            if self._peek() == "[" and self._opens_rows():
                if array:
                    raise self._error(tr(f"there are two arrays of objects, '{array}' and '{key}'; keep the one with "
                                         f"the rows", f"有两个对象数组：“{array}”和“{key}”；请只保留存放数据行的那个"))
                array = str(key)
                self._take("[")
                yield from self._array()
            else:
                self._value()
            self._next("}")
        self._take("}")
        if not array:
            raise self._error(tr("this JSON object holds no array of objects; rows are [{...}, {...}], or one object "
                                 "a line (JSONL)",
                                 "这个 JSON 对象里没有对象数组；数据行应写成 [{...}, {...}]，或一行一个对象（JSONL）"))

    def _array(self) -> Iterator[Record]:
        while self._peek() != "]":
            line = self._line
            value, _ = self._value()
            yield Record(line, value) if isinstance(value, dict) else Record(line, {}, not_object(value))
            self._next("]")
        self._take("]")

    def _opens_rows(self) -> bool:
        ahead = self._at + 1
        while True:
            while ahead < len(self._held) and self._held[ahead] in _BLANKS:
                ahead += 1
            if ahead < len(self._held) or not self._fill():
                return self._held[ahead:ahead + 1] == "{"

    def _fill(self, least: int = 1) -> bool:
        """Read on by `least` characters or more; False at the end."""
        parts, size = [self._held], 0
        while size < least and not self._ended:
            text = next(self._texts, None)
            if text is None:
                self._ended = True
            else:
                parts.append(text)
                size += len(text)
        self._held = "".join(parts)
        return size > 0

    def _move(self, count: int) -> None:
        self._line += self._held.count("\n", self._at, self._at + count)
        self._at += count
        if self._at > 1 << 16:
            self._held, self._at = self._held[self._at:], 0

    def _peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            end = self._at
            while end < len(self._held) and self._held[end] in _BLANKS:
                end += 1
            self._move(end - self._at)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._fill():
                return ""

    def _take(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            self._fail(f"'{wanted}'", found)
        self._move(1)

    def _next(self, end: str) -> None:
        """Go on to the next member, or stay before `end`."""
        if self._peek() != end:
            self._take(",")
            if self._peek() == end:
                self._fail(tr("a value after the comma", "逗号后的值"), end)

    def _fail(self, wanted: str, found: str) -> None:
        shown = repr(found) if found else tr("the end of the file", "文件结尾")
        raise self._error(tr(f"broken JSON: {wanted} should stand here, not {shown}",
                             f"JSON 有误：这里应该是 {wanted}，而不是 {shown}"))

    def _value(self) -> tuple[Any, int]:
        """The next value and its length in characters."""
        if not self._peek():
            self._fail(tr("a value", "一个值"), "")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._held) - 16
                size = len(self._held) - self._at
                if self._ended or not cut or size > MAX_LINE or not self._fill(size):
                    self._line += self._held.count("\n", self._at, error.pos)
                    raise self._error(tr(f"broken JSON: {error.msg}", f"JSON 有误：{error.msg}")) from None
            except (ValueError, RecursionError) as error:
                raise self._error(tr(f"not usable JSON: {error}", f"无法使用的 JSON：{error}")) from None
            else:
                # A number that ends where the window ends may go on beyond it.
                if end < len(self._held) or not self._fill():
                    size = end - self._at
                    self._move(size)
                    return value, size

    def _error(self, message: str) -> UserError:
        return UserError(message, where=f"{self._name}:{self._line}")
