"""The records of a file one by one, each with its line: delimited tables, JSON lines, and running text in pieces."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from multihead.data.encoding import MAX_LINE, read_lines, read_text, unix_newlines
from multihead.data.files import Source, read_chunks
from multihead.errors import UserError, tr

PIECE = 2000  # characters in a piece of plain text

FormatName = Literal["txt", "jsonl", "json", "csv", "parquet", "lists", "images", "idx", "clips",
                     "recordings"]


class Record(NamedTuple):
    """One record: its line (row number in Parquet), its values, or why it is not one."""

    line: int
    values: dict[str, Any]
    problem: str = ""
    place: str = ""
    """Where in the file it stands, if a line does not say it: the id of a question in nested JSON."""


@dataclass
class Format:
    """The form of one file. `header_line` is 0 where there is no header; `names` are the columns, where fixed; `nested`
    JSON holds questions within passages within articles (SQuAD). "lists": a user's items on a line, between blanks."""

    name: FormatName
    encoding: str = "utf-8"
    packed: bool = False
    delimiter: str = ""
    quoted: bool = True
    header_line: int = 0
    names: list[str] = field(default_factory=list)
    nested: Literal["", "questions", "passages"] = ""


def texts(source: Source, encoding: str | None, lone: bool = True) -> Iterator[str]:
    """The file's text in chunks, newlines as ``\\n``."""
    return unix_newlines(read_text(read_chunks(source), source.name, encoding), lone)


def _lines(source: Source, encoding: str | None) -> Iterator[str]:
    return read_lines(texts(source, encoding), source.name)


def csv_rows(lines: Iterator[str], delimiter: str, quoted: bool, strict: bool = True) -> Any:
    if len(delimiter) != 1:
        return (line.rstrip("\n").split(delimiter) if line.strip() else [] for line in lines)
    csv.field_size_limit(MAX_LINE)
    if quoted:
        return csv.reader(lines, delimiter=delimiter, strict=strict)
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=strict)


def read_csv(source: Source, form: Format, encoding: str | None) -> Iterator[Record]:
    count = itertools.count(1)
    line = 0

    def numbered() -> Iterator[str]:
        nonlocal line
        for text in _lines(source, encoding):
            line = next(count)
            yield text

    rows = csv_rows(numbered(), form.delimiter, form.quoted)
    width, header = len(form.names), form.header_line > 0
    while True:
        start = line + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(start, {}, _csv_problem(error, source, start, line))
            continue
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if header:
            header = False
            continue
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        if len(cells) != width:
            yield Record(start, {}, tr(
                f"{len(cells)} fields where there should be {width}; a field that holds {form.delimiter!r} must stand "
                f"in double quotes",
                f"有 {len(cells)} 个字段，应为 {width} 个；含有 {form.delimiter!r} 的字段要用双引号括起来"))
            continue
        yield Record(start, dict(zip(form.names, cells, strict=True)))


def _csv_problem(error: csv.Error, source: Source, start: int, end: int) -> str:
    said = str(error)
    if "unexpected end" in said or "limit" in said:
        raise UserError(tr("a double quote opens in this row and is never closed",
                           "这一行里有一个双引号一直没有闭合"), where=f"{source.name}:{start}")
    span_en = f" (the row runs on to line {end})" if end > start else ""
    span_zh = f"（这一行一直延续到第 {end} 行）" if end > start else ""
    return tr(f"the double quotes are not in order{span_en}: a quote inside a quoted field is written twice",
              f"双引号没有配对{span_zh}：引号括起的字段里，引号要写两遍")


def read_jsonl(source: Source, encoding: str | None) -> Iterator[Record]:
    for number, line in enumerate(_lines(source, encoding), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield Record(number, {}, tr(f"not JSON: {error.msg}, at character {error.pos + 1}",
                                        f"不是 JSON：{error.msg}，在第 {error.pos + 1} 个字符"))
        except (ValueError, RecursionError) as error:
            yield Record(number, {}, tr(f"not usable JSON: {error}", f"无法使用的 JSON：{error}"))
        else:
            if isinstance(value, dict):
                yield Record(number, value)
            else:
                yield Record(number, {}, not_object(value))


def read_lists(source: Source, form: Format, encoding: str | None) -> Iterator[Record]:
    """A user's items on each line, oldest first. The user is the line's first word where ``form.names`` has "user",
    else "line", the number of the line."""
    named = "user" in form.names
    for number, line in enumerate(_lines(source, encoding), 1):
        words = line.split()
        if len(words) > named:
            head = {"user": words[0]} if named else {"line": str(number)}
            yield Record(number, {**head, "item": words[named:]})
        elif words:
            yield Record(number, {}, tr(f"there is a user, '{words[0]}', and no item",
                                        f"只有用户“{words[0]}”，没有物品"))


def not_object(value: Any) -> str:
    """The message for a JSON value that is not a row."""
    kind = type(value).__name__
    return tr(f"a row is an object {{...}}, not {kind}", f"一行应该是对象 {{...}}，而不是 {kind}")


def pieces(source: Source, encoding: str | None) -> Iterator[tuple[int, str]]:
    """(line, piece) of plain text: about ``PIECE`` characters each, cut at line ends; joined they are the file.

    A line without an end in reach is cut after a sentence, or else anywhere.
    """
    line, rest = 1, ""
    for text in texts(source, encoding, lone=False):
        rest += text
        start = 0
        while len(rest) - start > 2 * PIECE:
            end = _cut(rest, start)
            yield line, rest[start:end]
            line += rest.count("\n", start, end)
            start = end
        rest = rest[start:]
    while rest:
        end = _cut(rest, 0) if len(rest) > 2 * PIECE else len(rest)
        yield line, rest[:end]
        line += rest.count("\n", 0, end)
        rest = rest[end:]


def _cut(text: str, start: int) -> int:
    low, high = start + PIECE, start + 2 * PIECE
    end = text.find("\n", low - 1, high)
    if end < 0:
        end = text.rfind("\n", start, low)
    if end < 0:
        end = max(text.rfind(mark, low, high) for mark in "。！？.!? ")
    return high if end < 0 else end + 1


def whole_text(source: Source, encoding: str | None) -> tuple[str, str]:
    """(the text of a small file, "") or ("", why it is none)."""
    parts, size = [], 0
    for text in texts(source, encoding):
        parts.append(text)
        size += len(text)
        if size > MAX_LINE:
            return "", tr(f"one text of more than {MAX_LINE:,} characters", f"一篇文本超过 {MAX_LINE:,} 个字符")
    return "".join(parts).strip(), ""
