"""A diffusion Transformer: from a picture full of noise, a time, and what is wanted, to the velocity towards pictures.

Pictures may be latents: what an autoencoder makes of them, with as many channels and as small a side as it gives.

Legend: B pictures, C channels, S side, P side of a patch, G = S / P, N = G² patches, D d_model, L ids of a caption.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from multihead.errors import UserError, tr
from multihead.generation import flow
from multihead.task import Options
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.patches import PatchInput, patch_trunk
from multihead.transformer.times import TimeInput
from multihead.transformer.trunk import Trunk

Told = Literal["none", "label", "text"]


class DrawingOptions(Options):
    """What a model that draws is told, how pictures are brought to one form, and how they are drawn."""

    condition: Literal["auto", "none", "label", "text"] = "auto"
    """What the model is told: nothing, a label, or a caption; auto: captions where the data has them, else labels.
    生成时告诉模型什么：无、标签或文字描述；auto：数据有描述就用描述，否则用标签。"""
    size: int | None = Field(None, ge=4, le=256)
    """Pictures are made this many pixels high and wide; null: as most of them are, at most 64.
    图片统一缩放到的边长（像素）；null 表示取多数图片的大小，至多 64。"""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """auto: grey where all pictures are grey, else rgb. What is transparent stands on white.
    auto：全部为灰度图时用 grey，否则用 rgb。透明处以白色为底。"""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What becomes of pictures that are not square. crop: the middle; pad: all of it, between white bars; stretch.
    非正方形图片的处理。crop：取中间；pad：补白边保留全图；stretch：拉伸。"""
    names: list[str] = Field(default_factory=list)
    """Names of labels that are the numbers 0, 1, 2 … in the data.
    数据中标签是 0、1、2…… 时，依次对应的名称。"""
    patch: int = Field(4, ge=1, le=64)
    """Side of a patch; the smaller, the better and the slower. Of latents, where there are any: 1 or 2 then.
    图块边长；越小效果越好，也越慢。使用隐变量（latent）时以隐变量计，宜取 1 或 2。"""
    latent: Literal[2, 4, 8, 16] | None = None
    """Draw in the latents of an autoencoder, so many times smaller on each side than the pictures: for sides beyond 64.
    It is learned from the training pictures first. null: draw pixels.
    在自编码器的隐变量中生成，其每边是图片的几分之一；适合边长超过 64 的图片。自编码器先用训练图片学得。
    null 表示直接生成像素。"""
    latent_channels: int = Field(4, ge=1, le=64)
    """Numbers a place of the latents has: more are truer to the pictures, and harder to draw.
    隐变量每个位置的数值个数；越多越忠于原图，也越难生成。"""
    latent_steps: int = Field(2000, ge=1, le=1_000_000)
    """Steps in which the autoencoder is learned, of 32 pieces of pictures each.
    自编码器的训练步数，每步 32 个图块。"""
    flip: bool = False
    """Mirror half of the pictures in training, where left and right are alike.
    训练时一半图片左右翻转（左右无别的内容适用）。"""
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    """How times between noise and picture are drawn in training; logit_normal: more of the middle.
    训练时噪声与图片之间时刻的抽取方式；logit_normal 更多取中段。"""
    drop: float = Field(0.1, ge=0, lt=1)
    """Share of training pictures whose label or caption is kept from the model: guidance needs it.
    训练时不告诉模型标签或描述的图片比例；引导（guidance）需要它。"""
    steps: int = Field(20, ge=1, le=flow.MOST_STEPS)
    """Steps from noise to picture; more are truer and slower.
    从噪声到图片的步数；越多越准，也越慢。"""
    method: flow.Method = "heun"
    """How a step is taken: euler asks the model once, midpoint and heun twice.
    每一步的算法：euler 调用模型一次，midpoint 与 heun 两次。"""
    guidance: float = Field(2.0, ge=0, le=flow.MOST_GUIDANCE)
    """How strongly pictures follow what is asked: 1 as learned, more is plainer and less varied.
    图片贴近要求的强度：1 为原样，越大越典型、越少变化。"""
    tokenizer: Literal["bpe", "char"] = "bpe"
    """How captions become numbers: pieces learned from them, or single characters.
    描述文字的切分方式：学到的片段，或单个字符。"""
    vocab_size: int = Field(4000, ge=260, le=100_000)
    """Most pieces or characters there are.
    词表大小上限。"""
    caption_length: int = Field(64, ge=4, le=1024)
    """Longest caption, in pieces or characters.
    描述文字的最大长度（片段或字符数）。"""
    text_layers: int = Field(2, ge=1, le=24)
    """Blocks of the trunk that reads captions.
    阅读描述文字的层数。"""
    keywords: bool = False
    """Captions are lists of words, between commas or lines; each time, training shows some of them in any order.
    描述是以逗号或换行分隔的关键词；训练时每次随机取其中一部分、随机排序。"""
    judge: str | None = None
    """A run of image-classification that looks at drawn pictures: its last vector gives the Fréchet distance, its
    labels are compared with those asked for. null: the means of 8 × 8 cells, and no labels.
    image-classification 的训练结果目录，用来评判生成的图片：其最后一层向量用于计算 Fréchet 距离，
    其标签与要求的标签比较。null 表示用 8 × 8 格的像素均值，不比较标签。"""
    samples: int = Field(256, ge=0, le=10_000)
    """Pictures drawn at each evaluation, for as many held-out rows.
    每次评估时生成的图片数，对应同样多的留出数据。"""


