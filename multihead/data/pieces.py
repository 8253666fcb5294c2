"""Long texts in pieces that a model can read at once, short ones whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multihead.data.store import Store


class Pieces(Sequence[dict[str, np.ndarray]]):
    """The rows of a store, those of more than `room` tokens in several pieces: of `room` tokens that overlap by half,
    or of equal lengths end to end. Every array of a row is cut alike.

    Args:
        key: the array that is measured.
    """

    def __init__(self, store: Store, room: int, overlap: bool, key: str = "ids") -> None:
        self.store = store
        row, start, size = [], [], []
        for i, n in enumerate(store.lengths(key).tolist()):
            if overlap and n > room:
                at = np.linspace(0, n - room, 1 + -(-(n - room) // (room // 2))).astype(np.int64)
                end = at + room
            else:
                edges = np.linspace(0, n, 1 + max(1, -(-n // room))).astype(np.int64)
                at, end = edges[:-1], edges[1:]
            row.append(np.full(len(at), i))
            start.append(at)
            size.append(end - at)
        self.row, self.start, self.size = (np.concatenate(x) if x else np.zeros(0, int) for x in (row, start, size))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        at = int(self.start[i])
        return {key: array[at : at + int(self.size[i])] for key, array in self.store[self.row[i]].items()}

    def lengths(self, key: str) -> np.ndarray:
        """Tokens of each piece."""
        return self.size
