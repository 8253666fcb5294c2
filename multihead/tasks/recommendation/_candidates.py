"""Many items for one user as rows of one batch: each item encoded once and for all, each request once.

Legend: I items of the catalogue, n candidates, C fields of one category, N places for several, M quantities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multihead.codec.fields import FieldCodec
from multihead.task import Example


class Candidates:
    """The catalogue's side of every row.

    Args:
        about: item → its fields, its own id among them; of items that are not here, the id is all that is known.
        names: the fields that are the item's.
    """

    def __init__(self, codec: FieldCodec, about: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
        self.codec, self.about, self.names = codec, about, frozenset(names)
        self.one = np.array([f.name in self.names for f in codec.single], dtype=bool)
        self.amount = np.array([f.name in self.names for f in codec.quantities], dtype=bool)
        self.several = [f for f in codec.several if f.name in self.names]
        self.others = [f for f in codec.several if f.name not in self.names]
        self.places: dict[str, int] = {}
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._packed: tuple[np.ndarray, ...] | None = None

    def _place(self, item: str) -> int:
        """Where the item stands among those encoded; it is encoded if it was not."""
        if item not in self.places:
            row = {**self.about.get(item, {}), "item": item}
            codec, ignored = self.codec, list[str]()
            one = [codec.category(f, row.get(f.name), ignored)
                   for f, own in zip(codec.single, self.one, strict=True) if own]
            several = [i for f in self.several for i in codec.categories(f, row.get(f.name), ignored)]
            amounts = [codec.quantity(f, row.get(f.name))
                       for f, own in zip(codec.quantities, self.amount, strict=True) if own]
            self.places[item] = len(self.rows)
            self.rows.append((np.array(one, np.int32), np.array(several, np.int32),
                              np.array(amounts, np.float32).reshape(len(amounts), 2)))
            self._packed = None
        return self.places[item]

    def _tables(self) -> tuple[np.ndarray, ...]:
        """one (I, C'), several (I, N'), how many of them (I,), quantity (I, M', 2) of all items encoded so far."""
        if self._packed is None:
            lengths = np.array([len(several) for _, several, _ in self.rows])
            padded = np.zeros((len(self.rows), int(lengths.max(initial=0))), np.int32)
            for to, (_, several, _) in zip(padded, self.rows, strict=True):
                to[: len(several)] = several
            one, amounts = (np.stack([row[i] for row in self.rows]) for i in (0, 2))
            self._packed = one, padded, lengths, amounts
        return self._packed

    def add(self, items: Sequence[str]) -> None:
        """Encode these ahead."""
        for item in items:
            self._place(item)
        if self.rows:
            self._tables()

    def batch(self, row: Mapping[str, Any], items: Sequence[str]) -> Example:
        """The rows of one request: one (n, C), several (n, N), several_lengths (n,), quantity (n, M, 2).

        Args:
            row: the fields that are not the item's.
        """
        at = np.array([self._place(item) for item in items], dtype=np.int64)
        table_one, table_several, lengths, table_amount = (table[at] for table in self._tables())
        codec, ignored, n = self.codec, list[str](), len(at)
        one = np.zeros((n, len(self.one)), np.int32)
        one[:, self.one] = table_one
        one[:, ~self.one] = [codec.category(f, row.get(f.name), ignored)
                             for f, own in zip(codec.single, self.one, strict=True) if not own]
        amount = np.zeros((n, len(self.amount), 2), np.float32)
        amount[:, self.amount] = table_amount
        amount[:, ~self.amount] = np.array([codec.quantity(f, row.get(f.name)) for f, own in
                                            zip(codec.quantities, self.amount, strict=True) if not own],
                                           np.float32).reshape(-1, 2)
        mine = np.array([i for f in self.others for i in codec.categories(f, row.get(f.name), ignored)], np.int32)
        several = np.concatenate((np.broadcast_to(mine, (n, len(mine))), table_several), axis=1)
        return {"one": one, "several": several, "several_lengths": lengths + len(mine), "quantity": amount}


def joined(batches: Sequence[Example]) -> Example:
    """The rows of several requests as one batch, padded to the longest."""
    width = max(batch["several"].shape[1] for batch in batches)
    padded = [{**b, "several": np.pad(b["several"], ((0, 0), (0, width - b["several"].shape[1])))} for b in batches]
    return {key: np.concatenate([batch[key] for batch in padded]) for key in padded[0]}
