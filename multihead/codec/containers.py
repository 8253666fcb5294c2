"""What a clip's file says of itself, looked at before a decoder takes its word for it."""

from __future__ import annotations

import os
from typing import Any

from multihead.data.video import MAX_FRAMES, too_many
from multihead.errors import UserError, tr

MAX_SAMPLES = 4_000_000
"""Most samples (of picture, sound and all else) that an MP4's tables may name, for the room their index takes."""
_INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts")


def check_tables(file: Any) -> None:
    """UserError where the tables of an MP4 name more samples than `MAX_SAMPLES`: a few bytes can name billions, for
    each of which a demuxer would take room before anything of the clip is known."""
    count, boxes = 0, 0
    file.seek(0, os.SEEK_END)
    ends = [file.tell()]
    file.seek(0)
    while ends:
        at = file.tell()
        if at + 8 > ends[-1] or boxes > MAX_SAMPLES:
            ends.pop()
            continue
        size, name = int.from_bytes(file.read(4), "big"), file.read(4)
        head = 8
        if size == 1:
            size, head = int.from_bytes(file.read(8), "big"), 16
        end = ends[-1] if size == 0 else min(ends[-1], at + max(size, head))
        boxes += 1
        if name == b"cmov":
            raise UserError(tr("the clip's tables are compressed, which is not read; save it anew",
                               "视频的索引表是压缩的，无法读取；请重新保存"))
        if name in (b"stsz", b"stz2"):
            count += int.from_bytes(file.read(12)[8:], "big")
        elif name == b"trun":
            count += int.from_bytes(file.read(8)[4:], "big")
        if count > MAX_SAMPLES:
            raise UserError(too_many(count))
        if name in _INSIDE and len(ends) < 12:
            ends.append(end)
        else:
            file.seek(end)


def ends_well(file: Any, kind: str) -> bool:
    """Whether a WebM or a GIF reaches its end, which their demuxers take as it comes."""
    size = file.seek(0, os.SEEK_END)
    if kind == "gif":
        check_frames(file)
        file.seek(max(0, size - 4096))
        return file.read().rstrip(b"\0\r\n").endswith(b";")
    file.seek(0)
    head = file.read(256)
    if kind != "webm" or (at := head.find(b"\x18\x53\x80\x67") + 4) < 4 or at >= len(head) or not head[at]:
        return True
    width = 9 - head[at].bit_length()  # of the segment's length in bytes, itself included (RFC 8794, section 4)
    length = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return length == (1 << 7 * width) - 1 or at + width + length <= size  # all ones: unknown, as of a live recording


def check_frames(file: Any) -> None:
    """UserError where a GIF has more than `MAX_FRAMES` frames, each with its heading: counted far faster than read."""
    count = 0
    file.seek(0)
    while chunk := file.read(1 << 20):
        count += chunk.count(b"\x21\xf9\x04")
    if count > MAX_FRAMES:
        raise UserError(too_many(count))
