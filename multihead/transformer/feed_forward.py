"""The feed-forward part of a block, and what it is bent by.

Legend: B batch, T positions, D d_model, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.linear import Linear


class ReluSquared(torch.autograd.Function):
    """max(x, 0)² of any shape (So et al. 2021, "Primer", section 4). By itself `square` would be computed in float32
    under autocast and its gradient in five passes over the widest tensor of a layer; here it is two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class FeedForward(nn.Module):
    """Two linear maps with GELU, ReLU or ReLU² between them, or SwiGLU (Shazeer 2020): (…, D) → (…, D)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        gated = config.activation == "swiglu"
        self.up = Linear(config.d_model, config.ff_size * (2 if gated else 1), bias=config.bias)
        if gated:
            mark_split(self.up, 2)
        self.down = Linear(config.ff_size, config.d_model, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.activation == "swiglu":
            gate_BTF, value_BTF = h_BTF.chunk(2, dim=-1)
            h_BTF = F.silu(gate_BTF) * value_BTF
        elif self.activation in ("gelu", "gelu_tanh"):
            h_BTF = F.gelu(h_BTF, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        elif self.activation == "relu2":
            h_BTF = ReluSquared.apply(h_BTF)
        else:
            h_BTF = F.relu(h_BTF)
        return self.down(self.dropout(h_BTF))


def mark_split(linear: nn.Linear, parts: int) -> None:
    """Tell the optimizer that this weight is `parts` matrices stacked by rows (Muon orthogonalises each alone)."""
    linear.weight.muon_split = parts  # type: ignore[attr-defined]
