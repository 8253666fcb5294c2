"""What it means that an export is the same model: both are run, and their logits compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multihead.errors import UserError, tr

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit (or of 1). Two float32 programs that sum the same
products in another order differ by about 1e-6 of it; a wrong map or a missing norm by more than 1e-2."""


@dataclass
class Proof:
    """What running both has shown."""

    rows: int = 0
    """Texts or pictures."""
    difference: float = 0.0
    """The largest, of any logit."""
    scale: float = 0.0
    """The largest logit."""
    agree: int | None = None
    """Pictures: how many get the same label through the processor that stands in the folder."""
    pixels: float = 0.0
    """Pictures: the largest mean difference of a picture's values, of 255, between that processor and ours."""

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """The logits of one more row."""
        self.rows += 1
        self.difference = max(self.difference, float((ours.float() - theirs.float()).abs().max()))
        self.scale = max(self.scale, float(ours.abs().max()))

    def judge(self) -> None:
        """UserError where the two are not the same."""
        if not self.difference <= TOLERANCE * max(1.0, self.scale):
            off, scale = f"{self.difference:.2g}", f"{self.scale:.3g}"
            raise differ(tr(
                f"its logits differ from ours by up to {off} (allowed: {TOLERANCE:g} of the largest, {scale})",
                f"其 logits 与我们的最多相差 {off}；最大的 logit 是 {scale}，只允许它的 {TOLERANCE:g}"))

    def __str__(self) -> str:
        things = ("texts", "文本") if self.agree is None else ("pictures", "图片")
        off, most = f"{self.difference:.2g}", f"{self.scale:.3g}"
        en = f"on {self.rows} {things[0]} its logits differ from ours by at most {off}, the largest being {most}"
        zh = f"在 {self.rows} 条{things[1]}上，其 logits 与我们的最多相差 {off}，最大的 logit 为 {most}"
        if self.agree is not None:
            en += (f"; through its own processor, whose pictures differ from ours by at most {self.pixels:.2g} of 255 "
                   f"on average, {self.agree} of {self.rows} get the same label")
            zh += (f"；经其自带的处理器（图片与我们的平均最多相差 {self.pixels:.2g}/255），"
                   f"{self.rows} 张中有 {self.agree} 张标签相同")
        return tr(en, zh)


def differ(what: str) -> UserError:
    return UserError(tr(f"the export is not the same model: {what}. Nothing was kept; please report this",
                        f"导出的模型与原模型不一致：{what}。未保留任何文件，请向我们报告"))


def transformers() -> Any:
    """The library, without its chatter."""
    import transformers as library

    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def numbered(names: Sequence[str]) -> dict[str, Any]:
    """The labels of a classifier as config.json holds them."""
    return {"id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)}}
