"""The network of sequential-recommendation: items, their features and the time between them in, what comes next out.

Legend: B batch, T positions, D d_model, I items, N targets, K drawn items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer import noise
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk

GAPS = 32
"""Kinds of gaps: 0 for an unknown one, else 1 + log₂ of its seconds, rounded down; the last holds all longer ones."""


def gap_kinds(times: Sequence[float | None]) -> np.ndarray:
    """(T,) uint8: which kind the time between each item and the one before it is; 0 for the first."""
    moments = np.array([np.nan if t is None else t for t in times], dtype=np.float64)
    gaps = np.diff(moments, prepend=np.nan)
    kinds = np.minimum(1 + np.floor(np.log2(1 + np.maximum(gaps, 0))), GAPS - 1)
    return np.nan_to_num(kinds, nan=0.0).astype(np.uint8)


class ItemInput(TokenInput):
    """Items as vectors: one of their own, plus the mean of their features' vectors, plus the position's and the gap's.

    Args:
        features: for each item the numbers of its features; empty for none.
        kinds: how many features there are.
        hidden: whether there is one more id, number I, for an item that is hidden.
        gaps: whether the time before each item is read.
    """

    def __init__(
        self, config: TransformerConfig, items: int, features: Sequence[Sequence[int]], kinds: int,
        hidden: bool = False, gaps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config, items + hidden)
        self.items = items
        self.feature = nn.EmbeddingBag(kinds, config.d_model, mode="mean") if kinds else None
        self.gap = nn.Embedding(GAPS, config.d_model) if gaps else None
        flat = torch.tensor([number for one in features for number in one], dtype=torch.long)
        starts = torch.tensor([0, *np.cumsum([len(one) for one in features])][: items if features else 0]).long()
        self.register_buffer("flat", flat, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self._held: tuple[Any, Tensor] | None = None
        if self.feature is not None:
            nn.init.normal_(self.feature.weight, std=config.d_model**-0.5)
        if self.gap is not None:
            nn.init.zeros_(self.gap.weight)

    def table(self) -> Tensor:
        """(I, D) the vector of every item, by which it is read and by which it is foretold (Press & Wolf 2017)."""
        own_ID = self.token.weight[: self.items]
        if self.feature is None:
            return own_ID
        if torch.is_grad_enabled() or torch.is_autocast_enabled(own_ID.device.type):
            return own_ID + self.feature(self.flat, self.starts)
        # When serving it is worked out once: a hundred thousand sums would take longer than the answer.
        tables = (self.token.weight, self.feature.weight)
        state = [(weight.data_ptr(), weight._version) for weight in tables]
        if self._held is None or self._held[0] != state:
            self._held = state, own_ID + self.feature(self.flat, self.starts)
        return self._held[1]

    def read(self, ids_BT: Tensor, table_ID: Tensor, gaps_BT: Tensor | None = None) -> Tensor:
        """Items → vectors the trunk reads: (B, T) → (B, T, D)."""
        x_BTD = self(ids_BT)
        if self.feature is not None:
            mean_ID = table_ID - self.token.weight[: self.items]
            shown_BT1 = (ids_BT < self.items)[..., None]
            x_BTD = x_BTD + self.dropout(F.embedding(ids_BT.clamp(max=self.items - 1), mean_ID)) * shown_BT1
        if self.gap is not None and gaps_BT is not None:
            x_BTD = x_BTD + self.gap(gaps_BT)
        return x_BTD


class ItemHead(nn.Module):
    """Scores of all items: (…, D) by the items' own vectors (I, D) → (…, I)."""

    def forward(self, x: Tensor, table_ID: Tensor) -> Tensor:
        return F.linear(x, table_ID)


class NextItem(nn.Module):
    """Histories → what stands at each place.

    Causal (SASRec): what comes after each place; ids (B, T) padded on the right, which a causal trunk never looks at.
    Else (BERT4Rec): what is hidden at each place that holds the number I, from what stands on both sides of it.
    """

    def __init__(
        self, config: TransformerConfig, items: int, features: Sequence[Sequence[int]] = (), kinds: int = 0,
        causal: bool = True, gaps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input = ItemInput(config, items, features, kinds, hidden=not causal, gaps=gaps)
        self.trunk = Trunk(config, causal=causal)
        self.head = ItemHead()

    def forward(
        self, ids_BT: Tensor, gaps_BT: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each place foretells, (B, T, D), and the table (I, D) to read it by. `lengths_B`: real places of each
        row, for the bidirectional form."""
        table_ID = self.input.table()
        real_BT = None
        if not self.trunk.causal and lengths_B is not None:
            real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        return self.trunk(self.input.read(ids_BT, table_ID, gaps_BT), mask=real_BT), table_ID


def gbce(x_ND: Tensor, table_ID: Tensor, target_N: Tensor, negatives: int, calibration: float) -> Tensor:
    """Binary cross-entropy whose positive term is weighed by β (Petrov & Macdonald 2023, eq. 14), a sum over targets;
    all places of a batch share the drawn items, which makes the scores one matrix product."""
    items = len(table_ID)
    own = noise.generator(x_ND.device)
    drawn_K = torch.randperm(items, device=x_ND.device, generator=own)[: min(negatives, items - 1)]
    alpha = len(drawn_K) / (items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    right_N = (x_ND * table_ID[target_N]).sum(-1).float()
    wrong_NK = (x_ND @ table_ID[drawn_K].T).float()
    counts_NK = drawn_K != target_N[:, None]
    wrong_N = (F.logsigmoid(-wrong_NK) * counts_NK).sum(-1)
    return -(beta * F.logsigmoid(right_N) + wrong_N).sum() / (len(drawn_K) + 1)


def hide(items: np.ndarray, share: float, sign: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(ids, targets), each (T,): some items replaced by `sign`, and what stood there, −1 elsewhere (Sun et al. 2019,
    section 3.5). Every tenth time the last one alone, which is what serving asks (the end of that section)."""
    hidden = rng.random(len(items)) < share
    if rng.random() < 0.1 or not hidden.any():
        hidden[:] = False
        hidden[-1] = True
    return np.where(hidden, sign, items).astype(np.int32), np.where(hidden, items, -1).astype(np.int32)
