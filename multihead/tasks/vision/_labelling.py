"""What tasks that give pictures, or clips of them, one label have in common: the noise, the loss, the figures.

What a model sees is (B, C, S, S), a picture, or (B, F, C, S, S), the frames of a clip, which are all bent alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.image import ImageCodec
from multihead.codec.text import LabelCodec
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import text as metrics
from multihead.metrics.vision import confused_pairs, top_accuracy
from multihead.task import Answer, Batch, Example, Loss, Task
from multihead.tasks.vision import _augment as noise
from multihead.transformer.config import TransformerConfig

BINS = 15
MISTAKES = 30
SHOWN = 6  # pictures beside a pair of labels that are mixed up


class LabelOptions(base.Options):
    """How pictures are brought to one form, cut into patches, pooled, and bent in training."""

    size: int | None = Field(None, ge=4, le=1024)
    """Pictures are made this many pixels high and wide; null: as most of them are, at most 64.
    图片统一缩放到的边长（像素）；null 表示取多数图片的大小，至多 64。"""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """auto: grey where all pictures are grey, else rgb.
    auto：全部为灰度图时用 grey，否则用 rgb。"""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What becomes of pictures that are not square. crop: the middle; pad: all of it, between white bars; stretch.
    非正方形图片的处理。crop：取中间；pad：补白边保留全图；stretch：拉伸。"""
    names: list[str] = Field(default_factory=list)
    """Names of labels that are the numbers 0, 1, 2 … in the data.
    数据中标签是 0、1、2…… 时，依次对应的名称。"""
    patch: int = Field(4, ge=1, le=64)
    """Side of a patch; the smaller, the better and the slower.
    图块边长；越小效果越好，也越慢。"""
    stem: Literal["conv", "linear"] = "conv"
    """How patches become vectors. conv: by a few convolutions, which learn faster; linear: each by itself, as in
    ViT.
    图块如何变成向量。conv：经几层卷积，学得更快；linear：每块各自线性映射，同 ViT。"""
    pool: Literal["mean", "attention", "class"] = "mean"
    """How patches become one vector. mean: their average; attention: a learned average beside the largest values;
    class: a token of its own, as in ViT.
    各图块如何合成一个向量。mean：取平均；attention：学到的加权平均加上最大值；class：专用词元，同 ViT。"""
    registers: int = Field(0, ge=0, le=64)
    """Vectors in front of the patches that the model may use as it likes.
    图块之前供模型自由使用的向量个数。"""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the pooled vector set to zero in training.
    训练时池化向量随机置零的比例。"""
    flip: bool = True
    """Mirror half of the pictures in training; false for texts, digits and whatever has a left and a right.
    训练时一半图片左右翻转；文字、数字等左右有别的内容应设为 false。"""
    shift: float = Field(0.1, ge=0, le=0.5)
    """Move pictures in training by up to this share of their side.
    训练时随机平移，最多为边长的这个比例。"""
    operations: int = Field(1, ge=0, le=noise.OPERATIONS)
    """How many of rotate, shear (2), scale, brightness, contrast and colour each picture gets in training.
    训练时每张图片随机施加几种变换：旋转、错切（2 种）、缩放、亮度、对比度、色彩。"""
    strength: float = Field(0.3, ge=0, le=1)
    """How strong these are at most.
    上述变换的最大强度。"""
    erase: float = Field(0.0, ge=0, le=1)
    """Share of pictures of which a rectangle is erased in training.
    训练时随机擦除一个矩形的图片比例。"""
    mixup: float = Field(0.0, ge=0, le=1)
    """Share of pictures blended with another in training, label and all.
    训练时与另一张图片混合（标签也混合）的比例。"""
    cutmix: float = Field(0.0, ge=0, le=1)
    """Share of pictures into which a piece of another is pasted in training, label and all.
    训练时贴入另一张图片一块（标签按面积混合）的比例。"""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of certainty taken from the true label, for labels that are sometimes wrong.
    从正确标签上拿走的确定性比例，适合标注有误差的数据。"""
    mirror: bool = False
    """Answer by the mean over a picture and its mirror image; twice the time.
    对原图与镜像的结果取平均作答；耗时加倍。"""

    @model_validator(mode="after")
    def _together(self) -> LabelOptions:
        if self.size and self.size % self.patch:
            raise ValueError(tr(f"patch {self.patch} does not divide size {self.size}",
                                f"patch {self.patch} 不能整除 size {self.size}"))
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(tr(f"stem: conv halves the side, so patch must be 1, 2, 4, 8 …, not {self.patch}",
                                f"stem: conv 每层边长减半，patch 应为 1、2、4、8……，而不是 {self.patch}"))
        if self.mixup + self.cutmix > 1:
            raise ValueError(tr(f"mixup {self.mixup:g} and cutmix {self.cutmix:g} are shares of the pictures; "
                                "together they are at most 1",
                                f"mixup {self.mixup:g} 与 cutmix {self.cutmix:g} 是图片的比例，之和不能超过 1"))
        return self


