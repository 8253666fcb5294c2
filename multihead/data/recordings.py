"""Rows with a recording in them: folders of recordings with their texts beside them, tables that name recordings,
archives of either.

A text lies beside its recording as ``name.txt`` or ``name.lab``; the folders in between do not matter, but the first of
them is kept as ``speaker``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from multihead.data import audio
from multihead.data.archives import is_archive, members
from multihead.data.columns import Column, Matched, Row, convert
from multihead.data.files import Paths, Source, find_sources, os_error, read_head
from multihead.data.formats import Format, whole_text
from multihead.data.pictures import ArchiveOf, PictureRows, _try
from multihead.data.rows import FileOf, _look
from multihead.data.sniff import Wanted, sniff
from multihead.errors import Problem, UserError, tr

BESIDE = (".txt", ".lab")
_TABLES = 8
_TEXT_BYTES = 64 << 20
_LONGEST_TEXT = 1 << 16  # of one recording: a longer file is a table or a book


@dataclass
class RecordingsOf(FileOf):
    """Recordings that are rows themselves, each with the text beside it; of an archive where there is one."""

    recordings: list[Source] = field(default_factory=list)
    texts: Mapping[str, Source] = field(default_factory=dict)
    """Text files by the recording's name without its ending."""
    archive: Source | None = None


def open_recordings(paths: Paths, wanted: Wanted, base: Path) -> RecordingRows:
    """`rows.open_rows` for a task that asks for a recording: what every file of `paths` is, found by content.

    Where tables that name recordings lie beside recordings, the tables' rows are the rows. Raises UserError.
    """
    sources, skipped = find_sources(paths, base)
    groups = defaultdict[str, list[Source]](list)
    for source in sources:
        groups[_kind(source)].append(source)
    texts = {_stem(s.name): s for s in groups["other"] if s.name.lower().endswith(BESIDE)}
    beside = {stem: s for stem, s in texts.items() if any(_stem(r.name) == stem for r in groups["recording"])}
    others = [s for s in groups["other"] if s not in beside.values()]
    files: list[FileOf] = []
    problems: list[Problem] = []
    _try(partial(_look_archive, wanted=wanted), groups["archive"], files, problems)
    tables: list[FileOf] = []
    faults: list[Problem] = []
    _try(partial(_look_table, wanted=wanted), others, tables, faults)
    if groups["recording"] and not tables:
        _try(partial(_recordings, texts=beside, wanted=wanted), [groups["recording"]], files, problems)
    if files and faults:  # a stray file beside recordings
        skipped += [source.name for source in others]
        faults = []
    if problems or faults:
        raise UserError.many(list(dict.fromkeys(problems + faults)))
    return RecordingRows([*tables, *files], wanted, skipped)


def _kind(source: Source) -> str:
    """What a file is by its first bytes: "recording", "archive" or "other". What is only called like a recording is one
    that cannot be read."""
    try:
        with open(source.path, "rb") as file:
            head = file.read(audio.HEAD)
    except OSError as error:
        raise os_error(source.name, error) from None
    if audio.kind_of(head) or audio.looks_like_path(source.name):
        return "recording"
    if head[:2] not in (b"PK", b"\x1f\x8b") and head[257:262] != b"ustar":
        return "other"
    return "archive" if is_archive(read_head(source, 512)[0]) else "other"


