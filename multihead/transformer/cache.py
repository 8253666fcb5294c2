"""Keys and values of the tokens already read, so that the next token costs one step and not a whole pass.

Legend: L layers, B rows, R rows that there is room for, H heads, K key/value heads, T new positions, S cached
positions, C positions that there is room for, E head width, N ids that n-grams reach back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Step:
    """Where the T new positions of one call go, worked out once and used by every layer."""

    positions_BT: Tensor
    """Absolute position of each new token: (B, T), or (1, T) where all rows are equally long."""
    start: int | None
    """Common length of all rows before this call, or None where rows differ."""
    end: int
    """Cached positions that any row may look at after the write."""
    mask_BTS: Tensor | None
    """True where a query may look; None where no mask is needed (or plain causal order within an empty cache)."""
    causal: bool
    """True where the new tokens only see each other, in order: the prefill of an empty cache."""
    kv_L2BKCE: Tensor
    """Keys and values of all layers, over the whole room C for positions."""


@dataclass
class Cache:
    """State of emitting models: one row a sequence; rows may have different lengths.

    The trunk writes keys and values; only the caller moves `lengths` on, by ``advance``. Prompts are padded on the
    right: what lies behind a row's length is never looked at and is overwritten by its next tokens. All layers' keys
    and values are one tensor with room to spare in rows and positions, so that a row joins or leaves by one copy of
    its own past. A cache belongs to the model that began it.
    """

    num_layers: int
    lengths: list[int]
    kv_L2RKCE: Tensor | None = None
    cross: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Keys and values of the encoder's memory, per layer, each (B, K, S, E) (encoder–decoder models)."""
    memory_mask_BS: Tensor | None = None
    recent_BN: Tensor | None = None
    """The last ids of each row, for n-gram embeddings."""

    def __post_init__(self) -> None:
        self.cross = self.cross or [None] * self.num_layers

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def plan(self, T: int, like: Tensor, kv_heads: int, head_size: int) -> Step:
        """Places for `T` new tokens a row, behind what each row holds; keys and values of `like`'s dtype and device."""
        shortest, longest = min(self.lengths), max(self.lengths)
        end, device = longest + T, like.device
        kv_L2BKCE = self._room(end, like, kv_heads, head_size)[:, :, : self.rows]
        steps_T = torch.arange(longest, end, device=device)
        if shortest == longest:
            mask = None
            if longest and T > 1:
                mask = (torch.arange(end, device=device) <= steps_T[:, None])[None]
            return Step(steps_T[None], longest, end, mask, longest == 0 and T > 1, kv_L2BKCE)
        positions_BT = torch.tensor(self.lengths, device=device)[:, None] + (steps_T - longest)
        mask = torch.arange(end, device=device) <= positions_BT[:, :, None]
        return Step(positions_BT, None, end, mask, False, kv_L2BKCE)

    def write(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of `layer`; returns all that may be looked at, each (B, K, S, E)."""
        k_BKCE, v_BKCE = step.kv_L2BKCE[layer, 0], step.kv_L2BKCE[layer, 1]
        if step.start is not None:
            k_BKCE[:, :, step.start : step.end] = k_BKTE
            v_BKCE[:, :, step.start : step.end] = v_BKTE
        else:
            rows_B1 = torch.arange(self.rows, device=k_BKCE.device)[:, None]
            k_BKCE[rows_B1, :, step.positions_BT] = k_BKTE.transpose(1, 2).to(k_BKCE.dtype)
            v_BKCE[rows_B1, :, step.positions_BT] = v_BKTE.transpose(1, 2).to(v_BKCE.dtype)
        return k_BKCE[:, :, : step.end], v_BKCE[:, :, : step.end]

    def _room(self, end: int, like: Tensor, kv_heads: int, head_size: int) -> Tensor:
        """The tensor of keys and values, grown where `end` outgrows it: by an eighth at least, so that a token costs
        O(1) copies, and no more than that, since a step may read the whole room."""
        kv, room = self.kv_L2RKCE, -(-(end + end // 8) // 32) * 32
        if kv is None:
            # Zeros, not empty memory: a masked position still enters the product, and 0 · NaN is NaN.
            kv = like.new_zeros(self.num_layers, 2, self.rows, kv_heads, room, head_size)
        elif kv.shape[4] < end:
            kv = _grown(kv, kv.shape[2], room)
        self.kv_L2RKCE = kv
        return kv

    def advance(self, by: int | Sequence[int]) -> None:
        """Move every row's length on by `by` tokens (one number, or one a row)."""
        more = [by] * self.rows if isinstance(by, int) else list(by)
        self.lengths = [a + b for a, b in zip(self.lengths, more, strict=True)]

    def select(self, index: Sequence[int] | Tensor) -> Cache:
        """The rows at `index`, in that order, repeats allowed (beams, several samples): a new cache."""
        chosen = index.tolist() if isinstance(index, Tensor) else list(index)
        kv = self.kv_L2RKCE
        at = torch.tensor(chosen, dtype=torch.long, device=kv.device if kv is not None else None)
        return Cache(
            self.num_layers,
            [self.lengths[i] for i in chosen],
            None if kv is None else kv.index_select(2, at),
            [None if pair is None else (pair[0][at], pair[1][at]) for pair in self.cross],
            None if self.memory_mask_BS is None else self.memory_mask_BS[at],
            None if self.recent_BN is None else self.recent_BN[at],
        )

    def reorder(self, index: Tensor) -> None:
        """Put the rows at `index` (repeats allowed) in the place of the present ones; the memory stays as it is.

        A memory may have fewer rows than there are sequences: then each is looked at by as many rows that lie next to
        each other (the beams of one source).
        """
        kv, used, chosen = self.kv_L2RKCE, max(self.lengths), index.tolist()
        if kv is not None and len(chosen) <= kv.shape[2]:
            # Many beams stay where they are: only the others' past is copied.
            moved = [(to, row) for to, row in enumerate(chosen) if to != row]
            if moved:
                to, row = torch.tensor(moved, device=kv.device).unbind(1)
                kv[:, :, to, :, :used] = kv[:, :, row, :, :used]
            self.kv_L2RKCE = kv[:, :, : len(chosen)]
        elif kv is not None:
            L, two, _, K, C, E = kv.shape
            self.kv_L2RKCE = kv.new_zeros(L, two, len(chosen), K, C, E)
            self.kv_L2RKCE[:, :, :, :, :used] = kv[:, :, index, :, :used]
        self.lengths = [self.lengths[i] for i in chosen]
        self.recent_BN = None if self.recent_BN is None else self.recent_BN[index]

    def keep_memory(self, index: Tensor) -> None:
        """Keep only these rows of the encoder's memory, in this order; the sequences stay as they are."""
        self.cross = [None if pair is None else (pair[0][index], pair[1][index]) for pair in self.cross]
        self.memory_mask_BS = None if self.memory_mask_BS is None else self.memory_mask_BS[index]

    def drop(self, row: int) -> None:
        """Take out one row: the last row moves into its place. Copies the past of that one row only."""
        last = self.rows - 1
        if row < last:
            self.lengths[row] = self.lengths[last]
            if self.kv_L2RKCE is not None:
                past = self.lengths[last]
                self.kv_L2RKCE[:, :, row, :, :past] = self.kv_L2RKCE[:, :, last, :, :past]
        self.lengths.pop()

        def without(tensor: Tensor | None) -> Tensor | None:
            if tensor is not None and row < last:
                tensor[row] = tensor[last]
            return None if tensor is None else tensor[:last]

        self.cross = [None if pair is None else (without(pair[0]), without(pair[1])) for pair in self.cross]  # type: ignore[misc]
        self.memory_mask_BS, self.recent_BN = without(self.memory_mask_BS), without(self.recent_BN)

    def join(self, other: Cache) -> None:
        """Append the rows of `other`, a cache of the same model (begun by a ``start`` of its own).

        Room for rows doubles when it runs out, so that a joining row costs a copy of its own past. Memories of other
        lengths are padded to the longest and masked.
        """
        mine, theirs, rows, total = self.kv_L2RKCE, other.kv_L2RKCE, self.rows, self.rows + other.rows
        if theirs is not None:
            mine = theirs[:, :, :0] if mine is None else mine
            room = mine.shape[2] if mine.shape[2] >= total else max(total, 2 * mine.shape[2])
            if room > mine.shape[2] or mine.shape[4] < theirs.shape[4]:
                mine = _grown(mine, room, max(mine.shape[4], theirs.shape[4]))
            past = max(other.lengths)
            mine[:, :, rows:total, :, :past] = theirs[:, :, : other.rows, :, :past]
            self.kv_L2RKCE = mine
        self.memory_mask_BS = _joined(self._memory_mask(other), other._memory_mask(self), 1)
        self.cross = [
            b if a is None else a if b is None else (_joined(a[0], b[0], 2), _joined(a[1], b[1], 2))  # type: ignore[misc]
            for a, b in zip(self.cross, other.cross, strict=True)
        ]
        self.recent_BN = _joined(self.recent_BN, other.recent_BN, 1)
        self.lengths = self.lengths + other.lengths

    def _memory_mask(self, other: Cache) -> Tensor | None:
        """The mask of this cache's memory, written out where joining `other` makes one necessary."""
        mine, theirs = self.cross[0], other.cross[0]
        if self.memory_mask_BS is not None or mine is None or theirs is None:
            return self.memory_mask_BS
        if other.memory_mask_BS is None and mine[0].shape[2] == theirs[0].shape[2]:
            return None
        return torch.ones(self.rows, mine[0].shape[2], dtype=torch.bool, device=mine[0].device)


def _joined(a: Tensor | None, b: Tensor | None, axis: int) -> Tensor | None:
    """Rows of `a`, then of `b`; the shorter of the two padded with zeros along `axis`."""
    if a is None or b is None:
        return b if a is None else a
    grown = a.new_zeros(a.shape[0] + b.shape[0], *[max(m, n) for m, n in zip(a.shape[1:], b.shape[1:], strict=True)])
    grown[: a.shape[0]].narrow(axis, 0, a.shape[axis]).copy_(a)
    grown[a.shape[0] :].narrow(axis, 0, b.shape[axis]).copy_(b)
    return grown


def _grown(kv: Tensor, rows: int, positions: int) -> Tensor:
    """The same keys and values with room for more rows and positions."""
    L, two, R, K, C, E = kv.shape
    grown = kv.new_empty(L, two, rows, K, positions, E)  # most of it is written over at once: zeros only for the rest
    grown[:, :, :R, :, :C] = kv
    grown[:, :, :R, :, C:] = 0
    grown[:, :, R:] = 0
    return grown
