"""Dropout whose noise costs next to nothing on a CPU.

torch draws a number of 24 bits for every element, which takes a quarter of a small model's training step. Here one draw
of 64 bits decides on eight elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 256


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability `p` (on CPUs rounded to 1/256), the others scaled so that the mean stays."""
    if not training or p == 0.0:
        return x
    out = round(p * LEVELS)
    if x.device.type != "cpu" or not 0 < out < LEVELS:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = (words.view(torch.uint8)[: x.numel()] >= out).view(x.shape)
    return x * (kept.to(x.dtype) * (LEVELS / (LEVELS - out)))


def drop_path(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero whole examples (the first axis) with probability `p`, the others scaled so that the mean stays."""
    if not training or p == 0.0:
        return x
    kept_B = torch.rand(len(x), device=x.device) >= p
    return x * (kept_B.to(x.dtype) / (1 - p)).view(-1, *[1] * (x.dim() - 1))


class Dropout(nn.Module):
    """`dropout` as a module; where it ends a residual branch, with `drop_path` of probability `path`."""

    def __init__(self, p: float, path: float = 0.0) -> None:
        super().__init__()
        self.p, self.path = p, path

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(dropout(x, self.p, self.training), self.path, self.training)
