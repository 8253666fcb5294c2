"""From clips to the vectors the trunk reads: patches with a length in time, and positions in three dimensions.

Legend: B batch, F frames, C channels, S side of a frame, L frames of a tubelet, T = F / L moments, G patches a side,
N = G² patches, R vectors in front of the patches of every moment (class token and registers), M = R + N vectors a
moment, D d_model, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import sinusoids
from multihead.transformer.patches import PatchInput
from multihead.transformer.trunk import Trunk


class ClipInput(nn.Module):
    """A clip cut into tubelets, each one vector (Arnab et al. 2021, "ViViT", section 3.2): (B, F, C, S, S) →
    (B, T, M, D).

    The frames of a tubelet are the channels of one picture: a linear map of its patches is then one of all that a
    tubelet holds, as a 3-D convolution of the tubelet's stride would be. Learned and sinusoidal positions are the sum
    of one in space and one in time.
    """

    sinusoids_TD: Tensor | None

    def __init__(self, config: TransformerConfig, channels: int, side: int, frames: int, patch: int, tubelet: int,
                 stem: str = "linear", extra: int = 0) -> None:
        super().__init__()
        self.tubelet, self.moments = tubelet, frames // tubelet
        self.picture = PatchInput(config, tubelet * channels, side, patch, stem, extra)
        shape = (self.moments, config.d_model)
        self.time = nn.Parameter(torch.randn(shape) * 0.02) if config.positions == "learned" else None
        self.register_buffer("sinusoids_TD", sinusoids(*shape) if config.positions == "sinusoidal" else None,
                             persistent=False)

    @property
    def grid(self) -> int:
        """G, patches a side."""
        return self.picture.grid

    @property
    def length(self) -> int:
        """T · M, vectors of one clip."""
        return self.moments * self.picture.length

    def forward(self, x_BFCSS: Tensor) -> Tensor:
        B, frames, C, S, _ = x_BFCSS.shape
        x_BTMD = self.picture(x_BFCSS.reshape(-1, self.tubelet * C, S, S)).unflatten(0, (B, frames // self.tubelet))
        time_TD = self.time if self.time is not None else self.sinusoids_TD
        return x_BTMD if time_TD is None else x_BTMD + time_TD[:, None]


class ClipTrunk(Trunk):
    """The trunk over clips: x (B, T, M, D) → (B, T, M, D).

    Joint attention looks from every vector at every other (ViViT's model 1, section 3.3). Factorised attention takes
    turns by blocks: the first, third … look at the vectors of the same moment, the others at those of the same place
    (ViViT's model 3 divides each block so; whole blocks by turns are Latte's variant 1, Ma et al. 2024, section 3.1).

    Args:
        moments, grid, extra: T, G and R.
    """

    def __init__(self, config: TransformerConfig, moments: int, grid: int, extra: int, factorised: bool) -> None:
        super().__init__(config)
        self.factorised = factorised
        if self.angles_T2E is not None:
            self.angles_T2E = rotary_clip(config.head_size, moments, grid, extra, config.rope_theta)

    def forward(self, x_BTMD: Tensor) -> Tensor:  # type: ignore[override]
        B, T, M, _ = x_BTMD.shape
        if not self.factorised:
            return super().forward(x_BTMD.flatten(1, 2)).unflatten(1, (T, M))
        # What all vectors of a sequence are turned by alike, they do not see: the first moment's angles serve for
        # every moment, and the first place's for every place.
        angles = None if self.angles_T2E is None else self.angles_T2E.view(T, M, 2, -1)
        space, time = (None, None) if angles is None else (angles[None, 0], angles[None, :, 0])
        for layer, block in enumerate(self.blocks):
            if layer % 2 == 0:
                x_BTMD = block(x_BTMD.flatten(0, 1), space, *_ALONE).unflatten(0, (B, T))
            else:
                x_BMTD = block(x_BTMD.transpose(1, 2).flatten(0, 1), time, *_ALONE).unflatten(0, (B, M))
                x_BTMD = x_BMTD.transpose(1, 2)
        return x_BTMD if self.norm is None else self.norm(x_BTMD)


_ALONE = (None, False, None, None, None)
"""What a block is given beside vectors and angles: no mask, not causal, no memory and none of its mask, no cache."""


def rotary_clip(head_size: int, moments: int, grid: int, extra: int, theta: float) -> Tensor:
    """Angles of rotary positions in a clip, (T·M, 2, E/2): of the pairs, three eighths turn with the row, as many with
    the column and the rest with the moment. The vectors in front are turned by the moment alone."""
    pairs = head_size // 2
    space = pairs * 3 // 8
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    time = torch.arange(moments)[:, None].expand(-1, extra + grid * grid)
    angles = []
    for place_N, count in ((row, space), (column, space), (None, pairs - 2 * space)):
        speed = theta ** (-torch.arange(count, dtype=torch.float64) / max(1, count))
        at_TM = time if place_N is None else F.pad(place_N.flatten(), (extra, 0)).expand(moments, -1)
        angles.append(at_TM[..., None] * speed)
    angle_XE2 = torch.cat(angles, dim=-1).flatten(0, 1)
    return torch.stack((angle_XE2.cos(), angle_XE2.sin()), dim=1).float()
