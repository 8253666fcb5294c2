"""From the time on a path between noise and data to a vector that conditions the trunk.

Legend: B examples, W waves, D d_model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAVES = 128


class TimeInput(nn.Module):
    """Times (B,) from 0 to 1 → vectors (B, D): sines and cosines of many speeds, and two linear maps (Peebles & Xie
    2023, section 3.2)."""

    waves_W: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        speeds = 1000 * torch.exp(-math.log(10000.0) * torch.arange(WAVES) / WAVES)
        self.register_buffer("waves_W", speeds, persistent=False)
        self.up, self.down = nn.Linear(2 * WAVES, d_model), nn.Linear(d_model, d_model)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        angle_BW = t_B.float()[:, None] * self.waves_W
        return self.down(F.silu(self.up(torch.cat((angle_BW.cos(), angle_BW.sin()), dim=1))))
