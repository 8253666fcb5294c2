"""Files of a person's data as rows: streamed, with the place of each, and the faulty ones listed with the reason.

Forms (txt, JSONL, JSON, also nested as SQuAD's, CSV and other delimited tables, Parquet; any of them gzipped),
encodings and columns are found by content. What was found stands in ``Rows.guess``; a recipe's ``data`` section
overrides it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multihead.data.columns import (
    LABEL_NAMES,
    TEXT_NAMES,
    Column,
    Matched,
    Row,
    convert,
    match_columns,
    plain_name,
    synonyms,
)
from multihead.data.files import Paths, Source, find_sources
from multihead.data.formats import Format, Record, pieces, read_csv, read_jsonl, read_lists, whole_text
from multihead.data.json_array import read_json
from multihead.data.parquet import read_parquet
from multihead.data.sniff import Wanted, sniff
from multihead.data.squad import nested, unfold
from multihead.errors import Problem, UserError, tr

__all__ = ["LABEL_NAMES", "TEXT_NAMES", "Column", "Row", "Rows", "open_rows"]

_SAMPLE = 200
_KEPT_PROBLEMS = 1000


@dataclass
class FileOf:
    """One file, and how it is read: as a table, as pieces of running text, or whole with its folder's name."""

    source: Source
    form: Format
    matched: Matched = field(default_factory=Matched)
    header: list[str] = field(default_factory=list)


def open_rows(paths: Paths | Mapping[str, Paths], columns: Sequence[Column],
              mapping: Mapping[str, str] | None = None, *, encoding: str | None = None,
              delimiter: str | None = None, header: bool | None = None, base: Path | str = ".") -> Rows:
    """Look at the beginning of every file of `paths` and say how its rows are read; nothing is read whole.

    `paths`: a file, a list, a glob or a folder, relative to `base`; or column → file for aligned files, as a dict or as
    a list of "column=file". `columns`: what the task asks for. `mapping` (ours
    → theirs; a number means the column's position), `encoding`, `delimiter` and `header` override what is found.
    Raises UserError with all problems at once: no such file, empty, binary, not decodable, a column that is not there.
    """
    from multihead.data.aligned import named_files, open_aligned

    named = paths if isinstance(paths, Mapping) else None
    if isinstance(paths, (list, tuple)):
        named = named_files([str(item) for item in paths], columns)
    if named is not None:
        return open_aligned(named, columns, encoding, Path(base))
    assert not isinstance(paths, Mapping)
    # A field called by its place ("4") is no name to look for in a header, where it would be a value.
    columns = [c for c in columns if c.kind != "any" or not c.name.isdecimal()]
    wanted = Wanted(columns, {k: str(v) for k, v in (mapping or {}).items()}, encoding, delimiter, header)
    if any(column.kind == "video" for column in columns):
        from multihead.data.clips import ClipRows

        return ClipRows(paths, wanted, Path(base))
    if any(column.kind == "image" for column in columns):
        from multihead.data.pictures import PictureRows

        return PictureRows(paths, wanted, Path(base))
    if any(column.kind == "audio" for column in columns):
        from multihead.data.recordings import RecordingRows

        return RecordingRows(paths, wanted, Path(base))
    sources, skipped = find_sources(paths, Path(base))
    files, problems = [], []
    for source in sources:
        try:
            files.append(_look(source, wanted))
        except UserError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise UserError.many(problems)
    return Rows(files, wanted, skipped)


def _records(source: Source, form: Format, encoding: str | None) -> Iterator[Record]:
    """The records of a table, streamed. Row faults are records with a `problem`; structural ones raise UserError."""
    if form.name == "csv":
        return read_csv(source, form, encoding)
    if form.name == "parquet":
        return read_parquet(source)
    if form.name == "lists":
        return read_lists(source, form, encoding)
    records = read_jsonl(source, encoding) if form.name == "jsonl" else read_json(source, encoding)
    return unfold(records, form.nested) if form.nested else records


