"""Weights of 8 bits: a product is that of the numbers they stand for, whatever the shape, the rows and the machine."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.errors import UserError
from multihead.generation import int8
from multihead.generation.fast import prepared
from multihead.generation.seq2seq import Transformer
from tests.generation.test_fast import BATCHES, furthest
from tests.transformer.test_cache import KINDS, build

pytest.importorskip("llvmlite", reason="the kernel is compiled with llvmlite (extra int8)")
ROUNDING = 2e-4  # of the outputs' spread: inputs are rounded to 16 bits


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_product_is_that_of_the_dequantized_weights(
    vnni: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if vnni and int8.compiled() is int8._compiled(False):
        pytest.skip("this CPU has no AVX-512 VNNI")
    monkeypatch.setattr(int8, "compiled", lambda: int8._compiled(vnni))
    monkeypatch.setattr(int8, "SHARED", 1)  # so that small weights, too, are split between threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for N, K in ((64, 32), (100, 70), (256, 96)):
        weight, bias, scale = drawn(N, K), drawn(N), drawn(K).abs()
        exact = int8.dequantized(weight).double()
        assert (exact - weight).abs().max() <= weight.abs().max() / 127 * 0.51
        plain, biased = int8.Int8Map(weight), int8.Int8Map(weight, bias)
        normed = int8.Int8Map(weight, None, (scale, 1e-5))
        for R in (1, 2, 3, 5, 16, int8.CHUNK + 2):
            x, residual = drawn(R, K), drawn(R, N + 1)[:, :N]
            y = x.double() @ exact.T
            close = float(y.std()) * ROUNDING
            assert (plain(x) - y).abs().max() < close
            assert (plain(x, residual) - y - residual).abs().max() < close
            assert (biased(x) - y - bias).abs().max() < close
            assert (biased(x, residual) - y - bias - residual).abs().max() < close
            assert (normed(x) - F.rms_norm(x, (K,), scale, 1e-5).double() @ exact.T).abs().max() < close
            assert torch.equal(plain(x)[R // 2], plain(x[R // 2 :][:1])[0])  # bits do not depend on the other rows


def test_what_is_no_number_stays_in_its_row() -> None:
    product, x = int8.Int8Map(drawn(96, 64), drawn(96)), drawn(3, 64)
    x[0, 5], x[1] = torch.nan, 0.0
    y = product(x)
    assert y[0].isnan().all() and torch.equal(y[1], product.bias[:96]) and y[2].isfinite().all()
    assert torch.equal(int8.Int8Map(torch.zeros(64, 32))(drawn(1, 32)), torch.zeros(1, 64))


def test_the_numbers_are_those_of_q8_0() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the quantization of the package gguf")
    weight = torch.cat((drawn(50, 96), torch.zeros(1, 96), torch.full((1, 96), 1e-9)))
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(int8.dequantized(weight), theirs)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_model_is_the_one_with_dequantized_weights(options: dict[str, Any]) -> None:
    plain = build(**options)
    fast, twin = prepared(plain, "int8"), rounded(plain)
    for rows in BATCHES:
        assert furthest(twin, fast, rows) < 2e-3
        assert furthest(plain, fast, rows) < 0.1


@torch.inference_mode()
def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    plain = Transformer(50, d_model=32, nhead=4, num_layers=2, norm_first=True).eval()
    src = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    difference = (prepared(plain, "int8")(src, src) - rounded(plain)(src, src))[src != 0].abs().max()
    assert difference < 2e-3 * plain(src, src)[..., 1:].std()


def rounded(model: nn.Module) -> Any:
    """The model whose linear maps have the weights that stand for their own in 8 bits."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(int8.dequantized(module.weight), requires_grad=False)
    return twin


def test_without_llvmlite_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    with pytest.raises(UserError, match=r"multihead\[int8\]"):
        prepared(build(), "int8")
