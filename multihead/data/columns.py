"""Rows, the columns a task asks for, and which column of a file is which: by name first, then by content."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from multihead.data import audio, images, video
from multihead.data.events import guess_log, ids_of, seconds
from multihead.data.media import path_of
from multihead.data.squad import answers
from multihead.errors import Problem, UserError, nearest, tr

ColumnKind = Literal["text", "label", "labels", "id", "ids", "number", "time", "answers", "image", "video", "audio",
                     "any"]
MEDIA = {"image": images, "video": video, "audio": audio}
"""Kinds whose values are whole files, written as data URIs, and what knows of each."""

TEXT_NAMES = ("text", "review", "sentence", "content", "comment", "body", "message", "document", "paragraphs",
              "paragraph", "文本", "评论", "内容", "正文", "句子", "评价", "留言", "评论内容", "文本内容")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "tag", "y", "polarity",
               "标签", "类别", "分类", "情感", "类型", "情感倾向", "标注")

_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATORS = re.compile(r"[|;,、，；]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\Z")


class Row(dict[str, Any]):
    """One row: column → value. ``where`` is its place in the person's data, ``reviews.csv:812``."""

    def __init__(self, values: Mapping[str, Any] | None = None, where: str = "") -> None:
        super().__init__(values or {})
        self.where = where


def changed(row: Mapping[str, Any], **values: Any) -> Row:
    """`row` with other values in some columns, at the same place; None takes a column out."""
    held = {name: value for name, value in {**row, **values}.items() if name not in values or value is not None}
    return Row(held, where=getattr(row, "where", ""))


@dataclass(frozen=True)
class Column:
    """A column a task asks for: our `name`, what it holds, and other `names` it may have in a file (any case).

    kinds: "text" str, not blank; "label" one str; "labels" list of str; "id" str; "ids" list of str, one id alone being
    a list of one; "number" int or float; "time" float, in seconds where it was a date, else the number as it stands;
    "answers" list of {"text", "answer_start"}, empty for a question that has none (see `squad.answers`); "image" str,
    the picture's file as a data URI; "video" str, a clip's, or a `video.ClipFile`; "audio"
    str, a recording's; "any" the value as it stands.
    """

    name: str
    kind: ColumnKind = "text"
    required: bool = True
    names: tuple[str, ...] = ()
    target: bool = False
    """Whether this is what is to be learned. The other columns are inputs: rows with equal inputs are copies of each
    other, and a request holds inputs alone."""


@dataclass
class Matched:
    """Which of the file's columns is which of ours, and how that was decided ("given", "name" or "content")."""

    theirs: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)


def plain_name(name: str) -> str:
    """A column name as it is compared: full-width folded (NFKC), lower case, without blanks, ``_`` and ``-``."""
    return re.sub(r"[\s_\-\ufeff]+", "", unicodedata.normalize("NFKC", str(name))).casefold()


def synonyms(column: Column) -> list[str]:
    """Every plain name of a column, its own first."""
    return list(dict.fromkeys(plain_name(n) for n in (column.name, *column.names)))


def match_columns(columns: Sequence[Column], given: Mapping[str, str] | None, header: Sequence[str],
                  sample: Sequence[Mapping[str, Any]], where: str, *, named: bool = True) -> Matched:
    """Decide which of the file's columns (`header`) is which of ours.

    `given` (ours → theirs) wins; then names; then, for required columns, the content of `sample`. `named` is False
    for a file without a header, whose columns are called "1", "2", …. Raises UserError for a column that is not there.
    """
    found = Matched()
    _take_given(columns, given or {}, header, where, named, found)
    plain: dict[str, str] = {}
    for name in header:
        plain.setdefault(plain_name(name), name)
    if named:
        for column in columns:
            if column.name in found.theirs:
                continue
            free = [plain[n] for n in synonyms(column) if n in plain and plain[n] not in found.theirs.values()]
            usable = [n for n in free if _usable(column, [row.get(n) for row in sample])]
            if usable:
                found.theirs[column.name], found.how[column.name] = usable[0], "name"
    elif any(column.kind == "time" for column in columns):
        _take_log(columns, header, sample, found)
    missing = [c for c in columns if c.required and c.name not in found.theirs]
    _guess_by_content(missing, header, sample, found)
    problems = [_missing(c, header, where, named) for c in columns if c.required and c.name not in found.theirs]
    if problems:
        raise UserError.many(problems)
    return found


