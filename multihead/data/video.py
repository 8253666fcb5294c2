"""Clips as the values of rows: what is one, and its place on the disk.

In a row a clip is a data URI (``data:video/mp4;base64,…``), as a picture is, or a `ClipFile`: a text made of a hash of
what the clip's file (or its folder of frames) holds, equal where the files are equal, that also knows where they lie,
so that a long file need not pass through memory. A text of a request is never a `ClipFile`, and so never a path.
Nothing is decoded here (`codec.video` does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from multihead.data import images
from multihead.data.files import os_error
from multihead.data.media import Media
from multihead.errors import tr

MAX_FILE = 4 << 30
"""Longest file of one clip on the disk."""
MAX_FRAMES = 36_000
"""Most frames of one clip (ten minutes of 60 a second), those of a folder included."""

_CHUNK = 1 << 20
CLIP = Media(
    one=("clip", "视频"),
    kinds=("a clip is an MP4, WebM, AVI or GIF file, or a folder of pictures",
           "视频须是 MP4、WebM、AVI 或 GIF 文件，或一个图片文件夹"),
    example="video/mp4",
    magic=(
        (re.compile(rb"GIF8[79]a"), "image/gif"),
        (re.compile(rb"\x1a\x45\xdf\xa3"), "video/webm"),
        (re.compile(rb"RIFF....AVI ", re.DOTALL), "video/x-msvideo"),
        (re.compile(rb"....ftyp(?!heic|heix|mif1|msf1|hevc|avif|avis)", re.DOTALL), "video/mp4"),
        (re.compile(rb"....(moov|mdat|wide|free|skip)", re.DOTALL), "video/mp4"),
    ),
    others=tuple(
        (pattern, f"a picture ({kind.split('/')[-1].upper()}), whatever it is called",
         f"图片（{kind.split('/')[-1].upper()}），无论文件名如何")
        for pattern, kind in images.PICTURE.magic if kind != "image/gif"
    ),
    endings=(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif"),
    smaller=("cut or shrink it first", "请先剪短或压缩"),
    # As browsers write what they recorded: data:video/webm;codecs="vp9";base64,…
    prefix=re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*);base64,", re.IGNORECASE),
)  # fmt: skip
HEAD = CLIP.head
KINDS = {"video/mp4": "mp4", "video/webm": "webm", "video/x-msvideo": "avi", "image/gif": "gif"}

no_clip, too_large, to_uri, from_uri = CLIP.none, CLIP.too_large, CLIP.to_uri, CLIP.from_uri
looks_like_path = CLIP.looks_like_path


class ClipFile(str):
    """A clip on the disk; the text is a hash of what it holds. `paths`: its file, or the files of its frames in order.
    """

    paths: tuple[Path, ...]
    frames: bool
    """Whether `paths` are pictures, one a frame."""

    def __new__(cls, text: str, paths: Sequence[Path], frames: bool = False) -> ClipFile:
        made = super().__new__(cls, text)
        made.paths, made.frames = tuple(paths), frames
        return made


def kind_of(head: bytes) -> str:
    """The form of a clip by its first bytes: "mp4" (also QuickTime's), "webm" (also Matroska), "avi", "gif", or ""."""
    return KINDS.get(CLIP.kind_of(head), "")


def value(given: Any) -> tuple[str, str]:
    """(a clip in a row's form, "") or ("", what is wrong with it): a `ClipFile`, or as `Media.value`."""
    return (given, "") if isinstance(given, ClipFile) else CLIP.value(given)


# -- clips on the disk ------------------------------------------------------------------------------------------------


def read_clip(path: Path) -> tuple[str, str]:
    """(the clip at `path`, a file or a folder of pictures, "") or ("", why it is none)."""
    try:
        if path.is_dir():
            names = [p for p in path.iterdir() if p.is_file() and images.kind_of(head_of(p)) not in ("", "image/gif")]
            return read_frames(names) if names else ("", tr(f"there is no picture in the folder {path}",
                                                            f"文件夹 {path} 里没有图片"))
        size = path.stat().st_size
        if not kind_of(head := head_of(path)):
            return "", no_clip(head)
        if size > MAX_FILE:
            return "", too_large(size, MAX_FILE)
        return ClipFile(f"clip {_hashed([path])}", [path]), ""
    except OSError as error:
        return "", str(os_error(str(path), error).problems[0].message)


def read_frames(paths: Sequence[Path]) -> tuple[str, str]:
    """(the clip whose frames are these pictures, ordered by the numbers in their names, "") or ("", why not)."""
    if len(paths) > MAX_FRAMES:
        return "", too_many(len(paths))
    ordered = sorted(paths, key=in_order)
    try:
        return ClipFile(f"frames {_hashed(ordered)}", ordered, frames=True), ""
    except OSError as error:
        return "", str(os_error(str(ordered[0]), error).problems[0].message)


def too_many(count: int) -> str:
    """The message for a clip of more than `MAX_FRAMES` frames."""
    return tr(f"the clip has {count:,} frames; at most {MAX_FRAMES:,} are read: cut it into shorter clips",
              f"视频有 {count:,} 帧；最多读取 {MAX_FRAMES:,} 帧：请先剪成较短的片段")


def in_order(path: Path) -> list[Any]:
    """A key by which 2.jpg stands before 10.jpg."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def head_of(path: Path) -> bytes:
    """The first `HEAD` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(HEAD)


def _hashed(paths: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128()
    for chunk in _chunks(paths):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        yield path.stat().st_size.to_bytes(8, "little")
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
