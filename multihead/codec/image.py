"""Pictures ↔ arrays: decoded, turned upright, brought to one size and one number of channels.

The only road from a picture's file to numbers, in training and in serving. Decoding is guarded: only the formats of
`FORMATS`, a limit on pixels that is checked before any is decoded, and one message for whatever is damaged. Needs
pillow (the extra ``vision``), which is imported when the first picture is decoded.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from multihead.data.images import from_uri, to_uri
from multihead.errors import UserError, tr
from multihead.run import write_json

FILE = "image.json"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
MAX_PIXELS = 1 << 26
"""Most pixels of one picture (67 million), for what it takes in memory while it is decoded."""
MAX_SIDE = 64
"""Largest side that is chosen where a recipe names none."""
SMALL = 64
"""Side up to which a small copy of a picture keeps every pixel as it is."""
_GREY = ("1", "L", "LA", "La", "I", "F")
_WHITES = (1, 255, 1023, 4095, 16383, 65535)

Fit = Literal["crop", "pad", "stretch"]


def pillow() -> Any:
    """Pillow's modules Image and ImageOps. UserError where it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError(tr("pictures need pillow: pip install 'multihead[vision]'",
                           "处理图片需要 pillow：pip install 'multihead[vision]'")) from None
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is said once, by us
    return Image, ImageOps