def _take_given(columns: Sequence[Column], given: Mapping[str, str], header: Sequence[str], where: str, named: bool,
                found: Matched) -> None:
    problems = []
    plain = {plain_name(name): name for name in reversed(header)}
    ours = [c.name for c in columns]
    for name, theirs in given.items():
        theirs = str(theirs)
        if name not in ours:
            problems.append(Problem(tr(
                f"data.columns names '{name}', which this task does not use; it uses: {', '.join(ours)}"
                f"{nearest(name, ours)}",
                f"data.columns 里的 '{name}' 不是本任务用到的列；本任务用到：{'、'.join(ours)}{nearest(name, ours)}")))
        elif theirs in header or plain_name(theirs) in plain:
            found.theirs[name] = theirs if theirs in header else plain[plain_name(theirs)]
            found.how[name] = "given"
        elif theirs.isdecimal() and 1 <= int(theirs) <= len(header):
            found.theirs[name], found.how[name] = header[int(theirs) - 1], "given"
        else:
            hint = nearest(theirs, header)
            problems.append(Problem(tr(
                f"there is no column '{theirs}' (data.columns.{name}); the columns are: {_shown(header, named)}{hint}",
                f"没有 '{theirs}' 这一列（data.columns.{name}）；现有的列：{_shown(header, named)}{hint}"), where))
    if problems:
        raise UserError.many(problems)


def _take_log(columns: Sequence[Column], header: Sequence[str], sample: Sequence[Mapping[str, Any]],
              found: Matched) -> None:
    """Which column of an event log without a header is which; what the recipe gives stands."""
    for name, theirs in guess_log([name for name in header if name not in found.theirs.values()], sample).items():
        if name not in found.theirs and any(column.name == name for column in columns):
            found.theirs[name], found.how[name] = theirs, "content"


def _shown(header: Sequence[str], named: bool) -> str:
    names = ", ".join(str(h) for h in header[:30]) + (", …" if len(header) > 30 else "")
    return names if named else names + tr(" (no header row: columns by number)", "（没有表头：用列号）")


def _missing(column: Column, header: Sequence[str], where: str, named: bool) -> Problem:
    known = ", ".join(column.names[:6])
    known_en = f" (also known as {known})" if known else ""
    known_zh = f"（也可以叫 {known}）" if known else ""
    return Problem(tr(
        f"no column was found for '{column.name}'{known_en}; the columns are: {_shown(header, named)}. "
        f"Name it in the recipe: data.columns.{column.name}",
        f"没有找到 '{column.name}' 列{known_zh}；现有的列：{_shown(header, named)}。"
        f"请在配方里写明：data.columns.{column.name}"), where)


def _guess_by_content(missing: Sequence[Column], header: Sequence[str], sample: Sequence[Mapping[str, Any]],
                      found: Matched) -> None:
    """Longest mean text is the text; few distinct values are the label. Anything less clear stays unmapped."""
    free = [name for name in header if name not in found.theirs.values()]
    values = {name: [v for row in sample if not blank(v := row.get(name))] for name in free}

    def take(column: Column, name: str) -> None:
        found.theirs[column.name], found.how[column.name] = name, "content"
        free.remove(name)

    texts = [c for c in missing if c.kind == "text"]
    wordy = sorted((n for n in free if _mean_text(values[n]) > 0), key=lambda n: -_mean_text(values[n]))
    # The longest columns, but handed out in the file's order: source stands before target.
    for column, name in zip(texts, sorted(wordy[:len(texts)], key=free.index), strict=False):
        take(column, name)
    for column in missing:
        if column.kind in MEDIA:
            fits = MEDIA[column.kind].looks_like_path
            pictures = [n for n in free if values[n] and all(map(fits, values[n]))]
            if pictures:
                take(column, pictures[0])
    for column in missing:
        if column.kind in ("label", "labels"):
            few = [n for n in free if _few_values(values[n], len(sample))]
            if few:
                # A column with one value only is the label when nothing else can be: files may be sorted by label.
                counts = {n: len({str(v) for v in values[n]}) for n in few}
                take(column, min(few, key=lambda n: (counts[n] == 1, counts[n])))


