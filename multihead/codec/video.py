"""Clips ↔ arrays: a few frames of each, evenly spread over its time, brought to the form of pictures.

The only road from a clip to numbers, in training and in serving. A clip is read twice: its packets first, undecoded,
for the time of every frame, by which bounds are checked; then only what leads to the wanted frames is decoded, from the
key frame before each, and all other frames are let go as they come. Needs PyAV (the extra ``vision``).
"""

from __future__ import annotations

import base64
import io
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from multihead.codec.containers import check_tables, ends_well
from multihead.codec.image import Fit, ImageCodec, decoded, pillow
from multihead.data.images import to_uri
from multihead.data.video import HEAD, MAX_FRAMES, ClipFile, from_uri, kind_of, no_clip, too_many
from multihead.errors import UserError, tr
from multihead.run import write_json

FILE = "video.json"
MAX_PIXELS = 4096 * 2304
"""Most pixels of one frame, for what a decoder keeps of them: up to 17 frames."""
MAX_SECONDS = 600.0
GREY = 4
"""Most that the colours of a grey frame differ by, of 255: coding grey pictures with colours may add so much."""
MAX_WORK = 1 << 34
"""Most pixels that are decoded of one clip."""
CODECS = ("h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "libdav1d", "av1", "mpeg4", "msmpeg4v1", "msmpeg4v2",
          "msmpeg4", "h263", "mjpeg", "mpeg1video", "mpeg2video", "theora", "gif", "rawvideo", "png", "ffv1", "huffyuv",
          "prores", "dvvideo", "cinepak")
_FORMATS = {"mp4": "mov", "webm": "matroska", "avi": "avi", "gif": "gif"}
_OPTIONS = {"max_pixels": str(MAX_PIXELS), "codec_whitelist": ",".join(CODECS), "protocol_whitelist": "none",
            "probesize": str(1 << 20), "analyzeduration": "2000000", "threads": "1"}


def pyav() -> Any:
    """PyAV. UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(tr("clips need PyAV: pip install 'multihead[vision]'",
                           "处理视频需要 PyAV：pip install 'multihead[vision]'")) from None
    return av


def _cut() -> UserError:
    return _damaged(tr("it ends too early: it was not copied whole", "提前结束：文件不完整"))


def _damaged(error: BaseException | str) -> UserError:
    said = str(getattr(error, "strerror", None) or error)
    said = " ".join(said.split())[:120] or type(error).__name__
    return UserError(tr(f"the clip cannot be decoded ({said}); save it anew or remove it",
                        f"视频无法解码（{said}）；请重新保存或删除"))


def sampled(clip: str, count: int, side: int = 0) -> list[Any]:
    """`count` frames of a clip (a data URI or a `ClipFile`) as pillow images: those in force at the middles of as many
    equal parts of its time. A clip of fewer frames gives some of them twice.

    Args:
        side: frames are reduced to about twice this on their shorter side while they are converted; 0: as they are.

    Raises:
        UserError: no clip, no picture in it, damaged, too many frames, too large, too long.
    """
    if isinstance(clip, ClipFile) and clip.frames:
        places = [clip.paths[int((i + 0.5) * len(clip.paths) / count)] for i in range(count)]
        pictures = {path: decoded(path.read_bytes(), side) for path in dict.fromkeys(places)}
        return [pictures[path] for path in places]
    try:
        with _file(clip) as (file, kind):
            with _opened(file, kind) as (container, stream):
                table = _table(container, stream)
            with _opened(file, kind) as (container, stream):
                return _decoded(container, stream, table, table.moments(count), side)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything on bytes made to break it
        raise _damaged(error) from None


@contextmanager
def _file(clip: str) -> Iterator[tuple[Any, str]]:
    """A clip's file, opened, and its form."""
    if isinstance(clip, ClipFile):
        with open(clip.paths[0], "rb") as file:
            yield file, _kind(file.read(HEAD))
    else:
        raw = from_uri(clip)
        yield io.BytesIO(raw), _kind(raw[:HEAD])


