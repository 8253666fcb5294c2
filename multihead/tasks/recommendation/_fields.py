"""Rows of fields → one logit each: attention over the fields, crosses of two, and a wide linear reader, summed.

Every field is a token that the trunk reads beside a token of its own for the answer (FT-Transformer, Gorishniy et al.
2021, "Revisiting Deep Learning Models for Tabular Data", section 3.3; AutoInt, Song et al. 2019, applies attention to
the fields of click logs in the same way). What attention finds hard is written out: a bias for each value (Cheng et al.
2016, "Wide & Deep Learning") and the products of any two fields' vectors, each pair of fields with a weight of its own
(field-weighted factorization machines, Pan et al. 2018). Several members of the model, whose vectors of values differ
and whose trunk is one, may be trained side by side and averaged (after TabM, Gorishniy et al. 2024, section 3): where
rows are few, the mean of some is better than any of them.

Legend: B rows, C fields of one category, K of several, M quantities, F = C + K + M fields, N categories of the fields
of several, Q quantile bins, V categories of all fields, D width, R width of the crosses, P members.
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

    def penalty(
        self, one_BC: Tensor, several_BN: Tensor, lengths_B: Tensor, weight_V: Tensor, weight: float
    ) -> Tensor:
        """Σ over the categories of every row of their weight · |vector|², and of `weight` · the squares of what
        quantities are read by, which every row reads: a sum over rows."""
        squares_BC = self.value(one_BC).square().sum(-1) * weight_V[one_BC]
        total = squares_BC.sum()
        if self.several:
            real_BN = torch.arange(several_BN.shape[1], device=several_BN.device) < lengths_B[:, None]
            total = total + (self.value(several_BN).square().sum(-1) * weight_V[several_BN] * real_BN).sum()
        if self.quantities:
            total = total + len(one_BC) * weight * (self.piece.square().sum() + self.log.square().sum())
        return total


def parted(x: Tensor, members: int) -> Tensor:
    """Each member's share of the vectors: (B, F, P · D) → (P · B, F, D), the first member's rows first."""
    return x.unflatten(-1, (members, -1)).permute(2, 0, 1, 3).flatten(0, 1)


class FieldInput(nn.Module):
    """The tokens that the trunk reads, (P · B, 1 + F, D): the answer's, then each field's, plus a vector of its
    place."""

    def __init__(self, codec: FieldCodec, config: TransformerConfig, members: int = 1) -> None:
        super().__init__()
        width, self.members = members * config.d_model, members
        self.table = FieldTable(codec, width, SMALL)
        self.field = nn.Parameter(torch.randn(1 + len(codec.used), width) * config.d_model**-0.5)
        self.dropout = Dropout(config.dropout)

    def forward(self, *batch: Tensor) -> Tensor:
        x = self.dropout(self.table(*batch))
        return parted(nn.functional.pad(x, (0, 0, 1, 0)) + self.field, self.members)


class Pairs(nn.Module):
    """Σ over pairs of fields of their weight times the product of their vectors: (P · B,)."""

    above: Tensor

    def __init__(self, codec: FieldCodec, width: int, members: int = 1) -> None:
        super().__init__()
        fields, self.members = len(codec.used), members
        self.table = FieldTable(codec, members * width, 0.1 * width**-0.5)
        self.weight = nn.Parameter(torch.ones(fields * (fields - 1) // 2))
        above = torch.triu_indices(fields, fields, 1)
        self.register_buffer("above", above, persistent=False)

    def forward(self, *batch: Tensor) -> Tensor:
        v_BFR = parted(self.table(*batch), self.members)
        product_BFF = v_BFR @ v_BFR.mT
        return product_BFF[:, self.above[0], self.above[1]] @ self.weight


class ClickModel(nn.Module):
    """Fields → the logit of a click, (B,): ``(one, several, lengths of several, quantity)``."""

    def __init__(
        self, codec: FieldCodec, config: TransformerConfig, cross: int, start: float, members: int = 1
    ) -> None:
        """
        Args:
            cross: width of the vectors whose products are taken; 0: none.
            start: logit of the share of clicks in the training rows.
            members: models that are averaged; they share the trunk and the biases.
        """
        super().__init__()
        self.input = FieldInput(codec, config, members)
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.d_model, members)
        self.wide = FieldTable(codec, 1, SMALL)
        self.cross = Pairs(codec, cross, members) if cross else None
        nn.init.normal_(self.head.weight, std=0.1 * config.d_model**-0.5)
        nn.init.constant_(self.head.bias, start)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.each(*batch).mean(0)

    def each(self, *batch: Tensor) -> Tensor:
        """What each member says: (P, B)."""
        members = self.head.out_features
        x_PBD = self.trunk(self.input(*batch))[:, 0].unflatten(0, (members, -1))
        with torch.autocast(x_PBD.device.type, enabled=False):  # in bfloat16 many rows would tie
            logit_PB = torch.einsum("pbd,pd->pb", x_PBD.float(), self.head.weight) + self.head.bias[:, None]
            logit_PB = logit_PB + WIDE * self.wide(*batch).sum((1, 2))
            return logit_PB if self.cross is None else logit_PB + self.cross(*batch).unflatten(0, (members, -1))

    def penalty(
        self, batch: tuple[Tensor, Tensor, Tensor, Tensor], once_V: Tensor, once: float, biases: float, vectors: float
    ) -> Tensor:
        """The squares of what the rows of a batch look up, biases times `biases`, vectors times `vectors`; of members'
        vectors the mean, as of what they say.

        Args:
            once_V: what one row pulls of a category, so that all rows that hold it pull it once.
            once: the same of a quantity, which all rows hold.
        """
        weighed = (*batch[:3], once_V, once)
        told = self.input.table.penalty(*weighed)
        if self.cross is not None:
            told = told + self.cross.table.penalty(*weighed)
        return biases * WIDE**2 * self.wide.penalty(*weighed) + vectors / self.head.out_features * told
