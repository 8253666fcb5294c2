"""Rows with a clip in them: folders of clips or of frames, and tables that name either."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multihead.data import images, video
from multihead.data.columns import Column, Matched, Row, convert
from multihead.data.files import Paths, Source, find_sources, os_error, read_head
from multihead.data.formats import Format
from multihead.data.pictures import _try
from multihead.data.rows import FileOf, Rows, _look
from multihead.data.sniff import Wanted, sniff
from multihead.errors import Problem, UserError, tr


@dataclass
class ClipsOf(FileOf):
    """Clips that are rows themselves: (name, files, whether those are frames); each one's folder is its label."""

    clips: list[tuple[str, list[Path], bool]] = field(default_factory=list)


def open_clips(paths: Paths, wanted: Wanted, base: Path) -> Rows:
    """`rows.open_rows` for a task that asks for a clip: what every file of `paths` is, found by content.

    Pictures that lie in a folder are the frames of one clip. Where tables lie beside clips, the tables' rows are the
    rows. Raises UserError.
    """
    sources, skipped = find_sources(paths, base)
    groups = defaultdict[str, list[Source]](list)
    for source in sources:
        groups[_kind(source)].append(source)
    tables: list[FileOf] = []
    faults: list[Problem] = []
    for source in groups["other"]:
        _try(partial(_look_table, wanted=wanted), [source], tables, faults)
    found = [(source.name, [source.path], False) for source in groups["clip"]]
    frames = defaultdict[str, list[Path]](list)
    for source in groups["frame"]:
        frames[str(Path(source.name).parent)].append(source.path)
    found += [(name, files, True) for name, files in sorted(frames.items())]
    if tables:
        return ClipRows(tables, wanted, skipped)
    if found and faults:  # a stray file beside clips
        skipped, faults = skipped + [source.name for source in groups["other"]], []
    if faults:
        raise UserError.many(list(dict.fromkeys(faults)))
    return ClipRows([_clips(found, wanted)], wanted, skipped)


def _kind(source: Source) -> str:
    """What a file is by its first bytes: "clip", "frame" or "other". What is only called like a clip is one that cannot
    be read."""
    try:
        head = video.head_of(source.path)
    except OSError as error:
        raise os_error(source.name, error) from None
    if video.kind_of(head) or source.name.lower().endswith(video.ENDINGS):
        return "clip"
    return "frame" if images.kind_of(head) else "other"


def _look_table(source: Source, wanted: Wanted) -> FileOf:
    if sniff(source, wanted).name == "txt":
        reason = video.no_clip(read_head(source, video.HEAD)[0])
        raise UserError(tr(f"{reason}. It is no table either: data are a folder of clips, or a table with their paths",
                           f"{reason}。它也不是表格：数据应是视频文件夹，或含视频路径的表格"), source.name)
    return _look(source, wanted)


def _clips(found: Sequence[tuple[str, list[Path], bool]], wanted: Wanted) -> FileOf:
    """Clips as rows. UserError where they have no labels and need them, or where their folders are parts."""
    clip, label = _columns(wanted)
    name = images._common([name for name, *_ in found])
    matched = Matched({clip.name: ""}, {clip.name: "content"})
    labels = images.labels_of([name for name, *_ in found])
    if label is not None:
        images.refuse_splits(labels, name)
        if any(labels):
            matched.theirs[label.name], matched.how[label.name] = "", "folder"
        elif label.required:
            raise UserError(tr("these clips have no labels: put them into one folder per label (jump/1.mp4, "
                               "run/2.mp4), or give a table of paths and labels",
                               "这些视频没有标签：请每个标签放一个文件夹（jump/1.mp4、run/2.mp4），"
                               "或提供视频路径与标签的表格"), name)
    return ClipsOf(Source(found[0][1][0], name), Format("clips", encoding=""), matched, [], list(found))


def _columns(wanted: Wanted) -> tuple[Column, Column | None]:
    clip = next(c for c in wanted.columns if c.kind == "video")
    label = next((c for c in wanted.columns if c.kind in ("label", "labels")), None)
    others = [c.name for c in wanted.columns if c.required and c not in (clip, label)]
    if others:
        raise UserError(tr(f"these are clips alone, and the task also needs: {', '.join(others)}; give a table (CSV, "
                           "JSONL, Parquet) with the clips' paths",
                           f"这里只有视频，而任务还需要：{'、'.join(others)}；请提供含视频路径的表格（CSV、JSONL、Parquet）"))
    if wanted.mapping:
        raise UserError(tr(f"data.columns is given ({', '.join(wanted.mapping)}), and these are clips without columns",
                           f"设置了 data.columns（{'、'.join(wanted.mapping)}），但这是没有列的视频"))
    return clip, label


class ClipRows(Rows):
    """`Rows` whose clips lie in files; of those a row holds a hash and the place, never the bytes."""

    @property
    def files(self) -> list[Path]:
        clips = [clip for file in self._files if isinstance(file, ClipsOf) for clip in file.clips]
        tables = [file.source.path for file in self._files if not isinstance(file, ClipsOf)]
        return [*tables, *(path for _, paths, _ in clips for path in paths)]

    def __iter__(self) -> Iterator[Row]:
        self.count, self.rejected, self.rejected_count = 0, [], 0
        for file in self._files:
            for row in self._clips(file) if isinstance(file, ClipsOf) else self._table(file):
                self.count += 1
                yield row

    def _clips(self, file: ClipsOf) -> Iterator[Row]:
        clip, label = _columns(self._wanted)
        labels = images.labels_of([name for name, *_ in file.clips])
        for (name, paths, frames), folder in zip(file.clips, labels, strict=True):
            found, fault = video.read_frames(paths) if frames else video.read_clip(paths[0])
            row = Row({clip.name: found}, where=name)
            if label is not None and label.name in file.matched.theirs and not fault:
                row[label.name], fault = convert(label, folder)
            if fault:
                self._reject(fault, name)
            else:
                yield row

    def _value(self, file: FileOf, column: Column, value: Any) -> tuple[Any, str]:
        path = images.path_of(value) if column.kind == "video" else None
        if path is None:
            return convert(column, value)
        full, fault = images.located(path, file.source.path, tr("clip", "视频"))
        return (None, fault) if fault else video.read_clip(full)


__all__ = ["ClipRows", "open_clips"]
