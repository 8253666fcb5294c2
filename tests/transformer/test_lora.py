"""LoRA: W x + alpha/R · B A x, nothing at first; merged it is one plain weight; only what is small learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multihead.runtime import optim
from multihead.transformer import lora
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk


class Model(nn.Module):
    def __init__(self, **shape: Any) -> None:
        super().__init__()
        config = TransformerConfig(**{"d_model": 16, "num_layers": 2, "num_heads": 4, **shape})
        self.input, self.trunk, self.head = TokenInput(config, 11), Trunk(config), nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(self.input(ids)))


def adapted(targets: list[str], dropout: float = 0.0, **shape: Any) -> Model:
    torch.manual_seed(0)
    model = Model(**shape)
    lora.adapt(model.trunk, 3, 12.0, dropout, targets)
    lora.freeze(model.input, model.trunk)
    return model


def stir(model: nn.Module) -> None:
    for _, module in lora.adapted(model):
        nn.init.normal_(module.lora_B, std=0.2)


def test_the_sum_is_the_papers() -> None:
    plain = nn.Linear(5, 7)
    small = lora.LoraLinear(plain, 2, 3.0)
    nn.init.normal_(small.lora_B)
    x, a, b = torch.randn(4, 5), small.lora_A, small.lora_B
    torch.testing.assert_close(small(x), plain(x) + 1.5 * (b @ (a @ x.mT)).mT)
    torch.testing.assert_close(nn.functional.linear(x, small.merged(), plain.bias), small(x))
    small = lora.LoraLinear(plain, 2, 3.0, dropout=0.5)
    nn.init.normal_(small.lora_B)
    assert torch.equal(small.eval()(x), small(x)) and not torch.equal(small.train()(x), small.eval()(x))


def test_at_first_nothing_changes_and_merged_is_unmerged() -> None:
    ids = torch.randint(11, (3, 9))
    torch.manual_seed(0)
    plain = Model()
    model = adapted(["all"])
    assert torch.equal(model(ids), plain(ids))
    stir(model)
    assert (model(ids) - plain(ids)).abs().max() > 0.01
    plain.load_state_dict(lora.merged(model, model.state_dict()))
    torch.testing.assert_close(plain(ids), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("targets", "held"), [
    (["attention"], {"attention.qkv", "attention.out"}),
    (["feed_forward"], {"feed_forward.up", "feed_forward.down"}),
    (["attention", "feed_forward"], {"attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"}),
    (["all"], {"attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"}),
])  # fmt: skip
def test_targets(targets: list[str], held: set[str]) -> None:
    names = [name for name, _ in lora.adapted(adapted(targets))]
    assert sorted(names) == sorted(f"trunk.blocks.{i}.{name}" for i in range(2) for name in held)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_the_small_matrices_and_the_head_learn_and_have_state(kind: str) -> None:
    model = adapted(["attention"], dropout=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.build(model, optimizer=kind, lr=0.01, weight_decay=0.1)
    average = optim.EMA(model, 0.9)
    for _ in range(2):  # A learns from the second step on, when B is no longer zero
        model.zero_grad(set_to_none=True)
        model(torch.randint(11, (3, 9))).square().sum().backward()
        optim.clip(model.parameters(), 1.0)
        optimizer.step()
        average.update()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    live = {name for name in before if "lora_" in name or name.startswith("head.")}
    assert moved == live == set(average.tensors()) and optim.first_bad(model) is None
    held = {id(p) for p in optimizer.state}
    assert held == {id(p) for name, p in model.named_parameters() if name in live}
    assert not any(group["muon"] for group in optimizer.param_groups)  # small matrices go to AdamW
    assert len(live) == 2 * 2 * 2 + 2
