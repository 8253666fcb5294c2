"""Noise for pictures: each example draws its own numbers, and a whole batch is bent by them at once.

What an example is mixed with is another training picture that it drew itself, not its neighbour in the batch: so a
batch of 8 is 4 × 2, and a resumed run sees what one that was never stopped does.

Legend: B pictures, C channels, S side, O operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROTATE, SHEAR, SCALE, TINT = 30.0, 0.3, 0.3, 0.9
"""Each operation at its strongest: degrees, slope, logarithm of a factor, share (RandAugment, Cubuk et al. 2020)."""
OPERATIONS = 7  # rotate, shear along either axis, scale, brightness, contrast, colour


def drawn(rng: np.random.Generator, options: Any, count: int, side: int) -> dict[str, np.ndarray]:
    """The numbers by which `count` pictures are bent: ``warp`` (count, 6), an affine map from the new picture to the
    old as `affine_grid` takes it; ``tint`` (count, 3), factors of brightness, contrast and colour; ``hole`` (4,), the
    top, bottom, left and right of what is erased (none where it is empty)."""
    u = rng.random((count, 4 + 2 * OPERATIONS))
    chosen = np.argsort(u[:, 4 : 4 + OPERATIONS], axis=1) < options.operations
    wish = np.where(chosen, 2 * u[:, 4 + OPERATIONS :] - 1, 0.0) * options.strength
    angle, scale = np.deg2rad(ROTATE) * wish[:, 0], np.exp(SCALE * wish[:, 3])
    mirror = np.where(u[:, 0] < 0.5, -1.0, 1.0) if options.flip else np.ones(count)
    cos, sin, shear_x, shear_y = np.cos(angle), np.sin(angle), SHEAR * wish[:, 1], SHEAR * wish[:, 2]
    warp = np.empty((count, 2, 3))
    warp[:, 0, 0], warp[:, 0, 1] = scale * mirror * (cos - sin * shear_y), scale * (cos * shear_x - sin)
    warp[:, 1, 0], warp[:, 1, 1] = scale * mirror * (sin + cos * shear_y), scale * (sin * shear_x + cos)
    # Whole pixels: a shift alone then blurs nothing.
    warp[:, :, 2] = np.round((2 * u[:, 1:3] - 1) * options.shift * side) * 2 / side
    return {
        "warp": warp.reshape(count, 6).astype(np.float32),
        "tint": (1 + TINT * wish[:, 4:]).astype(np.float32),
        "hole": hole(rng, side) if options.erase and u[0, 3] < options.erase else np.zeros(4, np.float32),
    }


def hole(rng: np.random.Generator, side: int) -> np.ndarray:
    """A rectangle of 2 % to a third of the picture, at most three times as long as wide (Zhong et al. 2020, Random
    Erasing, section 3.2): its top, bottom, left and right in pixels, (4,)."""
    u = rng.random(4)
    area, ratio = side * side * (0.02 + 0.31 * u[0]), np.exp((2 * u[1] - 1) * np.log(3.3))
    return box(u[2:], np.sqrt(area * ratio), np.sqrt(area / ratio), side)


def box(u: np.ndarray, height: float, width: float, side: int) -> np.ndarray:
    """A rectangle of about this size, anywhere inside the picture: top, bottom, left and right, (4,)."""
    high, wide = (max(1, min(side, round(float(length)))) for length in (height, width))
    top, left = int(u[0] * (side - high + 1)), int(u[1] * (side - wide + 1))
    return np.array([top, top + high, left, left + wide], dtype=np.float32)


def mix(rng: np.random.Generator, options: Any, side: int) -> np.ndarray:
    """How a picture is mixed with another, (5,): its own share, then the box that the other fills (empty for mixup).

    mixup blends the two (Zhang et al. 2018), cutmix pastes a box (Yun et al. 2019); shares as in DeiT (Touvron et al.
    2021, table 9): Beta(0.8, 0.8) and even.
    """
    u, found = rng.random(4), np.zeros(5, np.float32)
    found[0] = 1.0
    if u[0] < options.mixup:
        found[0] = rng.beta(0.8, 0.8)
    elif u[0] < options.mixup + options.cutmix:
        length = side * np.sqrt(1 - u[1])
        found[1:] = box(u[2:], length, length, side)
        found[0] = 1 - (found[2] - found[1]) * (found[4] - found[3]) / (side * side)
    return found


def tinted(x_BCSS: Tensor, tint_B3: Tensor) -> Tensor:
    """Values from 0 to 1 with other brightness, contrast and colour."""
    bright, contrast, colour = tint_B3[:, :, None, None, None].unbind(1)
    x_BCSS = x_BCSS * bright
    x_BCSS = torch.lerp(x_BCSS.mean((1, 2, 3), keepdim=True), x_BCSS, contrast)
    if x_BCSS.shape[1] == 3:
        x_BCSS = torch.lerp(x_BCSS.mean(1, keepdim=True), x_BCSS, colour)
    return x_BCSS.clamp(0, 1)


def warped(x_BCSS: Tensor, warp_B6: Tensor) -> Tensor:
    """The pictures bent by an affine map each; beyond the edge they are mirrored."""
    grid = F.affine_grid(warp_B6.view(-1, 2, 3), list(x_BCSS.shape), align_corners=False)
    return F.grid_sample(x_BCSS, grid, padding_mode="reflection", align_corners=False)


def within(box_B4: Tensor, side: int) -> Tensor:
    """(B, 1, S, S) bool: which pixels lie in each picture's box."""
    at = torch.arange(side, device=box_B4.device)
    top, bottom, left, right = box_B4[:, :, None].unbind(1)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def bent(picture: Tensor, batch: dict[str, Tensor], normal: Any, index: int) -> Tensor:
    """Pictures (B, C, S, S) uint8 → what the model sees of them, noise number `index` of each example.

    Clips (B, F, C, S, S) → (B, F·C, S, S), all frames bent alike.
    """
    tint, warp = batch["tint"][:, index], batch["warp"][:, index]
    if picture.dim() == 4:
        return warped(normal(tinted(picture.float() / 255, tint)), warp)
    # One above the other they are one picture to be tinted; as each other's channels, one to be warped.
    tall = picture.transpose(1, 2).flatten(2, 3).float() / 255
    x_BFCSS = normal(tinted(tall, tint)).unflatten(2, (picture.shape[1], -1)).transpose(1, 2)
    return warped(x_BFCSS.flatten(1, 2), warp)


def stacked(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Examples whose arrays are all of one shape → a batch."""
    return {key: torch.from_numpy(np.stack([example[key] for example in examples])) for key in examples[0]}
