"""What form a file has (by content, never by its name) and its records one by one, each with its line."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from multihead.data.columns import Column, plain_name, synonyms
from multihead.data.encoding import MAX_LINE, detect, known_encoding, read_lines, read_text, unix_newlines
from multihead.data.files import Source, is_gzip, os_error, read_chunks, read_head, refuse_binary
from multihead.errors import UserError, tr

HEAD = 1 << 20
PIECE = 2000  # characters in a piece of plain text
_DELIMITERS = ("\t", ",", ";", "|", "::")
_SAMPLE = 100

FormatName = Literal["txt", "jsonl", "json", "csv", "parquet"]


class Record(NamedTuple):
    """One record: its line (row number in Parquet), its values, or why it is not one."""

    line: int
    values: dict[str, Any]
    problem: str = ""


@dataclass
class Format:
    """The form of one file. `header_line` is 0 where there is no header; `names` are the columns, where fixed."""

    name: FormatName
    encoding: str = "utf-8"
    packed: bool = False
    delimiter: str = ""
    quoted: bool = True
    header_line: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What the recipe says about the files, and the columns looked for."""

    columns: Sequence[Column]
    mapping: dict[str, str]
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None


def texts(source: Source, encoding: str | None, lone: bool = True) -> Iterator[str]:
    """The file's text in chunks, newlines as ``\\n``."""
    return unix_newlines(read_text(read_chunks(source), source.name, encoding), lone)


def _lines(source: Source, encoding: str | None) -> Iterator[str]:
    return read_lines(texts(source, encoding), source.name)


# ---------------------------------------------------------------------------------------------- which form is it?


def sniff(source: Source, wanted: Wanted) -> Format:
    """Find the form of `source`. Raises UserError: empty, binary, not decodable, or no readable beginning."""
    head, whole = read_head(source, HEAD)
    try:
        packed = is_gzip(source.path)
    except OSError as error:
        raise os_error(source.name, error) from None
    if not head:
        raise UserError(tr("this file is empty", "这个文件是空的"), where=source.name)
    if head.startswith(b"PAR1") and not packed:
        return Format("parquet", encoding="")
    refuse_binary(head, source.name)
    found = known_encoding(wanted.encoding) if wanted.encoding else detect(head) or ""
    form = Format("txt", encoding="utf-8" if found == "ascii" else found, packed=packed)
    # A head cut anywhere may end in half a character: only the last chunk of a whole file is held to be complete.
    text = "".join(unix_newlines(_head_text(head, whole, source.name, wanted.encoding)))
    if not text.strip():
        raise UserError(tr("there is nothing but blanks in this file", "这个文件里只有空白"), where=source.name)
    if wanted.delimiter:
        return _as_csv(form, wanted.delimiter, text, whole, wanted, source)
    json_form = _json_form(text, whole)
    if json_form:
        form.name = json_form
        return form
    delimiter = _find_delimiter(text, whole, wanted)
    return _as_csv(form, delimiter, text, whole, wanted, source) if delimiter else form


def _head_text(head: bytes, whole: bool, name: str, encoding: str | None) -> Iterator[str]:
    parts = read_text([head], name, encoding)
    if whole:
        yield from parts
    else:
        yield next(parts)


def _json_form(text: str, whole: bool) -> Literal["json", "jsonl"] | None:
    start = text.lstrip()
    if start[:1] == "[":
        after = start[1:].lstrip()
        return "json" if after[:1] in ("{", "]", '"') or not after else None
    if start[:1] != "{" or start[1:].lstrip()[:1] not in ('"', "}", ""):
        return None
    lines = [line for line in start.split("\n", 20)[:20] if line.strip()]
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        # A broken first line of many objects, or the first line of an object written over several.
        return "jsonl" if len(lines) > 1 and lines[1].startswith("{") else "json"
    if len(lines) == 1 and whole and any(_objects(v) for v in first.values()):
        return "json"
    return "jsonl"


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _parse_head(text: str, whole: bool, delimiter: str, quoted: bool) -> list[list[str]]:
    lines = text.split("\n")
    if not whole and len(lines) > 1:
        lines.pop()
    found = _csv_rows((line + "\n" for line in lines), delimiter, quoted, strict=False)
    try:
        rows = [r for r in itertools.islice(found, _SAMPLE + 1) if r and (len(r) > 1 or r[0].strip())]
    except csv.Error:
        return []
    # Where the head was cut, its last record may be half of one.
    return rows[:_SAMPLE] if whole or len(rows) > _SAMPLE or len(rows) < 2 else rows[:-1]


def _csv_rows(lines: Iterator[str], delimiter: str, quoted: bool, strict: bool = True) -> Any:
    if len(delimiter) != 1:
        return (line.rstrip("\n").split(delimiter) if line.strip() else [] for line in lines)
    csv.field_size_limit(MAX_LINE)
    if quoted:
        return csv.reader(lines, delimiter=delimiter, strict=strict)
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=strict)


def _agreement(rows: list[list[str]]) -> tuple[int, float]:
    """(the usual number of fields, the share of rows that have it)."""
    if not rows:
        return 0, 0.0
    width, count = Counter(map(len, rows)).most_common(1)[0]
    return width, count / len(rows)


