"""Dropout whose noise costs next to nothing on a CPU.

torch draws a number of 24 bits for every element, which takes a quarter of a small model's training step. Here one draw
of 64 bits decides on eight elements, and its eight bytes are compared at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer import noise

LEVELS = 256
EACH = 0x0101010101010101
"""A one in every byte of a word."""


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability `p` (on CPUs rounded to 1/256), the others scaled so that the mean stays."""
    if not training or p == 0.0:
        return x
    out = round(p * LEVELS)
    if x.device.type != "cpu":
        return F.dropout(x, p)
    own = noise.generator(x.device)
    if not 0 < out < LEVELS:
        return x * ((torch.rand(x.shape, generator=own) >= p).to(x.dtype) / (1 - p))
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=own)
    kept = at_least(words, out)[: x.numel()].view(x.shape)
    return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - out))


def at_least(words: Tensor, least: int) -> Tensor:
    """Whether each byte of `words` (N,) int64 is at least `least`, 1 to 255: (8 N,) uint8, 1 or 0.

    torch compares bytes one by one; here eight at a time. Added to the lower seven bits of a byte, 128 − least % 128
    reaches its highest bit exactly where they are at least least % 128, and never the next byte; what the byte's own
    highest bit says is joined to it.
    """
    reached = (words & 127 * EACH).add_(_signed((128 - least % 128) * EACH))
    reached = reached.bitwise_or_(words) if least < 128 else reached.bitwise_and_(words)
    return reached.bitwise_right_shift_(7).bitwise_and_(EACH).view(torch.uint8)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def drop_path(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero whole examples (the first axis) with probability `p`, the others scaled so that the mean stays."""
    if not training or p == 0.0:
        return x
    kept_B = torch.rand(len(x), device=x.device, generator=noise.generator(x.device)) >= p
    return x * (kept_B.to(x.dtype) / (1 - p)).view(-1, *[1] * (x.dim() - 1))


class Dropout(nn.Module):
    """`dropout` as a module; where it ends a residual branch, with `drop_path` of probability `path`."""

    def __init__(self, p: float, path: float = 0.0) -> None:
        super().__init__()
        self.p, self.path = p, path

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(dropout(x, self.p, self.training), self.path, self.training)