def _look(source: Source, wanted: Wanted) -> FileOf:
    form = sniff(source, wanted)
    file = FileOf(source, form)
    if form.name == "txt":
        _look_text(file, wanted)
        return file
    sample = list(itertools.islice(_records(source, form, wanted.encoding), _SAMPLE))
    if form.name in ("json", "jsonl") and nested([r.values for r in sample]):
        form.nested = "questions" if any(plain_name("question") in synonyms(c) for c in wanted.columns) else "passages"
        sample = list(itertools.islice(_records(source, form, wanted.encoding), _SAMPLE))
    good = [r.values for r in sample if not r.problem]
    if not good:
        if not sample:
            raise UserError(tr("there is no row in this file", "这个文件里没有数据行"), where=source.name)
        raise UserError.many([Problem(r.problem, f"{source.name}:{r.place or r.line}") for r in sample[:5]])
    file.header = form.names or list(dict.fromkeys(str(k) for values in good for k in values))
    place = f"{source.name}:{form.header_line or sample[0].place or sample[0].line}"
    file.matched = match_columns(wanted.columns, wanted.mapping, file.header, good, place,
                                 named=form.name != "csv" or form.header_line > 0)
    return file


def _look_text(file: FileOf, wanted: Wanted) -> None:
    """Plain text gives the first text column, and with a folder's name the label."""
    text = next((c for c in wanted.columns if c.kind == "text"), None)
    label = next((c for c in wanted.columns if c.kind in ("label", "labels") and c.required), None)
    others = [c.name for c in wanted.columns if c.required and c is not text and c is not label]
    if text is None or others or (label is not None and file.source.label is None):
        names = ", ".join(c.name for c in wanted.columns if c.required)
        raise UserError(tr(
            f"this is plain text, without columns, and the task needs: {names}. Give a CSV, TSV, JSONL or Parquet file"
            f"{', or a folder with one sub-folder of .txt files per label' if label else ''}"
            f" (if it is a table, name its data.delimiter)",
            f"这是没有列的纯文本，而任务需要：{names}。请提供 CSV、TSV、JSONL 或 Parquet 文件"
            f"{'，或者每个标签一个子文件夹、内放 .txt 文件' if label else ''}"
            f"（如果它是表格，请设置 data.delimiter）"), where=f"{file.source.name}:1")
    if wanted.mapping:
        raise UserError(tr(f"data.columns is given, and this is plain text without columns: "
                           f"{', '.join(wanted.mapping)}", f"设置了 data.columns（{'、'.join(wanted.mapping)}），"
                           f"但这是没有列的纯文本"), where=f"{file.source.name}:1")
    file.matched.theirs[text.name], file.matched.how[text.name] = "", "content"
    if label is not None:
        file.matched.theirs[label.name], file.matched.how[label.name] = "", "folder"