def _hits(row: Sequence[str], wanted: Wanted) -> set[str]:
    """Our columns that a header row `row` would name."""
    plain = {plain_name(cell) for cell in row}
    hits = {c.name for c in wanted.columns if plain & set(synonyms(c))}
    given = {ours for ours, theirs in wanted.mapping.items() if plain_name(theirs) in plain and not theirs.isdecimal()}
    return hits | given


def _find_delimiter(text: str, whole: bool, wanted: Wanted) -> str | None:
    """The delimiter of a table, or None for plain text."""
    required = {c.name for c in wanted.columns if c.required}
    best: tuple[tuple[int, float, int, int], str] | None = None
    for order, delimiter in enumerate(_DELIMITERS):
        rows = _parse_head(text, whole, delimiter, quoted=delimiter != "\t")
        width, share = _agreement(rows)
        if not rows:
            continue
        hits = _hits(rows[0], wanted)
        one_column = width == 1 and delimiter == "," and len(required) == 1 and bool(hits) and share >= 0.9
        if width < 2 and len(rows[0]) < 2 and not one_column:
            continue
        named = bool(hits) and (len(rows[0]) > 1 or one_column) and (hits >= required or share >= 0.7)
        # Without a known name in the first row, prose must not pass for a table: lines often agree on their commas.
        alike = width > 1 and share >= 0.9 and (
            delimiter == "\t" or (len(required) > 1 and share >= 0.95 and len(rows) > 1))
        if named or alike:
            rank = (len(hits) if named else 0, share, width, -order)
            if best is None or rank > best[0]:
                best = (rank, delimiter)
    return best[1] if best else None


def _as_csv(form: Format, delimiter: str, text: str, whole: bool, wanted: Wanted, source: Source) -> Format:
    form.name, form.delimiter = "csv", {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if form.delimiter in ("\n", "\r", '"', ""):
        raise UserError(tr(f"data.delimiter {delimiter!r} cannot separate columns; use one like , ; | or tab",
                           f"data.delimiter {delimiter!r} 不能用来分列；请用 , ; | 或 tab"))
    form.quoted = len(form.delimiter) == 1 and _is_quoted(text, whole, form.delimiter)
    rows = _parse_head(text, whole, form.delimiter, form.quoted)
    if not rows:
        raise UserError(tr("no row can be read from the beginning of this file", "从文件开头读不出任何一行"),
                        where=f"{source.name}:1")
    has_header = wanted.header if wanted.header is not None else _has_header(rows, wanted)
    if has_header:
        form.names = _unique([cell.strip() or str(i + 1) for i, cell in enumerate(rows[0])])
        leading = text[:len(text) - len(text.lstrip("\n"))].count("\n")
        form.header_line = leading + 1
        if whole and len(rows) == 1:
            raise UserError(tr("there is a header and no row below it", "只有表头，没有数据行"),
                            where=f"{source.name}:{form.header_line}")
    else:
        form.names = [str(i + 1) for i in range(_agreement(rows)[0])]
    return form


def _is_quoted(text: str, whole: bool, delimiter: str) -> bool:
    """Tab-separated files mostly use no quotes, and a sentence may begin with one: there it takes evidence."""
    if delimiter != "\t":
        return True
    with_quotes = _agreement(_parse_head(text, whole, delimiter, quoted=True))[1]
    without = _agreement(_parse_head(text, whole, delimiter, quoted=False))[1]
    return with_quotes > without


def _unique(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return result


def _has_header(rows: list[list[str]], wanted: Wanted) -> bool:
    first, rest = rows[0], rows[1:]
    if _hits(first, wanted):
        return True
    cells = [cell.strip() for cell in first]
    if not rest or any(not c or len(c) > 40 or _numeric(c) for c in cells) or len(set(cells)) < len(cells):
        return False
    for i in range(len(cells)):
        below = [row[i].strip() for row in rest if i < len(row)]
        if below and all(_numeric(v) for v in below if v) and any(below):
            return True
        # A column of few values whose first cell is none of them: a name above its labels.
        if len(below) >= 10 and len(set(below)) <= len(below) // 5 and cells[i] not in below:
            return True
    return False


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- the records


def records(source: Source, form: Format, encoding: str | None) -> Iterator[Record]:
    """The records of a table, streamed. Row faults are records with a `problem`; structural ones raise UserError."""
    if form.name == "csv":
        return _read_csv(source, form, encoding)
    if form.name == "jsonl":
        return _read_jsonl(source, encoding)
    if form.name == "json":
        from multihead.data.json_array import read_json

        return read_json(source, encoding)
    from multihead.data.parquet import read_parquet

    return read_parquet(source)


def _read_csv(source: Source, form: Format, encoding: str | None) -> Iterator[Record]:
    count = itertools.count(1)
    line = 0

    def numbered() -> Iterator[str]:
        nonlocal line
        for text in _lines(source, encoding):
            line = next(count)
            yield text

    rows = _csv_rows(numbered(), form.delimiter, form.quoted)
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


def _read_jsonl(source: Source, encoding: str | None) -> Iterator[Record]:
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
