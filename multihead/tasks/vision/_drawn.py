"""Drawn pictures: as files, in numbers that tell how far they are from real ones, and beside their nearest originals.

Legend: n, m pictures, C channels, S side, D features.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multihead import recipe as recipes
from multihead.codec.image import pillow
from multihead.data.images import to_uri
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.run import RECIPE, RunFolder
from multihead.runtime import checkpoint
from multihead.task import find

CELLS = 8
WIDE, NEIGHBOURS, NEAR, REBUILT = 8, 20, 4, 12
CHUNK = 256
TOO_MANY = 20_000_000  # numbers held at once when neighbours are looked for


def to_image(picture: np.ndarray) -> Any:
    """uint8 (C, S, S) → a pillow image, grey or RGB."""
    Image, _ = pillow()
    return Image.fromarray(picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0)))


def to_png(picture: np.ndarray) -> str:
    """uint8 (C, S, S) → a PNG as a data URI."""
    with io.BytesIO() as file:
        to_image(picture).save(file, "PNG")
        return to_uri(file.getvalue())[0]


def from_png(uri: str) -> np.ndarray:
    """What `to_png` made → uint8 (C, S, S)."""
    Image, _ = pillow()
    array = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])), formats=("PNG",)))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def bytes_of(x: Tensor) -> np.ndarray:
    """Values from −1 to 1, (n, C, S, S) → uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


# -- features ----------------------------------------------------------------------------------------------------------


