"""The convolution module of the Conformer (Gulati et al. 2020, section 2.2), for trunks that look both ways.

Legend: B batch, T positions, D d_model, G positions a side of a square.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig


class Convolution(nn.Module):
    """x (B, T, D) → (B, T, D): a gate, a convolution of each channel over `conv_kernel` positions, a norm, Swish and a
    linear map.

    LayerNorm stands where the paper has BatchNorm, so that a row does not depend on its batch.

    Args:
        square: (G, extra): the positions behind the first `extra` lie on a square of G a side, and the convolution
            spans `conv_kernel` of them both ways; the others pass it by. None: they lie in a line.
    """

    def __init__(self, config: TransformerConfig, square: tuple[int, int] | None = None) -> None:
        super().__init__()
        width, kernel, self.square = config.d_model, config.conv_kernel, square
        self.gate = nn.Linear(width, 2 * width, bias=config.bias)
        kind = nn.Conv1d if square is None else nn.Conv2d
        self.depthwise = kind(width, width, kernel, padding=kernel // 2, groups=width, bias=config.bias)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.out = nn.Linear(width, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """`real_BT`: True where a position is no padding; padding is as nothing to its neighbours."""
        x_BTD = F.glu(self.gate(x_BTD), dim=-1)
        if real_BT is not None:
            x_BTD = x_BTD * real_BT[..., None]
        return self.out(F.silu(self.norm(self._along(x_BTD))))

    def _along(self, x_BTD: Tensor) -> Tensor:
        if self.square is None:
            return self.depthwise(x_BTD.mT).mT
        grid, extra = self.square
        y_BDGG = self.depthwise(x_BTD[:, extra:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2))  # channels last, as is
        y_BND = y_BDGG.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((x_BTD[:, :extra].to(y_BND.dtype), y_BND), dim=1) if extra else y_BND
