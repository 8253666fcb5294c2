"""The packed copy against the plain model: the same numbers, whatever the shape, the kernel and the rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from multihead.errors import UserError
from multihead.generation import packing
from multihead.generation.fast import PackedTrunk, prepared
from multihead.generation.loop import padded
from multihead.generation.seq2seq import Transformer
from multihead.tasks.language.text_generation import LanguageModel
from tests.transformer.test_cache import KINDS, build

MANY = [[1, 2, 3]] * 12
BATCHES = [[[1, 2, 3]], [[1, 2, 3, 4, 5], [7, 8], [5] * 70], [[9] * 4, [8] * 4], MANY]


@torch.inference_mode()
def furthest(plain: LanguageModel, fast: LanguageModel, rows: list[list[int]]) -> float:
    """The largest difference of logits over a prompt, steps, a row that leaves and one that joins; in units of their
    spread."""
    states, worst = [], 0.0
    for model in (plain, fast):
        states.append(model.start(padded(rows)))
    (a, left), (b, right) = states
    spread = float(left.std())
    for t in range(4):
        worst = max(worst, float((left - right).abs().max()))
        if t == 1 and len(rows) > 1:
            a.drop(0), b.drop(0)
        if t == 2:
            a.join(plain.start(padded([[4, 4]]))[0])
            b.join(fast.start(padded([[4, 4]]))[0])
        ids = torch.arange(a.rows) + t
        left, right = plain.step(ids, a), fast.step(ids, b)
    return max(worst, float((left - right).abs().max())) / spread


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_float32_is_the_plain_model(options: dict[str, Any], onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ONEDNN", onednn and packing.ONEDNN)
    monkeypatch.setattr(packing, "WIDE", 2000)  # so that small weights, too, are split between threads
    plain = build(**options)
    for rows in BATCHES:
        for known in (None, len(rows)):
            assert furthest(plain, prepared(plain, "float32", rows=known), rows) < 1e-4
    ids = torch.tensor(BATCHES[2])
    with torch.inference_mode():
        assert (prepared(plain, "float32")(ids) - plain(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("options", [KINDS[0], KINDS[2], KINDS[4]], ids=str)
@pytest.mark.parametrize("shared", [1 << 20, 1])
def test_half_is_near_it(options: dict[str, Any], shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 keeps 11 bits and bfloat16 8; the error of a few layers' products stays near that of one rounding."""
    monkeypatch.setattr(packing, "SHARED", shared)  # each of the two ways to FBGEMM
    plain = build(**options)
    fast = prepared(plain, "half")
    assert furthest(plain, fast, BATCHES[0]) < 0.01
    assert furthest(plain, fast, BATCHES[3]) < 0.1


def test_half_without_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FBGEMM", False)
    plain = build()
    assert furthest(plain, prepared(plain, "half"), BATCHES[0]) < 0.1


@torch.inference_mode()
def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    for norm_first in (True, False):
        plain = Transformer(50, d_model=32, nhead=4, num_layers=2, norm_first=norm_first).eval()
        fast = prepared(plain, "float32")
        src = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
        assert (fast(src, src) - plain(src, src))[src != 0].abs().max() < 1e-4
        batch = {"ids": src, "lengths": torch.tensor([4, 2])}
        (a, left), (b, right) = plain.start(batch), fast.start(batch)
        for t in range(4):
            assert (left - right)[:, 1:].abs().max() < 1e-4
            left, right = plain.step(torch.tensor([t, t + 1]), a), fast.step(torch.tensor([t, t + 1]), b)


def test_the_copy_is_a_snapshot_and_the_model_stays_as_it_was() -> None:
    plain = build().train()
    kept = {name: value.clone() for name, value in plain.state_dict().items()}
    fast = prepared(plain, "float32")
    assert plain.training and not any(module.training for module in fast.modules())
    assert isinstance(fast.trunk, PackedTrunk) and prepared(fast) is fast
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = fast(ids)
        for parameter in plain.trunk.parameters():
            parameter.add_(1.0)
        assert torch.equal(fast(ids), before)
        plain.load_state_dict(kept)
        assert (plain.eval()(ids) - before).abs().max() < 1e-4
    assert plain.state_dict().keys() == kept.keys()


def test_a_model_in_bfloat16_is_served_in_float32() -> None:
    plain = build().bfloat16()
    fast = prepared(plain, "float32")
    with torch.inference_mode():
        got = fast.start(padded([[1, 2, 3]]))[1]
    assert got.dtype == torch.float32
    assert next(plain.parameters()).dtype == torch.bfloat16


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="half"):
        prepared(build(), "int3")


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2}], ids=str)
def test_the_same_weights_in_transformers_give_the_same_tokens(shape: dict[str, int]) -> None:
    """The bridge that ``benchmarks/generate.py`` crosses, at a small size."""
    pytest.importorskip("transformers")
    path = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "generate.py"
    spec = importlib.util.spec_from_file_location("benchmark_generate", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    peer = benchmark.llama(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **shape
    )
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    ours = benchmark.language_model(peer)
    ids = torch.randint(0, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (ours(ids) - peer(ids).logits).abs().max() < 1e-5
    expected = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    for model in (ours, prepared(ours, "float32")):
        assert torch.equal(model.generate(ids, max_length=37, temperature=0), expected)
