"""From ids to the vectors the trunk reads.

Legend: B batch, T positions, D d_model, N earlier ids, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.trunk import make_norm


def sinusoids(length: int, d_model: int) -> Tensor:
    """Positions of Vaswani et al. 2017, section 3.5: (length, d_model), even columns sine, odd columns cosine."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    table = torch.zeros(length, d_model)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()[:, : d_model // 2]
    return table


class TokenInput(nn.Module):
    """Token embedding, plus positions where the trunk does not rotate, plus hashed n-grams and segments where asked.

    An n-gram embedding adds to position t a learned vector for the n ids that end at t, found by a hash into a table
    (Pagnoni et al. 2024, "Byte Latent Transformer", section 3.2.1). It costs a look-up and no matrix product, which
    makes it the cheapest capacity a small model on a CPU can have.
    """

    sinusoids_TD: Tensor | None

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.orders, self.buckets = vocab_size, config.ngrams, config.ngram_buckets
        self.classic = config.positions == "sinusoidal"
        self.scale = math.sqrt(config.d_model) if self.classic else 1.0
        self.max_length = config.max_length
        self.token = nn.Embedding(vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model) if config.positions == "learned" else None
        waves = sinusoids(config.max_length, config.d_model) if self.classic else None
        self.register_buffer("sinusoids_TD", waves, persistent=False)
        self.ngram = nn.Embedding(len(self.orders) * self.buckets, config.d_model) if self.orders else None
        self.segment = nn.Embedding(config.segments, config.d_model) if config.segments else None
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = Dropout(config.dropout)
        std = config.d_model**-0.5
        for table in (self.token, self.position, self.segment):
            if table is not None:
                nn.init.normal_(table.weight, std=std)
        if self.ngram is not None:
            # From zero, so that an n-gram never seen in training adds nothing rather than noise.
            nn.init.zeros_(self.ngram.weight)
            mark_rows(self.ngram)

    @property
    def memory(self) -> int:
        """Ids before the first that its n-grams reach back to."""
        return max(self.orders, default=1) - 1

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        before_BN: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """ids (B, T) → vectors (B, T, D).

        Args:
            positions: (B, T) or (T,), None for 0 … T−1.
            before_BN: the N = ``memory`` ids before the first (decoding with a cache); None at the start of a text.
            segments_BT: which segment each id belongs to; None: all to the first. Without `config.segments` it has no
                effect.
        """
        x_BTD = self.token(ids_BT)
        if self.ngram is not None:
            keys_BTG = ngram_hashes(ids_BT, before_BN, self.orders, self.buckets)
            # A batch looks up few rows. A sparse gradient holds only those; GPUs do better with a dense one.
            sparse = self.ngram.weight.device.type == "cpu"
            x_BTD = x_BTD + F.embedding(keys_BTG, self.ngram.weight, sparse=sparse).sum(2)
        x_BTD = x_BTD * self.scale
        T = ids_BT.shape[1]
        table = self.position.weight if self.position is not None else self.sinusoids_TD
        if table is not None:
            x_BTD = x_BTD + (table[:T] if positions is None else table[positions])
        if self.segment is not None:
            x_BTD = x_BTD + (self.segment.weight[0] if segments_BT is None else self.segment(segments_BT))
        return self.dropout(x_BTD if self.norm is None else self.norm(x_BTD))


def ngram_hashes(ids_BT: Tensor, before_BN: Tensor | None, orders: tuple[int, ...], buckets: int) -> Tensor:
    """Rows of the n-gram table for each position: (B, T, len(orders)); order g owns rows g·buckets … (g+1)·buckets − 1.

    Ids before the start count as −1. The hash is a polynomial in the ids, mixed once, so it is the same on every
    machine and for every way of cutting a text into steps.
    """
    reach = max(orders) - 1
    padded = F.pad(ids_BT, (reach, 0), value=-1) if before_BN is None else torch.cat((before_BN, ids_BT), dim=1)
    T = ids_BT.shape[1]
    keys: list[Tensor] = []
    value = torch.zeros_like(ids_BT)
    for back in range(reach + 1):
        value = value * 1_000_003 + padded[:, reach - back : reach - back + T] + 2
        if back + 1 in orders:
            mixed = value * 2_654_435_761
            keys.append(((mixed ^ (mixed >> 17)) & 0x7FFFFFFFFFFF) % buckets + len(keys) * buckets)
    return torch.stack(keys, dim=2)


def mark_rows(table: nn.Embedding) -> None:
    """Tell the optimizer to move only the rows of this table that a batch looked up."""
    table.weight.rowwise = True  # type: ignore[attr-defined]
