"""Clips for tests: real files, made by PyAV."""

from __future__ import annotations

import struct
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

CODECS = {"mp4": "h264", "webm": "libvpx-vp9", "avi": "mpeg4", "gif": "gif"}
QUICK = {"webm": {"cpu-used": "8", "deadline": "realtime", "crf": "10"}}


def clip(frames: Iterable[np.ndarray], form: str = "mp4", times: Sequence[int] | None = None, rate: int = 10,
         pixels: str = "", sound: bool = False, turned: int = 0, codec: str = "",
         options: dict[str, str] | None = None, container: dict[str, str] | None = None) -> bytes:
    """Frames (H, W, 3) uint8 as the bytes of a file.

    Args:
        times: of each frame in milliseconds; None: `rate` a second.
        pixels: the pixel format; "" what is usual.
        sound: silence beside them.
        turned: degrees by which a player is to turn it.
        options, container: for the codec and for the form.
    """
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{form}"
        with av.open(str(path), "w", format=form, options=container or {}) as file:
            stream, count = None, 0
            for count, frame in enumerate(frames, 1):
                if stream is None:
                    stream = _stream(file, form, frame, rate, pixels, codec, options)
                    if turned:
                        stream.set_display_rotation(turned)
                    speech = file.add_stream("libopus" if form == "webm" else "aac", rate=48000) if sound else None
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
                picture.time_base = Fraction(1, 1000)
                picture.pts = times[count - 1] if times is not None else (count - 1) * 1000 // rate
                file.mux(stream.encode(picture))
                if speech is not None:
                    file.mux(speech.encode(_silence(av, count - 1)))
            if stream is not None:
                for one in (stream, speech):
                    file.mux(one.encode() if one is not None else [])
        return path.read_bytes()


def sound_alone(form: str = "mp4") -> bytes:
    """Three tenths of a second of silence, and no picture."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{form}"
        with av.open(str(path), "w", format=form) as file:
            stream = file.add_stream("libopus" if form == "webm" else "aac", rate=48000)
            for i in range(3):
                file.mux(stream.encode(_silence(av, i)))
            file.mux(stream.encode())
        return path.read_bytes()


def no_frames() -> bytes:
    """An MP4 that has a stream of pictures, and none in it."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w", format="mp4") as file:
            _stream(file, "mp4", np.zeros((48, 64, 3), np.uint8), 10, "", "", None)
            file.start_encoding()
        return path.read_bytes()


def _stream(file: Any, form: str, frame: np.ndarray, rate: int, pixels: str, codec: str,
            options: dict[str, str] | None) -> Any:
    stream = file.add_stream(codec or CODECS[form], rate=rate, options={**QUICK.get(form, {}), **(options or {})})
    stream.height, stream.width, _ = frame.shape
    stream.pix_fmt, stream.thread_count = pixels or ("rgb8" if form == "gif" else "yuv420p"), 1
    if form != "avi":
        stream.codec_context.time_base = Fraction(1, 1000 if form != "gif" else 100)
    return stream


def _silence(av: Any, number: int) -> Any:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 48000, number * 4800
    return frame


def ramp(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames of one grey each, from black to white."""
    return [np.full((height, width, 3), round(255 * i / max(1, count - 1)), np.uint8) for i in range(count)]


def many_frames(count: int) -> bytes:
    """A GIF of `count` frames of one pixel."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + (b"\x21\xf9\x04\0\x02\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0") * count + b";"


def wide_screen(width: int, height: int) -> bytes:
    """A GIF of one pixel on a screen of this size."""
    whole = many_frames(1)
    return whole[:6] + struct.pack("<HH", width, height) + whole[10:]


def many_samples(fragmented: bool) -> bytes:
    """An MP4 of two kilobytes whose tables speak of two billion samples."""
    raw = bytearray(clip(ramp(6), container={"movflags": "frag_keyframe+empty_moov"} if fragmented else None))
    at = raw.find(b"trun" if fragmented else b"stsz")
    struct.pack_into(">I" if fragmented else ">II", raw, at + 8, *(() if fragmented else (1,)), 2_000_000_000)
    return bytes(raw)


def sparse(size: int) -> bytes:
    """A tar of one member that claims `size` bytes, of which 512 are written: GNU's form for files with holes."""
    info = tarfile.TarInfo("a/1.mp4")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for at, value in ((386, 0), (398, 512), (410, size), (422, 0), (483, size)):
        head[at : at + 12] = b"%011o\0" % value
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + b"\0\0\0\x18ftypisom".ljust(512, b"\0") + bytes(10240)
