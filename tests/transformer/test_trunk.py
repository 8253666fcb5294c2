"""The trunk against torch's own layers, a naive attention, and what its parts are defined to be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import drop_path
from multihead.transformer.feed_forward import ReluSquared
from multihead.transformer.inputs import sinusoids
from multihead.transformer.trunk import Attention, Trunk, make_norm, plain_attention, rotary_table, rotate

D, HEADS, FF = 32, 4, 48


def naive_attention(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, may_look_BTS: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d_k) V, heads side by side: the slow twin of every attention here."""
    G = q_BHTE.shape[1] // k_BHSE.shape[1]
    k_BHSE, v_BHSE = k_BHSE.repeat_interleave(G, 1), v_BHSE.repeat_interleave(G, 1)
    scores = q_BHTE @ k_BHSE.mT / math.sqrt(q_BHTE.shape[-1])
    weights = scores.masked_fill(~may_look_BTS[:, None], -torch.inf).softmax(-1)
    return (weights @ v_BHSE).transpose(1, 2).flatten(2)


def shake(module: nn.Module) -> None:
    """Every parameter random, so that no bias is 0 and no scale is 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def classic(activation: str, norm_first: bool) -> TransformerConfig:
    return TransformerConfig(
        d_model=D, num_layers=2, num_heads=HEADS, d_ff=FF, activation=activation, norm="layernorm", bias=True,
        norm_position="before" if norm_first else "after", positions="none",
    )


def copy_layer(theirs: nn.Module, ours: nn.Module) -> None:
    """Weights of one of torch's layers into one of our blocks."""
    norms = [theirs.norm1, theirs.norm2]
    pairs = [(ours.attention.qkv.weight, theirs.self_attn.in_proj_weight)]
    pairs += [(ours.attention.qkv.bias, theirs.self_attn.in_proj_bias)]
    linears = [(ours.attention.out, theirs.self_attn.out_proj)]
    if ours.cross is not None:
        norms.append(theirs.norm3)
        for kind in ("weight", "bias"):
            packed = getattr(theirs.multihead_attn, f"in_proj_{kind}")
            pairs += [(getattr(ours.cross.q, kind), packed[:D]), (getattr(ours.cross.kv, kind), packed[D:])]
        linears.append((ours.cross.out, theirs.multihead_attn.out_proj))
    mine = [ours.attention_norm, *([ours.cross_norm] if ours.cross is not None else []), ours.feed_forward_norm]
    linears += [(ours.feed_forward.up, theirs.linear1), (ours.feed_forward.down, theirs.linear2)]
    for a, b in [*linears, *zip(mine, norms, strict=True)]:
        pairs += [(a.weight, b.weight), (a.bias, b.bias)]
    for a, b in pairs:
        a.data.copy_(b)


