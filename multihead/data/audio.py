"""Recordings as the values of rows: what is one, and how it is written down.

In a row a recording is a data URI (RFC 2397), ``data:audio/flac;base64,…``, its file's bytes as they are: the same in a
table, in a request and in a stored row, equal where the files are equal. Nothing is decoded here (`codec.audio` does).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any

from multihead.data.images import _PREFIX
from multihead.data.images import path_of as path_of
from multihead.errors import UserError, tr

MAX_BYTES = 64 << 20
"""Largest file of one recording."""
HEAD = 512
ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".aif", ".aiff", ".au", ".webm",
           ".caf", ".w64", ".wma", ".amr", ".sph")

_MAGIC = (
    (re.compile(rb"(RIFF|RF64)....WAVE", re.DOTALL), "audio/wav"),
    (re.compile(rb"riff.{12}", re.DOTALL), "audio/x-w64"),
    (re.compile(rb"fLaC"), "audio/flac"),
    (re.compile(rb"OggS"), "audio/ogg"),
    (re.compile(rb"ID3[\x02-\x04]|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][^\xff]", re.DOTALL), "audio/mpeg"),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]", re.DOTALL), "audio/aac"),
    (re.compile(rb"....ftyp", re.DOTALL), "audio/mp4"),
    (re.compile(rb"\x1aE\xdf\xa3"), "audio/webm"),
    (re.compile(rb"FORM....AIF[FC]", re.DOTALL), "audio/aiff"),
    (re.compile(rb"\.snd"), "audio/basic"),
    (re.compile(rb"caff\x00\x01"), "audio/x-caf"),
)
_OTHERS = (
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "a video (AVI)", "视频（AVI）"),
    (re.compile(rb"\x00\x00\x01[\xba\xb3]", re.DOTALL), "a video (MPEG)", "视频（MPEG）"),
    (re.compile(rb"FLV\x01"), "a video (FLV)", "视频（FLV）"),
    (re.compile(rb"\s*<(!DOCTYPE )?html", re.IGNORECASE), "a web page", "网页"),
    (re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL), "a picture", "图片"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "zip 压缩包"),
    (re.compile(rb"NIST_1A"), "a NIST SPHERE file", "NIST SPHERE 文件"),
    (re.compile(rb"0&\xb2u\x8ef\xcf\x11"), "a Windows Media file", "Windows Media 文件"),
    (re.compile(rb"#!AMR"), "an AMR file", "AMR 文件"),
    (re.compile(rb"MThd"), "a MIDI file", "MIDI 文件"),
)


def kind_of(head: bytes) -> str:
    """The media type of a recording by its first bytes; "" where it is none that can be read."""
    return next((kind for pattern, kind in _MAGIC if pattern.match(head)), "")


def no_audio(head: bytes) -> str:
    """Why these first bytes are not those of a recording, for a person."""
    kinds = tr("a recording is a WAV, FLAC, MP3, Ogg, Opus, M4A or WebM file",
               "录音须是 WAV、FLAC、MP3、Ogg、Opus、M4A 或 WebM 文件")
    if not head:
        return tr("the recording is empty (0 bytes)", "录音是空的（0 字节）")
    for pattern, en, zh in _OTHERS:
        if pattern.match(head):
            return tr(f"this is {en}; {kinds}: save it as one", f"这是{zh}；{kinds}：请另存")
    return tr(f"this is no recording; {kinds}", f"这不是录音；{kinds}")


def to_uri(raw: bytes) -> tuple[str, str]:
    """(the data URI of a recording's file, "") or ("", why it is none)."""
    kind = kind_of(raw[:HEAD])
    if not kind:
        return "", no_audio(raw[:HEAD])
    if len(raw) > MAX_BYTES:
        return "", too_large(len(raw))
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}", ""


def too_large(size: int) -> str:
    """The message for a recording whose file is beyond `MAX_BYTES`."""
    most = MAX_BYTES >> 20
    return tr(f"the recording's file is larger than {most} MiB: save it as FLAC, Opus or MP3, or cut it",
              f"录音文件超过 {most} MiB：请存为 FLAC、Opus 或 MP3，或剪短")


def from_uri(uri: str) -> bytes:
    """The bytes of a data URI. UserError where it is none, or not a recording's."""
    found = _PREFIX.match(uri)
    if not found:
        raise UserError(not_uri(uri))
    if len(uri) > MAX_BYTES * 4 // 3 + 1000:
        raise UserError(too_large(len(uri) * 3 // 4))
    try:
        raw = base64.b64decode(uri[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(tr(f"the recording's base64 is damaged ({error})",
                           f"录音的 base64 已损坏（{error}）")) from None
    if not kind_of(raw[:HEAD]):
        raise UserError(no_audio(raw[:HEAD]))
    return raw


def not_uri(value: Any) -> str:
    """The message for a value that is not a recording."""
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
    return tr(f'a recording is written as "data:audio/wav;base64,…", not {shown}',
              f"录音写作 \"data:audio/wav;base64,…\"，而不是 {shown}")


def value(given: Any) -> tuple[str, str]:
    """(a recording in a row's form, "") or ("", what is wrong). `given`: a data URI, bytes, or {"bytes": …} (Parquet).
    """
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        given = given["bytes"]
    if isinstance(given, (bytes, bytearray, memoryview)):
        return to_uri(bytes(given))
    if isinstance(given, str) and _PREFIX.match(given):
        return given, ""
    return "", not_uri(given)


def looks_like_path(given: Any) -> bool:
    """Whether a table's cell may be a recording: a data URI, bytes, or a path with a recording's ending."""
    if isinstance(given, bytes) or (isinstance(given, dict) and ("bytes" in given or "path" in given)):
        return True
    return isinstance(given, str) and (given.startswith("data:audio/") or given.strip().lower().endswith(ENDINGS))


def read_path(path: str, table: Path) -> tuple[str, str]:
    """(the recording at `path`, "") or ("", why it cannot be had). A relative path starts from the table's folder and
    must stay inside it, links followed; an absolute one is taken as it is: it is the person's own table."""
    if re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE):
        return "", tr(f"{path!r} is an address; nothing is fetched from the network: download the recordings first",
                      f"{path!r} 是网址；不会从网络获取：请先下载录音")
    if "\0" in path:
        return "", tr(f"{path!r} is not the name of a file", f"{path!r} 不是文件名")
    folder = os.path.realpath(table.parent)
    full = os.path.join(folder, path)
    if not os.path.isabs(path) and os.path.commonpath((folder, os.path.realpath(full))) != folder:
        return "", tr(f"{path!r} lies outside the table's folder {table.parent}; put the table above its recordings",
                      f"{path!r} 位于表格所在文件夹 {table.parent} 之外；请把表格放到录音的上级文件夹")
    try:
        if not os.path.isfile(full):
            return "", tr(f"there is no recording {path!r}; paths start from the table's folder {table.parent}",
                          f"没有录音 {path!r}；路径从表格所在文件夹 {table.parent} 开始")
        return read_file(Path(full))
    except OSError as error:
        return "", tr(f"{path!r} cannot be read: {error.strerror}", f"无法读取 {path!r}：{error.strerror}")


def read_file(path: Path) -> tuple[str, str]:
    """(the recording in a file, "") or ("", why it is none)."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            return "", too_large(MAX_BYTES + 1) if kind_of(file.read(HEAD)) else no_audio(b"?")
        return to_uri(file.read(MAX_BYTES + 1))