class Wish(NamedTuple):
    """What each picture of a batch is to show, as the model reads it: one vector (B, D), and of a caption also its
    vectors (B, L, D) with their mask (B, L); None where a model is told nothing, or has no captions."""

    vector: Tensor | None = None
    memory: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, index: Tensor) -> Wish:
        """The wishes of these pictures."""
        return Wish(*(None if part is None else part[index] for part in self))


class PictureFlow(nn.Module):
    """The velocity of pictures (B, C, S, S), values from −1 to 1, at times t (B,).

    A label is one vector, added to the time's; the last is that of no label. A caption is read by a trunk of its own:
    the mean of its vectors is added to the time's, and every block looks at them all.
    """

    def __init__(self, config: TransformerConfig, shape: tuple[int, int], options: Any, told: Told, classes: int = 0,
                 vocab_size: int = 0) -> None:
        """`shape`: C and S."""
        super().__init__()
        self.patch, (self.channels, side) = options.patch, shape
        self.label: nn.Embedding | None = None
        self.words: TokenInput | None = None
        self.reader: Trunk | None = None
        self.input = PatchInput(config, self.channels, side, options.patch)
        self.time = TimeInput(config.d_model)
        if told == "label":
            self.label = nn.Embedding(classes + 1, config.d_model)
        if told == "text":
            reading = replace(config, num_layers=options.text_layers, max_length=options.caption_length)
            self.words, self.reader = TokenInput(reading, vocab_size), Trunk(reading)
        self.trunk = patch_trunk(config, self.input.grid, 0, conditioned=True, cross_attention=told == "text")
        self.head = nn.Linear(config.d_model, self.channels * options.patch**2)
        # Near zero as the gates are: at first the model says nothing, and every weight learns.
        nn.init.normal_(self.head.weight, std=0.1 * config.d_model**-0.5)
        nn.init.zeros_(self.head.bias)

    def wish(self, label_B: Tensor | None = None, ids_BL: Tensor | None = None, mask_BL: Tensor | None = None) -> Wish:
        """What is asked for, read once for all steps of a drawing."""
        if self.label is not None:
            return Wish(self.label(label_B))
        if self.words is None or self.reader is None or ids_BL is None or mask_BL is None:
            return Wish()
        memory_BLD = self.reader(self.words(ids_BL), mask=mask_BL)
        mean_BD = (memory_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        return Wish(mean_BD, memory_BLD, mask_BL)

    def forward(self, x_BCSS: Tensor, t_B: Tensor, wish: Wish) -> Tensor:
        condition_BD = self.time(t_B)
        if wish.vector is not None:
            condition_BD = condition_BD + wish.vector
        y_BND = self.trunk(self.input(x_BCSS), memory=wish.memory, memory_mask=wish.mask, condition=condition_BD)
        return unpatched(self.head(y_BND).float(), self.patch, self.channels)


def check_side(side: int, options: Any) -> None:
    """UserError where pictures of that side cannot be cut into patches, of pixels or of latents."""
    shrink = options.latent or 1
    if side % (options.patch * shrink):
        en = f" of latents {shrink} times smaller" if shrink > 1 else ""
        zh = f"（隐变量，每边缩小 {shrink} 倍）" if shrink > 1 else ""
        raise UserError(tr(f"options.patch is {options.patch}{en}, which does not divide the pictures' size {side}",
                           f"options.patch 是 {options.patch}{zh}，不能整除图片大小 {side}"))


def check_trunk(config: TransformerConfig) -> None:
    """UserError where a trunk of that shape cannot draw."""
    if config.positions == "rotary" and config.head_size % 4:
        raise UserError(tr("rotary positions in two dimensions need a head width (model.d_model / model.num_heads) "
                           f"that is a multiple of 4; it is {config.head_size}",
                           f"二维 rotary 位置编码要求每个头的宽度（model.d_model / model.num_heads）是 4 的倍数；"
                           f"现在是 {config.head_size}"))
    if config.norm_position != "before":
        raise UserError(tr("a diffusion Transformer has its norms before: model.norm_position: before",
                           "扩散 Transformer 的归一化在前：model.norm_position: before"))


def unpatched(x_BNF: Tensor, patch: int, channels: int) -> Tensor:
    """(B, N, C·P·P) → (B, C, S, S), the reverse of `patches`."""
    B, N, _ = x_BNF.shape
    G = math.isqrt(N)
    x_BGGCPP = x_BNF.view(B, G, G, channels, patch, patch)
    return x_BGGCPP.permute(0, 3, 1, 4, 2, 5).reshape(B, channels, G * patch, G * patch)
