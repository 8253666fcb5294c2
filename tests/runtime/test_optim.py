"""Muon against the SVD and torch's Muon, AdamW against torch's, schedule and average against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from multihead.runtime import optim
from multihead.runtime.optim import EMA, MuonAdamW, lr_scale, orthogonalize
from multihead.transformer.config import TransformerConfig
from multihead.transformer.trunk import Trunk


def small(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    trunk = Trunk(TransformerConfig(d_model=16, num_layers=2, num_heads=2, max_length=8, bias=True), causal=True)
    return nn.ModuleDict({"embed": nn.Embedding(11, 16), "trunk": trunk, "head": nn.Linear(16, 11)})


def backward(model: Any, seed: int) -> None:
    ids = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    logits = model["head"](model["trunk"](model["embed"](ids)))
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalize_lands_near_the_polar_factor_of_the_svd(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    size = u.shape[-1]
    matrices = u @ torch.diag(torch.linspace(1, 0.05, size, dtype=torch.float64)) @ vt * 3
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalize(matrices.float(), dtype=dtype).double()
        middle = u.mT @ found @ vt.mT  # the diagonal is the new singular values
        values = middle.diagonal(dim1=-2, dim2=-1)
        assert values.min() > 0.6 and values.max() < 1.25
        off = middle - torch.diag_embed(values)
        assert off.abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_muon_equals_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    for rms, name in ((False, "original"), (True, "match_rms_adamw")):
        torch.manual_seed(1)
        start = [torch.randn(shape) for shape in ((12, 20), (20, 12), (12, 20), (16, 16))]
        ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
        own = MuonAdamW([{"params": ours, "muon": True, "lr": 0.02, "weight_decay": 0.1, "match_rms": rms}])
        other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=name)
        monkeypatch.setattr(optim, "fast_bf16", lambda device: True)  # torch's works in bf16 everywhere
        for step in range(5):
            torch.manual_seed(step)
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            own.step()
            other.step()
        for a, b, w in zip(ours, theirs, start, strict=True):
            assert (a - b).norm() < 0.02 * (b - w).norm()  # both are rounded to bf16 five times a step
        assert all(torch.equal(own.state[a]["momentum"], other.state[b]["momentum_buffer"])
                   for a, b in zip(ours, theirs, strict=True))  # fmt: skip


def test_muon_split_equals_separate_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "fast_bf16", lambda device: False)
    torch.manual_seed(0)
    parts = [torch.randn(8, 6) for _ in range(3)]
    fused: Any = nn.Parameter(torch.cat(parts))
    fused.muon_split = 3
    alone = [nn.Parameter(part.clone()) for part in parts]
    one = MuonAdamW([{"params": [fused], "muon": True, "lr": 0.1}])
    three = MuonAdamW([{"params": alone, "muon": True, "lr": 0.1}])
    for step in range(3):
        fused.grad = torch.randn(24, 6, generator=torch.Generator().manual_seed(step))
        for weight, part in zip(alone, fused.grad.chunk(3), strict=True):
            weight.grad = part.clone()
        one.step()
        three.step()
    torch.testing.assert_close(fused.detach(), torch.cat([w.detach() for w in alone]), rtol=0, atol=1e-6)
    unsplit = nn.Parameter(torch.cat(parts))
    unsplit.grad = fused.grad
    MuonAdamW([{"params": [unsplit], "muon": True, "lr": 0.1}]).step()
    assert (unsplit - fused).abs().max() > 1e-3


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])
    weight: Any = nn.Parameter(torch.zeros(4, 3))
    weight.muon_split = 3
    with pytest.raises(ValueError, match=r"\(4, 3\) in 3"):
        MuonAdamW([{"params": [weight], "muon": True}])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torch_adamw(weight_decay: float) -> None:
    ours, theirs = small(), small()
    own = optim.build(ours, optimizer="adamw", lr=0.01, weight_decay=weight_decay, betas=(0.9, 0.98))
    matrix = [p for p in theirs.parameters() if p.dim() >= 2]
    vector = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrix, "weight_decay": weight_decay}, {"params": vector, "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), fused=True)
    plain = torch.optim.AdamW((copy := small()).parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0, foreach=False)
    for step in range(10):
        for model in (ours, theirs):
            backward(model, step)
        for a, c in zip(ours.parameters(), copy.parameters(), strict=True):
            c.grad = a.grad.clone()
        for optimizer in (own, other, plain):
            optimizer.step()
    for a, b, c in zip(ours.parameters(), theirs.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)
        if not weight_decay:
            torch.testing.assert_close(a, c, rtol=0, atol=2e-7)


def test_each_weight_gets_its_optimizer_and_decay() -> None:
    model = small()
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optim.build(model, lr=1e-3, muon_lr=0.02, weight_decay=0.1, decay_embeddings=False)
    muon, decayed, plain = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert muon == {n for n, p in model.named_parameters() if n.startswith("trunk") and p.dim() == 2}
    assert decayed == {"head.weight"}
    assert muon | decayed | plain == set(names.values())
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    optim.set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 5e-4, 5e-4]
    optim.set_lr(optimizer, 1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 1e-3, 1e-3]
    with pytest.raises(ValueError, match="known: muon, adamw"):
        optim.build(model, optimizer="sgd")


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    model = small()
    optimizer = optim.build(model, lr=0.1, weight_decay=0.5)
    backward(model, 0)
    still = model["trunk"].blocks[0].feed_forward.up.weight
    before, still.grad = still.clone(), None
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state


def test_schedule_closed_form() -> None:
    assert [lr_scale(s, steps=8, warmup=3, decay="constant") for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_scale(s, steps=6, warmup=1, decay="linear", floor=0.2) for s in range(6)] == pytest.approx(
        [0.5, 1.0, 0.8, 0.6, 0.4, 0.2])  # fmt: skip
    for step in range(5, 21):
        expected = 0.1 + 0.9 * math.cos(math.pi / 2 * (step - 5) / 15) ** 2
        assert lr_scale(step, steps=21, warmup=5, decay="cosine", floor=0.1) == pytest.approx(expected)
    assert lr_scale(50, steps=21, warmup=5, floor=0.1) == 0.1  # past the end it stays at the floor
    assert lr_scale(0, steps=1) == 1.0
    with pytest.raises(ValueError, match="known: cosine"):
        lr_scale(1, steps=5, decay="step")


def test_clip_scales_then_shrinks_as_torch_does() -> None:
    one, two = small(), small()
    for limit in (0.01, 1e6, None):
        backward(one, 0)
        backward(two, 0)
        norm = optim.clip(one.parameters(), limit, scale=0.25)
        for parameter in two.parameters():
            parameter.grad *= 0.25
        expected = nn.utils.clip_grad_norm_(two.parameters(), limit or 1e9)
        torch.testing.assert_close(norm, expected)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert optim.clip([nn.Parameter(torch.zeros(2))], 1.0) == 0


def test_first_bad_names_the_parameter() -> None:
    model = small()
    backward(model, 0)
    assert optim.first_bad(model) is None
    model["trunk"].blocks[1].attention.out.bias.grad[3] = math.inf
    assert not optim.clip(model.parameters(), 1.0).isfinite()
    assert optim.first_bad(model) is not None  # the norm is not finite, so nor is what clipping leaves
    backward(model, 0)
    with torch.no_grad():
        model["head"].weight[2, 1] = math.nan
    assert optim.first_bad(model) == "head.weight"


def test_average_closed_form_and_swap() -> None:
    model = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    both = nn.ModuleList([model, frozen])
    ema = EMA(both, decay=0.9)
    seen = []
    for step in range(6):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        seen.append(model.weight.detach().double().clone())
        ema.update()
    expected = sum(0.1 * 0.9 ** (5 - i) * w for i, w in enumerate(seen)) / (1 - 0.9**6)
    assert set(ema.tensors()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(ema.tensors()["0.weight"].double(), expected, rtol=0, atol=1e-6)
    own, mean, place = model.weight.detach().clone(), ema.tensors()["0.weight"].clone(), model.weight.data_ptr()
    with pytest.raises(RuntimeError), ema.swapped():
        assert torch.equal(model.weight, mean)
        raise RuntimeError
    assert torch.equal(model.weight, own) and torch.equal(ema.tensors()["0.weight"], mean)
    assert model.weight.data_ptr() == place
    with pytest.raises(KeyError, match="differ in names"):
        ema.load({}, 3)
