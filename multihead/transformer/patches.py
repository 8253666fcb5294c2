"""From pictures to the vectors the trunk reads, and positions in two dimensions.

Legend: B batch, C channels, S side of the picture, P side of a patch, G = S / P patches a side, N = G² patches,
R vectors in front of them (class token and registers), T = R + N, D d_model, E width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.inputs import sinusoids
from multihead.transformer.trunk import Trunk, make_norm


class PatchInput(nn.Module):
    """A picture cut into patches, each one vector, with vectors of its own in front: (B, C, S, S) → (B, R + N, D).

    `stem`: "linear" maps each patch by itself (Dosovitskiy et al. 2021, section 3.1); "conv" reads it, and what lies
    around it, by a few 3×3 convolutions that halve the side until a patch is one vector (Xiao et al. 2021, "Early
    Convolutions Help Transformers See Better", section 3), which small data and short training need.

    Args:
        extra: vectors in front: a class token, registers (Darcet et al. 2023), or both.
        embedding_bias: whether the patch embedding has a bias (always, in ViT).
    """

    sinusoids_ND: Tensor | None

    def __init__(self, config: TransformerConfig, channels: int, side: int, patch: int, stem: str = "linear",
                 extra: int = 0) -> None:
        super().__init__()
        self.patch, self.grid, self.extra = patch, side // patch, extra
        d_model = config.d_model
        self.linear = nn.Linear(channels * patch * patch, d_model) if stem == "linear" else None
        self.conv = conv_stem(channels, d_model, patch) if stem == "conv" else None
        self.front = nn.Parameter(torch.randn(extra, d_model) * 0.02) if extra else None
        learned = config.positions == "learned"
        self.position = nn.Parameter(torch.randn(extra + self.grid**2, d_model) * 0.02) if learned else None
        waves = grid_sinusoids(self.grid, d_model) if config.positions == "sinusoidal" else None
        self.register_buffer("sinusoids_ND", waves, persistent=False)
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout)

    @property
    def length(self) -> int:
        """T, vectors of one picture."""
        return self.extra + self.grid**2

    def fitted(self, name: str, given: Tensor) -> Tensor:
        """A tensor called `name` of an input for pictures of another size, for this one: positions are stretched by
        bicubic interpolation (Dosovitskiy et al. 2021, section 3.2); whatever fits, or cannot be made to, stays."""
        side = math.isqrt(max(0, len(given) - self.extra)) if name == "position" and given.dim() == 2 else 0
        if side in (0, self.grid) or side * side != len(given) - self.extra:
            return given
        square_1DGG = given[self.extra :].T.reshape(1, -1, side, side)
        stretched = F.interpolate(square_1DGG, (self.grid, self.grid), mode="bicubic", align_corners=False)
        return torch.cat((given[: self.extra], stretched.flatten(2)[0].T))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        if self.linear is not None:
            x_BND = self.linear(patches(x_BCSS, self.patch))
        else:
            assert self.conv is not None
            x_BND = self.conv(x_BCSS).flatten(2).mT
        if self.sinusoids_ND is not None:
            x_BND = x_BND + self.sinusoids_ND
        x_BTD = x_BND
        if self.front is not None:
            x_BTD = torch.cat((self.front.to(x_BND.dtype).expand(len(x_BND), -1, -1), x_BND), dim=1)
        if self.position is not None:
            x_BTD = x_BTD + self.position
        return self.dropout(x_BTD if self.norm is None else self.norm(x_BTD))


def patches(x_BCSS: Tensor, patch: int) -> Tensor:
    """(B, C, S, S) → (B, N, C·P·P), patches row by row, each as a convolution's weight lies: channel, row, column."""
    B, C, S, _ = x_BCSS.shape
    G = S // patch
    x_BCGPGP = x_BCSS.reshape(B, C, G, patch, G, patch)
    return x_BCGPGP.permute(0, 2, 4, 1, 3, 5).reshape(B, G * G, C * patch * patch)


def conv_stem(channels: int, d_model: int, patch: int) -> nn.Sequential:
    """(B, C, S, S) → (B, D, G, G): a 3×3 convolution of stride 2 for each halving of the side, each twice as wide as
    the one before it, the last D wide, and a 1×1.

    GroupNorm stands where Xiao et al. have BatchNorm, so that a picture's vectors do not depend on its batch.
    """
    halvings = patch.bit_length() - 1
    layers: list[nn.Module] = []
    before = channels
    for i in range(1, halvings + 1):
        width = max(16, d_model >> (halvings - i))
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
                   nn.GroupNorm(math.gcd(width, 8), width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, d_model, 1))


def grid_sinusoids(grid: int, d_model: int) -> Tensor:
    """Positions on a square as sines and cosines: (N, D), the first half of each vector for the row, the other for the
    column (as in MAE, He et al. 2021)."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    half = d_model // 2
    return torch.cat((sinusoids(grid, half)[row.flatten()], sinusoids(grid, d_model - half)[column.flatten()]), dim=1)


def rotary_grid(head_size: int, grid: int, extra: int, theta: float) -> Tensor:
    """Angles of rotary positions on a square, (T, 2, E/2): the first half of the pairs turns with the row, the other
    with the column (axial; Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", section 3.2). The
    vectors in front are not turned."""
    pairs = head_size // 4
    speed_E4 = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angle_NE2 = torch.cat((row.flatten()[:, None] * speed_E4, column.flatten()[:, None] * speed_E4), dim=1)
    angle_TE2 = F.pad(angle_NE2, (0, 0, extra, 0))
    return torch.stack((angle_TE2.cos(), angle_TE2.sin()), dim=1).float()


def patch_trunk(config: TransformerConfig, grid: int, extra: int, **kinds: bool) -> Trunk:
    """A trunk over a square of patches behind `extra` vectors: its rotary positions and its convolutions, where it has
    them, go both ways. `kinds`: as `Trunk`."""
    trunk = Trunk(config, square=(grid, extra), **kinds)
    if trunk.angles_T2E is not None:
        trunk.angles_T2E = rotary_grid(config.head_size, grid, extra, config.rope_theta)
    return trunk