class Rows:
    """The rows of some files; every iteration streams them anew.

    A row has our column names; the file's other columns keep their own, where they are not ours. Running text comes as
    pieces of about 2,000 characters whose concatenation is the file (``\\r\\n`` as ``\\n``); ``row["joined"]`` is True
    where a piece continues the one before it. After an iteration ``count`` is the number of good rows, ``rejected`` the
    first thousand faulty ones with place and reason, and ``rejected_count`` how many there were.
    """

    def __init__(self, files: Sequence[FileOf], wanted: Wanted, skipped: Sequence[str] = ()) -> None:
        self._files = list(files)
        self._wanted = wanted
        self._skipped = list(skipped)
        self.count = 0
        self.rejected: list[Problem] = []
        self.rejected_count = 0

    @property
    def files(self) -> list[Path]:
        """The files that are read, in order."""
        return [file.source.path for file in self._files]

    @property
    def guess(self) -> dict[str, Any]:
        """What was found: ``files`` (one dict a file: file, format, encoding, packed, delimiter, header, columns,
        mapping ours → theirs, how) and ``skipped`` names."""
        return {"files": [self._describe(f) for f in self._files], "skipped": list(self._skipped)}

    def _describe(self, file: FileOf) -> dict[str, Any]:
        form = file.form
        return {
            "file": file.source.name, "format": form.name, "encoding": form.encoding, "packed": form.packed,
            "nested": form.nested, "delimiter": form.delimiter, "header": form.header_line > 0,
            "columns": list(file.header), "mapping": dict(file.matched.theirs),
            "how": dict(file.matched.how),
        }

    def describe(self) -> list[str]:
        """The guess as lines to print; files read in the same way share a line."""
        groups: dict[str, list[str]] = {}
        for about in self.guess["files"]:
            groups.setdefault(_how_read(about), []).append(about["file"])
        lines = []
        for how, names in groups.items():
            more = len(names) - 1
            also = tr(f" and {more} more", f" 等 {more + 1} 个文件") if more else ""
            lines.append(f"{names[0]}{also}: {how}")
        if self._skipped:
            lines.append(tr(f"passed over: {', '.join(self._skipped[:5])}", f"跳过：{'、'.join(self._skipped[:5])}"))
        return lines

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        for file in self._files:
            if file.form.name != "txt":
                rows = self._table(file)
            elif "folder" in file.matched.how.values():
                rows = self._labelled(file)
            else:
                rows = self._text(file)
            for row in rows:
                self.count += 1
                yield row

    def _reject(self, message: str, where: str) -> None:
        self.rejected_count += 1
        if len(self.rejected) < _KEPT_PROBLEMS:
            self.rejected.append(Problem(message, where))

    def _table(self, file: FileOf) -> Iterator[Row]:
        for record in _records(file.source, file.form, self._wanted.encoding):
            row = self._record_row(file, record)
            if row is not None:
                yield row

    def _record_row(self, file: FileOf, record: Record) -> Row | None:
        """The record as a row; None, and the reason kept, where it cannot be one."""
        where = f"{file.source.name}:{record.place or record.line}"
        if record.problem:
            self._reject(record.problem, where)
            return None
        row, faults, theirs = Row(where=where), [], file.matched.theirs
        for column in self._wanted.columns:
            if column.name not in theirs:
                continue
            value, fault = self._value(file, column, record.values.get(theirs[column.name]))
            if fault:
                faults.append(fault)
            elif value is not None:
                row[column.name] = value
        if faults:
            self._reject("; ".join(faults), where)
            return None
        taken = {*theirs.values(), *(c.name for c in self._wanted.columns)}
        for key, value in record.values.items():
            if key not in taken:
                row[key] = value
        return row

    def _value(self, file: FileOf, column: Column, value: Any) -> tuple[Any, str]:
        """(a cell in its column's form, "") or (None, what is wrong with it)."""
        return convert(column, value)

    def _text(self, file: FileOf) -> Iterator[Row]:
        column = next(iter(file.matched.theirs))
        for i, (line, piece) in enumerate(pieces(file.source, self._wanted.encoding)):
            row = Row({column: piece}, where=f"{file.source.name}:{line}")
            if i:
                row["joined"] = True
            yield row

    def _labelled(self, file: FileOf) -> Iterator[Row]:
        where = f"{file.source.name}:1"
        text, fault = whole_text(file.source, self._wanted.encoding)
        values: dict[str, Any] = {}
        for column in self._wanted.columns:
            if column.name in file.matched.theirs:
                raw = file.source.label if file.matched.how[column.name] == "folder" else text
                values[column.name], wrong = convert(column, raw)
                fault = fault or wrong
        if fault:
            self._reject(fault, where)
        else:
            yield Row(values, where=where)


def _how_read(about: Mapping[str, Any]) -> str:
    form = about["format"]
    if form == "csv":
        named = {",": "CSV", "\t": "TSV"}.get(about["delimiter"], tr(f"table split at {about['delimiter']!r}",
                                                                     f"以 {about['delimiter']!r} 分列的表格"))
        form = named + ("" if about["header"] else tr(" without header", "，没有表头"))
    elif form == "txt":
        form = tr("plain text", "纯文本")
    elif form == "recordings":
        form = tr("recordings", "录音")
    elif form == "clips":
        form = tr("clips", "视频")
    elif form in ("images", "idx"):
        form = tr("pictures", "图片") + (" (IDX)" if form == "idx" else "")
    elif form == "lists":
        form = tr("one user's items a line", "每行一个用户的物品序列")
    else:
        form = form.upper() if form != "parquet" else "Parquet"
        form += {"questions": tr(" of passages with questions", "（段落与问题，SQuAD 形式）"),
                 "passages": tr(" of passages", "（段落）")}.get(about["nested"], "")
    parts = [form, about["encoding"].upper(), "gzip" if about["packed"] else ""]
    words = {"name": tr("by name", "按列名"), "content": tr("by content", "按内容"), "given": tr("given", "配方指定"),
             "folder": tr("the folder's name", "文件夹名"), "beside": tr("the file beside it", "旁边的文件")}
    columns = [f"{ours} = {theirs} ({words[about['how'][ours]]})" if theirs else f"{ours} ({words[about['how'][ours]]})"
               for ours, theirs in about["mapping"].items()]
    return ", ".join(p for p in parts if p) + "; " + ", ".join(columns)
