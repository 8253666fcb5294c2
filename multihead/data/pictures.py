"""Rows with a picture in them: folders of pictures, tables that name pictures, archives of either, IDX, Parquet."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from multihead.data import images
from multihead.data.archives import is_archive, members
from multihead.data.columns import Column, Matched, Row, convert
from multihead.data.files import Paths, Source, find_sources, os_error, read_head
from multihead.data.formats import Format, Record
from multihead.data.images import Files, Found, Idx
from multihead.data.rows import FileOf, Rows, _look, _records
from multihead.data.sniff import Wanted, sniff
from multihead.errors import Problem, UserError, tr

_TABLES = 8  # members of an archive that are tried as its table
_TABLE_BYTES = 64 << 20


@dataclass
class PicturesOf(FileOf):
    """Pictures that are rows themselves, each with the label its folder or its file of labels gives."""

    pictures: Files | Idx | Archive | None = None


@dataclass
class ArchiveOf(FileOf):
    """A table in an archive that names pictures in it."""

    archive: Source | None = None
    inside: str = ""
    """The table's folder in the archive."""


class Archive:
    """The pictures of an archive; each one's folder in it is its label."""

    form = "images"

    def __init__(self, source: Source, names: Sequence[str], inside: str = "") -> None:
        self.source, self.sources, self.name = source, [source], source.name
        self.labels = dict(zip(names, images.labels_of(names), strict=True))

    def __iter__(self) -> Iterator[Found]:
        for name, content in members(self.source):
            if name in self.labels:
                uri, fault = images.to_uri(content) if content is not None else ("", images.too_large(1 << 40))
                yield Found(f"{self.source.name}/{name}", uri, self.labels[name], fault)


def open_pictures(paths: Paths, wanted: Wanted, base: Path) -> Rows:
    """`rows.open_rows` for a task that asks for a picture: what every file of `paths` is, found by content.

    Where tables that name pictures lie beside pictures, the tables' rows are the rows. Raises UserError.
    """
    sources, skipped = find_sources(paths, base)
    groups = defaultdict[str, list[Source]](list)
    for source in sources:
        groups[_kind(source)].append(source)
    files: list[FileOf] = []
    problems: list[Problem] = []
    for source in groups["archive"]:
        _try(partial(_look_archive, wanted=wanted), [source], files, problems)
    tables: list[FileOf] = []
    faults: list[Problem] = []
    for source in groups["other"]:
        _try(partial(_look_table, wanted=wanted), [source], tables, faults)
    if groups["idx"] and not tables:
        _try(partial(_pictures, wanted=wanted), images.pair_idx(groups["idx"]), files, problems)
    if groups["picture"] and not tables:
        _try(partial(_pictures, wanted=wanted), [Files(groups["picture"])], files, problems)
    if files and faults:  # a stray file beside pictures
        skipped += [source.name for source in groups["other"]]
        faults = []
    if problems or faults:
        raise UserError.many(list(dict.fromkeys(problems + faults)))
    return PictureRows([*tables, *files], wanted, skipped)


def _try(look: Callable[[Any], FileOf], given: Sequence[Any], found: list[FileOf], problems: list[Problem]) -> None:
    for one in given:
        try:
            found.append(look(one))
        except UserError as error:
            problems += error.problems


def _kind(source: Source) -> str:
    """What a file is by its first bytes: "picture", "idx", "archive" or "other". What is only called like a picture is
    one that cannot be read."""
    try:
        with open(source.path, "rb") as file:
            head = file.read(262)
    except OSError as error:
        raise os_error(source.name, error) from None
    if images.kind_of(head):
        return "picture"
    named = "picture" if images.looks_like_path(source.name) else "other"
    if head[:2] not in (b"PK", b"\x1f\x8b", b"\0\0") and head[257:] != b"ustar":
        return named
    head, _ = read_head(source, 512)
    if is_archive(head):
        return "archive"
    return "idx" if images.idx_shape(source, head) else named


def _columns(wanted: Wanted) -> tuple[Column, Column | None]:
    image = next(c for c in wanted.columns if c.kind == "image")
    label = next((c for c in wanted.columns if c.kind in ("label", "labels")), None)
    others = [c.name for c in wanted.columns if c.required and c not in (image, label)]
    if others:
        raise UserError(tr(f"these are pictures alone, and the task also needs: {', '.join(others)}; give a table "
                           f"(CSV, JSONL, Parquet) with the pictures' paths",
                           f"这里只有图片，而任务还需要：{'、'.join(others)}；请提供含图片路径的表格（CSV、JSONL、Parquet）"))
    return image, label


def _pictures(found: Files | Idx | Archive, wanted: Wanted) -> FileOf:
    """Pictures as rows. UserError where they have no labels and need them, or where their folders are parts."""
    image, label = _columns(wanted)
    if wanted.mapping:
        raise UserError(tr(f"data.columns is given ({', '.join(wanted.mapping)}), and these are pictures without "
                           "columns",
                           f"设置了 data.columns（{'、'.join(wanted.mapping)}），但这是没有列的图片"), found.name)
    matched = Matched({image.name: ""}, {image.name: "content"})
    labels = list(found.labels.values()) if isinstance(found, Archive) else found.labels
    if isinstance(found, Idx):
        labelled = found.label_source is not None
    else:
        labelled = any(labels)
        if label is not None:
            images.refuse_splits(labels, found.name)
    if label is not None and labelled:
        matched.theirs[label.name] = ""
        matched.how[label.name] = "content" if isinstance(found, Idx) else "folder"
    elif label is not None and label.required:
        what = (tr("no file of labels lies beside it (…-labels-idx1-…)", "旁边没有标签文件（…-labels-idx1-…）")
                if isinstance(found, Idx) else
                tr("put them into one folder per label (cat/1.jpg, dog/2.jpg), or give a table of paths and labels",
                   "请每个标签放一个文件夹（cat/1.jpg、dog/2.jpg），或提供图片路径与标签的表格"))
        raise UserError(tr(f"these pictures have no labels: {what}", f"这些图片没有标签：{what}"), found.name)
    name = found.name if isinstance(found, (Idx, Archive)) or len(found.sources) > 1 else found.sources[0].name
    form = Format("idx" if found.form == "idx" else "images", encoding="")
    return PicturesOf(Source(found.sources[0].path, name), form, matched, [], found)


