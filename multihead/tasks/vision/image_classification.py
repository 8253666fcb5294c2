"""image-classification: give each picture a label.

A Vision Transformer (Dosovitskiy et al. 2021): a picture is cut into patches, each becomes a vector, a Transformer that
looks both ways reads them, and one vector pooled from all of them gives the label. With few pictures and little time
it needs what DeiT found (Touvron et al. 2021): much noise on the pictures, and smoothed labels; and a few convolutions
in front of it (Xiao et al. 2021).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from multihead.codec.image import ImageCodec, thumbnail
from multihead.codec.text import LabelCodec
from multihead.data import images
from multihead.data.columns import changed
from multihead.data.rows import LABEL_NAMES, Column
from multihead.errors import UserError
from multihead.task import Example
from multihead.tasks.vision import _maps as maps
from multihead.tasks.vision._labelling import Labelling, LabelOptions
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import DistilledHead, PoolHead
from multihead.transformer.patches import PatchInput, patch_trunk

IMAGE_NAMES = ("img", "picture", "photo", "pic", "file", "filename", "file_name", "path", "filepath", "file_path",
               "image_path", "img_path", "image_file", "image_bytes", "图片", "图像", "照片", "文件名", "图片路径")
SAMPLE = 2000  # pictures from which size, mean and deviation are learned
SHOWABLE = ("data:image/png", "data:image/jpeg", "data:image/webp")
KEPT = 12 << 10  # characters of a picture that is kept as it is beside its encoding


class PictureClassifier(nn.Module):
    """Pictures (B, C, S, S), normalized → logits over classes (B, C)."""

    def __init__(self, config: TransformerConfig, codec: ImageCodec, classes: int, options: Any) -> None:
        super().__init__()
        self.answering = {"class": 1, "distilled": 2}.get(options.pool, 0)
        self.skip = options.registers + self.answering
        self.input = PatchInput(config, codec.channels, codec.size, options.patch, options.stem, self.skip)
        self.trunk = patch_trunk(config, self.input.grid, self.skip)
        pool = "attention" if options.pool == "attention" else "mean"
        self.head = (DistilledHead(config.d_model, classes, options.head_dropout) if options.pool == "distilled"
                     else PoolHead(config.d_model, classes, pool, options.head_dropout))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        x_BTD = self.trunk(self.input(x_BCSS))
        return self.head(x_BTD[:, : self.answering] if self.answering else x_BTD[:, self.skip :]).float()


class ImageClassification(Labelling):
    """One label for each picture."""

    title = ("label a picture: what is on it, any labels of your own", "给图片打标签：图中是什么，或自定义标签")
    columns = (
        Column("image", "image", names=IMAGE_NAMES),
        Column("label", "label", names=LABEL_NAMES, target=True),
    )
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {
            "d_model": 128, "num_layers": 6, "num_heads": 4, "norm": "layernorm", "activation": "relu2",
            "conv_kernel": 3, "rope_theta": 100.0,
        },
        "train": {
            "steps": 3000, "batch_size": 64, "optimizer": "muon", "lr": 0.004, "muon_lr": 0.012,
            "weight_decay": 0.05, "ema": 0.998,
        },
        "serve": {"max_body_bytes": 16 << 20},
    }

    class Options(LabelOptions):
        pool: Literal["mean", "attention", "class", "distilled"] = "mean"  # type: ignore[assignment]
        """How patches become one vector. mean: their average; attention: a learned average beside the largest values;
        class: a token of its own, as in ViT; distilled: two such tokens, whose answers are averaged, as in DeiT.
        各图块如何合成一个向量。mean：取平均；attention：学到的加权平均加上最大值；class：专用词元，同 ViT；
        distilled：两个专用词元，结果取平均，同 DeiT。"""
        maps: int = Field(4, ge=0, le=50)
        """How many right and as many wrong answers the report explains by maps of what was looked at; 0: none.
        报告中用热图解释多少个答对的与答错的例子；0 表示不做。"""

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        o, every = self.options, -(-self.fit_labels(rows) // SAMPLE)
        if self.origin is not None:
            codec: ImageCodec = self.origin.codec()
            self.codec = codec.sized(o.size or codec.size, o.fit)
            if set(self.origin.labels or ()) == set(self.labels.names):
                self.labels = LabelCodec(self.origin.labels)  # in its order, so that its head can be taken
            return
        self.codec = ImageCodec.fit(_Some(rows, every), o.size, o.patch, o.channels, o.fit)

    def encode(self, row: dict[str, Any]) -> Example:
        example = {"image": self.codec.encode(row["image"])}
        if row.get("label") is not None:
            example["label"] = np.array(self.labels.encode(self._name(row["label"])), dtype=np.int64)
        return example

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        if len(row["image"]) <= KEPT:
            return row
        return changed(row, image=thumbnail(row["image"], max(128, 2 * self.codec.size)))

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> PictureClassifier:
        self.check_shape(config)
        return PictureClassifier(config, self.codec, len(self.labels), self.options)

    def anew(self) -> Sequence[str]:
        """What gives an answer, where the origin's classes are not these in this order."""
        return () if self.origin.labels == self.labels.names else ("head.linear.", "head.distilled.")

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def explain(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
        def seen(image_BCSS: Tensor) -> Tensor:
            return self._normal(image_BCSS.float() / 255)

        found = maps.galleries(model, seen, self.labels.names, examples, self.options.maps)
        return {"galleries": found} if found else {}

    # -- serve --------------------------------------------------------------------------------------------------------

    def shown(self, row: dict[str, Any]) -> str:
        return thumbnail(row["image"])

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        picture = row["image"]
        if len(picture) > KEPT or not picture.startswith(SHOWABLE):
            picture = thumbnail(picture, max(128, 2 * self.codec.size))
        return {"image": picture}

    def request(self, body: Any) -> dict[str, Any]:
        """An object with ``image``, or the picture alone: a data URI; from Python also a `pathlib.Path`, the bytes of a
        file, or a pillow image. A text is never taken for a path: a caller of the server must not read its files."""
        row = dict(body) if isinstance(body, dict) else {"image": body}
        picture: Any = row.get("image")
        fault = ""
        if isinstance(picture, Path):
            picture, fault = images.read_file(picture)
        elif isinstance(picture, bytes):
            picture, fault = images.to_uri(picture)
        elif hasattr(picture, "save") and hasattr(picture, "getexif"):
            file = io.BytesIO()
            picture.save(file, "PNG")
            picture, fault = images.to_uri(file.getvalue())
        if fault:
            raise UserError(fault)
        return {**row, "image": picture} if "image" in row else row


class _Some:
    """The pictures of every n-th row; may be read as often as one likes."""

    def __init__(self, rows: Iterable[dict[str, Any]], every: int) -> None:
        self.rows, self.every = rows, every

    def __iter__(self) -> Iterator[str]:
        return (row["image"] for row in itertools.islice(iter(self.rows), 0, None, self.every))
