"""Why a model answers as it does: what its attention passes on, and what each input adds to a logit.

Legend: B batch, T positions, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multihead.transformer.trunk import Attention, Trunk


@contextmanager
def attention_weights(trunk: Trunk) -> Iterator[list[Tensor]]:
    """While this lasts, every pass through `trunk` adds each layer's attention weights (B, H, T, T) to the list.

    They are worked out a second time beside the pass, which itself is as fast and as exact as ever.
    """
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, Attention)
        found.append(module.weights(*args[:4], **{k: v for k, v in kwargs.items() if k != "cache"}))

    hooks = [block.attention.register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[union-attr]
             for block in trunk.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rollout(weights: list[Tensor]) -> Tensor:
    """How much of each input position is in each output, if attention only mixed positions (Abnar & Zuidema 2020,
    section 3, attention rollout): L of (B, H, T, T) → (B, T, T), rows sum to 1.

    Heads are averaged, and half of each layer is what its residual passes on unmixed.
    """
    B, _, T, _ = weights[0].shape
    whole_BTT = torch.eye(T, device=weights[0].device).expand(B, T, T)
    for layer_BHTT in weights:
        mixed_BTT = (layer_BHTT.mean(1) + torch.eye(T, device=layer_BHTT.device)) / 2
        whole_BTT = mixed_BTT @ whole_BTT
    return whole_BTT


def integrated_gradients(score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int = 32) -> Tensor:
    """What each number of `x` adds to `score` on the straight way from `baseline` (Sundararajan et al. 2017, equation
    1, the integral as a sum over the middles of `steps` even pieces): the shape of x.

    They add up to score(x) − score(baseline) (completeness, proposition 1), but for the error of the sum, O(1/steps²).

    Args:
        score: (B, …) → (B,), with a gradient; no example may depend on another.
    """
    total = torch.zeros_like(x)
    for step in range(steps):
        at = (baseline + (x - baseline) * ((step + 0.5) / steps)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(score(at).sum(), at)
        total += slope
    return (x - baseline) * total / steps