class Labelling(Task):
    """One label for each picture or clip, which stands in the column and under the key `seen`."""

    field = "vision"
    metric = ("accuracy", "max")
    seen: ClassVar[str] = "image"
    things: ClassVar[tuple[str, str]] = ("pictures", "图片")
    """What messages call the rows."""
    Options = LabelOptions
    codec: ImageCodec
    labels: LabelCodec
    _others: Store | None = None

    def shown(self, row: dict[str, Any]) -> str:
        """A row as a picture for the report, a data URI."""
        raise NotImplementedError

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit_labels(self, rows: Iterable[dict[str, Any]]) -> int:
        """Learn the labels; how many rows there are. UserError where all have the same."""
        counts = Counter(self._name(row["label"]) for row in rows)
        self.labels = LabelCodec.fit(counts)
        if len(self.labels) < 2:
            only, (en, zh) = self.labels.names[0], self.things
            raise UserError(tr(f"all {en} have the same label, '{only}'; there is nothing to tell apart. Labels are "
                               f"the names of the {en}' folders, or a column (data.columns.label)",
                               f"所有{zh}的标签都是 '{only}'，没有可区分的类别。标签来自{zh}所在的文件夹名，"
                               "或表格的一列（data.columns.label）"))
        return sum(counts.values())

    def _name(self, label: Any) -> str:
        names, text = self.options.names, str(label)
        if not names or not text.isdecimal():
            return text
        if int(text) >= len(names):
            raise UserError(tr(f"label {text} has no name: options.names has {len(names)}, for 0 to {len(names) - 1}",
                               f"标签 {text} 没有名称：options.names 有 {len(names)} 个，对应 0 到 {len(names) - 1}"))
        return names[int(text)]

    def describe(self, store: Store) -> dict[str, Any]:
        counts = np.bincount(store.stream("label"), minlength=len(self.labels))
        return {"classes": dict(zip(self.labels.names, counts.tolist(), strict=True))}

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        if part == "train":
            self._others = store
        return store

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        self.labels.save(folder)

    def load(self, folder: Path) -> None:
        self.codec, self.labels = ImageCodec.load(folder), LabelCodec.load(folder)

    # -- build and train ----------------------------------------------------------------------------------------------

    def check_shape(self, config: TransformerConfig) -> None:
        """UserError where patches do not fill the pictures, or the head cannot turn with rows and columns."""
        size, patch = self.codec.size, self.options.patch
        if size % patch:
            raise UserError(tr(f"options.patch is {patch}, which does not divide the pictures' size {size}",
                               f"options.patch 是 {patch}，不能整除图片大小 {size}"))
        if config.positions == "rotary" and config.head_size % 4:
            raise UserError(tr("rotary positions in two dimensions turn pairs for rows and for columns, so the head "
                               f"width (model.d_model / model.num_heads) must be a multiple of 4; it is "
                               f"{config.head_size}",
                               f"二维 rotary 位置编码按行、列成对旋转，每个头的宽度须是 4 的倍数；现在是 "
                               f"{config.head_size}（model.d_model / model.num_heads）"))

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """The numbers by which this picture is bent, and another one to mix it with (see `_augment`)."""
        o, side = self.options, self.codec.size
        mixing = o.mixup + o.cutmix > 0
        found = {**example, **noise.drawn(rng, o, 2 if mixing else 1, side)}
        if mixing:
            others = self._others
            other = others[int(rng.integers(len(others)))] if others is not None else example
            found |= {"other": other[self.seen], "other_label": other["label"], "mix": noise.mix(rng, o, side)}
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        return noise.stacked(examples)

    def _normal(self, x_BCSS: Tensor) -> Tensor:
        """Values from 0 to 1, less the mean, by the deviation."""
        mean, std = (torch.tensor(v, device=x_BCSS.device)[:, None, None] for v in (self.codec.mean, self.codec.std))
        return (x_BCSS - mean) / std

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the model sees, (B, C, S, S), and each picture's own share of it, (B,), where it is mixed."""
        if "warp" not in batch:
            return self._normal(batch[self.seen].float() / 255), None
        x, side = noise.bent(batch[self.seen], batch, self._normal, 0), self.codec.size
        x = x.masked_fill(noise.within(batch["hole"], side), 0.0)
        if "mix" not in batch:
            return x, None
        other, share = noise.bent(batch["other"], batch, self._normal, 1), batch["mix"][:, 0]
        pasted = noise.within(batch["mix"][:, 1:], side)
        blend = torch.lerp(other, x, torch.where(pasted.flatten(1).any(1), 1.0, share)[:, None, None, None])
        return torch.where(pasted, other, blend), share

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        x, share = self._seen(batch)
        logits, smooth = model(x), self.options.label_smoothing if model.training else 0.0
        told = F.cross_entropy(logits, batch["label"], reduction="none", label_smoothing=smooth)
        if share is not None:
            other = F.cross_entropy(logits, batch["other_label"], reduction="none", label_smoothing=smooth)
            told = torch.lerp(other, told, share)
        return Loss(told.sum(), len(told))

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"label", "scores": {label: probability, likeliest first}}``."""
        x, _ = self._seen({self.seen: batch[self.seen]})
        likely = model(x).double().softmax(-1)
        if self.options.mirror:
            likely = (likely + model(x.flip(-1)).double().softmax(-1)) / 2
        names, answers = self.labels.names, []
        for row in likely.cpu().numpy():
            order = np.argsort(-row, kind="stable")
            scores = {names[i]: float(f"{row[i]:.6g}") for i in order}
            answers.append({"label": names[order[0]], "scores": scores})
        return answers

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Accuracy, accuracy among the first five (of more than five labels), calibration error, log loss.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        target, guess, likely = self._compared(answers, rows)
        sure, at = likely.max(1), np.arange(len(target))
        found = {"accuracy": metrics.accuracy(target, guess, weights)}
        if len(self.labels) > 5:
            found["top5_accuracy"] = top_accuracy(likely, target, 5, weights)
        found["calibration_error"] = metrics.calibration_error(sure, target == guess, weights, BINS)
        found["log_loss"] = metrics.log_loss(likely[at, target], weights)
        return found

    def _compared(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """True and guessed class (n,), and all probabilities (n, C)."""
        target = np.array([self.labels.encode(self._name(row["label"])) for row in rows], dtype=np.int64)
        guess = np.array([self.labels.encode(answer["label"]) for answer in answers], dtype=np.int64)
        likely = np.array([[answer["scores"][name] for name in self.labels.names] for answer in answers])
        return target, guess, likely

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Confusion matrix, calibration, figures of each class, the pairs most often mixed up and the surest mistakes,
        both with pictures."""
        names = self.labels.names
        target, guess, likely = self._compared(answers, rows)
        sure = likely.max(1)
        wrong = np.where(target == guess, 0.0, sure)
        pairs = confused_pairs(target, guess, names, sure)
        for pair in pairs:
            pair["pictures"] = [self.shown(rows[i]) for i in pair.pop("rows")[:SHOWN]]
        mistakes = [
            {"picture": self.shown(rows[i]), "truth": names[target[i]], "answer": names[guess[i]],
             "score": float(wrong[i]), "where": getattr(rows[i], "where", "")}
            for i in np.argsort(-wrong, kind="stable")[:MISTAKES] if wrong[i] > 0
        ]  # fmt: skip
        return {
            "confusion": {"labels": names, "matrix": metrics.confusion(target, guess, len(names)).tolist()},
            "calibration": metrics.reliability(sure, target == guess, BINS),
            "classes": metrics.class_table(names, *metrics.hits(target, guess, len(names))),
            "pairs": pairs,
            "mistakes": mistakes,
        }
