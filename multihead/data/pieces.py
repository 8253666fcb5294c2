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


class Bundles(Sequence[dict[str, np.ndarray]]):
    """Pieces of like length joined to examples of at most `tokens` tokens (a longer piece stands alone), so that every
    example has about as many, however long the texts are. ``sizes`` says how many tokens each piece of a bundle has.
    """

    def __init__(self, pieces: Pieces, tokens: int) -> None:
        self.pieces = pieces
        self.order = np.argsort(pieces.size, kind="stable")
        first, held = [], tokens + 1
        for i, size in enumerate(pieces.size[self.order].tolist()):
            if held + size > tokens:
                first.append(i)
                held = 0
            held += size
        self.first = np.array([*first, len(self.order)])

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        chosen = self.order[self.first[i] : self.first[int(i) + 1]]
        parts = [self.pieces[k] for k in chosen]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return joined | {"sizes": self.pieces.size[chosen]}

    def lengths(self, key: str) -> np.ndarray:
        """Tokens of the longest piece of each bundle: those of like length make a batch with little padding."""
        return self.pieces.size[self.order[self.first[1:] - 1]]


def unbundle(example: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The pieces of a bundle; an example that is none is its own only piece."""
    if "sizes" not in example:
        return [example]
    ends = np.cumsum(example["sizes"])[:-1]
    split = {key: np.split(array, ends) for key, array in example.items() if key != "sizes"}
    return [{key: parts[k] for key, parts in split.items()} for k in range(len(ends) + 1)]
