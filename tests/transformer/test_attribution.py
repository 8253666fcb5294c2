"""Attention weights against the attention they belong to, rollout by hand, and the axiom of completeness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multihead.transformer.attribution import attention_weights, integrated_gradients, rollout
from multihead.transformer.config import TransformerConfig
from multihead.transformer.trunk import Trunk


@pytest.mark.parametrize("shape, causal", [
    ({"positions": "none"}, False), ({"num_kv_heads": 2, "qk_norm": True}, True), ({}, False),
    ({"norm_position": "after", "norm": "layernorm"}, False),
])
@torch.inference_mode()
def test_weights_are_those_that_the_pass_used(shape: dict[str, Any], causal: bool) -> None:
    """weights · values, through the output map, is what attention gave; and looking changes nothing."""
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(d_model=16, num_layers=2, num_heads=4, **shape), causal).eval()
    x, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    passed: list[Any] = []
    hooks = [block.attention.register_forward_hook(lambda m, a, y: passed.append((m, a[0], a[1], y)))
             for block in trunk.blocks]
    plain = trunk(x, mask=mask)
    for hook in hooks:
        hook.remove()
    with attention_weights(trunk) as weights:
        assert torch.equal(trunk(x, mask=mask), plain)
    trunk(x)
    assert len(weights) == 2
    for weight, (attention, given, angles, y) in zip(weights, passed, strict=True):
        torch.testing.assert_close(weight.sum(-1), torch.ones(3, 4, 5))
        values = attention._heads(given, angles)[2]
        values = values.repeat_interleave(4 // values.shape[1], 1)
        torch.testing.assert_close(attention.out((weight @ values).transpose(1, 2).flatten(2)), y, rtol=1e-4, atol=1e-5)


def test_rollout_by_hand() -> None:
    """Two layers of two positions; and where each looks at itself alone, nothing is mixed."""
    first, second = torch.tensor([[[[1.0, 0], [1, 0]]]]), torch.tensor([[[[0.0, 1], [0, 1]]]])
    # halves: [[1, 0], [.5, .5]] and then [[.5, .5], [0, 1]]
    torch.testing.assert_close(rollout([first, second]), torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))
    still = torch.eye(3).expand(2, 4, 3, 3)
    torch.testing.assert_close(rollout([still, still]), torch.eye(3).expand(2, 3, 3))


def test_integrated_gradients_are_complete_and_exact_where_the_integral_is_known() -> None:
    x, baseline = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.zeros(2, 2)
    # x₀·x₁ along the straight line: each gets half of the product
    found = integrated_gradients(lambda z: z[:, 0] * z[:, 1], x, baseline, 8)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [-1.5, -1.5]]))
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(d_model=16, num_layers=2, num_heads=4)).double()

    def score(z: torch.Tensor) -> torch.Tensor:
        return trunk(z).square().sum((1, 2)).tanh() + trunk(z)[:, 0, 0]

    x, baseline = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 16).double()
    whole = score(x) - score(baseline)
    errors = [(integrated_gradients(score, x, baseline, n).sum((1, 2)) - whole).abs().max().item() for n in (16, 256)]
    assert errors[1] < 1e-3 * whole.abs().max() and errors[1] < errors[0] / 50
