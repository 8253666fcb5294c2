"""Attention by plain products, the training path of CPUs in bfloat16, against torch's fused kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multihead.transformer.trunk import plain_attention, plain_is_faster


@pytest.mark.parametrize("kind", ["causal", "padding", "all"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_plain_products_equal_the_fused_kernel(kind: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    B, H, T, E = 3, 4, 9, 8
    q, k, v = (torch.randn(B, n, T, E, dtype=torch.float64, requires_grad=True) for n in (H, kv_heads, kv_heads))
    mask = torch.arange(T)[None, None, None, :] < torch.tensor([9, 4, 1])[:, None, None, None]
    mask = mask if kind == "padding" else None
    ours = plain_attention(q, k, v, mask, kind == "causal", 0.0)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal", enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_row_with_nothing_to_look_at_stays_finite() -> None:
    q = torch.randn(1, 2, 3, 4)
    assert plain_attention(q, q, q, torch.zeros(1, 1, 1, 3, dtype=torch.bool), False, 0.0).isfinite().all()


def test_only_training_in_bfloat16_on_a_cpu_takes_the_plain_road() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert plain_is_faster(q.bfloat16(), q.bfloat16()) and not plain_is_faster(q, q)
    with torch.no_grad():
        assert not plain_is_faster(q.bfloat16(), q.bfloat16())
