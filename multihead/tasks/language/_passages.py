"""What reading a passage takes before any number is learned: where an answer stands, which words of the passage the
question holds, and how a long passage is cut into windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 4
"""Runs of more tokens than this, in passage and question alike, count as this long."""


def locate(passage: str, text: str, start: int | None) -> int | None:
    """Where `text` stands: at `start`, else the place nearest to it; None where it stands nowhere."""
    if start is not None and start >= 0 and passage.startswith(text, start):
        return start
    found, best = passage.find(text), None
    while found >= 0:
        if best is None or (start is not None and abs(found - start) < abs(best - start)):
            best = found
        found = passage.find(text, found + 1) if start is not None else -1
    return best


def tokens_of(spans: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """First and last token that hold characters `start` … `end` − 1, of tokens at `spans` (T, 2); None for none."""
    inside = np.flatnonzero((spans[:, 0] < end) & (spans[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def window_starts(length: int, room: int, stride: int) -> np.ndarray:
    """First positions of windows of `room` over `length` positions, (W,) int32: every `stride`, the last one at the
    end."""
    last = max(0, length - room)
    return np.array([*range(0, last, stride), last], dtype=np.int32)


def shared_runs(passage: Sequence[str], question: Sequence[str]) -> np.ndarray:
    """(T,) uint8: for each token of the passage, the length of the longest run around it that the question holds too,
    at most LONGEST; 0 where it does not hold the token itself.

    The "exact match" feature of Chen et al. 2017 ("Reading Wikipedia to Answer Open-Domain Questions", section 3.2),
    for runs of tokens.
    """
    names = {token: i + 1 for i, token in enumerate(dict.fromkeys(question))}
    wanted = np.array([names[t] for t in question], dtype=np.int64)
    given = np.array([names.get(t, 0) for t in passage], dtype=np.int64)
    found = np.zeros(len(given), dtype=np.uint8)
    keys, sought = np.zeros_like(given), np.zeros_like(wanted)
    for n in range(1, LONGEST + 1):
        size = len(given) - n + 1
        if size < 1 or len(wanted) < n:
            break
        # Runs of n as one number each; a run that holds a token unknown to the question is 0.
        keys = _longer(keys, given, n, len(names) + 1)
        sought = _longer(sought, wanted, n, len(names) + 1)
        hit = np.isin(keys, sought) & (keys > 0)
        for back in range(n):
            found[back : back + size] = np.where(hit, n, found[back : back + size])
    return found


def _longer(keys: np.ndarray, ids: np.ndarray, n: int, base: int) -> np.ndarray:
    """Keys of runs of n from those of n − 1."""
    if n == 1:
        return ids.copy()
    longer = keys[: len(ids) - n + 1] * base + ids[n - 1 :]
    longer[(keys[: len(ids) - n + 1] == 0) | (ids[n - 1 :] == 0)] = 0
    return longer