def blank(value: Any) -> bool:
    """Nothing there: None, blanks only, an empty list, or not a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, dict)) and not value


def _usable(column: Column, values: Sequence[Any]) -> bool:
    """Whether a column called right can be what is wanted: not where every value in it is of another kind."""
    present = [v for v in values if not blank(v)]
    if column.kind in MEDIA and any(path_of(v) for v in present):
        return True
    return not present or any(not convert(column, v)[1] for v in present)


def _mean_text(values: Sequence[Any]) -> float:
    """Mean length of values that are text; 0 for numbers, ids and other things."""
    texts = ["\n".join(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for v in values]
    if not texts or not all(isinstance(t, str) for t in texts) or all(_NUMBER.match(t.strip()) for t in texts):
        return 0.0
    # Codes and ids are long too, but are single words of ASCII.
    if sum(1 for t in texts if not t.isascii() or len(t.split()) > 1) < 0.3 * len(texts):
        return 0.0
    return sum(map(len, texts)) / len(texts)


def _few_values(values: Sequence[Any], rows: int) -> bool:
    texts = [str(v) for v in values if isinstance(v, (str, int, bool, list))]
    if len(texts) < max(1, 0.9 * rows) or max(map(len, texts)) > 40:
        return False
    distinct = len(set(texts))
    return distinct <= max(2, min(50, len(texts) // 3))


def convert(column: Column, value: Any) -> tuple[Any, str]:
    """(value in the column's form, "") or (None, what is wrong with it)."""
    if column.kind == "answers" and value is not None:
        found = answers(value)
        return (found, "") if found is not None else (None, _wrong_kind(column, value))
    if blank(value):
        if not column.required:
            return None, ""
        return None, tr(f"'{column.name}' is empty", f"“{column.name}”为空")
    if column.kind == "any":
        return value, ""
    if column.kind in MEDIA:
        picture, fault = MEDIA[column.kind].value(value)
        return (None, fault) if fault else (picture, "")
    if column.kind == "labels":
        parts = value if isinstance(value, list) else _SEPARATORS.split(_scalar(value) or "")
        names = [s.strip() for p in parts if (s := _scalar(p)) is not None and s.strip()]
        if not names or len(names) < sum(1 for p in parts if not blank(p)):
            return None, _wrong_kind(column, value)
        return list(dict.fromkeys(names)), ""
    if column.kind == "ids":
        ids = [s.strip() if (s := _scalar(v)) is not None else "" for v in ids_of(value) or []]
        return (ids, "") if ids and all(ids) and not any(map(_SURROGATE.search, ids)) else (
            None, _wrong_kind(column, value))
    if column.kind == "time":
        moment = seconds(value)
        return (moment, "") if moment is not None else (None, _wrong_kind(column, value))
    if column.kind == "text" and isinstance(value, list) and all(isinstance(x, str) for x in value):
        value = "\n".join(value)
    text = _scalar(value)
    if text is None or (column.kind == "text" and isinstance(value, bool)):
        return None, _wrong_kind(column, value)
    if _SURROGATE.search(text):
        return None, tr(f"'{column.name}' holds half a character (a lone surrogate)",
                        f"“{column.name}”里有半个字符（孤立的代理项）")
    if column.kind == "text":
        return text, ""
    text = text.strip()
    if column.kind != "number":
        return text, ""
    folded = unicodedata.normalize("NFKC", text)
    if isinstance(value, bool) or not _NUMBER.match(folded):
        return None, _wrong_kind(column, value)
    number = float(folded)
    if math.isinf(number):
        return None, _wrong_kind(column, value)
    return int(folded) if re.fullmatch(r"[+-]?\d{1,18}", folded) else number, ""


def _scalar(value: Any) -> str | None:
    """A plain value as text; whole floats as integers, so that 1 and 1.0 of two JSON writers are one label."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value) if isinstance(value, (int, float)) else None


def _wrong_kind(column: Column, value: Any) -> str:
    wanted = {"text": ("text", "文本"), "label": ("a label", "标签"), "labels": ("a list of labels", "标签列表"),
              "id": ("an id", "编号"), "number": ("a number", "数字"),
              "ids": ("an id, or a list of ids", "编号，或编号的列表"),
              "time": ("a time: a number, or a date such as 2024-03-01 12:00:00",
                       "时间：数字，或日期如 2024-03-01 12:00:00"),
              "answers": ("an answer, or a list of answers, each a text or {text, answer_start}",
                          "答案或答案列表，每个答案是文本或 {text, answer_start}")}[column.kind]
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return tr(f"'{column.name}' should be {wanted[0]}, not {shown} ({type(value).__name__})",
              f"“{column.name}”应该是{wanted[1]}，而不是 {shown}（{type(value).__name__}）")
