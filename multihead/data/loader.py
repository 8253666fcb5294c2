"""Which rows make up which batch: a pure function of the seed and the step, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from functools import lru_cache

import numpy as np

from multihead.errors import UserError, tr

POOL = 64  # batches sorted by length together: little padding, and batches still differ from epoch to epoch
LARGE = 1 << 20  # rows from which on no order is written down: memory must not grow with the data
ROUNDS = 6


class Loader:
    """Batches of example indices for training.

    `examples` is what is trained on (only its length is asked) or that length. `lengths` (one a row) puts rows of like
    length in one batch. The last incomplete batch of an epoch is dropped; with fewer rows than `batch_size`, a batch is
    all rows. How a batch is shared by several processes says `shares`.
    """

    def __init__(self, examples: Sized | int, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                 lengths: np.ndarray | None = None) -> None:
        self.rows = examples if isinstance(examples, int) else len(examples)
        if self.rows < 1:
            raise UserError(tr("there are no rows to train on", "没有可以训练的数据行"))
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}")
        self.batch_size = min(batch_size, self.rows)
        if lengths is not None and len(lengths) != self.rows:
            raise ValueError(f"{len(lengths)} lengths for {self.rows} rows")
        self.seed, self.shuffle = seed, shuffle
        self.lengths = None if lengths is None else np.asarray(lengths)
        self._epoch = -1
        self._order: np.ndarray | _Order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.rows // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """The row indices of the global batch at `step` (from 0), (batch_size,) int64."""
        epoch, within = divmod(int(step), len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._make_order(epoch)
        start = within * self.batch_size
        return self._order[start:start + self.batch_size]

    def _make_order(self, epoch: int) -> np.ndarray | _Order:
        used = len(self) * self.batch_size
        if not self.shuffle:
            return np.arange(used, dtype=np.int64)
        if self.rows > LARGE:
            return _Order(self, epoch)
        order = _permutation(self.rows, self.seed, epoch, 0)[:used]
        if self.lengths is None:
            return order
        pool = POOL * self.batch_size
        for start in range(0, used, pool):
            part = order[start:start + pool]
            order[start:start + pool] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = order.reshape(len(self), self.batch_size)
        return batches[_permutation(len(self), self.seed, epoch, 1)].reshape(-1)


def shares(rows: int, at_once: int | None = None, rank: int = 0, world: int = 1) -> list[tuple[int, int, int]]:
    """The micro-batches of a batch that are this process's: (number in the batch, first row, last row + 1) of each.

    A batch is cut into micro-batches of `at_once` rows (None: as many as there are processes), and those are dealt out
    in turn, as many to each process. Which process works out which changes nothing: their noise goes by their numbers.
    """
    if rows < world:
        raise UserError(tr(
            f"a batch of {rows} rows cannot be shared by {world} processes; "
            f"give train.batch_size at least {world}, and at least as many rows",
            f"一批 {rows} 行不够分给 {world} 个进程；train.batch_size 和数据行数都至少要有 {world}"))
    count = -(-rows // at_once) if at_once else world
    if at_once and count % world == 0:
        bounds = [min(n * at_once, rows) for n in range(count + 1)]
    else:
        count = min(-(-count // world), rows // world) * world
        bounds = [n * rows // count for n in range(count + 1)]
    return [(n, bounds[n], bounds[n + 1]) for n in range(rank, count, world)]


class _Order:
    """The rows of an epoch as `Loader` deals them out, worked out batch by batch."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self.size, self.lengths, self.used = loader.batch_size, loader.lengths, len(loader) * loader.batch_size
        self.rows = Scattered(loader.rows, loader.seed, epoch, 0)
        self.batches = Scattered(len(loader), loader.seed, epoch, 1)
        self.pool = lru_cache(maxsize=4)(self._pool)

    def __getitem__(self, at: slice) -> np.ndarray:
        """One whole batch."""
        if self.lengths is None:
            return self.rows[np.arange(at.start, at.stop)]
        number, within = divmod(int(self.batches[np.array([at.start // self.size])][0]), POOL)
        return self.pool(number)[within * self.size:(within + 1) * self.size]

    def _pool(self, number: int) -> np.ndarray:
        start = number * POOL * self.size
        part = self.rows[np.arange(start, min(start + POOL * self.size, self.used))]
        assert self.lengths is not None
        return part[np.argsort(self.lengths[part], kind="stable")]


class Scattered:
    """The numbers 0 to n − 1 in an order of their own, any of them worked out by itself: a Feistel network (Luby &
    Rackoff 1988) over as many bits as n has, followed until it arrives below n (Black & Rogaway 2002, section 4)."""

    def __init__(self, n: int, seed: int, epoch: int, use: int) -> None:
        self.n, half = n, max(1, ((n - 1).bit_length() + 1) // 2)
        self.half, self.mask = np.uint64(half), np.uint64((1 << half) - 1)
        self.keys = np.random.SeedSequence([seed, epoch, use]).generate_state(ROUNDS, np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places, int64."""
        found = self._network(places.astype(np.uint64))
        while len(beyond := np.flatnonzero(found >= self.n)):
            found[beyond] = self._network(found[beyond])
        return found.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self.half, x & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & self.mask)
        return left << self.half | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permutation(n: int, seed: int, epoch: int, use: int) -> np.ndarray:
    # Sorting raw PCG64 words: NumPy promises their values for good, but not those of Generator.permutation (NEP 19).
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch, use])).random_raw(n)
    return np.argsort(words, kind="stable")


def sequential(n: int, batch_size: int, lengths: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Index arrays that cover rows 0..n-1 once each, for evaluation.

    With `lengths`, longest first: little padding, and a batch too large for the memory fails at once.
    """
    order = np.arange(n, dtype=np.int64)
    if lengths is not None:
        order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    for start in range(0, n, batch_size):
        yield order[start:start + batch_size]
