"""The convolution module of the Conformer (Gulati et al. 2020, section 2.2), for trunks that look both ways.

Legend: B batch, T positions, D d_model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig


class Convolution(nn.Module):
    """x (B, T, D) → (B, T, D): a gate, a convolution of each channel over `conv_kernel` positions, a norm, Swish and a
    linear map.

    LayerNorm stands where the paper has BatchNorm, so that a row does not depend on its batch.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, kernel = config.d_model, config.conv_kernel
        self.gate = nn.Linear(width, 2 * width, bias=config.bias)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=config.bias)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.out = nn.Linear(width, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """`real_BT`: True where a position is no padding; padding is as nothing to its neighbours."""
        x_BTD = F.glu(self.gate(x_BTD), dim=-1)
        if real_BT is not None:
            x_BTD = x_BTD * real_BT[..., None]
        x_BTD = self.depthwise(x_BTD.mT).mT
        return self.out(F.silu(self.norm(x_BTD)))
