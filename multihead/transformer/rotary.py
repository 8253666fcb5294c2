"""Rotary positions (Su et al. 2021, "RoFormer", section 3.2.2): queries and keys turned by angles that grow.

Legend: B batch, T positions, E head width, X heads of queries, keys and values laid end to end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_table(
    head_size: int, max_length: int, theta: float, llama3: tuple[float, float, float, float] | None = None
) -> Tensor:
    """Angles of rotary positions: (max_length, 2, E/2), cosines then sines.

    `llama3` (factor, low, high, former length): waves that turn fewer than `low` times in the former length are slowed
    by `factor`, those that turn more than `high` times are kept, with a straight line between (Llama 3.1's code).
    """
    inverse_E2 = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    if llama3 is not None:
        factor, low, high, former = llama3
        kept_E2 = ((former * inverse_E2 / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        inverse_E2 = inverse_E2 * (kept_E2 + (1 - kept_E2) / factor)
    angle_TE2 = torch.arange(max_length, dtype=torch.float64)[:, None] * inverse_E2
    return torch.stack((angle_TE2.cos(), angle_TE2.sin()), dim=1).float()


def rotate(x_BTHE: Tensor, angles_BT2E: Tensor) -> Tensor:
    """Turn each pair (e, e + E/2) of every head by its position's angle. Angles: (B or 1, T, 2, E/2)."""
    return heads_turned(x_BTHE, angles_BT2E, (x_BTHE.shape[2],))[0]


def heads_turned(x_BTXE: Tensor, angles_BT2E: Tensor, sizes: tuple[int, ...], kept: int = 0) -> tuple[Tensor, ...]:
    """`x_BTXE.split(sizes, dim=2)`, all but the last `kept` parts turned."""
    cos, sin = angles_BT2E.to(x_BTXE.dtype)[..., None, :].unbind(2)
    heads = sum(sizes[: len(sizes) - kept])
    # Once a head, so that one pass goes over all of them end to end: by small pieces it takes twice as long.
    stay, swap = (torch.cat(halves, -1).repeat(1, 1, heads, 1) for halves in ((cos, cos), (-sin, sin)))
    return HeadsTurned.apply(x_BTXE, stay, swap, sizes, kept)


class HeadsTurned(torch.autograd.Function):
    """See `heads_turned`: x · stay + (x with its halves exchanged) · swap. The slope of a turn is the turn back, which
    takes three passes here, and a dozen where torch takes it back piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, x_BTXE: Tensor, stay: Tensor, swap: Tensor, sizes: tuple[int, ...], kept: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(stay, swap)
        turning = len(sizes) - kept
        x_BTHE = x_BTXE[:, :, : stay.shape[2]]
        turned_BTHE = (x_BTHE * stay).addcmul_(x_BTHE.roll(x_BTHE.shape[3] // 2, -1), swap)
        return (*turned_BTHE.split(sizes[:turning], 2), *x_BTXE.split(sizes, 2)[turning:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        stay, swap = ctx.saved_tensors
        whole_BTXE = torch.cat(gradients, 2)
        x_BTHE = whole_BTXE[:, :, : stay.shape[2]]
        exchanged = x_BTHE.roll(x_BTHE.shape[3] // 2, -1)
        x_BTHE.mul_(stay).addcmul_(exchanged, swap, value=-1)
        return whole_BTXE, None, None, None, None
