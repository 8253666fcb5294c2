"""video-classification: give each clip a label.

A video vision Transformer (Arnab et al. 2021, "ViViT"): a few frames, evenly spread over the clip, are cut into
tubelets (patches with a length in time), each becomes a vector, a Transformer that looks both ways in space and time
reads them, and one vector pooled from all of them gives the label. All frames of a clip are bent alike in training, and
each is drawn anew from about its place in time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from multihead.codec.text import LabelCodec
from multihead.codec.video import ClipCodec, small_clip, strip
from multihead.data import video
from multihead.data.columns import changed
from multihead.data.rows import LABEL_NAMES, Column
from multihead.data.video import ClipFile
from multihead.errors import UserError, tr
from multihead.task import Batch, Example
from multihead.tasks.vision._labelling import Labelling, LabelOptions
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import PoolHead
from multihead.transformer.tubelets import ClipInput, ClipTrunk

VIDEO_NAMES = ("clip", "movie", "file", "filename", "file_name", "path", "filepath", "file_path", "video_path",
               "clip_path", "video_file", "视频", "短片", "片段", "文件名", "视频路径")
SAMPLE = 500  # clips from which size, mean and deviation are learned
SHOWN_FRAMES = 8  # of a clip in the report
KEPT = 12 << 10  # characters of a clip that is kept as it is beside its encoding


class ClipClassifier(nn.Module):
    """Frames (B, F, C, S, S), normalized → logits over classes (B, C)."""

    def __init__(self, config: TransformerConfig, codec: ClipCodec, classes: int, options: Any) -> None:
        super().__init__()
        o, self.first = options, options.pool == "class"
        self.skip = o.registers + self.first
        self.input = ClipInput(config, codec.image.channels, codec.image.size, o.frames, o.patch, o.tubelet, o.stem,
                               self.skip)
        self.trunk = ClipTrunk(config, self.input.moments, self.input.grid, self.skip, o.attention == "factorised")
        self.head = PoolHead(config.d_model, classes, "attention" if o.pool == "attention" else "mean", o.head_dropout)

    def forward(self, x_BFCSS: Tensor) -> Tensor:
        x_BTMD = self.trunk(self.input(x_BFCSS))
        x_BTMD = x_BTMD[:, :, :1] if self.first else x_BTMD[:, :, self.skip :]
        return self.head(x_BTMD.flatten(1, 2)).float()


class VideoClassification(Labelling):
    """One label for each clip."""

    title = ("label a clip: what happens in it, any labels of your own", "给视频打标签：其中发生了什么，或自定义标签")
    columns = (
        Column("video", "video", names=VIDEO_NAMES),
        Column("label", "label", names=LABEL_NAMES, target=True),
    )
    seen = "video"
    things = ("clips", "视频")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {
            "d_model": 128, "num_layers": 6, "num_heads": 4, "norm": "layernorm", "activation": "relu2",
            "positions": "learned",
        },
        "train": {
            "steps": 3000, "batch_size": 32, "optimizer": "muon", "lr": 1e-3, "weight_decay": 0.05, "ema": 0.998,
        },
        "serve": {"max_body_bytes": 16 << 20, "max_batch": 8},
    }  # fmt: skip

    class Options(LabelOptions):
        frames: int = Field(8, ge=1, le=256)
        """Frames of a clip that the model sees, evenly spread over its time.
        模型看到的帧数，在整段视频的时间上均匀分布。"""
        patch: int = Field(8, ge=1, le=64)
        """Side of a patch; half of it is four times the work, or more.
        图块边长；减半则计算量至少为四倍。"""
        tubelet: int = Field(2, ge=1, le=64)
        """Frames that a patch reaches over; it divides frames.
        每个图块跨越的帧数；须整除 frames。"""
        attention: Literal["joint", "factorised"] = "joint"
        """joint: every patch looks at every other; factorised: blocks look by turns within a moment and along time,
        which costs less for many frames.
        joint：每个图块看到所有图块；factorised：各层交替在同一时刻内、沿时间方向看，帧数多时更省。"""
        jitter: int = Field(3, ge=1, le=9)
        """Frames prepared for each one seen; training draws among them, answers take the middle one; 1: no choice.
        为每个所见帧准备几帧；训练时从中随机取一帧，回答时取中间一帧；1 表示不选。"""

        @model_validator(mode="after")
        def _tubes(self) -> VideoClassification.Options:
            if self.frames % self.tubelet:
                raise ValueError(tr(f"tubelet {self.tubelet} does not divide frames {self.frames}",
                                    f"tubelet {self.tubelet} 不能整除 frames {self.frames}"))
            if self.jitter % 2 == 0:
                raise ValueError(tr(f"jitter is {self.jitter}; it must be odd, so that one of them is the middle",
                                    f"jitter 是 {self.jitter}；应为奇数，才有居中的一帧"))
            return self

    clips: ClipCodec

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        o, every = self.options, -(-self.fit_labels(rows) // SAMPLE)
        self._take(ClipCodec.fit(_Some(rows, every), o.frames * o.jitter, o.size, o.patch, o.channels, o.fit))

    def _take(self, clips: ClipCodec) -> None:
        self.clips, self.codec = clips, clips.image

    def encode(self, row: dict[str, Any]) -> Example:
        example = {"video": self.clips.encode(row["video"])}
        if row.get("label") is not None:
            example["label"] = np.array(self.labels.encode(self._name(row["label"])), dtype=np.int64)
        return example

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row["video"], ClipFile) and len(row["video"]) <= KEPT:
            return row
        return changed(row, video=self._small(row["video"]))

    def _small(self, clip: str) -> str:
        return small_clip(clip, max(SHOWN_FRAMES, self.options.frames), min(128, max(64, self.codec.size)))

    def save(self, folder: Path) -> None:
        self.clips.save(folder)
        self.labels.save(folder)

    def load(self, folder: Path) -> None:
        self._take(ClipCodec.load(folder))
        self.labels = LabelCodec.load(folder)

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> ClipClassifier:
        self.check_shape(config)
        if config.positions == "rotary" and config.head_size < 8:
            raise UserError(tr("rotary positions in three dimensions turn pairs for rows, columns and time, so the "
                               "head width (model.d_model / model.num_heads) must be at least 8; it is "
                               f"{config.head_size}",
                               "三维 rotary 位置编码按行、列、时间成对旋转，每个头的宽度至少为 8；现在是 "
                               f"{config.head_size}（model.d_model / model.num_heads）"))
        return ClipClassifier(config, self.clips, len(self.labels), self.options)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Frames drawn from about their places, and the numbers by which all of them are bent (see `_augment`)."""
        found = super().augment(example, rng)
        for key in ("video", "other"):
            if key in found:
                found[key] = found[key][self._places(rng)]
        return found

    def _places(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """Which of the prepared frames are seen, (F,): drawn, or the middle ones."""
        count, each = self.options.frames, self.options.jitter
        return np.arange(count) * each + (each // 2 if rng is None else rng.integers(each, size=count))

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the model sees, (B, F, C, S, S), and each clip's own share of it, (B,), where it is mixed."""
        clip = batch["video"]
        if "warp" not in batch:
            batch = {**batch, "video": clip[:, self._places()]}
        x, share = super()._seen(batch)
        return x.view(len(clip), self.options.frames, *clip.shape[2:]), share

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def shown(self, row: dict[str, Any]) -> str:
        return strip(row["video"], SHOWN_FRAMES)

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        clip = row["video"]
        small = clip.startswith("data:image/gif") and len(clip) <= 16 * KEPT
        return {"video": clip if small else self._small(clip)}

    def request(self, body: Any) -> dict[str, Any]:
        """An object with ``video``, or the clip alone: a data URI; from Python also a `pathlib.Path` (a file, or a
        folder of frames) or the bytes of a file. A text is never taken for a path: a caller of the server must not read
        its files."""
        row = dict(body) if isinstance(body, dict) else {"video": body}
        clip: Any = row.get("video")
        fault = ""
        if isinstance(clip, Path):
            clip, fault = video.read_clip(clip)
        elif isinstance(clip, bytes):
            clip, fault = video.to_uri(clip)
        if fault:
            raise UserError(fault)
        return {**row, "video": clip} if "video" in row else row


class _Some:
    """The clips of every n-th row; may be read as often as one likes."""

    def __init__(self, rows: Iterable[dict[str, Any]], every: int) -> None:
        self.rows, self.every = rows, every

    def __iter__(self) -> Iterator[str]:
        return (row["video"] for row in itertools.islice(iter(self.rows), 0, None, self.every))