def _kind(head: bytes) -> str:
    if not (kind := kind_of(head)):
        raise UserError(no_clip(head))
    return kind


@contextmanager
def _opened(file: Any, kind: str) -> Iterator[tuple[Any, Any]]:
    """The container, read from its beginning, and its stream of pictures."""
    av = pyav()
    file.seek(0)
    if kind == "mp4":
        check_tables(file)
    elif not ends_well(file, kind):
        raise _cut()
    file.seek(0)
    with av.open(file, format=_FORMATS[kind], options=dict(_OPTIONS)) as container:
        streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        if not streams:
            raise UserError(tr("there is sound in this file but no picture", "这个文件里只有声音，没有画面")
                            if container.streams.audio else
                            tr("there is no picture in this file", "这个文件里没有画面"))
        stream = streams[0]
        context = stream.codec_context
        check_size(context.width, context.height)
        if context.name not in CODECS:
            raise UserError(tr(f"the clip is coded as {context.name}, which is not read; save it as H.264, VP9 or AV1",
                               f"视频编码 {context.name} 不受支持；请另存为 H.264、VP9 或 AV1"))
        context.thread_count, context.options = 1, {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def check_size(width: int, height: int) -> None:
    """UserError where frames are too large, or nothing."""
    if width * height > MAX_PIXELS:
        raise UserError(tr(f"the clip has {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} in all are decoded: "
                           "make it smaller first",
                           f"视频有 {width:,} × {height:,} 像素；最多解码 {MAX_PIXELS:,} 像素：请先缩小"))
    if not width or not height:
        raise UserError(tr(f"the clip's pictures have no size, or one of more than {MAX_PIXELS:,} pixels",
                           f"视频画面没有大小，或超过 {MAX_PIXELS:,} 像素"))


class _Table(NamedTuple):
    """What the packets say, in their order: the time of each frame in units of the stream, and which are key frames."""

    times: list[int]
    keys: list[int]
    end: int

    def moments(self, count: int) -> list[float]:
        """The middles of `count` equal parts of the clip's time."""
        start = min(self.times)
        return [start + (self.end - start) * (i + 0.5) / count for i in range(count)]


def _table(container: Any, stream: Any) -> _Table:
    """Read every packet, undecoded. UserError where there is none, or too much."""
    times: list[int] = []
    keys: list[int] = []
    lengths: list[int] = []
    unit = stream.time_base or Fraction(1, 25)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise _cut()
        moment = packet.pts if packet.pts is not None else packet.dts
        if moment is None:
            moment = times[-1] + max(1, round(1 / (unit * (stream.average_rate or 25)))) if times else 0
        if packet.is_keyframe:
            keys.append(len(times))
        times.append(moment)
        lengths.append(packet.duration or 0)
        if len(times) > MAX_FRAMES:
            raise UserError(too_many(len(times)))
    if not times:
        raise UserError(tr("the clip has no frame (its length is zero)", "视频没有任何一帧（长度为零）"))
    if stream.frames and len(times) < 0.98 * stream.frames - 1:
        raise _damaged(tr(f"it ends after {len(times):,} of {stream.frames:,} frames",
                          f"在第 {len(times):,} 帧之后提前结束，应有 {stream.frames:,} 帧"))
    last = max(range(len(times)), key=times.__getitem__)
    usual = (times[last] - min(times)) // (len(times) - 1) if len(times) > 1 else 1
    end = times[last] + (lengths[last] or usual or 1)
    seconds = float((end - min(times)) * unit)
    if seconds > MAX_SECONDS:
        raise UserError(tr(f"the clip lasts {seconds:,.0f} seconds; at most {MAX_SECONDS:,.0f} are read: cut it into "
                           "shorter clips", f"视频长 {seconds:,.0f} 秒；最多读取 {MAX_SECONDS:,.0f} 秒：请先剪短"))
    return _Table(times, keys or [0], end)


def _ranges(table: _Table, moments: Sequence[float]) -> list[tuple[int, int, list[float]]]:
    """Packets to decode (first, behind the last) and the moments that each range serves: from the key frame before a
    moment to the packet whose frame is in force then."""
    order = sorted(range(len(table.times)), key=table.times.__getitem__)
    shown = [table.times[i] for i in order]
    found: list[tuple[int, int, list[float]]] = []
    for moment in moments:
        packet = order[max(0, bisect_right(shown, moment) - 1)]
        at = max(0, bisect_right(table.keys, packet) - 1)
        if at and table.times[packet] < table.times[table.keys[at]]:
            at -= 1  # shown before the key frame that it follows: it also needs what stands before that
        first = min(table.keys[at], packet)
        if found and first <= found[-1][1]:
            before = found[-1]
            found[-1] = (before[0], max(before[1], packet + 1), [*before[2], moment])
        else:
            found.append((first, packet + 1, [moment]))
    return found


def _decoded(container: Any, stream: Any, table: _Table, moments: Sequence[float], side: int) -> list[Any]:
    """The frame in force at each moment, as a pillow image."""
    context, ranges = stream.codec_context, _ranges(table, moments)
    work = sum(last - first for first, last, _ in ranges) * context.width * context.height
    if work > MAX_WORK:
        raise UserError(tr(f"{work / 1e9:.0f} billion pixels would have to be decoded for this clip; at most "
                           f"{MAX_WORK / 1e9:.0f} are: make it shorter or smaller",
                           f"这段视频需要解码 {work / 1e9:.0f} 十亿像素；上限为 {MAX_WORK / 1e9:.0f}：请剪短或缩小"))
    found: list[Any] = []
    packets = enumerate(packet for packet in container.demux(stream) if packet.size)
    number = -1
    for first, last, wanted in ranges:
        chooser = _Chooser(wanted, side)
        while number + 1 < last and (following := next(packets, None)) is not None:
            number, packet = following
            if number >= first:
                chooser.look(context.decode(packet))
        chooser.look(context.decode(None))
        context.flush_buffers()
        found += chooser.ended()
    return found


class _Chooser:
    """Takes frames in the order in which they are shown and keeps, as images, those in force at each moment."""

    def __init__(self, moments: Sequence[float], side: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.waiting, self.side = list(moments), side
        self.reformatter = VideoReformatter()
        self.before: Any = None
        self.found: list[Any] = []

    def look(self, frames: Iterable[Any]) -> None:
        """The next frames."""
        for frame in frames:
            if frame.is_corrupt:
                raise _damaged(tr("a frame is damaged", "有一帧已损坏"))
            check_size(frame.width, frame.height)
            moment = frame.pts if frame.pts is not None else frame.dts
            self._keep(self.before or frame, moment)
            self.before = frame

    def _keep(self, frame: Any, until: int | None) -> None:
        """Use `frame` for all moments before `until`; None: nothing is known of the time of what follows."""
        count = 0 if until is None else sum(moment < until for moment in self.waiting)
        if count:
            self.waiting, image = self.waiting[count:], _image(frame, self.side, self.reformatter)
            self.found += [image] * count

    def ended(self) -> list[Any]:
        """The images, one a moment."""
        if self.before is None:
            raise _damaged(tr("none of its frames can be had", "其中没有可用的帧"))
        if self.waiting:
            self.found += [_image(self.before, self.side, self.reformatter)] * len(self.waiting)
        return self.found


def _image(frame: Any, side: int, reformatter: Any) -> Any:
    """A frame as a pillow image, upright: RGBA where it is partly transparent, L where it is grey, else RGB."""
    Image, _ = pillow()
    if side and (shrink := min(frame.width, frame.height) / (2 * side)) > 1:
        width, height = (max(1, round(length / shrink)) for length in (frame.width, frame.height))
    else:
        width, height = frame.width, frame.height
    alpha = any(component.is_alpha for component in frame.format.components)
    # One thread: starting others takes longer than all the work on frames of this size.
    plain = reformatter.reformat(frame, width, height, "rgba" if alpha else "rgb24", interpolation="AREA", threads=1)
    pixels = plain.to_ndarray()
    if frame.rotation:
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    if alpha and (pixels[..., 3] == 255).all():
        pixels, alpha = np.ascontiguousarray(pixels[..., :3]), False
    if not alpha and int(np.ptp(pixels.astype(np.int16), axis=-1).max()) <= GREY:
        return Image.fromarray(np.ascontiguousarray(pixels[..., 1]))
    return Image.fromarray(pixels)


# -- the codec ---------------------------------------------------------------------------------------------------------


class ClipCodec:
    """Clips → uint8 (frames, channels, size, size), frames spread evenly over the time. `image`: how a frame becomes an
    array."""

    def __init__(self, frames: int, image: ImageCodec) -> None:
        self.frames, self.image = frames, image

    @classmethod
    def fit(cls, clips: Iterable[str], frames: int, size: int | None = None, multiple: int = 1,
            channels: Literal["auto", "grey", "rgb"] = "auto", fit: Fit = "crop") -> ClipCodec:
        """Learn from the middle frames of training clips what `ImageCodec.fit` learns of pictures. Damaged ones are
        passed over.

        Raises:
            UserError: no clip that can be decoded.
        """
        return cls(frames, ImageCodec.fit(_Middles(clips), size, multiple, channels, fit))

    def encode(self, clip: str) -> np.ndarray:
        """A data URI or a `ClipFile` → uint8 (frames, channels, size, size). UserError: as `sampled`."""
        images = sampled(clip, self.frames, self.image.size)
        made = {id(image): self.image.array(image) for image in images}
        return np.stack([made[id(image)] for image in images])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``video.json`` and the picture codec's file into `folder`."""
        self.image.save(folder)
        write_json(Path(folder) / FILE, {"frames": self.frames})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ClipCodec:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        path = Path(folder) / FILE
        try:
            frames = int(json.loads(path.read_text("utf-8"))["frames"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(path)) from None
        return cls(frames, ImageCodec.load(folder))


class _Middles:
    """The middle frame of every clip that can be decoded, as a picture's data URI; read as often as one likes."""

    def __init__(self, clips: Iterable[str]) -> None:
        self.clips = clips

    def __iter__(self) -> Iterator[str]:
        for clip in self.clips:
            try:
                yield png(sampled(clip, 1)[0])
            except UserError:
                continue


def png(image: Any) -> str:
    """A pillow image as a data URI."""
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return to_uri(file.getvalue())[0]


def small_clip(clip: str, frames: int, side: int) -> str:
    """A few frames of a clip as a small animated GIF, a data URI that any browser shows; "" where it cannot be decoded.
    """
    Image, _ = pillow()
    try:
        images = sampled(clip, frames, side)
        for image in images:
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
        flat = [image if image.mode == "L" else image.convert("RGB") for image in images]
        with io.BytesIO() as file:
            flat[0].save(file, "GIF", save_all=True, append_images=flat[1:], duration=max(20, 1500 // frames), loop=0)
            return f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    except Exception:
        return ""


def strip(clip: str, frames: int, side: int = 64) -> str:
    """A few frames of a clip side by side, a picture's data URI; "" where it cannot be decoded."""
    Image, _ = pillow()
    try:
        images = sampled(clip, frames, side)
        grey = all(image.mode == "L" for image in images)
        small = [image.convert("L" if grey else "RGB") for image in images]
        for image in small:
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
        width, height = small[0].size
        whole = Image.new(small[0].mode, ((width + 2) * frames - 2, height), "white")
        for i, image in enumerate(small):
            whole.paste(image, (i * (width + 2), 0))
        return png(whole)
    except Exception:
        return ""
