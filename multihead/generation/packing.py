"""Linear maps with their weights in the order in which the fastest kernel of a CPU reads them.

For one or a few rows a product's cost is reading the weights; for many it is multiplying. So a map holds a kernel for
each, of the three that torch brings along: oneDNN's, FBGEMM's and the BLAS's own. Of the kernels that torch has for
weights of 8 bits none reads them as fast as FBGEMM reads float16, so those have one of their own (`int8.py`).

Legend: N rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from multihead.generation.int8 import Int8Map

Change = Callable[[Tensor], Tensor]
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")
FEW = 8  # rows up to which reading half the bytes outweighs multiplying in float32
WIDE = 1 << 18  # float32 weights from which a second thread is worth waking
SHARED = 1 << 20  # the same for float16


class Map:
    """A linear map ready for use: x (N, in) → x Aᵀ + b (N, out), by one kernel for few rows and one for many; and a
    residual (N, out) added to it, where one is given."""

    __slots__ = ("few", "limit", "many")

    def __init__(self, few: Change, many: Change, limit: int) -> None:
        self.few, self.many, self.limit = few, many, limit

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.few(x) if x.shape[0] <= self.limit else self.many(x)
        return y if residual is None else residual + y


@dataclass(frozen=True)
class Packing:
    """How weights are packed; see ``prepared``."""

    precision: str
    """float32, half or int8"""
    rows: int | None

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Map | Int8Map:
        weight, bias = weight.detach().float(), None if bias is None else bias.detach().float()
        if self.precision == "int8":
            return Int8Map(weight, bias)
        half = self.precision == "half"
        limit = FEW if half else 1
        few = many = None
        if self.rows is None or self.rows <= limit:
            few = in_float16(weight, bias) if half else in_columns(weight, bias)
        if few is None or self.rows is None or self.rows > limit:
            many = in_blocks(weight, bias, torch.bfloat16 if half else torch.float32)
        return Map(few or many or self.none, many or few or self.none, limit)

    def none(self, x: Tensor) -> Tensor:
        raise AssertionError


def in_columns(weight: Tensor, bias: Tensor | None) -> Change:
    """Float32, input by input: the product of one row then runs about twice as fast as output by output.

    The BLAS gives one row to one thread. A large weight is therefore a batch of two halves of the inputs, whose
    products two threads work out side by side.
    """
    columns = weight.t().contiguous()
    if weight.numel() >= WIDE and weight.shape[1] % 2 == 0:
        halves = columns.view(2, -1, columns.shape[1])

        def product(x: Tensor) -> Tensor:
            if x.shape[0] > 1:
                y = torch.mm(x, columns)
            else:
                y = torch.bmm(x.view(2, 1, -1), halves).sum(0)
            return y if bias is None else y + bias

        return product
    if bias is None:
        return lambda x: torch.mm(x, columns)
    return lambda x: torch.addmm(bias, x, columns)


def in_blocks(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Change:
    """In the blocks that oneDNN's matrix product wants."""
    if not ONEDNN:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return lambda x: F.linear(x.to(dtype), weight, bias).float()
    product = torch.ops.mkldnn._linear_pointwise.default
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 16)
    if dtype == torch.float32:
        return lambda x: product(x, blocks, bias, "none", [], "")
    short = None if bias is None else bias.to(dtype)
    return lambda x: product(x.to(dtype), blocks, short, "none", [], "").float()


def in_float16(weight: Tensor, bias: Tensor | None) -> Change | None:
    """Float16 weights, multiplied in float32 by FBGEMM; None where torch is built without it.

    Of torch's two doors to it the older costs a tenth of the other's 11 µs a call, and the newer uses all threads.
    """
    if not FBGEMM:
        return None
    if weight.numel() >= SHARED or not hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation"):
        shared = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
        dynamic = torch.ops.quantized.linear_dynamic_fp16.default
        return lambda x: dynamic(x, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both say once that they will go some day; torch's version is bounded
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.contiguous())
        torch.fbgemm_linear_fp16_weight_fp32_activation(weight.new_zeros(1, weight.shape[1]), packed, bias)
    product = torch.ops.aten.fbgemm_linear_fp16_weight_fp32_activation.default
    return lambda x: product(x, packed, bias)
