"""What form a file has: found by its content, never by its name."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multihead.data.columns import Column, plain_name, synonyms
from multihead.data.encoding import detect, known_encoding, read_text, unix_newlines
from multihead.data.files import Source, is_gzip, os_error, read_head, refuse_binary
from multihead.data.formats import Format, csv_rows
from multihead.errors import UserError, tr

HEAD = 1 << 20
_DELIMITERS = ("\t", ",", ";", "|", "::", "，")
_SAMPLE = 100


@dataclass(frozen=True)
class Wanted:
    """What the recipe says about the files, and the columns looked for."""

    columns: Sequence[Column]
    mapping: dict[str, str]
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None


def sniff(source: Source, wanted: Wanted) -> Format:
    """Find the form of `source`. Raises UserError: empty, binary, not decodable, or no readable beginning."""
    head, whole = read_head(source, HEAD)
    try:
        packed = source.content is None and is_gzip(source.path)
    except OSError as error:
        raise os_error(source.name, error) from None
    if not head:
        raise UserError(tr("this file is empty", "这个文件是空的"), where=source.name)
    if head.startswith(b"PAR1") and not packed:
        return Format("parquet", encoding="")
    refuse_binary(head, source.name)
    found = known_encoding(wanted.encoding) if wanted.encoding else detect(head) or ""
    form = Format("txt", encoding="utf-8" if found == "ascii" else found, packed=packed)
    text = "".join(unix_newlines(read_text([head], source.name, wanted.encoding, whole=whole)))
    if not text.strip():
        raise UserError(tr("there is nothing but blanks in this file", "这个文件里只有空白"), where=source.name)
    if wanted.delimiter:
        return _as_csv(form, wanted.delimiter, text, whole, wanted, source)
    json_form = _json_form(text, whole, wanted)
    if json_form:
        form.name = json_form
        return form
    delimiter = _find_delimiter(text, whole, wanted, document=source.label is not None)
    if not delimiter and any(c.kind == "ids" for c in wanted.columns):
        return _as_lists(form, text, whole, wanted, source)
    return _as_csv(form, delimiter, text, whole, wanted, source) if delimiter else form


def _json_form(text: str, whole: bool, wanted: Wanted) -> Literal["json", "jsonl"] | None:
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
    row = _hits([str(key) for key in first], wanted) >= {c.name for c in wanted.columns if c.required}
    if len(lines) == 1 and whole and any(_objects(v) for v in first.values()) and not row:
        return "json"
    return "jsonl"


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _parse_head(text: str, whole: bool, delimiter: str, quoted: bool) -> list[list[str]]:
    lines = text.split("\n")
    if not whole and len(lines) > 1:
        lines.pop()
    found = csv_rows((line + "\n" for line in lines), delimiter, quoted, strict=False)
    try:
        rows = [r for r in itertools.islice(found, _SAMPLE + 1) if r and (len(r) > 1 or r[0].strip())]
    except csv.Error:
        return []
    # Where the head was cut, its last record may be half of one.
    return rows[:_SAMPLE] if whole or len(rows) > _SAMPLE or len(rows) < 2 else rows[:-1]


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


def _find_delimiter(text: str, whole: bool, wanted: Wanted, document: bool) -> str | None:
    """The delimiter of a table, or None for plain text.

    `document`: the file lies in a sub-folder that may be its label, so that it takes more to call it a table.
    """
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
        least = 5 if document else 1 if delimiter == "\t" else 2
        alike = width > 1 and share >= (0.9 if delimiter == "\t" else 0.95) and len(rows) >= least and (
            delimiter == "\t" or (len({*required, *wanted.mapping}) > 1 and not document and delimiter != "，"))
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


def _as_lists(form: Format, text: str, whole: bool, wanted: Wanted, source: Source) -> Format:
    """One user's items a line: the first word names the user where no two lines begin alike, or the recipe says so."""
    lines = [line.split() for line in (text if whole else text[: text.rfind("\n") + 1]).split("\n")]
    lines = [words for words in lines if words]
    if lines and len({len(words) for words in lines}) == 1 and 2 < len(lines[0]) < 5 and len(lines) > 2 \
            and all(_numeric(words[-1]) and float(words[-1]) > 3e8 for words in lines):
        raise UserError(tr("this looks like a table with blanks between its columns; set data.delimiter to ' '",
                           "这看起来是以空格分列的表格；请把 data.delimiter 设为 ' '"), where=f"{source.name}:1")
    firsts = [words[0] for words in lines]
    given = wanted.mapping.get("user")
    named = given == "user" or (given is None and len(set(firsts)) == len(firsts))
    form.name, form.names = "lists", ["user" if named else "line", "item"]
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
