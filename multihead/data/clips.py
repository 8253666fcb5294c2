"""Rows with a clip in them: folders of clips or of frames, tables that name either, archives of either.

Of a clip in a file a row holds a hash and the place, never the bytes. One in an archive is written into a folder for
temporary files, which is removed when the row is let go: no more of an archive lies there than is being looked at.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from multihead.data import images, video
from multihead.data.archives import Member, members
from multihead.data.files import Source
from multihead.data.folders import shared
from multihead.data.media_rows import Content, Inside, MediaRows, Things
from multihead.errors import UserError, tr


class ClipRows(MediaRows):
    """`Rows` with a clip in each. Pictures that lie in a folder are the frames of one."""

    media, kind, form = video.CLIP, "video", "clips"
    lacking = ("these clips have no labels: put them into one folder per label (jump/1.mp4, run/2.mp4), or give a "
               "table of paths and labels",
               "这些视频没有标签：请每个标签放一个文件夹（jump/1.mp4、run/2.mp4），或提供视频路径与标签的表格")
    data = ("a folder of clips, an archive of them, or a table with their paths",
            "视频文件夹、视频压缩包，或含视频路径的表格")

    def _kind_of(self, name: str, head: bytes | None) -> str:
        if super()._kind_of(name, head):
            return "thing"
        frame = images.looks_like_path(name) if head is None else images.kind_of(head)
        return "frame" if frame else ""

    def _alone(self, groups: Mapping[str, Sequence[Source]]) -> list[Things]:
        found = {source.name: [source] for source in groups["thing"]}
        frames = defaultdict[str, list[Source]](list)
        for source in groups["frame"]:
            frames[str(Path(source.name).parent)].append(source)
        found |= dict(sorted(frames.items()))
        if not found:
            return []

        def contents() -> Iterator[Content]:
            for name, sources in found.items():
                paths = [source.path for source in sources]
                yield name, *(video.read_frames(paths) if name in frames else video.read_clip(paths[0]))

        names = list(found)
        sources = [source for one in found.values() for source in one]
        return [self._by_folder(sources, shared(names), names, contents)]

    def _path(self, path: str, table: Path) -> tuple[Any, str]:
        full, fault = self.media.located(path, table)
        return (None, fault) if fault else video.read_clip(full)

    # -- clips in archives ---------------------------------------------------------------------------------------------

    def _inside(self, found: Inside) -> Things:
        names = list(dict.fromkeys(name if found.things[name] == "thing" else folder(name) for name in found.chosen))
        contents = self._contents(found, set(names))
        return self._by_folder([found.archive], found.archive.name, names, contents, found.where)

    def _contents(self, found: Inside, names: Container[str]) -> Callable[[], Iterator[Content]]:
        def read() -> Iterator[Content]:
            frames = defaultdict[str, list[str]](list)
            for name, kind in found.things.items():
                if kind == "frame" and folder(name) in names:
                    frames[folder(name)].append(name)
            with _Begun(frames) as begun:
                for member in members(found.archive):
                    if member.name in names:
                        yield member.name, *self._held(member)
                    elif member.name in begun.places and (whole := begun.add(member)) is not None:
                        yield whole

        return read

    def _held(self, member: Member) -> tuple[Any, str]:
        head = member.head(self.media.head)
        if not self.media.kind_of(head):
            return "", self.media.none(head)
        if member.size > video.MAX_FILE:
            return "", self.media.too_large(member.size, video.MAX_FILE)
        place = _temporary()
        try:
            _write(member, place / "clip")
            return _kept(place, *video.read_clip(place / "clip"))
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


class _Begun:
    """Clips of which some frames have been met in an archive, which may hold those of several by turns.

    Args:
        frames: the members that make up each.
    """

    def __init__(self, frames: Mapping[str, Sequence[str]]) -> None:
        self.places: dict[str, int] = {}
        """Of each frame its place among those of its clip."""
        for names in frames.values():
            ordered = sorted(names, key=lambda name: video.in_order(Path(name)))
            self.places |= {name: i for i, name in enumerate(ordered)}
        self._left = {name: set(frames[name]) for name in frames}
        self._folders: dict[str, Path] = {}
        self._faults: dict[str, str] = {}

    def __enter__(self) -> _Begun:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._folders.values():
            shutil.rmtree(place, ignore_errors=True)

    def add(self, member: Member) -> Content | None:
        """Take a frame; the clip, where this was its last."""
        name = folder(member.name)
        left = self._left[name]
        if member.name not in left:  # a second one of this name
            return None
        if name not in self._folders:
            self._folders[name] = _temporary()
        count = len(left) if len(left) > video.MAX_FRAMES else 0
        if count or member.size > images.MAX_BYTES:
            fault = video.too_many(count) if count else images.too_large(member.size)
            self._faults.setdefault(name, fault)
        elif name not in self._faults:
            _write(member, self._folders[name] / str(self.places[member.name]))
        left.discard(member.name)
        if left:
            return None
        place = self._folders.pop(name)
        clip, fault = "", self._faults.get(name, "")
        if not fault:
            clip, fault = video.read_frames(list(place.iterdir()))
        return name, *_kept(place, clip, fault)


def folder(name: str) -> str:
    """The folder of a member; "" for the archive itself."""
    above = str(PurePosixPath(name).parent)
    return "" if above == "." else above


def _kept(place: Path, clip: Any, fault: str) -> tuple[Any, str]:
    """A clip whose folder `place` is removed when it is let go; at once where it is none."""
    if fault:
        shutil.rmtree(place, ignore_errors=True)
    else:
        weakref.finalize(clip, shutil.rmtree, place, ignore_errors=True)
    return clip, fault


def _no_room(error: OSError) -> UserError:
    where, why = tempfile.gettempdir(), error.strerror or type(error).__name__
    return UserError(tr(f"a clip of an archive cannot be written into this folder for temporary files ({why}); TMPDIR "
                        "names another, or unpack the archive yourself",
                        f"无法把压缩包中的视频写入临时文件夹（{why}）；"
                        "可用 TMPDIR 指定另一个文件夹，或自行解压"), where)


def _temporary() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="multihead-clip-"))
    except OSError as error:
        raise _no_room(error) from None


def _write(member: Member, path: Path) -> None:
    try:
        with open(path, "wb") as file:
            for chunk in member.chunks():
                file.write(chunk)
    except OSError as error:
        raise _no_room(error) from None