class Cells:
    """Features that need no model: the mean of each of 8 × 8 cells of a picture, per channel, from 0 to 1."""

    name = ("means of 8 × 8 cells", "8 × 8 格的像素均值")
    labels: Sequence[str] = ()

    def look(self, pictures: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """uint8 (n, C, S, S) → features (n, D), and labels: none."""
        x = torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(x, CELLS).flatten(1).numpy(), []


class Judge:
    """A trained run that labels pictures: its last vector before the labels is the features, its labels an opinion.

    Raises:
        UserError: no such run, or one of another task.
    """

    def __init__(self, path: str) -> None:
        folder = RunFolder.open(path)
        recipe = recipes.load(folder.file(RECIPE), find=find, settled=True)
        self.task = find(recipe.task, folder.path)(recipe.options, seed=recipe.seed)
        self.task.load(folder.file("codec"))
        self.model: Any = self.task.model(recipe.model)
        if recipe.task != "image-classification":
            raise UserError(tr(f"options.judge is a run of {recipe.task}; it must be one of image-classification",
                               f"options.judge 是 {recipe.task} 的训练结果；应为 image-classification 的"), path)
        weights = folder.weights()
        checkpoint.load_model(self.model, checkpoint.load_weights(weights), str(weights))
        self.model.eval()
        self.codec: Any = self.task.codec  # type: ignore[attr-defined]
        self.labels: Sequence[str] = self.task.labels.names  # type: ignore[attr-defined]
        self.name = (f"the last vector of {recipe.name}", f"{recipe.name} 的最后一层向量")

    @torch.no_grad()
    def look(self, pictures: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """uint8 (n, C, S, S) → features (n, D), and the label each is given."""
        held: list[Tensor] = []
        hook = self.model.head.linear.register_forward_pre_hook(lambda _, given: held.append(given[0]))
        guesses: list[int] = []
        try:
            for start in range(0, len(pictures), CHUNK):
                seen = np.stack([self.codec.array(to_image(one)) for one in pictures[start : start + CHUNK]])
                answers = self.task.predict(self.model, {"image": torch.from_numpy(seen)}, {})
                guesses += [self.labels.index(answer["label"]) for answer in answers]
        finally:
            hook.remove()
        # A judge that looks at mirror images too reads every batch twice, the picture itself first.
        every = len(held) // -(-len(pictures) // CHUNK)
        return torch.cat(held[::every]).double().numpy(), [self.labels[i] for i in guesses]


# -- the pictures learned from -----------------------------------------------------------------------------------------


def training_store(store: Store) -> Store | None:
    """The training part of the run in whose folder `store` lies, None where there is none."""
    for folder in store.folder.resolve().parents[:3]:
        if (folder / "train").is_dir() and folder.name == "data":
            return Store(folder / "train")
    return None


def pictures_of(store: Store, index: Any = None) -> np.ndarray:
    """The encoded pictures of a store, all or some, uint8 (n, C, S, S)."""
    first = store[0]["image"]
    every = np.asarray(store.stream("image")).reshape(-1, *first.shape)
    return every if index is None else every[index]


def nearest(pictures: np.ndarray, among: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` pictures of `among` (m, C, S, S) nearest to each of `pictures` (n, C, S, S), by the root of the mean
    squared difference of their values (from 0 to 1): numbers (n, count) and distances (n, count), nearest first."""
    a = torch.from_numpy(np.ascontiguousarray(pictures)).flatten(1).float() / 255
    size, found = max(1, TOO_MANY // a.shape[1]), []
    for start in range(0, len(among), size):
        b = torch.from_numpy(np.array(among[start : start + size])).flatten(1).float() / 255
        found.append(torch.cdist(a, b))
    distance = torch.cat(found, dim=1) / a.shape[1] ** 0.5
    near, which = distance.topk(min(count, distance.shape[1]), largest=False)
    return which.numpy(), near.numpy()


# -- for the report ----------------------------------------------------------------------------------------------------

Gallery = dict[str, Any]


def grid(asked: Sequence[str], pictures: Sequence[str]) -> Gallery:
    """Pictures by what was asked for, in the order of their rows."""
    held: dict[str, list[str]] = {}
    for name, picture in zip(asked, pictures, strict=True):
        held.setdefault(name, []).append(picture)
    several = len(held) > 1
    return {
        "title": ("What it draws", "它画出来的图"),
        "note": ("Drawn for held-out rows, in their order; none was picked.", "按留出数据的顺序生成，未经挑选。"),
        "rows": [{"name": name, "pictures": held[name][: WIDE if several else WIDE * WIDE]} for name in sorted(held)],
    }


def pairs(asked: Sequence[str], pictures: Sequence[str], real: np.ndarray) -> Gallery:
    """Each caption's drawn picture beside the real one."""
    lines = zip(asked[: 4 * WIDE], pictures, real, strict=False)
    return {
        "title": ("What it draws", "它画出来的图"),
        "note": ("Drawn, and beside it the held-out picture of that caption; in their order, none was picked.",
                 "左为生成，右为该描述对应的留出图片；按数据顺序，未经挑选。"),
        "rows": [{"name": name, "pictures": [picture, to_png(one)]} for name, picture, one in lines],
    }  # fmt: skip


def copies(pictures: Sequence[str], real: np.ndarray, learned: np.ndarray) -> Gallery:
    """Drawn pictures, each with the training pictures nearest to it, so that copying would be seen."""
    some = np.stack([from_png(uri) for uri in pictures[:NEIGHBOURS]])
    which, far = nearest(some, learned, NEAR)
    usual = float(np.median(nearest(real[:NEIGHBOURS], learned, 1)[1]))
    return {
        "title": ("Is it copying?", "是否照抄？"),
        "note": (f"A drawn picture, then the {NEAR} training pictures nearest to it, and how far the nearest is (root "
                 f"mean squared difference, 0 to 1). A real picture that was held out is {usual:.3f} from its own.",
                 f"左起第一张为生成，其后是与它最近的 {NEAR} 张训练图片；旁边是最近一张的距离（均方根差，0 到 1）。"
                 f"留出的真实图片到最近训练图片的距离为 {usual:.3f}。"),
        "rows": [{"name": f"{distance[0]:.3f}", "pictures": [uri, *map(to_png, learned[near])]}
                 for uri, near, distance in zip(pictures, which, far, strict=False)],
    }  # fmt: skip


def rebuilt(real: np.ndarray, again: np.ndarray, decibels: np.ndarray) -> Gallery:
    """Held-out pictures beside what the autoencoder makes of them, uint8 (n, C, S, S) each, with their PSNR (n,)."""
    return {
        "title": ("What the autoencoder keeps", "自编码器保留了什么"),
        "note": ("A held-out picture, and beside it the same, rebuilt from its latents: what is drawn is no sharper. "
                 "In their order, with the peak signal-to-noise ratio.",
                 "左为留出图片，右为由其隐变量重建的同一张图：生成的图片不会更清晰。按数据顺序，旁边是峰值信噪比。"),
        "rows": [{"name": f"{ratio:.1f} dB", "pictures": [to_png(one), to_png(other)]}
                 for one, other, ratio in zip(real, again, decibels, strict=True)],
    }  # fmt: skip
