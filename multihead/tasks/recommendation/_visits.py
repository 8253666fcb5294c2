"""Training examples of two-tower-retrieval: stretches of users' histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multihead.data.store import Store


class Visits(Sequence[dict[str, np.ndarray]]):
    """Each row's history and what came next as ``{"items": (T,), "user": (), "first": ()}``, T ≤ room + 1.

    A longer one comes in several, counted from the end. Every item is asked for once, those from ``first`` on: where a
    stretch begins in the midst of a history, its first item was asked for in the stretch before.
    """

    def __init__(self, store: Store, room: int) -> None:
        self.store = store
        total = store.lengths("history") + 1
        count = np.maximum(1, -(-(total - 1) // room))
        self.row = np.repeat(np.arange(len(total)), count)
        nth = np.arange(len(self.row)) - np.repeat(np.cumsum(count) - count, count)
        self.end = np.repeat(total, count) - nth * room
        self.start = np.maximum(self.end - room - 1, 0)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        example = self.store[self.row[i]]
        items = np.append(example["history"], example["item"].astype(np.int32))
        first, last = int(self.start[i]), int(self.end[i])
        return {"items": items[first:last], "user": example["user"], "first": np.array(int(first > 0), dtype=np.int64)}

    def lengths(self, key: str) -> np.ndarray:
        """Items of each."""
        return self.end - self.start
