"""preprocessor_config.json, in which a Hugging Face folder says how a picture becomes numbers, as an `ImageCodec`, and
the other way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multihead.codec.foreign import read_json
from multihead.codec.image import ImageCodec
from multihead.errors import Problem, UserError, tr

FILE = "preprocessor_config.json"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers for ways to resize."""


def check_hearing(path: Path, mels: int, positions: int) -> float:
    """The seconds that weights for sound hear at once.

    Raises:
        UserError: the file says other spectrograms than `multihead.codec.audio.WhisperMel` makes, or more or fewer of
            them than the weights have positions for; each with its key. Where there is none, they are as usual.
    """
    values = read_json(path) if path.is_file() else {}
    seconds = positions / 50
    wanted = {"feature_size": mels, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": seconds,
              "do_normalize": False, "dither": 0.0, "padding_value": 0.0}
    problems = [Problem(tr(f"{key} is {values[key]!r}; for these weights it must be {value:g}",
                           f"{key} 是 {values[key]!r}；这些权重需要 {value:g}"), str(path))
                for key, value in wanted.items() if values.get(key, value) != value]
    if problems:
        raise UserError.many(problems)
    return seconds


def read_processor(path: Path, size: int, channels: int) -> ImageCodec:
    """The codec of weights for pictures of `size` × `size`.

    Raises:
        UserError: the file is missing, or says what an `ImageCodec` does not do; each with its key.
    """
    if not path.is_file():
        raise UserError(tr(f"{FILE} is missing, which says how pictures are resized and scaled for these weights; "
                           "download it too",
                           f"缺少 {FILE}，它说明这些权重的图片如何缩放与归一化；请一并下载"), str(path.parent))
    values, problems = read_json(path), list[Problem]()

    def fault(key: str, allowed: str) -> None:
        shown = values.get(key)
        problems.append(Problem(tr(f"{key} is {shown!r}; what is done here: {allowed}",
                                   f"{key} 是 {shown!r}；这里支持：{allowed}"), str(path)))

    for key, default in (("do_resize", True), ("do_rescale", True)):
        if values.get(key, default) is not True:
            fault(key, "true")
    if not abs(float(values.get("rescale_factor", 1 / 255)) * 255 - 1) < 1e-4:
        fault("rescale_factor", "1/255")
    resample = FILTERS.get(values.get("resample", 2), "")
    if not resample:
        fault("resample", ", ".join(f"{number} ({name})" for number, name in FILTERS.items()))
    edge, fit = _edge(values.get("size", size))
    if not edge:
        fault("size", '{"height": N, "width": N}, {"shortest_edge": N}')
    cut, _ = _edge(values.get("crop_size", size)) if values.get("do_center_crop") else (edge, "")
    if edge and (cut != size or edge < size or (fit == "crop" and not values.get("do_center_crop"))):
        fault("crop_size" if values.get("do_center_crop") else "size", tr(f"in the end {size} × {size} pixels, as in "
              "config.json", f"最终为 {size} × {size} 像素，与 config.json 一致"))
    normal = values.get("do_normalize", True) is True
    mean, std = (_numbers(values.get(key, [0.5] * channels), channels) if normal else [rest] * channels
                 for key, rest in (("image_mean", 0.0), ("image_std", 1.0)))
    for key, numbers in (("image_mean", mean), ("image_std", std)):
        if not numbers or (key == "image_std" and min(numbers) <= 0):
            fault(key, tr(f"{channels} numbers, those of image_std above 0", f"{channels} 个数，image_std 须为正数"))
    if problems:
        raise UserError.many(problems)
    return ImageCodec(size, channels, "crop" if fit == "crop" else "stretch", 65535, mean, std, edge, resample)


def _edge(size: Any) -> tuple[int, str]:
    """(side, "crop" where it is the shorter one, "stretch" where it is both); 0 where it is neither."""
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            size, how = size["shortest_edge"], "crop"
        else:
            size, how = (size.get("height") if size.get("height") == size.get("width") else None), "stretch"
    else:
        how = "stretch"
    return (size, how) if type(size) is int and 0 < size <= 1 << 14 else (0, how)


def _numbers(given: Any, count: int) -> list[float]:
    """One number a channel; [] where they are not."""
    given = [given] * count if isinstance(given, (int, float)) else given
    if not isinstance(given, (list, tuple)) or len(given) not in (1, count):
        return []
    if not all(isinstance(n, (int, float)) and abs(n) < 1e6 for n in given):
        return []
    return [float(n) for n in (given * count if len(given) == 1 else given)]


def write_processor(codec: ImageCodec) -> dict[str, Any]:
    """What `read_processor` reads. UserError for pictures between bars, which no processor of ViT makes."""
    if codec.fit_how == "pad":
        raise UserError(tr("options.fit is pad, which no processor of transformers does; train with options.fit=crop "
                           "or stretch",
                           "options.fit 是 pad，transformers 中没有对应的处理；请用 options.fit=crop 或 stretch 训练"))
    number = next(number for number, name in FILTERS.items() if name == codec.resample)
    edge = codec.edge or codec.size
    cropped = codec.fit_how == "crop" or edge != codec.size
    found: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": number,
        "size": {"shortest_edge": edge} if codec.fit_how == "crop" else {"height": edge, "width": edge},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": codec.mean, "image_std": codec.std, "do_center_crop": cropped,
    }
    if cropped:  # which ViT's own does not do in every version of transformers
        found |= {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": codec.channels == 3,
                  "crop_size": {"height": codec.size, "width": codec.size}}
    return found
