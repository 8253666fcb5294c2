"""Clips as the values of rows: what is one, how it is written down, and its place on the disk.

In a row a clip is a data URI (``data:video/mp4;base64,…``), as a picture is, or a `ClipFile`: a text made of a hash of
what the clip's file (or its folder of frames) holds, equal where the files are equal, that also knows where they lie,
so that a long file need not pass through memory. A text of a request is never a `ClipFile`, and so never a path.
Nothing is decoded here (`codec.video` does).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from multihead.data import images
from multihead.data.files import os_error
from multihead.errors import UserError, tr

MAX_BYTES = 64 << 20
"""Longest clip that is written as a data URI."""
MAX_FILE = 4 << 30
"""Longest file of one clip on the disk."""
MAX_FRAMES = 36_000
"""Most frames of one clip (ten minutes of 60 a second), those of a folder included."""
HEAD = 64
ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
KINDS = {"mp4": "video/mp4", "webm": "video/webm", "avi": "video/x-msvideo", "gif": "image/gif"}

_PREFIX = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*);base64,", re.IGNORECASE)
_CHUNK = 1 << 20


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
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[4:8] == b"ftyp":
        return "" if head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"avif", b"avis") else "mp4"
    return "mp4" if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip") else ""


def no_clip(head: bytes) -> str:
    """Why these first bytes are not those of a clip, for a person."""
    kinds = tr("a clip is an MP4, WebM, AVI or GIF file, or a folder of pictures",
               "视频须是 MP4、WebM、AVI 或 GIF 文件，或一个图片文件夹")
    if not head:
        return tr("the clip is empty (0 bytes)", "视频是空的（0 字节）")
    picture = images.kind_of(head)
    if picture:
        name = picture.split("/")[-1].upper()
        return tr(f"this is a picture ({name}) and no clip, whatever it is called; {kinds}",
                  f"这是图片（{name}）而不是视频，无论文件名如何；{kinds}")
    return tr(f"this is no clip; {kinds}", f"这不是视频；{kinds}")


def too_large(size: int, most: int = MAX_BYTES) -> str:
    """The message for a clip of more than `most` bytes."""
    return tr(f"the clip's file has {size / 2**20:.0f} MiB; at most {most >> 20} MiB are read: cut or shrink it first",
              f"视频文件有 {size / 2**20:.0f} MiB；最多读取 {most >> 20} MiB：请先剪短或压缩")


def to_uri(raw: bytes) -> tuple[str, str]:
    """(the data URI of a clip's file, "") or ("", why it is none)."""
    kind = kind_of(raw[:HEAD])
    if not kind:
        return "", no_clip(raw[:HEAD])
    if len(raw) > MAX_BYTES:
        return "", too_large(len(raw))
    return f"data:{KINDS[kind]};base64,{base64.b64encode(raw).decode('ascii')}", ""


def from_uri(uri: str) -> bytes:
    """The bytes of a data URI. UserError where it is none, or not a clip's."""
    found = _PREFIX.match(uri)
    if not found:
        raise UserError(not_uri(uri))
    if len(uri) > MAX_BYTES * 4 // 3 + 1000:
        raise UserError(too_large(len(uri) * 3 // 4))
    try:
        raw = base64.b64decode(memoryview(uri.encode("ascii"))[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(tr(f"the clip's base64 is damaged ({error})", f"视频的 base64 已损坏（{error}）")) from None
    if not kind_of(raw[:HEAD]):
        raise UserError(no_clip(raw[:HEAD]))
    return raw


def not_uri(value: Any) -> str:
    """The message for a value that is not a clip."""
    shown = repr(value[:60] if isinstance(value, str) else value)[:60]
    return tr(f'a clip is written as "data:video/mp4;base64,…", not {shown}',
              f"视频写作 \"data:video/mp4;base64,…\"，而不是 {shown}")


def value(given: Any) -> tuple[str, str]:
    """(a clip in a row's form, "") or ("", what is wrong). `given`: a `ClipFile`, a data URI, bytes, or {"bytes": …}
    (Parquet)."""
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        given = given["bytes"]
    if isinstance(given, (bytes, bytearray, memoryview)):
        return to_uri(bytes(given))
    if isinstance(given, ClipFile) or (isinstance(given, str) and _PREFIX.match(given)):
        return given, ""
    return "", not_uri(given)


def looks_like_path(given: Any) -> bool:
    """Whether a table's cell may be a clip: a data URI, bytes, or a path with a clip's ending."""
    if isinstance(given, bytes) or (isinstance(given, dict) and ("bytes" in given or "path" in given)):
        return True
    return isinstance(given, str) and (given.startswith("data:video/") or given.strip().lower().endswith(ENDINGS))


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
