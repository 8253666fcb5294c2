"""From spectrograms to the vectors the trunk reads.

Legend: B batch, T frames, M mel bands, W channels of the convolutions, S = ⌈T / 4⌉ positions, D d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.inputs import sinusoids

SUBSAMPLING = 4


def subsampled(frames: Tensor) -> Tensor:
    """Positions of so many frames."""
    return ((frames + 1) // 2 + 1) // 2


class BandInput(nn.Module):
    """Frames (B, T, M) with lengths (B,) → vectors (B, ⌈T / 2⌉, D), and their lengths.

    Two convolutions of 3 over time, bands as channels, the second of stride 2; each with GELU; then learned positions
    (Radford et al. 2022, "Whisper", section 2.2).
    """

    def __init__(self, config: TransformerConfig, bands: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(bands, config.d_model, 3, padding=1)
        self.second = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.position = nn.Embedding(config.max_length, config.d_model)
        nn.init.normal_(self.position.weight, std=config.d_model**-0.5)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTM: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        x_BDS = F.gelu(self.second(F.gelu(self.first(x_BTM.mT))))
        return self.dropout(x_BDS.mT + self.position.weight[: x_BDS.shape[2]]), (lengths_B + 1) // 2


class SoundInput(nn.Module):
    """Frames (B, T, M) with lengths (B,) → vectors (B, S, D), four times fewer, and their lengths.

    Two 3×3 convolutions of stride 2 over time and bands, then a linear map of what a position holds (Dong et al.
    2018, "Speech-Transformer", section 3.2). What lies behind a recording's end is kept at 0, so that a recording's
    vectors do not depend on its batch.
    """

    sinusoids_SD: Tensor | None

    def __init__(self, config: TransformerConfig, bands: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.linear = nn.Linear(channels * ((bands + 3) // 4), config.d_model)
        waves = sinusoids(config.max_length, config.d_model) if config.positions == "sinusoidal" else None
        self.register_buffer("sinusoids_SD", waves, persistent=False)
        self.position = nn.Embedding(config.max_length, config.d_model) if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTM: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        x_BWTM = x_BTM[:, None]
        for convolution in (self.first, self.second):
            x_BWTM = torch.relu(convolution(x_BWTM))
            lengths_B = (lengths_B + 1) // 2
            real_BT = torch.arange(x_BWTM.shape[2], device=x_BTM.device) < lengths_B[:, None]
            x_BWTM = x_BWTM * real_BT[:, None, :, None]
        x_BSD = self.linear(x_BWTM.transpose(1, 2).flatten(2))
        if self.sinusoids_SD is not None:
            x_BSD = x_BSD + self.sinusoids_SD[: x_BSD.shape[1]]
        if self.position is not None:
            x_BSD = x_BSD + self.position.weight[: x_BSD.shape[1]]
        return self.dropout(x_BSD), lengths_B
