"""Rows of fields → one logit each: attention over the fields, crosses of two, and a wide linear reader, summed.

Every field is a token that the trunk reads beside a token of its own for the answer (FT-Transformer, Gorishniy et al.
2021, "Revisiting Deep Learning Models for Tabular Data", section 3.3; AutoInt, Song et al. 2019, applies attention to
the fields of click logs in the same way). What attention finds hard is written out: a bias for each value (Cheng et al.
2016, "Wide & Deep Learning") and the products of any two fields' vectors, each pair of fields with a weight of its own
(field-weighted factorization machines, Pan et al. 2018).

Legend: B rows, C fields of one category, K of several, M quantities, F = C + K + M fields, N categories of the fields
of several, Q quantile bins, V categories of all fields, D width, R width of the crosses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from multihead.codec.fields import FieldCodec
from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.trunk import Trunk

SMALL = 0.02
"""Deviation of fresh vectors of values: all users begin alike and grow apart only as far as their rows pull. With the
usual size the trunk would first have to unlearn differences that mean nothing."""
WIDE = 4.0
"""Biases count so many times, and so learn so many times faster than what the trunk reads."""


class FieldTable(nn.Module):
    """One vector a field: (B, F, D). A category's is looked up, several are averaged, a quantity's is linear between
    its quantiles and in its logarithm.

    Args:
        std: deviation of the fresh weights.
    """

    of_V: Tensor
    missing_M: Tensor

    def __init__(self, codec: FieldCodec, width: int, std: float) -> None:
        super().__init__()
        self.several, self.quantities = len(codec.several), len(codec.quantities)
        self.value = nn.Embedding(codec.size, width)
        nn.init.normal_(self.value.weight, std=std)
        of = np.zeros(codec.size, dtype=np.int64)  # which field of several a category belongs to
        for number, field in enumerate(codec.several):
            of[codec.starts[field.name] :][: len(field.counts)] = number
        self.register_buffer("of_V", torch.from_numpy(of), persistent=False)
        if self.quantities:
            self.bins = max(len(f.edges) for f in codec.quantities) - 1
            self.piece = nn.Parameter(torch.randn(self.quantities, self.bins, width) * std)
            self.log = nn.Parameter(torch.randn(self.quantities, width) * std)
            self.offset = nn.Parameter(torch.randn(self.quantities, width) * std)
            missing = torch.tensor([codec.starts[f.name] for f in codec.quantities])
            self.register_buffer("missing_M", missing, persistent=False)

    def forward(self, one_BC: Tensor, several_BN: Tensor, lengths_B: Tensor, quantity_BM2: Tensor) -> Tensor:
        found = [self.value(one_BC)]
        if self.several:
            found.append(self._means(several_BN, lengths_B))
        if self.quantities:
            found.append(self._amounts(quantity_BM2))
        return torch.cat(found, dim=1)

    def _means(self, several_BN: Tensor, lengths_B: Tensor) -> Tensor:
        real_BN = torch.arange(several_BN.shape[1], device=several_BN.device) < lengths_B[:, None]
        share_BNK = nn.functional.one_hot(self.of_V[several_BN], self.several) * real_BN[..., None]
        share_BNK = share_BNK / share_BNK.sum(1, keepdim=True).clamp(min=1)
        return share_BNK.mT @ self.value(several_BN)

    def _amounts(self, quantity_BM2: Tensor) -> Tensor:
        place_BM, log_BM = quantity_BM2.unbind(-1)
        held_BM1 = ~place_BM.isnan()[..., None]
        piece_BMQ = (place_BM.nan_to_num()[..., None] - torch.arange(self.bins, device=place_BM.device)).clamp(0, 1)
        x_BMD = torch.einsum("bmq,mqd->bmd", piece_BMQ, self.piece)
        x_BMD = x_BMD + log_BM.nan_to_num()[..., None] * self.log + self.offset
        return torch.where(held_BM1, x_BMD, self.value(self.missing_M))

    def penalty(self, one_BC: Tensor, several_BN: Tensor, lengths_B: Tensor, weight_V: Tensor) -> Tensor:
        """Σ over the categories of every row of weight · |vector|²: a sum over rows."""
        squares_BC = self.value(one_BC).square().sum(-1) * weight_V[one_BC]
        total = squares_BC.sum()
        if self.several:
            real_BN = torch.arange(several_BN.shape[1], device=several_BN.device) < lengths_B[:, None]
            total = total + (self.value(several_BN).square().sum(-1) * weight_V[several_BN] * real_BN).sum()
        return total


class FieldInput(nn.Module):
    """The tokens that the trunk reads, (B, 1 + F, D): the answer's, then each field's, plus a vector of its place."""

    def __init__(self, codec: FieldCodec, config: TransformerConfig) -> None:
        super().__init__()
        self.table = FieldTable(codec, config.d_model, SMALL)
        self.field = nn.Parameter(torch.randn(1 + len(codec.used), config.d_model) * config.d_model**-0.5)
        self.dropout = Dropout(config.dropout)

    def forward(self, *batch: Tensor) -> Tensor:
        x_BFD = self.dropout(self.table(*batch))
        return nn.functional.pad(x_BFD, (0, 0, 1, 0)) + self.field


class Pairs(nn.Module):
    """Σ over pairs of fields of their weight times the product of their vectors: (B,)."""

    above: Tensor

    def __init__(self, codec: FieldCodec, width: int) -> None:
        super().__init__()
        fields = len(codec.used)
        self.table = FieldTable(codec, width, 0.1 * width**-0.5)
        self.weight = nn.Parameter(torch.ones(fields * (fields - 1) // 2))
        above = torch.triu_indices(fields, fields, 1)
        self.register_buffer("above", above, persistent=False)

    def forward(self, *batch: Tensor) -> Tensor:
        v_BFR = self.table(*batch)
        product_BFF = v_BFR @ v_BFR.mT
        return product_BFF[:, self.above[0], self.above[1]] @ self.weight


class ClickModel(nn.Module):
    """Fields → the logit of a click, (B,): ``(one, several, lengths of several, quantity)``."""

    def __init__(self, codec: FieldCodec, config: TransformerConfig, cross: int, start: float) -> None:
        """
        Args:
            cross: width of the vectors whose products are taken; 0: none.
            start: logit of the share of clicks in the training rows.
        """
        super().__init__()
        self.input = FieldInput(codec, config)
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.d_model, 1)
        self.wide = FieldTable(codec, 1, SMALL)
        self.cross = Pairs(codec, cross) if cross else None
        nn.init.normal_(self.head.weight, std=0.1 * config.d_model**-0.5)
        nn.init.constant_(self.head.bias, start)

    def forward(self, *batch: Tensor) -> Tensor:
        x_BD = self.trunk(self.input(*batch))[:, 0]
        with torch.autocast(x_BD.device.type, enabled=False):  # in bfloat16 many rows would tie
            logit_B = self.head(x_BD.float())[:, 0] + WIDE * self.wide(*batch).sum((1, 2))
            return logit_B if self.cross is None else logit_B + self.cross(*batch)

    def penalty(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], bias_V: Tensor, vector_V: Tensor) -> Tensor:
        """The squares of what the rows of a batch look up: biases times `bias_V`, vectors times `vector_V`."""
        looked_up = batch[:3]
        told = WIDE**2 * self.wide.penalty(*looked_up, bias_V) + self.input.table.penalty(*looked_up, vector_V)
        return told if self.cross is None else told + self.cross.table.penalty(*looked_up, vector_V)