def copy_all(theirs: nn.Module, ours: Trunk) -> None:
    for layer, block in zip(theirs.layers, ours.blocks, strict=True):
        copy_layer(layer, block)
    if theirs.norm is not None:
        ours.norm.load_state_dict(theirs.norm.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_equals_torch(activation: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, HEADS, FF, 0.0, activation, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D) if norm_first else None, enable_nested_tensor=False)
    shake(theirs)
    ours = Trunk(classic(activation, norm_first))
    copy_all(theirs, ours)
    x, real = torch.randn(3, 7, D), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    difference = ours(x, mask=real) - theirs(x, src_key_padding_mask=~real)
    assert difference[real].abs().max() < 1e-5
    assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_decoder_equals_torch(activation: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(D, HEADS, FF, 0.0, activation, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerDecoder(layer, 2, nn.LayerNorm(D) if norm_first else None)
    shake(theirs)
    ours = Trunk(classic(activation, norm_first), causal=True, cross_attention=True)
    copy_all(theirs, ours)
    x, memory = torch.randn(3, 5, D), torch.randn(3, 9, D)
    real, seen = torch.arange(5) < torch.tensor([5, 3, 1])[:, None], torch.arange(9) < torch.tensor([9, 2, 6])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(
        x, memory, tgt_mask=causal, tgt_key_padding_mask=torch.zeros(3, 5).masked_fill(~real, -torch.inf),
        memory_key_padding_mask=~seen,
    )
    difference = ours(x, mask=real, memory=memory, memory_mask=seen) - expected
    assert difference[real].abs().max() < 1e-5
    assert (ours(x, memory=memory) - theirs(x, memory, tgt_mask=causal)).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_the_naive_one(kv_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(TransformerConfig(d_model=D, num_heads=HEADS, num_kv_heads=kv_heads, bias=True))
    shake(attention)
    x = torch.randn(2, 6, D)
    qkv = attention.qkv(x).view(2, 6, HEADS + 2 * kv_heads, D // HEADS).transpose(1, 2)
    q, k, v = qkv.split((HEADS, kv_heads, kv_heads), dim=1)
    may_look = torch.ones(2, 6, 6, dtype=torch.bool)
    expected = attention.out(naive_attention(q, k, v, may_look.tril() if causal else may_look))
    assert (attention(x, causal=causal) - expected).abs().max() < 1e-5
    ragged = may_look & (torch.arange(6) < torch.tensor([6, 3])[:, None])[:, None]
    expected = attention.out(naive_attention(q, k, v, ragged))
    assert (attention(x, mask_BHTS=ragged[:, None]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_products_equals_the_naive_one(kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)
    all_of_it = torch.ones(2, 5, 5, dtype=torch.bool)
    some = all_of_it & (torch.arange(5) < torch.tensor([5, 2])[:, None])[:, None]
    for mask, causal, seen in ((None, False, all_of_it), (None, True, all_of_it.tril()), (some[:, None], False, some)):
        y = plain_attention(q, k, v, mask, causal, dropout=0.0).transpose(1, 2).flatten(2)
        assert (y - naive_attention(q, k, v, seen)).abs().max() < 1e-5


def test_a_position_sees_nothing_behind_itself() -> None:
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(d_model=D, num_layers=2, num_heads=HEADS), causal=True)
    x = torch.randn(1, 8, D)
    changed = x.clone()
    changed[:, 5:] = torch.randn(1, 3, D)
    before, after = trunk(x), trunk(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-3


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    for causal in (True, False):
        trunk = Trunk(TransformerConfig(d_model=D, num_layers=2, num_heads=HEADS), causal=causal)
        x, real = torch.randn(2, 9, D), torch.arange(9) < torch.tensor([9, 4])[:, None]
        assert (trunk(x, mask=real)[1, :4] - trunk(x[1:, :4])[0]).abs().max() < 1e-5


def test_a_row_of_nothing_but_padding_is_finite() -> None:
    trunk = Trunk(TransformerConfig(d_model=D, num_layers=1, num_heads=HEADS), causal=True)
    assert trunk(torch.randn(2, 4, D), mask=torch.tensor([[True] * 4, [False] * 4])).isfinite().all()


def test_norms_are_what_they_are_defined_to_be() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, D)
    rms = make_norm(TransformerConfig(d_model=D, norm_eps=1e-3))
    layer = make_norm(TransformerConfig(d_model=D, norm="layernorm", bias=True, norm_eps=1e-3))
    shake(rms), shake(layer)
    root = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(rms(x), x / root * rms.weight, atol=1e-6)
    spread = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(layer(x), (x - x.mean(-1, keepdim=True)) / spread * layer.weight + layer.bias, atol=1e-6)


def test_rotary_positions_turn_pairs_and_only_distances_count() -> None:
    torch.manual_seed(0)
    E, table = 8, rotary_table(8, 64, 100.0)
    x = torch.randn(1, 1, 1, E)
    turned = rotate(x, table[None, 5:6])
    for i in range(E // 2):
        angle = 5 * 100.0 ** (-2 * i / E)
        expected = complex(x[..., i], x[..., i + E // 2]) * complex(math.cos(angle), math.sin(angle))
        assert abs(complex(turned[..., i], turned[..., i + E // 2]) - expected) < 1e-5
    q, k = torch.randn(1, 1, 1, E), torch.randn(1, 1, 1, E)
    scores = [float((rotate(q, table[None, m : m + 1]) * rotate(k, table[None, n : n + 1])).sum())
              for m, n in ((3, 1), (20, 18), (63, 61))]
    assert max(scores) - min(scores) < 1e-5
    trunk = Trunk(TransformerConfig(d_model=D, num_layers=2, num_heads=HEADS, max_length=64), causal=True)
    x = torch.randn(2, 6, D)
    assert (trunk(x) - trunk(x, positions=torch.arange(6) + 40)).abs().max() < 1e-4
    assert (trunk(x) - trunk(x, positions=torch.arange(6) * 2)).abs().max() > 1e-3


def test_sinusoids_follow_the_paper() -> None:
    table = sinusoids(50, 6)
    for t, i in ((0, 0), (1, 0), (7, 1), (49, 2)):
        angle = t / 10000 ** (2 * i / 6)
        assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_stochastic_depth_keeps_the_mean_of_each_branch_and_is_none_at_evaluation() -> None:
    """Each example takes a branch whole or not at all; the mean over many draws is the branch itself (Huang et al.
    2016). The share of block l is l / layers of the whole."""
    torch.manual_seed(0)
    y = drop_path(torch.ones(20000, 3, 2), 0.3)
    assert set(y.flatten().unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (y == y[:, :1, :1]).all()
    assert abs(y.mean().item() - 1) < 4 * math.sqrt(0.3 / 0.7 / 20000)
    plain, stochastic = (Trunk(TransformerConfig(d_model=D, num_layers=4, num_heads=HEADS, drop_path=p))
                         for p in (0.0, 0.4))
    assert [block.dropout.path for block in stochastic.blocks] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    stochastic.load_state_dict(plain.state_dict())
    x = torch.randn(64, 5, D)
    assert torch.equal(plain.train()(x), plain.eval()(x))
    assert torch.equal(stochastic.eval()(x), plain(x))
    assert not torch.equal(stochastic.train()(x), plain(x))


def test_a_condition_bends_norms_and_gates_as_adaln_zero_says() -> None:
    """Peebles & Xie 2023, section 3.2, written out: x += gate · part(norm(x) · (1 + scale) + shift)."""
    torch.manual_seed(0)
    config = TransformerConfig(d_model=16, num_layers=2, num_heads=2, norm="layernorm", positions="none")
    trunk = Trunk(config, conditioned=True)
    x, condition = torch.randn(3, 5, 16), torch.randn(3, 16)
    for block in [*trunk.blocks, trunk]:
        torch.nn.init.normal_(block.modulation.linear.weight)
    y = x
    for block in trunk.blocks:
        six = block.modulation.linear(torch.nn.functional.silu(condition)).view(3, 6, 1, 16).unbind(1)
        y = y + six[2] * block.attention(block.attention_norm(y) * (1 + six[1]) + six[0])
        y = y + six[5] * block.feed_forward(block.feed_forward_norm(y) * (1 + six[4]) + six[3])
    shift, scale = trunk.modulation.linear(torch.nn.functional.silu(condition)).view(3, 2, 1, 16).unbind(1)
    torch.testing.assert_close(trunk(x, condition=condition), trunk.norm(y) * (1 + scale) + shift, rtol=1e-4, atol=1e-5)


def test_a_fresh_conditioned_trunk_passes_on_nearly_what_it_was_given() -> None:
    trunk = Trunk(TransformerConfig(d_model=32, num_layers=4, num_heads=2), conditioned=True)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(trunk(x, condition=torch.randn(2, 32)), trunk.norm(x), rtol=0.1, atol=0.1)


def test_relu_squared_is_the_square_of_relu():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ReluSquared.apply(x), F.relu(x).square())
    assert torch.autograd.gradcheck(ReluSquared.apply, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ReluSquared.apply(x.detach().bfloat16()).dtype == torch.bfloat16
