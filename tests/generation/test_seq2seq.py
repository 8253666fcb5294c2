"""The encoder–decoder of the paper: against torch's own, cached against uncached, and what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import multihead
from multihead.errors import UserError
from multihead.generation.seq2seq import Transformer
from tests.transformer.test_trunk import copy_all, shake

V, D = 30, 32
src = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
tgt = torch.tensor([[2, 12, 13, 14, 3, 0], [2, 15, 3, 0, 0, 0]])


def build(**options: bool) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(V, d_model=D, nhead=4, num_layers=2, d_ff=48, max_length=64, **options)
    shake(model)
    return model.eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torchs_transformer(norm_first: bool) -> None:
    ours = build(norm_first=norm_first)
    layers = dict(d_model=D, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True, norm_first=norm_first)
    last = [nn.LayerNorm(D) if norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layers), 2, last[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layers), 2, last[1])
    shake(encoder), shake(decoder)
    copy_all(encoder, ours.encoder)
    copy_all(decoder, ours.decoder)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        t, i = torch.meshgrid(torch.arange(ids.shape[1]), torch.arange(D // 2), indexing="ij")
        angle = t / 10000 ** (2 * i / D)
        place = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
        return ours.source.token(ids) * math.sqrt(D) + place

    none = torch.zeros(src.shape).masked_fill(src == 0, -torch.inf)
    later = nn.Transformer.generate_square_subsequent_mask(6)
    memory = encoder(embed(src), src_key_padding_mask=none)
    padding = torch.zeros(tgt.shape).masked_fill(tgt == 0, -torch.inf)
    out = decoder(embed(tgt), memory, tgt_mask=later, tgt_key_padding_mask=padding, memory_key_padding_mask=none)
    expected = out @ ours.source.token.weight.T
    assert ours(src, tgt).shape == (2, 6, V)
    assert (ours(src, tgt) - expected)[tgt != 0].abs().max() < 1e-4


def test_a_target_position_sees_neither_the_future_nor_padding() -> None:
    model = build()
    before = model(src, tgt)
    later = tgt.clone()
    later[0, 3] = 20
    assert torch.equal(model(src, later)[0, :3], before[0, :3])
    assert not torch.equal(model(src, later)[0, 3], before[0, 3])
    assert (model(src[1:, :2], tgt[1:, :3])[0] - before[1, :3]).abs().max() < 1e-5
    assert model(torch.zeros_like(src), tgt).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"shared": False}], ids=str)
@pytest.mark.parametrize("max_length", [9, 30])
def test_cached_generation_is_argmax_over_whole_passes(options: dict[str, bool], max_length: int) -> None:
    model = build(**options)
    got = model.generate(src, max_length=max_length, temperature=0)
    ids = torch.full((2, 1), model.bos)
    with torch.no_grad():
        while ids.shape[1] < max_length:
            logits = model(src, ids)[:, -1]
            logits[:, model.pad] = -torch.inf
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    for expected, row in zip(ids.tolist(), got.tolist(), strict=True):
        end = expected.index(model.eos) + 1 if model.eos in expected else len(expected)
        assert row[:end] == expected[: len(row)][:end]
        assert set(row[end:]) <= {model.pad}


@torch.inference_mode()
def test_steps_equal_the_whole_pass() -> None:
    model = build()
    ids = torch.tensor([[2, 12, 13, 14], [2, 15, 16, 17]])
    whole = model(src, ids)
    cache, logits = model.start({"ids": src, "lengths": torch.tensor([5, 2])})
    for t in range(4):
        assert (logits - whole[:, t])[:, 1:].abs().max() < 1e-4
        assert (logits[:, model.pad] == -torch.inf).all()
        if t < 3:
            logits = model.step(ids[:, t + 1], cache)


def test_learns_to_reverse() -> None:
    """Twelve random sequences by heart, under the loss of the docstring; then it writes them without their targets."""
    torch.manual_seed(0)
    model = multihead.Transformer(20, d_model=32, nhead=4, num_layers=1, dropout=0.0)
    words = torch.randint(4, 20, (12, 5))
    target = torch.cat((torch.full((12, 1), 2), words.flip(1), torch.full((12, 1), 3)), 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        logits = model(words, target)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.generate(words, max_length=7, temperature=0), target)


def test_samples_and_refusals() -> None:
    model = build()
    assert model.generate(src[0], max_length=8, num_samples=4, seed=1).shape[0] == 4
    with pytest.raises(UserError, match="positions"):
        model(torch.ones(1, 65, dtype=torch.long), tgt)
    with pytest.raises(UserError, match="max_length"):
        model.generate(src, max_length=65)
    with pytest.raises(UserError) as caught:
        Transformer(10, d_model=30, nhead=4, bos=10, eos=-1)
    assert len(caught.value.problems) == 3
