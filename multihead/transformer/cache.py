"""Keys and values of the tokens already read, so that the next token costs one step and not a whole pass.

Legend: B rows, H heads, K key/value heads, T new positions, S cached positions, E head width.
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
    """Absolute position of each new token."""
    start: int | None
    """Common length of all rows before this call, or None where rows differ."""
    end: int
    """Cached positions that any row may look at after the write."""
    mask_BTS: Tensor | None
    """True where a query may look; None where no mask is needed (or plain causal order within an empty cache)."""
    causal: bool
    """True where the new tokens only see each other, in order: the prefill of an empty cache."""


@dataclass
class Cache:
    """State of emitting models: one row a sequence; rows may have different lengths.

    The trunk writes keys and values; only the caller moves `lengths` on, by ``advance``. Prompts are padded on the
    right: what lies behind a row's length is never looked at and is overwritten by its next tokens.
    """

    num_layers: int
    lengths: list[int]
    k: list[Tensor | None] = field(default_factory=list)
    v: list[Tensor | None] = field(default_factory=list)
    cross: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Keys and values of the encoder's memory, per layer (encoder–decoder models)."""
    memory_mask_BS: Tensor | None = None
    recent_BN: Tensor | None = None
    """The last ids of each row, for n-gram embeddings."""

    def __post_init__(self) -> None:
        self.k = self.k or [None] * self.num_layers
        self.v = self.v or [None] * self.num_layers
        self.cross = self.cross or [None] * self.num_layers

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def plan(self, T: int, device: torch.device) -> Step:
        """Places for `T` new tokens a row, behind what each row holds."""
        shortest, longest = min(self.lengths), max(self.lengths)
        steps_T = torch.arange(T, device=device)
        if shortest == longest:
            positions_BT = (steps_T + longest).expand(self.rows, T)
            mask = None
            if longest and T > 1:
                mask = torch.arange(longest + T, device=device) <= positions_BT[:1, :, None]
            return Step(positions_BT, longest, longest + T, mask, causal=longest == 0 and T > 1)
        positions_BT = torch.tensor(self.lengths, device=device)[:, None] + steps_T
        mask = torch.arange(longest + T, device=device) <= positions_BT[:, :, None]
        return Step(positions_BT, None, longest + T, mask, causal=False)

    def write(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of `layer`; returns all that may be looked at, each (B, K, S, E)."""
        k, v = self._room(layer, k_BKTE, step.end)
        if step.start is not None:
            k[:, :, step.start : step.end] = k_BKTE
            v[:, :, step.start : step.end] = v_BKTE
        else:
            rows_B1 = torch.arange(self.rows, device=k.device)[:, None]
            k[rows_B1, :, step.positions_BT] = k_BKTE.transpose(1, 2)
            v[rows_B1, :, step.positions_BT] = v_BKTE.transpose(1, 2)
        return k[:, :, : step.end], v[:, :, : step.end]

    def _room(self, layer: int, like_BKTE: Tensor, end: int) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer], self.v[layer]
        if k is None or v is None or k.shape[2] < end:
            B, K, _, E = like_BKTE.shape
            capacity = max(64, 1 << (end - 1).bit_length())
            # Zeros, not empty memory: a masked position still enters the product, and 0 · NaN is NaN.
            new_k, new_v = like_BKTE.new_zeros(B, K, capacity, E), like_BKTE.new_zeros(B, K, capacity, E)
            if k is not None and v is not None:
                new_k[:, :, : k.shape[2]], new_v[:, :, : v.shape[2]] = k, v
            self.k[layer], self.v[layer] = k, v = new_k, new_v
        return k, v

    def advance(self, by: int | Sequence[int]) -> None:
        """Move every row's length on by `by` tokens (one number, or one a row)."""
        more = [by] * self.rows if isinstance(by, int) else list(by)
        self.lengths = [a + b for a, b in zip(self.lengths, more, strict=True)]

    def select(self, index: Sequence[int] | Tensor) -> Cache:
        """The rows at `index`, in that order, repeats allowed (beams, several samples, finished rows dropped)."""
        chosen = index.tolist() if isinstance(index, Tensor) else list(index)
        device = next((t.device for t in self.k if t is not None), torch.device("cpu"))
        at = torch.tensor(chosen, dtype=torch.long, device=device)

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, at)

        return Cache(
            self.num_layers,
            [self.lengths[i] for i in chosen],
            [rows(t) for t in self.k],
            [rows(t) for t in self.v],
            [None if pair is None else (pair[0].index_select(0, at), pair[1].index_select(0, at)) for pair in self.cross],
            rows(self.memory_mask_BS),
            rows(self.recent_BN),
        )
