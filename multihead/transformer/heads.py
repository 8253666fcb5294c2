"""From the trunk's vectors to what a task asks for.

Legend: B batch, T positions, D d_model, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenHead(nn.Module):
    """Logits over the vocabulary: (…, D) → (…, V). `tied` shares the token embedding's weight (Press & Wolf 2017)."""

    def __init__(self, d_model: int, vocab_size: int, tied: nn.Embedding | None = None, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, vocab_size, bias=bias)
        if tied is not None:
            self.linear.weight = tied.weight
        else:
            nn.init.normal_(self.linear.weight, std=d_model**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PoolHead(nn.Module):
    """One vector a sequence, then logits over classes: (B, T, D) with mask (B, T) → (B, C).

    `pool`: "mean" over real positions, "first" position, or "attention": one learned query weighs the positions, and
    the largest value over positions stands beside it, so that one decisive word is not averaged away.
    """

    def __init__(self, d_model: int, classes: int, pool: str = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        self.pool = pool
        self.query = nn.Linear(d_model, 1) if pool == "attention" else None
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model * (2 if pool == "attention" else 1), classes)
        nn.init.normal_(self.linear.weight, std=d_model**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return self.linear(self.dropout(self.pooled(x_BTD, mask_BT)))

    def pooled(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The vector before the last linear map: (B, D), or (B, 2·D) for attention pooling."""
        if self.pool == "first":
            return x_BTD[:, 0]
        if mask_BT is None:
            mask_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        mask_BT1 = mask_BT[..., None]
        if self.query is None:
            return (x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        weight_BT1 = self.query(x_BTD).float().masked_fill(~mask_BT1, float("-inf")).softmax(1)
        largest_BD = x_BTD.masked_fill(~mask_BT1, torch.finfo(x_BTD.dtype).min).amax(1)
        return torch.cat(((weight_BT1.to(x_BTD.dtype) * x_BTD).sum(1), largest_BD), dim=-1)
