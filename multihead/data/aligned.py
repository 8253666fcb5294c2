"""Aligned files: line n of each belongs to line n of the others, as translations are often published."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multihead.data.columns import Column, Matched, Row, convert
from multihead.data.encoding import detect, known_encoding, read_lines, read_text, unix_newlines
from multihead.data.files import Paths, Source, find_sources, is_gzip, read_head, refuse_binary
from multihead.data.formats import Format, texts
from multihead.data.rows import FileOf, Rows
from multihead.data.sniff import HEAD, Wanted
from multihead.errors import Problem, UserError, nearest, tr


def named_files(items: Sequence[str], columns: Sequence[Column]) -> dict[str, str] | None:
    """``["source=a.en", "target=a.de"]``, as a command line gives aligned files: column → file; None for others."""
    names = {column.name for column in columns}
    split = [item.partition("=") for item in items]
    if not split or any(not equals or name not in names for name, equals, _ in split):
        return None
    return {name: path for name, _, path in split}


def open_aligned(
    files: Mapping[str, Paths], columns: Sequence[Column], encoding: str | None, base: Path
) -> AlignedRows:
    """Look at the beginning of every file; ``files`` names for each column a file, or several in the same order.

    Raises UserError with all problems at once: a column that the task has not, one that it needs, no such file, not
    text, or for one column more files than for another.
    """
    problems = _misnamed(files, columns)
    sides: dict[str, list[FileOf]] = {}
    for name in files:
        try:
            found = find_sources(files[name], base)[0]
            sides[name] = [_look(source, name, encoding) for source in found]
        except UserError as error:
            problems += [p for p in error.problems if p not in problems]
    if not problems and len({len(side) for side in sides.values()}) > 1:
        counts = ", ".join(f"{name}: {len(side)}" for name, side in sides.items())
        problems.append(Problem(tr(f"aligned files come in equal numbers, not {counts}",
                                   f"对齐的文件个数应当相同，而不是 {counts}")))
    if problems:
        raise UserError.many(problems)
    return AlignedRows(sides, Wanted(columns, {}, encoding))


def _misnamed(files: Mapping[str, Paths], columns: Sequence[Column]) -> list[Problem]:
    known = [column.name for column in columns]
    problems = [
        Problem(tr(f"'{name}' is no column of this task, which has: {', '.join(known)}{nearest(name, known)}",
                   f"'{name}' 不是本任务的列；本任务的列有：{'、'.join(known)}{nearest(name, known)}"))
        for name in files if name not in known
    ]  # fmt: skip
    problems += [
        Problem(tr(f"there is no file for the column '{c.name}'; aligned files are given as "
                   "{" + ", ".join(f"{k}: file" for k in known) + "}",
                   f"没有给出 '{c.name}' 列的文件；对齐的文件写作 {{{', '.join(f'{k}: 文件' for k in known)}}}"))
        for c in columns if c.required and c.name not in files
    ]  # fmt: skip
    return problems


def _look(source: Source, column: str, encoding: str | None) -> FileOf:
    head, whole = read_head(source, HEAD)
    if not head:
        raise UserError(tr("this file is empty", "这个文件是空的"), where=source.name)
    refuse_binary(head, source.name)
    for _ in unix_newlines(read_text([head], source.name, encoding, whole=whole)):
        pass
    found = known_encoding(encoding) if encoding else detect(head) or ""
    form = Format("txt", encoding="utf-8" if found == "ascii" else found, packed=is_gzip(source.path))
    return FileOf(source, form, Matched({column: ""}, {column: "given"}))


class AlignedRows(Rows):
    """The rows of aligned files. A row stands where its line stands in the first column's file."""

    def __init__(self, sides: Mapping[str, Sequence[FileOf]], wanted: Wanted) -> None:
        super().__init__([file for side in sides.values() for file in side], wanted)
        self._sides = dict(sides)

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        columns = [c for c in self._wanted.columns if c.name in self._sides]
        for files in zip(*(self._sides[c.name] for c in columns), strict=True):
            sources = [file.source for file in files]
            for number, values in enumerate(self._lines(sources), 1):
                row = self._row(columns, sources, number, values)
                if row is not None:
                    self.count += 1
                    yield row

    def _lines(self, sources: Sequence[Source]) -> Iterator[Sequence[str]]:
        """The lines side by side, without their ends. UserError where a file ends before the others."""
        encoding = self._wanted.encoding
        streams = [read_lines(texts(source, encoding), source.name) for source in sources]
        for number, lines in enumerate(itertools.zip_longest(*streams), 1):
            short = next((s for s, line in zip(sources, lines, strict=True) if line is None), None)
            longer = next((s for s, line in zip(sources, lines, strict=True) if line is not None), None)
            if short is None or longer is None:
                yield [str(line).rstrip("\n") for line in lines]
                continue
            total = number + sum(1 for _ in streams[sources.index(longer)])
            raise UserError(tr(
                f"this file ends after line {number - 1}, while {longer.name} has {total} lines: aligned files have a "
                "line each for every pair. Is a line missing in one of them, or was one cut off?",
                f"这个文件在第 {number - 1} 行之后结束，而 {longer.name} 有 {total} 行：对齐的文件必须逐行对应。"
                "是否有一边少了一行，或者文件不完整？"), where=f"{short.name}:{number - 1}")

    def _row(
        self, columns: Sequence[Column], sources: Sequence[Source], number: int, lines: Sequence[str]
    ) -> Row | None:
        if not any(line.strip() for line in lines):
            return None
        row = Row(where=f"{sources[0].name}:{number}")
        for column, source, line in zip(columns, sources, lines, strict=True):
            value: Any
            value, fault = convert(column, line)
            if fault:
                self._reject(fault, f"{source.name}:{number}")
                return None
            if value is not None:
                row[column.name] = value
        return row
