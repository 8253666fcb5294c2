"""Clips → vectors: tubelets are a 3-D convolution; both ways of attending against a joint one under a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from multihead.transformer.config import TransformerConfig
from multihead.transformer.tubelets import ClipInput, ClipTrunk, rotary_clip


def config(positions: Any, layers: int = 1) -> TransformerConfig:
    return TransformerConfig(d_model=16, num_layers=layers, num_heads=2, positions=positions)


def test_tubelets_are_a_3d_convolution_of_their_stride() -> None:
    torch.manual_seed(0)
    entry = ClipInput(config("none"), 3, 12, 6, 4, 2)
    x_BFCSS = torch.randn(2, 6, 3, 12, 12)
    linear = entry.picture.linear
    assert linear is not None
    weight = linear.weight.view(16, 2, 3, 4, 4).transpose(1, 2)  # D, channel, time, row, column
    expected = F.conv3d(x_BFCSS.transpose(1, 2), weight, linear.bias, stride=(2, 4, 4))
    torch.testing.assert_close(entry(x_BFCSS), expected.flatten(3).permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("factorised", [False, True])
def test_the_order_of_frames_is_seen_where_there_are_positions(positions: str, factorised: bool) -> None:
    torch.manual_seed(0)
    shape = config(positions, 2)
    entry, trunk = ClipInput(shape, 1, 8, 4, 4, 1, extra=1), ClipTrunk(shape, 4, 2, 1, factorised)
    x = torch.randn(2, 4, 1, 8, 8)
    assert entry(x).shape == (2, 4, 5, 16) and entry.length == 20
    forward, backward = trunk(entry(x)).mean((1, 2)), trunk(entry(x.flip(1))).mean((1, 2))
    assert torch.allclose(forward, backward, atol=1e-5) is (positions == "none")


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_factorised_attention_is_joint_attention_under_masks(positions: str) -> None:
    """Blocks by turns: under a mask of the same moment, then of the same place, with every angle in it."""
    torch.manual_seed(0)
    T, M, grid, extra = 3, 5, 2, 1
    trunk = ClipTrunk(config(positions, 3), T, grid, extra, factorised=True)
    x_BTMD = torch.randn(2, T, M, 16)
    moment, place = torch.arange(T).repeat_interleave(M), torch.arange(M).repeat(T)
    angles = None if trunk.angles_T2E is None else trunk.angles_T2E[None]
    y_BXD = x_BTMD.flatten(1, 2)
    for layer, block in enumerate(trunk.blocks):
        of = place if layer % 2 else moment
        y_BXD = block(y_BXD, angles, (of[:, None] == of)[None, None], False, None, None, None)
    assert trunk.norm is not None
    torch.testing.assert_close(trunk(x_BTMD), trunk.norm(y_BXD).view_as(x_BTMD), rtol=1e-4, atol=1e-5)


def test_rotary_positions_see_differences_in_time_and_space_alone() -> None:
    torch.manual_seed(0)
    head, T, grid, extra = 16, 4, 3, 2
    cos, sin = rotary_clip(head, T, grid, extra, 100.0).view(T, extra + grid * grid, 2, head // 2).unbind(2)
    q, k = torch.randn(2, head)

    def turned(x: torch.Tensor, t: int, row: int, column: int) -> torch.Tensor:
        at = t, extra + row * grid + column
        a, b = x.chunk(2)
        return torch.cat((a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]))

    for move in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 1)):
        starts = ((0, 0, 0), (1, 1, 0), (1, 0, 1))
        found = [turned(q, *s) @ turned(k, *(a + b for a, b in zip(s, move, strict=True))) for s in starts]
        torch.testing.assert_close(torch.stack(found), found[0].expand(3), rtol=1e-4, atol=1e-4)
        assert abs(float(found[0] - turned(q, 0, 0, 0) @ turned(k, 0, 0, 0))) > 1e-3
    assert torch.equal(cos[0, :extra], torch.ones(extra, head // 2)) and not torch.equal(cos[0, 0], cos[1, 0])
