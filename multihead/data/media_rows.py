"""Rows with a picture, a clip or a recording in them, from wherever it lies: in files that are rows themselves, in
tables that name files, in archives of either."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, TypeVar

from multihead.data.archives import Member, is_archive, members
from multihead.data.columns import Column, Matched, Row, convert
from multihead.data.files import Paths, Source, find_sources, os_error, read_head
from multihead.data.folders import labels_of, refuse_splits, shared
from multihead.data.formats import Format, FormatName
from multihead.data.media import Media, Words, path_of
from multihead.data.rows import FileOf, Rows, _look, _records
from multihead.data.sniff import Wanted, sniff
from multihead.errors import Problem, UserError, nearest, tr

_TABLES = 8  # members of an archive that are tried as its table
_TABLE_BYTES = 64 << 20
_LONGEST_TEXT = 1 << 16  # beside one file: a longer one is a table or a book

T = TypeVar("T")
F = TypeVar("F")
Content = tuple[str, Any, str]
"""(place, what lies there in a row's form, what is wrong with it)."""


class Found(NamedTuple):
    """A file that is a row itself, with its label or text; or what is wrong with it."""

    where: str
    value: Any
    beside: str | None
    fault: str = ""
    speaker: str | None = None


@dataclass
class Things(FileOf):
    """Files that are rows themselves."""

    sources: Sequence[Source] = ()
    found: Callable[[], Iterable[Found]] = tuple


@dataclass
class Inside:
    """What one reading of an archive found in it."""

    archive: Source
    things: dict[str, str] = field(default_factory=dict)
    """Name → kind of every file that may be named."""
    chosen: list[str] = field(default_factory=list)
    """Those of them that lie in `archive.inside`."""
    texts: dict[str, Source] = field(default_factory=dict)
    """Short text files by their names without endings."""
    folders: set[str] = field(default_factory=set)

    def where(self, name: str) -> str:
        """The place of a member, for a person."""
        whole = self.archive.name.removesuffix(f"/{self.archive.inside}") if self.archive.inside else self.archive.name
        return f"{whole}/{name}" if name else whole


@dataclass
class TableInside(FileOf):
    """A table in an archive that names what lies in it."""

    inside: Inside | None = None
    folder: str = ""
    """The table's folder in the archive."""


class MediaRows(Rows):
    """`Rows` of which a column holds pictures, clips or recordings. Where tables that name such files lie beside them,
    the tables' rows are the rows.

    Args:
        paths, wanted, base: as `rows.open_rows` has them; what every file is, is found by content.

    Raises:
        UserError: with all problems at once.
    """

    media: ClassVar[Media]
    kind: ClassVar[str]
    """Of the column that holds them."""
    kinds: ClassVar[tuple[str, ...]] = ("label", "labels")
    """Of the column whose value files alone have, too."""
    form: ClassVar[FormatName]
    """What `Rows.guess` calls such files."""
    lacking: ClassVar[Words]
    """Where files alone do not have that value: what to do."""
    data: ClassVar[Words]
    """What data may be."""
    texts: ClassVar[tuple[str, ...]] = ()
    """Endings of texts that may lie beside them."""

    def __init__(self, paths: Paths, wanted: Wanted, base: Path) -> None:
        sources, skipped = find_sources(paths, base, archives=True)
        super().__init__([], wanted, skipped)
        groups = defaultdict[str, list[Source]](list)
        for source in sources:
            groups[self._sort(source)].append(source)
        files, problems = _tried(self._archive, groups["archive"])
        others = self._apart(groups)
        texts = [self._is_text(source) for source in others]
        strays = list(itertools.compress(others, texts))
        tables, faults = _tried(self._table_of, [one for one, text in zip(others, texts, strict=True) if not text])
        if not tables:
            alone, more = _tried(self._alone, [groups])
            files, problems = [*files, *itertools.chain(*alone)], problems + more
        if tables or files:  # what is none of them is passed over, but for a table that cannot be read beside others
            self._skipped += [source.name for source in (strays if tables else others)]
            faults = faults if tables else []
        else:
            faults += [Problem(self._no_table(source), source.name) for source in strays]
        if problems or faults:
            raise UserError.many(list(dict.fromkeys(problems + faults)))
        self._files = [*tables, *files]

    # -- what a medium has of its own ----------------------------------------------------------------------------------

    def _kind_of(self, name: str, head: bytes | None) -> str:
        """"thing", another kind of use, or "", by a file's name or first bytes (None: not read). What is only called
        like one is one that cannot be read."""
        return "thing" if self.media.looks_like_path(name) or self.media.kind_of(head or b"") else ""

    def _apart(self, groups: Mapping[str, Sequence[Source]]) -> list[Source]:
        """The files that may be tables."""
        return list(groups["other"])

    def _alone(self, groups: Mapping[str, Sequence[Source]]) -> list[Things]:
        """The files that are rows themselves."""
        raise NotImplementedError

    def _inside(self, found: Inside) -> Things:
        """The files of an archive as rows."""
        contents = self._contents(found, set(found.chosen))
        return self._by_folder([found.archive], found.archive.name, found.chosen, contents, found.where)

    def _contents(self, found: Inside, names: Container[str]) -> Callable[[], Iterator[Content]]:
        """What these members of an archive hold, in its order."""
        def read() -> Iterator[Content]:
            for member in members(found.archive):
                if member.name in names:
                    yield member.name, *self._held(member)

        return read

    def _held(self, member: Member) -> tuple[Any, str]:
        content = member.content(self.media.most)
        return self.media.to_uri(content) if content is not None else ("", self.media.too_large(member.size))

    def _path(self, path: str, table: Path) -> tuple[Any, str]:
        return self.media.read_path(path, table)

    # -- looking at files ----------------------------------------------------------------------------------------------

    def _sort(self, source: Source) -> str:
        """What a file is: as `_kind_of`, or "archive", "other"."""
        if source.inside:
            return "archive"
        try:
            with open(source.path, "rb") as file:
                head = file.read(512)
        except OSError as error:
            raise os_error(source.name, error) from None
        if kind := self._kind_of(source.name, head[: self.media.head]):
            return kind
        if head[:2] in (b"PK", b"\x1f\x8b") or head[257:262] == b"ustar":
            return "archive" if is_archive(read_head(source, 512)[0]) else "other"
        return "other"

    def _is_text(self, source: Source) -> bool:
        """Whether a file is plain text, and so no table."""
        try:
            return sniff(source, self._wanted).name == "txt"
        except UserError:  # told by `_table_of`
            return False

    def _table_of(self, source: Source) -> FileOf:
        return _look(source, self._wanted)

    def _no_table(self, source: Source) -> str:
        reason = self.media.none(read_head(source, self.media.head)[0])
        return tr(f"{reason}. It is no table either: data are {self.data[0]}",
                  f"{reason}。它也不是表格：数据应是{self.data[1]}")

    def _archive(self, source: Source) -> FileOf:
        """A table in it that names such files, or else those files. One reading of the archive."""
        if not is_archive(read_head(source, 512)[0]):
            raise UserError(tr("there is no such file or folder", "没有这个文件或文件夹"), source.name)
        found, faults = Inside(source), list[Problem]()
        table = self._scan(found, faults)
        stems = {stem(name) for name in found.chosen}
        for one in [found.texts.pop(name) for name in list(found.texts) if name not in stems][:_TABLES]:
            table = table or self._table_inside(one, found, faults)
        if table is not None:
            return table
        if found.chosen:
            return self._inside(found)
        (en, zh), near = self.media.one, nearest(source.inside, found.folders)
        nothing = tr(f"there is no {en} in this archive, and no table that names {en}s",
                     f"这个压缩包里没有{zh}，也没有列出{zh}的表格")
        if source.inside and source.inside not in found.folders:
            nothing = tr(f"there is no such folder in the archive{near}", f"压缩包里没有这个文件夹{near}")
        raise UserError.many([Problem(nothing, source.name), *faults])

    def _scan(self, found: Inside, faults: list[Problem]) -> FileOf | None:
        """Read the archive into `found`; the first of its files that is a table, if any."""
        source, tried = found.archive, 0
        table: FileOf | None = None
        for member in members(source):
            name, within = member.name, f"{member.name}/".startswith(f"{source.inside}/" if source.inside else "")
            above = name
            while (above := above.rpartition("/")[0]) and above not in found.folders:
                found.folders.add(above)
            if kind := self._kind_of(name, member.head(self.media.head) if within else None):
                found.things[name] = kind
                found.chosen += [name] if within else []
            elif within and member.size and table is None:
                if name.lower().endswith(self.texts) and member.size <= _LONGEST_TEXT:
                    found.texts[stem(name)] = Source(source.path, found.where(name), content=member.content())
                elif member.size <= _TABLE_BYTES and tried < _TABLES:
                    one = Source(source.path, found.where(name), content=member.content())
                    table, tried = self._table_inside(one, found, faults), tried + 1
        return table

    def _table_inside(self, one: Source, found: Inside, faults: list[Problem]) -> FileOf | None:
        try:
            table = _look(one, self._wanted)
        except UserError as error:
            faults += error.problems
            return None
        if table.form.name == "txt":
            return None
        folder = str(PurePosixPath(one.name.removeprefix(found.where("") + "/")).parent)
        return TableInside(one, table.form, table.matched, table.header, found, "" if folder == "." else folder)

    # -- files that are rows themselves --------------------------------------------------------------------------------

    def _columns(self, name: str = "") -> tuple[Column, Column | None]:
        """The column that holds them, and the one whose value they have, too. UserError where the task needs others."""
        (en, zh), columns = self.media.one, self._wanted.columns
        held = next(c for c in columns if c.kind == self.kind)
        beside = next((c for c in columns if c.kind in self.kinds), None)
        others = [c.name for c in columns if c.required and c not in (held, beside)]
        if others:
            raise UserError(tr(f"these are {en}s alone, and the task also needs: {', '.join(others)}; give a table "
                               f"(CSV, TSV, JSONL, Parquet) with the {en}s' paths",
                               f"这里只有{zh}，而任务还需要：{'、'.join(others)}；"
                               f"请提供含{zh}路径的表格（CSV、TSV、JSONL、Parquet）"), name)
        if self._wanted.mapping:
            given = list(self._wanted.mapping)
            raise UserError(tr(f"data.columns is given ({', '.join(given)}), and these are {en}s without columns",
                               f"设置了 data.columns（{'、'.join(given)}），但这是没有列的{zh}"), name)
        return held, beside

    def _things(self, sources: Sequence[Source], name: str, how: str, found: Callable[[], Iterable[Found]],
                lacking: Words | None = None, form: FormatName | None = None) -> Things:
        """Files as rows. `how`: how `Rows.guess` says that they have the value beside them; "" where they do not."""
        held, beside = self._columns(name)
        matched = Matched({held.name: ""}, {held.name: "content"})
        if beside is not None and how:
            matched.theirs[beside.name], matched.how[beside.name] = "", how
        elif beside is not None and beside.required:
            raise UserError(tr(*(lacking or self.lacking)), name)
        where = Source(sources[0].path, name)
        return Things(where, Format(form or self.form, encoding=""), matched, [], sources, found)

    def _by_folder(self, sources: Sequence[Source], name: str, names: Sequence[str],
                   contents: Callable[[], Iterable[Content]], where: Callable[[str], str] = str) -> Things:
        """Files whose folders are their labels. `where`: the place of each of `names`, by which `contents` go."""
        labels = dict(zip(names, labels_of(names), strict=True))
        if self._columns(name)[1] is not None:
            refuse_splits(list(labels.values()), shared([where(one) for one in names]))

        def found() -> Iterator[Found]:
            for one, value, fault in contents():
                yield Found(where(one), value, labels[one], fault)

        return self._things(sources, name, "folder" if any(labels.values()) else "", found)

    def _read(self, sources: Sequence[Source]) -> Iterator[Content]:
        """What these files hold, by their names."""
        for source in sources:
            try:
                uri, fault = self.media.read_file(source.path)
            except OSError as error:
                uri, fault = "", str(os_error(source.name, error).problems[0].message)
            yield source.name, uri, fault

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def files(self) -> list[Path]:
        """The files that are read, in order."""
        found = ([s.path for s in f.sources] if isinstance(f, Things) else [f.source.path] for f in self._files)
        return [path for paths in found for path in paths]

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        for file in self._files:
            if isinstance(file, Things):
                rows = self._thing_rows(file)
            else:
                rows = self._archived(file) if isinstance(file, TableInside) else self._table(file)
            for row in rows:
                self.count += 1
                yield row

    def _thing_rows(self, file: Things) -> Iterator[Row]:
        held, beside = self._columns()
        for found in file.found():
            row, fault = Row({held.name: found.value}, where=found.where), found.fault
            if beside is not None and beside.name in file.matched.theirs and not fault:
                row[beside.name], fault = convert(beside, found.beside)
            if found.speaker is not None:
                row["speaker"] = found.speaker
            if fault:
                self._reject(fault, found.where)
            else:
                yield row

    def _value(self, file: FileOf, column: Column, value: Any) -> tuple[Any, str]:
        path = path_of(value) if column.kind == self.kind else None
        if path is None:
            return convert(column, value)
        if isinstance(file, TableInside):
            return path, ""  # what it names comes by later
        found, fault = self._path(path, file.source.path)
        return (None, fault) if fault else (found, "")

    def _archived(self, file: TableInside) -> Iterator[Row]:
        """The rows of a table in an archive, in the order in which the archive holds what they name."""
        assert file.inside is not None
        waiting = defaultdict[str, list[Row]](list)
        held = next(c for c in self._wanted.columns if c.kind == self.kind).name
        for record in _records(file.source, file.form, self._wanted.encoding):
            row = self._record_row(file, record)
            if row is None:
                continue
            path = path_of(row.get(held))
            if path is None:
                yield row
            else:
                waiting[_member(file.folder, path)].append(row)
        for name, value, fault in self._contents(file.inside, waiting)():
            for row in waiting.pop(name, ()):
                if fault:
                    self._reject(fault, file.inside.where(name))
                else:
                    row[held] = value
                    yield row
        en, zh = self.media.one
        for name, rows in waiting.items():
            for row in rows:
                self._reject(tr(f"there is no {en} {name!r} in the archive", f"压缩包里没有{zh} {name!r}"), row.where)


def _tried(look: Callable[[T], F], given: Iterable[T]) -> tuple[list[F], list[Problem]]:
    """(what `look` makes of those it can be made of, what is wrong with the others)."""
    found, problems = list[F](), list[Problem]()
    for one in given:
        try:
            found.append(look(one))
        except UserError as error:
            problems += error.problems
    return found, problems


def _member(folder: str, path: str) -> str:
    """A table's path as a member's name; one that climbs out of the archive names no member."""
    return os.path.normpath(os.path.join(folder, path.replace("\\", "/"))).replace(os.sep, "/")


def stem(name: str) -> str:
    """A name without its ending, the folders before it as they are."""
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix else str(path)
