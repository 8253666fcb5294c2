"""Linear maps, in float32 on AMD's processors by oneDNN.

torch makes its products in float32 by MKL, which does not know these processors: oneDNN takes 8 to 45 % less time for
the same ones (2,048 to 6,272 rows, 128 to 512 wide, one thread), but torch offers it for bfloat16 alone. Where MKL is
at home, and in all other formats, these are `nn.Linear`.

Legend: N rows, D input width, F output width.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEWEST = 1 << 16  # numbers of an input that make it worth the calls


class Linear(nn.Linear):
    """`nn.Linear` whose training in float32 is faster on AMD's processors."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.numel() >= FEWEST and _plain(x) and _plain(self.weight) and onednn_is_faster():
            return Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class Product(torch.autograd.Function):
    """``F.linear`` of x (…, D), weight (F, D) and bias (F) or None, in float32 on a CPU, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        return _product(x, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight_FD = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        gradient_NF, x_ND = gradient.reshape(-1, weight_FD.shape[0]), x.reshape(-1, weight_FD.shape[1])
        return (
            _product(gradient, weight_FD.T.contiguous(), None) if need_x else None,
            gradient_NF.T @ x_ND if need_weight else None,  # of this shape MKL's is as fast
            gradient_NF.sum(0) if need_bias else None,
        )


def _product(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_FD, bias_F, "none", [], "")


def _plain(x: Tensor) -> bool:
    """Whether these are numbers in memory that oneDNN can read as they are: of the right type, and of no subclass."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) \
        and not torch.is_autocast_enabled("cpu")  # fmt: skip


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is one of AMD's processors, and torch has the operator, which is not among those it documents."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # not Linux
        amd = "AuthenticAMD" in platform.processor()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