def _stem(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix else str(path)


def _columns(wanted: Wanted) -> tuple[Column, Column | None]:
    recording = next(c for c in wanted.columns if c.kind == "audio")
    text = next((c for c in wanted.columns if c.kind == "text"), None)
    others = [c.name for c in wanted.columns if c.required and c not in (recording, text)]
    if others:
        raise UserError(tr(f"these are recordings alone, and the task also needs: {', '.join(others)}; give a table "
                           "(CSV, TSV, JSONL) with the recordings' paths",
                           f"这里只有录音，而任务还需要：{'、'.join(others)}；请提供含录音路径的表格（CSV、TSV、JSONL）"))
    return recording, text


def _recordings(found: list[Source], texts: Mapping[str, Source], wanted: Wanted,
                archive: Source | None = None) -> RecordingsOf:
    """Recordings as rows. UserError where they need texts and there are none."""
    recording, text = _columns(wanted)
    name = archive.name if archive else str(PurePosixPath(found[0].name).parent) if len(found) > 1 else found[0].name
    if wanted.mapping:
        raise UserError(tr(f"data.columns is given ({', '.join(wanted.mapping)}), and these are recordings without "
                           "columns", f"设置了 data.columns（{'、'.join(wanted.mapping)}），但这是没有列的录音"), name)
    matched = Matched({recording.name: ""}, {recording.name: "content"})
    if text is not None and texts:
        matched.theirs[text.name], matched.how[text.name] = "", "beside"
    elif text is not None and text.required:
        raise UserError(tr("these recordings have no texts: put each text beside its recording (a.wav, a.txt), or give "
                           "a table (CSV, TSV, JSONL) with the columns audio and text",
                           "这些录音没有文本：请把文本放在录音旁边（a.wav、a.txt），或提供含 audio 与 text 两列的表格"
                           "（CSV、TSV、JSONL）"), name)
    first = archive or found[0]
    return RecordingsOf(Source(first.path, name), Format("recordings", encoding=""), matched, [], found, texts, archive)


def _look_table(source: Source, wanted: Wanted) -> FileOf:
    if sniff(source, wanted).name == "txt":
        reason = audio.no_audio(read_head(source, audio.HEAD)[0])
        raise UserError(tr(f"{reason}. It is no table either: data are a table with the columns audio and text, a "
                           "folder of recordings each with its text beside it, or an archive of either",
                           f"{reason}。它也不是表格：数据应是含 audio 与 text 两列的表格、录音与文本成对的文件夹，"
                           "或二者之一的压缩包"), source.name)
    return _look(source, wanted)


def _look_archive(source: Source, wanted: Wanted) -> FileOf:
    """A table in it that names recordings, or else its recordings. One reading of the archive."""
    found: list[Source] = []
    others: list[Source] = []
    texts: dict[str, Source] = {}
    for name, content in members(source):
        if audio.looks_like_path(name) or (content is not None and audio.kind_of(content[: audio.HEAD])):
            found.append(Source(source.path, f"{source.name}/{name}"))
        elif content is not None and 0 < len(content) <= _TEXT_BYTES:
            one = Source(source.path, f"{source.name}/{name}", content=content)
            if name.lower().endswith(BESIDE) and len(content) <= _LONGEST_TEXT:
                texts[_stem(one.name)] = one
            elif len(others) < _TABLES:
                others.append(one)
    beside = {stem: one for stem, one in texts.items() if stem in {_stem(r.name) for r in found}}
    others += [one for stem, one in texts.items() if stem not in beside][:_TABLES]
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
    if not found:
        nothing = Problem(tr("there is no recording in this archive, and no table that names recordings",
                             "这个压缩包里没有录音，也没有列出录音的表格"), source.name)
        raise UserError.many([nothing, *faults])
    return _recordings(found, beside, wanted, source)


class RecordingRows(PictureRows):
    """`Rows` whose recordings are read from wherever they lie."""

    media = "audio"

    @property
    def files(self) -> list[Path]:
        found = []
        for file in self._files:
            if isinstance(file, RecordingsOf) and file.archive is None:
                found += [source.path for source in [*file.recordings, *file.texts.values()]]
            else:
                found.append(file.source.path)
        return found

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        for file in self._files:
            if isinstance(file, RecordingsOf):
                rows = self._beside(file)
            else:
                rows = self._archived(file) if isinstance(file, ArchiveOf) else self._table(file)
            for row in rows:
                self.count += 1
                yield row

    def _beside(self, file: RecordingsOf) -> Iterator[Row]:
        recording, text = _columns(self._wanted)
        texts = text if text is not None and text.name in file.matched.theirs else None
        for where, uri, fault in self._contents(file):
            row = Row({recording.name: uri}, where=where)
            if texts is not None and not fault:
                source = file.texts.get(_stem(where))
                if source is None:
                    fault = tr("no text lies beside this recording (.txt or .lab)",
                               "这个录音旁边没有文本（.txt 或 .lab）")
                else:
                    words, fault = whole_text(source, self._wanted.encoding)
                    if not fault:
                        row[texts.name], fault = convert(texts, words.strip())
            if fault:
                self._reject(fault, where)
                continue
            speaker = next((s.label for s in file.recordings if s.name == where), None)
            if speaker is not None:
                row["speaker"] = speaker
            yield row

    def _contents(self, file: RecordingsOf) -> Iterator[tuple[str, str, str]]:
        """(place, recording, fault) of every recording of the files or the archive."""
        if file.archive is not None:
            known = {source.name for source in file.recordings}
            for name, content in members(file.archive):
                where = f"{file.archive.name}/{name}"
                if where in known:
                    uri, fault = self._uri(content)
                    yield where, uri, fault
            return
        for source in file.recordings:
            try:
                uri, fault = audio.read_file(source.path)
            except OSError as error:
                uri, fault = "", str(os_error(source.name, error).problems[0].message)
            yield source.name, uri, fault

    def _uri(self, content: bytes | None) -> tuple[str, str]:
        return audio.to_uri(content) if content is not None else ("", audio.too_large(1 << 40))

    def _path(self, path: str, table: Path) -> tuple[str, str]:
        return audio.read_path(path, table)

    def _none(self, name: str) -> str:
        return tr(f"there is no recording {name!r} in the archive", f"压缩包里没有录音 {name!r}")
