"""The convolution module: torch's convolution written out, blind to padding, off where a trunk is causal."""

from __future__ import annotations

import pytest
import torch

from multihead.transformer.config import TransformerConfig
from multihead.transformer.convolution import Convolution
from multihead.transformer.trunk import Trunk


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    for position in ("before", "after"):
        config = TransformerConfig(d_model=16, num_layers=2, num_heads=2, conv_kernel=5, norm_position=position)
        trunk = Trunk(config).eval()
        x, mask = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
        mask[0, 6:] = False
        torch.testing.assert_close(trunk(x, mask=mask)[0, :6], trunk(x[:1, :6])[0])
        torch.testing.assert_close(trunk(x, mask=mask)[1], trunk(x[1:])[0])


def test_what_a_position_hears_of_its_neighbours():
    torch.manual_seed(0)
    module = Convolution(TransformerConfig(d_model=8, num_layers=1, num_heads=2, conv_kernel=3, bias=True))
    x = torch.randn(1, 6, 8)
    a, b = module.gate(x).chunk(2, -1)
    y = torch.cat((torch.zeros(1, 1, 8), a * b.sigmoid(), torch.zeros(1, 1, 8)), 1)
    weight = module.depthwise.weight[:, 0]
    plain = torch.stack([(y[0, t : t + 3] * weight.T).sum(0) for t in range(6)]) + module.depthwise.bias
    torch.testing.assert_close(module(x)[0], module.out(torch.nn.functional.silu(module.norm(plain))))


def test_on_a_square_neighbours_lie_both_ways_and_what_stands_in_front_is_passed_by():
    torch.manual_seed(0)
    module = Convolution(TransformerConfig(d_model=8, num_layers=1, num_heads=2, conv_kernel=3, bias=True), (4, 2))
    x = torch.randn(3, 2 + 16, 8)
    a, b = module.gate(x).chunk(2, -1)
    y = a * b.sigmoid()
    padded = torch.nn.functional.pad(y[:, 2:].unflatten(1, (4, 4)), (0, 0, 1, 1, 1, 1))
    weight = module.depthwise.weight[:, 0]
    plain = sum(padded[:, i : i + 4, j : j + 4] * weight[:, i, j] for i in range(3) for j in range(3))
    seen = torch.cat((y[:, :2], plain.flatten(1, 2) + module.depthwise.bias), 1)
    torch.testing.assert_close(module(x), module.out(torch.nn.functional.silu(module.norm(seen))))


def test_causal_trunks_have_none_and_even_kernels_are_refused():
    config = TransformerConfig(d_model=16, num_layers=1, num_heads=2, conv_kernel=5)
    assert Trunk(config, causal=True).blocks[0].convolution is None
    assert [key for key, *_ in TransformerConfig(conv_kernel=4).faults()] == ["conv_kernel"]
    with pytest.raises(RuntimeError):
        Trunk(config)(torch.randn(1, 4, 15))
