"""From the trunk's vectors to what a task asks for.

Legend: B batch, T positions, D d_model, V vocabulary, C classes, G orders of n-grams, U distinct n-grams of the batch's
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.dropout import Dropout
from multihead.transformer.inputs import ngram_hashes


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


class MaskedHead(nn.Module):
    """Which token stands at a hidden position: (…, D) → (…, V). A linear map, GELU, LayerNorm, and then the token
    embedding's own weight with a bias for each token (Devlin et al. 2019, BERT's ``cls.predictions``).

    Args:
        tied: the token embedding.
    """

    def __init__(self, d_model: int, vocab_size: int, tied: nn.Embedding, eps: float = 1e-5) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.decoder = nn.Linear(d_model, vocab_size)
        self.decoder.weight = tied.weight
        nn.init.normal_(self.dense.weight, std=d_model**-0.5)
        nn.init.zeros_(self.dense.bias)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class PoolHead(nn.Module):
    """One vector a sequence, then logits over classes: (B, T, D) with mask (B, T) → (B, C).

    `pool`: "mean" over real positions; "first": the first position, a linear map and tanh, as BERT's pooler (Devlin et
    al. 2019); or "attention": one learned query weighs the positions, and the largest value over positions stands
    beside it, so that one decisive word is not averaged away.
    """

    def __init__(self, d_model: int, classes: int, pool: str = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        self.pool = pool
        self.query = nn.Linear(d_model, 1) if pool == "attention" else None
        self.pooler = nn.Linear(d_model, d_model) if pool == "first" else None
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(d_model * (2 if pool == "attention" else 1), classes)
        nn.init.normal_(self.linear.weight, std=d_model**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return self.linear(self.dropout(self.pooled(x_BTD, mask_BT)))

    def pooled(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The vector before the last linear map: (B, D), or (B, 2·D) for attention pooling."""
        if self.pooler is not None:
            return torch.tanh(self.pooler(x_BTD[:, 0]))
        if mask_BT is None:
            mask_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        mask_BT1 = mask_BT[..., None]
        if self.query is None:
            return (x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        weight_BT1 = self.query(x_BTD).float().masked_fill(~mask_BT1, float("-inf")).softmax(1)
        largest_BD = x_BTD.masked_fill(~mask_BT1, torch.finfo(x_BTD.dtype).min).amax(1)
        return torch.cat(((weight_BT1.to(x_BTD.dtype) * x_BTD).sum(1), largest_BD), dim=-1)


class DistilledHead(nn.Module):
    """Two tokens, (B, 2, D), each with a linear map of its own, and the mean of what they say: (B, C), as distilled
    DeiT answers (Touvron et al. 2021, section 4, "Classification with our approach: joint classifiers")."""

    def __init__(self, d_model: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.distilled = nn.Linear(d_model, classes), nn.Linear(d_model, classes)
        self.dropout = Dropout(dropout)
        for linear in (self.linear, self.distilled):
            nn.init.normal_(linear.weight, std=d_model**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x_B2D: Tensor) -> Tensor:
        x_B2D = self.dropout(x_B2D)
        return (self.linear(x_B2D[:, 0]) + self.distilled(x_B2D[:, 1])) / 2


class WideHead(nn.Module):
    """Logits straight from the words: a linear map of the n-grams of each row, beside which a trunk reads the order.

    ids (B, T) with mask (B, T) → (B, C). The wide part of "Wide & Deep Learning" (Cheng et al. 2016, section 3.1):
    hashed n-grams, each weighed by (1 + ln count) · idf (Spärck Jones 1972), the weights of a row scaled to length 1.
    Its table starts at zero and is marked for plain gradient steps, which act like the penalty of a ridge regression:
    an n-gram seen once moves once.

    Args:
        orders: lengths of the n-grams.
        idf: (G · buckets,) the weight of each bucket; 0 takes it out (never seen in training).
        rate: step of the table for each row's gradient.
    """

    idf: Tensor

    def __init__(self, orders: Sequence[int], idf: Tensor, classes: int, rate: float) -> None:
        super().__init__()
        self.orders, self.buckets = tuple(orders), len(idf) // len(orders)
        self.table = nn.Embedding(len(idf), classes)
        nn.init.zeros_(self.table.weight)
        self.table.weight.sgd = rate  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("idf", idf, persistent=False)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        row_U, key_U, value_U = weighed_ngrams(ids_BT, mask_BT, self.orders, self.idf)
        part_UC = F.embedding(key_U, self.table.weight, sparse=True) * value_U[:, None]
        return self.bias + part_UC.new_zeros(len(ids_BT), part_UC.shape[1]).index_add(0, row_U, part_UC)


def weighed_ngrams(
    ids_BT: Tensor, mask_BT: Tensor | None, orders: Sequence[int], idf: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct n-grams of each row: row (U,), bucket (U,), and weight (U,), (1 + ln count) · idf scaled so that the
    squares of a row sum to 1."""
    keys_BTG = ngram_hashes(ids_BT, None, tuple(orders), len(idf) // len(orders))
    pairs_BTG = keys_BTG + torch.arange(len(ids_BT), device=ids_BT.device)[:, None, None] * len(idf)
    real = pairs_BTG.flatten() if mask_BT is None else pairs_BTG[mask_BT].flatten()
    pair_U, count_U = real.unique(return_counts=True)
    row_U, key_U = pair_U // len(idf), pair_U % len(idf)
    value_U = (1 + count_U.log()) * idf[key_U]
    square_B = value_U.new_zeros(len(ids_BT)).index_add(0, row_U, value_U.square())
    return row_U, key_U, value_U * square_B.clamp(min=1e-12).rsqrt()[row_U]
