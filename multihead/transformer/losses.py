"""Cross-entropy over a large vocabulary, without ever holding all its logits.

Legend: N positions, D d_model, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 21  # logits at once: few enough to stay in a processor's cache


class VocabularyLoss(torch.autograd.Function):
    """See `vocabulary_loss`. The gradients are worked out chunk by chunk beside the loss, and only scaled later.

    With logits z = W x and p = softmax(z), the loss of a position is log Σ exp z − (1 − s)·z_target − s·mean z, and its
    slope p − (1 − s)·[target] − s/V. Of these only p needs a pass over the vocabulary: what belongs to the target is
    one row of W, and what belongs to all words alike is their sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, smoothing: float, dtype: torch.dtype
    ) -> Tensor:
        V, sure = len(weight_VD), 1 - smoothing
        needed = any(ctx.needs_input_grad[:2])
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        wide_ND = x_ND.to(weight_VD.dtype)
        row_ND, all_D = weight_VD[target_N], weight_VD.sum(0)
        right_N = (wide_ND * row_ND).sum(1)
        grad_x_ND = row_ND * -sure - all_D * (smoothing / V)
        grad_weight_VD = torch.zeros_like(weight_VD)
        total_N = torch.empty_like(right_N)
        size = max(16, CHUNK // V)
        for i in range(0, len(x), size):
            at = slice(i, i + size)
            logits_CV = F.linear(x[at], weight)
            if not needed:
                total_N[at] = logits_CV.to(total_N.dtype).logsumexp(1)
                continue
            share_CV = logits_CV.softmax(-1)
            target_C1 = target_N[at, None]
            known_C1 = share_CV.gather(1, target_C1).to(total_N.dtype).clamp(min=1e-30).log()
            total_N[at] = (logits_CV.gather(1, target_C1).to(total_N.dtype) - known_C1)[:, 0]
            _add_product(grad_x_ND[at], share_CV, weight)
            _add_product(grad_weight_VD, share_CV.T, x[at])
        if needed:
            grad_weight_VD.index_add_(0, target_N, wide_ND, alpha=-sure)
            grad_weight_VD -= wide_ND.sum(0) * (smoothing / V)
            ctx.save_for_backward(grad_x_ND.to(x_ND.dtype), grad_weight_VD)
        return total_N.sum() - sure * right_N.sum() - smoothing / V * (wide_ND @ all_D).sum()

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * scales[0], grad_weight_VD * scales[0], None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in one pass where their types are one."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def vocabulary_loss(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """``cross_entropy(x Wᵀ, target, reduction="sum", label_smoothing=smoothing)``, in a fraction of its memory.

    On a CPU most of the time of a small model with a large vocabulary goes into moving its logits between memory and
    processor; here a chunk of them is made, used for loss and gradient, and forgotten.

    Args:
        target_N: int64, every one a real target.
        smoothing: share of certainty given to all words alike (Szegedy et al. 2016, section 7).
    """
    kind = x_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    return VocabularyLoss.apply(x_ND, weight_VD, target_N, smoothing, dtype)