def open_picture(raw: bytes) -> Any:
    """A picture's file as a pillow image, not yet decoded. UserError: no picture, damaged, or too many pixels."""
    Image, _ = pillow()
    Image.MAX_IMAGE_PIXELS = None  # ours is stricter, and an error instead of a warning
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except Exception as error:  # a decoder may raise anything on bytes made to break it
        raise _damaged(error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(tr(f"the picture has {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} in all are decoded: "
                           "make it smaller first",
                           f"图片有 {width:,} × {height:,} 像素；最多解码 {MAX_PIXELS:,} 像素：请先缩小"))
    if not width or not height:
        raise UserError(tr("the picture has no pixels", "图片没有像素"))
    return image


def _damaged(error: BaseException) -> UserError:
    said = " ".join(str(error).split())[:120] or type(error).__name__
    if said.startswith("cannot identify image file"):
        said = tr("its beginning is not that of a whole picture", "开头不是完整图片")
    return UserError(tr(f"the picture cannot be decoded ({said}); save it anew or remove it",
                        f"图片无法解码（{said}）；请重新保存或删除"))


def decoded(raw: bytes, least: int = 0) -> Any:
    """A picture's file as a pillow image, upright, its first frame.

    Args:
        least: a side that the picture may be reduced to while it is decoded (JPEG can, which saves time and memory).

    Raises:
        UserError: as `open_picture`, or truncated.
    """
    _, ImageOps = pillow()
    image = open_picture(raw)
    try:
        if least and image.format in ("JPEG", "MPO"):
            scale = 2 * least / min(image.size)
            if scale < 0.5:
                image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        image.load()
        return ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    except Exception as error:
        raise _damaged(error) from None


def is_grey(image: Any) -> bool:
    """Whether a picture's form holds no colours."""
    return image.mode in _GREY or image.mode.startswith("I;")


def is_deep(image: Any) -> bool:
    """Whether a grey picture has more than 8 bits a pixel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


class ImageCodec:
    """Pictures (data URIs) → uint8 (channels, size, size).

    `fit`: "crop" cuts the middle square, "pad" adds white so that all of it is kept, "stretch" takes it as it is.
    `white`: the value that is white in grey pictures of more than 8 bits. `mean` and `std` (one a channel, of values
    from 0 to 1) are for the model.

    `edge`: as weights from elsewhere were trained: the whole picture is brought to a shorter side ("crop") or both
    sides ("stretch") of so many pixels by the filter `resample`, and the middle of it is cut out; 0: our own way.
    """

    def __init__(
        self, size: int, channels: int, fit: Fit, white: int, mean: Iterable[float], std: Iterable[float],
        edge: int = 0, resample: str = "bicubic",
    ) -> None:
        self.size, self.channels, self.fit_how, self.white = size, channels, fit, white
        self.edge, self.resample = edge, resample
        self.mean, self.std = [float(v) for v in mean], [float(v) for v in std]

    @classmethod
    def fit(cls, pictures: Iterable[str], size: int | None = None, multiple: int = 1,
            channels: Literal["auto", "grey", "rgb"] = "auto", fit: Fit = "crop") -> ImageCodec:
        """Learn from training pictures (read twice): whether all are grey, the size where none is given (that of most,
        at most `MAX_SIDE`, a multiple of `multiple`), and mean and deviation of each channel. Damaged ones are passed
        over.

        Raises:
            UserError: no picture that can be decoded.
        """
        sides, grey, deepest = [], True, 0.0
        for picture in pictures:
            try:
                image = open_picture(from_uri(picture))
                if is_deep(image):
                    deepest = max(deepest, float(np.max(np.nan_to_num(np.asarray(image)))))
            except UserError:
                continue
            except Exception:
                continue
            sides.append(min(image.size))
            grey = grey and is_grey(image)
        if not sides:
            raise UserError(tr("no picture of the training data can be decoded", "训练数据里没有可以解码的图片"))
        if size is None:
            size = max(1, min(MAX_SIDE, int(statistics.median(sides))) // multiple) * multiple
        count = {"grey": 1, "rgb": 3}.get(channels) or (1 if grey else 3)
        white = next((value for value in _WHITES if value >= deepest), 65535) if deepest else 65535
        codec = cls(size, count, fit, white, [0.0] * count, [1.0] * count)
        codec.mean, codec.std = codec._statistics(pictures)
        return codec

    def _statistics(self, pictures: Iterable[str]) -> tuple[list[float], list[float]]:
        total, squares, count = np.zeros(self.channels), np.zeros(self.channels), 0
        for picture in pictures:
            try:
                values = self.encode(picture).reshape(self.channels, -1).astype(np.float64) / 255
            except UserError:
                continue
            total, squares, count = total + values.sum(1), squares + (values**2).sum(1), count + values.shape[1]
        mean = total / count
        # Pictures that are all of one colour still need something to be divided by.
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-4))
        return [round(float(v), 6) for v in mean], [round(float(v), 6) for v in std]

    def encode(self, picture: str) -> np.ndarray:
        """A data URI → uint8 (channels, size, size). UserError: no picture, damaged, too large."""
        return self.array(decoded(from_uri(picture), 0 if self.edge else self.size))

    def array(self, image: Any) -> np.ndarray:
        """A pillow image → uint8 (channels, size, size)."""
        try:
            image = self._sized(self.plain(image))
        except Exception as error:
            raise _damaged(error) from None
        array = np.asarray(image)
        return np.ascontiguousarray(array[None] if self.channels == 1 else array.transpose(2, 0, 1))

    def plain(self, image: Any) -> Any:
        """In mode L or RGB; what is transparent shows white behind it."""
        Image, _ = pillow()
        mode = "L" if self.channels == 1 else "RGB"
        if is_deep(image):
            scale = 255 / self.white
            values = np.nan_to_num(np.asarray(image, dtype=np.float32)) * scale
            image = Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
            ground.alpha_composite(image)
            image = ground.convert("RGB")
        return image if image.mode == mode else image.convert(mode)

    def _sized(self, image: Any) -> Any:
        Image, _ = pillow()
        width, height = image.size
        if self.edge and self.fit_how != "pad":
            return self._cut(image)
        if width == height == self.size:
            return image
        target, how = (self.size, self.size), Image.Resampling.BICUBIC
        if self.fit_how == "pad" and width != height:
            scale = self.size / max(width, height)
            small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), how, reducing_gap=3.0)
            ground = Image.new(image.mode, target, "white")
            ground.paste(small, ((self.size - small.width) // 2, (self.size - small.height) // 2))
            return ground
        if self.fit_how == "crop" and width != height:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return image.resize(target, how, box=(left, top, left + side, top + side), reducing_gap=3.0)
        return image.resize(target, how, reducing_gap=3.0)

    def _cut(self, image: Any) -> Any:
        """Brought to `edge` whole, then the middle cut out: pixel for pixel what transformers' processors do."""
        Image, _ = pillow()
        width, height = image.size
        to = (self.edge, self.edge)
        if self.fit_how == "crop":
            short = min(width, height)
            to = (int(self.edge * width / short), int(self.edge * height / short))
        if to != image.size:
            image = image.resize(to, Image.Resampling[self.resample.upper()])
        left, top = (to[0] - self.size) // 2, (to[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def sized(self, size: int, fit: Fit) -> ImageCodec:
        """The same for pictures of another size, as much of each being seen."""
        edge = max(size, round(self.edge * size / self.size)) if self.edge else 0
        return ImageCodec(size, self.channels, fit, self.white, self.mean, self.std, edge, self.resample)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``image.json`` into `folder`."""
        about = {"size": self.size, "channels": self.channels, "fit": self.fit_how, "white": self.white,
                 "mean": self.mean, "std": self.std, "edge": self.edge, "resample": self.resample}
        write_json(Path(folder) / FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ImageCodec:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        path = Path(folder) / FILE
        try:
            about = json.loads(path.read_text("utf-8"))
            codec = cls(int(about["size"]), int(about["channels"]), about["fit"], int(about["white"]), about["mean"],
                        about["std"], int(about.get("edge", 0)), about.get("resample", "bicubic"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(path)) from None
        if codec.channels not in (1, 3) or codec.size < 1 or len(codec.mean) != codec.channels != len(codec.std) != 0:
            raise UserError(tr("this codec is not whole; prepare the run again", "编码器不完整；请重新准备"), str(path))
        return codec


def thumbnail(picture: str, side: int = 64) -> str:
    """A small copy of a picture as a data URI that any browser shows; "" where it cannot be decoded."""
    Image, _ = pillow()
    try:
        image = decoded(from_uri(picture), side)
        codec = ImageCodec(side, 1 if is_grey(image) else 3, "crop", 65535, [], [])
        plain = codec.plain(image)
        if max(plain.size) > side:
            plain.thumbnail((side, side), Image.Resampling.BICUBIC)
    except Exception:
        return ""
    with io.BytesIO() as file:
        small = max(plain.size) <= SMALL  # as it is; of a larger one, a file that is small
        plain.save(file, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 90}))
        return to_uri(file.getvalue())[0]
