"""From pictures to the few numbers they can be drawn again from, and back.

Legend: B pictures, C channels, S side, N times smaller, G = S / N, Z channels of latents, W channels inside.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, WIDEST = 32, 4
RANGE = (-20.0, 10.0)
"""What the logarithm of a latent's variance is kept within."""


class Autoencoder(nn.Module):
    """Pictures (B, C, S, S), values from −1 to 1, ↔ latents (B, Z, G, G), N times smaller on each side.

    A variational autoencoder of convolutions (Kingma & Welling 2014; Rombach et al. 2022, "High-Resolution Image
    Synthesis with Latent Diffusion Models", section 3.1). Each halving folds squares of 2 × 2 into channels, so the
    convolutions begin at half the side; nothing in it looks at a whole picture (there are no norms), so what it learns
    on small pieces holds for pictures of any size.

    Args:
        channels: C.
        shrink: N, a power of two.
        latent_channels: Z.
        width: W at the first level; twice as many at each below it, at most four times.
    """

    mean_Z: Tensor
    std_Z: Tensor

    def __init__(self, channels: int, shrink: int, latent_channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.shrink, self.latent_channels = shrink, latent_channels
        widths = [width * min(1 << i, WIDEST) for i in range(shrink.bit_length() - 1)]
        down: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for before, after in itertools.pairwise(widths):
            down += [Residual(before), nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, 1)]
        for after, before in itertools.pairwise(reversed(widths)):
            up += [Residual(after), nn.Conv2d(after, 4 * before, 1), nn.PixelShuffle(2)]
        down += [Residual(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)]
        up += [Residual(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)
        self.register_buffer("mean_Z", torch.zeros(latent_channels))
        self.register_buffer("std_Z", torch.ones(latent_channels))

    def posterior(self, x_BCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of each latent, as they are trained: (B, Z, G, G) each."""
        mean, log_variance = self.down(x_BCSS).chunk(2, dim=1)
        return mean, log_variance.clamp(*RANGE)

    def encode(self, x_BCSS: Tensor) -> Tensor:
        """Latents (B, Z, G, G), brought to mean 0 and deviation 1 by what `measure` was given."""
        return (self.posterior(x_BCSS)[0] - self.mean_Z[:, None, None]) / self.std_Z[:, None, None]

    def decode(self, z_BZGG: Tensor) -> Tensor:
        """What `encode` gave → pictures (B, C, S, S)."""
        return self.up(z_BZGG * self.std_Z[:, None, None] + self.mean_Z[:, None, None])

    def measure(self, mean_Z: Tensor, std_Z: Tensor) -> None:
        """Keep mean and deviation of each channel of `posterior`'s means over the training pictures."""
        self.mean_Z.copy_(mean_Z)
        self.std_Z.copy_(std_Z.clamp(min=1e-4))


class Residual(nn.Module):
    """Two 3×3 convolutions, added to what they read; at first they add nothing: (B, W, H, H) → (B, W, H, H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BWHH: Tensor) -> Tensor:
        return x_BWHH + self.second(F.silu(self.first(F.silu(x_BWHH))))


def autoencoder_loss(model: Autoencoder, x_BCSS: Tensor, noise_BZGG: Tensor, divergence: float) -> Tensor:
    """Mean error of pictures rebuilt from noisy latents: a scalar.

    The absolute error; the same of the differences between neighbours, which keeps edges sharp (as the gradient
    difference loss of Mathieu et al. 2016, section 3.3); and `divergence` times the Kullback–Leibler divergence of a
    latent from N(0, 1), which keeps latents of like scale and close together (Kingma & Welling 2014, appendix B).

    Args:
        noise_BZGG: normal noise.
    """
    mean, log_variance = model.posterior(x_BCSS)
    wrong = model.up(mean + noise_BZGG * (0.5 * log_variance).exp()) - x_BCSS
    across, along = wrong.diff(dim=-1).abs().mean(), wrong.diff(dim=-2).abs().mean()
    apart = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return wrong.abs().mean() + 0.5 * (across + along) + divergence * apart