def _look_table(source: Source, wanted: Wanted) -> FileOf:
    if sniff(source, wanted).name == "txt":
        reason = images.no_picture(read_head(source, images.HEAD)[0])
        raise UserError(tr(f"{reason}. It is no table either: data are a folder of pictures, an archive of them, or a "
                           "table with their paths",
                           f"{reason}。它也不是表格：数据应是图片文件夹、图片压缩包，或含图片路径的表格"), source.name)
    return _look(source, wanted)


def _look_archive(source: Source, wanted: Wanted) -> FileOf:
    """A table in it that names pictures, or else its pictures. One reading of the archive."""
    names: list[str] = []
    others: list[Source] = []
    for name, content in members(source):
        if images.looks_like_path(name) or (content is not None and images.kind_of(content[: images.HEAD])):
            names.append(name)
        elif content is not None and len(others) < _TABLES and 0 < len(content) <= _TABLE_BYTES:
            others.append(Source(source.path, f"{source.name}/{name}", content=content))
    faults: list[Problem] = []
    for other in others:
        try:
            table = _look(other, wanted)
        except UserError as error:
            faults += error.problems
            continue
        if table.form.name != "txt":
            inside = str(PurePosixPath(other.name[len(source.name) + 1 :]).parent)
            return ArchiveOf(other, table.form, table.matched, table.header, source, "" if inside == "." else inside)
    if not names:
        nothing = Problem(tr("there is no picture in this archive, and no table that names pictures",
                             "这个压缩包里没有图片，也没有列出图片的表格"), source.name)
        raise UserError.many([nothing, *faults])
    return _pictures(Archive(source, names), wanted)


class PictureRows(Rows):
    """`Rows` whose pictures are read from wherever they lie."""

    media = "image"

    @property
    def files(self) -> list[Path]:
        found = []
        for file in self._files:
            if isinstance(file, PicturesOf) and file.pictures is not None:
                found += [source.path for source in file.pictures.sources]
            else:
                found.append(file.source.path)
        return found

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        for file in self._files:
            if isinstance(file, PicturesOf):
                rows = self._pictures(file)
            else:
                rows = self._archived(file) if isinstance(file, ArchiveOf) else self._table(file)
            for row in rows:
                self.count += 1
                yield row

    def _pictures(self, file: PicturesOf) -> Iterator[Row]:
        assert file.pictures is not None
        image, label = _columns(self._wanted)
        for found in file.pictures:
            row, fault = Row({image.name: found.image}, where=found.where), found.fault
            if label is not None and label.name in file.matched.theirs and not fault:
                value, fault = convert(label, found.label)
                row[label.name] = value
            if fault:
                self._reject(fault, found.where)
            else:
                yield row

    def _value(self, file: FileOf, column: Column, value: Any) -> tuple[Any, str]:
        path = images.path_of(value) if column.kind == self.media else None
        if path is None:
            return convert(column, value)
        if isinstance(file, ArchiveOf):
            return path, ""  # its picture comes by later
        uri, fault = self._path(path, file.source.path)
        return (None, fault) if fault else (uri, "")

    def _path(self, path: str, table: Path) -> tuple[str, str]:
        return images.read_path(path, table)

    def _uri(self, content: bytes | None) -> tuple[str, str]:
        return images.to_uri(content) if content is not None else ("", images.too_large(1 << 40))

    def _none(self, name: str) -> str:
        return tr(f"there is no picture {name!r} in the archive", f"压缩包里没有图片 {name!r}")

    def _archived(self, file: ArchiveOf) -> Iterator[Row]:
        """The rows of a table in an archive, in the order in which the archive holds their pictures."""
        assert file.archive is not None
        waiting = defaultdict[str, list[Row]](list)
        image = next(c for c in self._wanted.columns if c.kind == self.media)
        for record in _records(file.source, file.form, self._wanted.encoding):
            row = self._record_row(file, record)
            if row is None:
                continue
            path = images.path_of(row.get(image.name))
            if path is None:
                yield row
            else:
                waiting[_inside(file.inside, path)].append(row)
        for name, content in members(file.archive):
            for row in waiting.pop(name, ()):
                uri, fault = self._uri(content)
                if fault:
                    self._reject(fault, f"{file.archive.name}/{name}")
                else:
                    row[image.name] = uri
                    yield row
        for name, rows in waiting.items():
            for row in rows:
                self._reject(self._none(name), row.where)


def _inside(folder: str, path: str) -> str:
    """A table's path as a member's name; one that climbs out of the archive names no member."""
    return os.path.normpath(os.path.join(folder, path.replace("\\", "/"))).replace(os.sep, "/")


__all__ = ["PictureRows", "Record", "open_pictures"]
