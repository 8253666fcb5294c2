"""Beam search: of all sequences a model might write, look for the likeliest by keeping a few of the best at every step.

Works for every model with ``start`` and ``step``. The rows of one input's beams lie next to each other; what was read
of the input itself is held once for all of them.

Legend: B inputs, K beams, R = B·K rows, V vocabulary, T tokens so far, C = 2·K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multihead.errors import UserError, tr
from multihead.generation.loop import Decoding, Emitter
from multihead.transformer.cache import Cache

NEVER = -1e9
"""Score of what is not there; finite, so that sums and comparisons with it stay plain."""
CROWDED = 0.75


@dataclass(frozen=True)
class Hypothesis:
    """One finished sequence."""

    ids: list[int]
    """Without what it began with, and without the end token."""
    score: float
    """Sum of its tokens' log-probabilities (the end token's too) over their number to the power `length_penalty`."""
    ended: bool
    """Whether it came to its own end; False where it was cut at the longest length."""


@torch.no_grad()
def beam_search(
    model: Emitter,
    batch: dict[str, Tensor],
    eos: int,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_tokens: int | Sequence[int] = 128,
) -> list[list[Hypothesis]]:
    """For each input of `batch` (what ``model.start`` takes) up to `beam` hypotheses, the best first.

    A hypothesis of n tokens, its end among them, scores log P / n^length_penalty: the form of transformers'
    ``generate`` (Wu et al. 2016 divide by ((5 + n) / 6)^α instead). At every step the 2·K likeliest continuations of
    the K beams are looked at; those that end and are among the best K are put aside, the best K of the others go on. An
    input is done when K are put aside and the best that goes on, at its present length, scores no better than the worst
    of them, which is transformers' ``early_stopping=False``. With ``beam=1`` this is greedy decoding.

    Args:
        max_tokens: most new tokens, the end included; one number, or one an input.

    Raises:
        UserError: a `beam` below 1.
    """
    if beam < 1:
        raise UserError(tr(f"beam is {beam}; it must be at least 1", f"beam 是 {beam}，至少要为 1"))
    B = len(batch["lengths"])
    limits = [max_tokens] * B if isinstance(max_tokens, int) else list(max_tokens)
    with Decoding(model):
        state, logits_BV = model.start(batch)
        return Search(model, eos, beam, length_penalty, limits).run(state, logits_BV)


class Search:
    """The beams of some inputs on their way. Inputs leave as they are done; the others do not notice."""

    def __init__(self, model: Emitter, eos: int, beam: int, penalty: float, limits: Sequence[int]) -> None:
        self.model, self.eos, self.K, self.penalty = model, eos, beam, penalty
        B, longest = len(limits), max(limits)
        self.found: list[list[Hypothesis]] = [[] for _ in limits]
        self.who = torch.arange(B)
        """Which input each of the B that still go on is."""
        self.live_B = torch.ones(B, dtype=torch.bool)
        """Those that are not done; some of the others may still go along, unheeded."""
        self.limit_B = torch.tensor(limits)
        self.ids_BKT = torch.zeros(B, beam, longest, dtype=torch.long)
        self.score_BK = torch.full((B, beam), NEVER)
        self.score_BK[:, 0] = 0.0
        self.done_BKT = torch.zeros(B, beam, longest, dtype=torch.long)
        self.done_BK = torch.full((B, beam), NEVER)
        self.size_BK = torch.zeros(B, beam, dtype=torch.long)
        self.T = 0

    def run(self, state: Cache, logits_BV: Tensor) -> list[list[Hypothesis]]:
        """From the state after ``start``, one row an input, to the hypotheses of all."""
        B, device = len(self.who), logits_BV.device
        logits_RV = logits_BV.repeat_interleave(self.K, dim=0)
        state.reorder(torch.arange(B, device=device).repeat_interleave(self.K))
        while True:
            token_BK, origin_BK = self._advance(logits_RV)
            stay = self._stay()
            if not len(stay):
                return self.found
            if len(stay) <= CROWDED * len(self.who):  # not at every end: to leave means to copy what all others read
                self._keep(stay)
                token_BK, origin_BK = token_BK[stay], origin_BK[stay]
                state.keep_memory(stay.to(device))
            state.reorder(origin_BK.flatten().to(device))
            logits_RV = self.model.step(token_BK.flatten().to(device), state)

    def _advance(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        """One token more for every beam: the tokens (B, K) and the rows (B, K) they continue."""
        B, K = self.score_BK.shape
        value_BC, row_BC, token_BC = self._candidates(logits_RV)
        end_BC = (token_BC == self.eos) | (self.limit_B <= self.T + 1)[:, None]
        self._put_aside(value_BC, row_BC, token_BC, end_BC)
        self.score_BK, at_BK = (value_BC + end_BC * NEVER).topk(K, dim=1)
        origin_BK, token_BK = row_BC.gather(1, at_BK), token_BC.gather(1, at_BK)
        self.ids_BKT = _take(self.ids_BKT, origin_BK)
        self.ids_BKT[:, :, self.T] = token_BK
        self.T += 1
        return token_BK, origin_BK + torch.arange(B)[:, None] * K

    def _candidates(self, logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The C likeliest continuations of each input, best first: their scores, beams and tokens, each (B, C)."""
        B, K = self.score_BK.shape
        V = logits_RV.shape[1]
        C = min(2 * K, V)
        logits_RV = logits_RV.float()
        total_R1 = logits_RV.logsumexp(1, keepdim=True)
        best_RC, token_RC = largest(logits_RV, C)
        value_BX = ((best_RC - total_R1).cpu().view(B, K, C) + self.score_BK[:, :, None]).flatten(1)
        value_BC, at_BC = value_BX.topk(min(2 * K, K * C), dim=1)
        return value_BC, at_BC // C, token_RC.cpu().view(B, K * C).gather(1, at_BC)

    def _put_aside(self, value_BC: Tensor, row_BC: Tensor, token_BC: Tensor, end_BC: Tensor) -> None:
        """Take those of the best K that end in among the finished, and keep the best K of these."""
        K = self.K
        end_BK = end_BC[:, :K]
        if not bool(end_BK.any()):
            return
        # An end below every beam that goes on is no hypothesis; one of a beam that is not there neither.
        new_BK = torch.where(end_BK, value_BC[:, :K] / (self.T + 1) ** self.penalty, NEVER)
        new_BKT = _take(self.ids_BKT, row_BC[:, :K])
        new_BKT[:, :, self.T] = token_BC[:, :K]
        self.done_BK, at_BK = torch.cat((self.done_BK, new_BK), 1).topk(K, dim=1)
        self.done_BKT = _take(torch.cat((self.done_BKT, new_BKT), 1), at_BK)
        self.size_BK = torch.cat((self.size_BK, torch.full_like(self.size_BK, self.T + 1)), 1).gather(1, at_BK)

    def _stay(self) -> Tensor:
        """Which of the B go on; those that are newly done are written down."""
        worst_B = self.done_BK[:, -1]
        over_B = (worst_B > NEVER / 2) & (self.score_BK[:, 0] / self.T**self.penalty <= worst_B)
        over_B |= self.limit_B <= self.T
        over_B &= self.live_B
        for b in over_B.nonzero().flatten().tolist():
            sizes = self.size_BK[b].tolist()
            for score, size, ids in zip(self.done_BK[b].tolist(), sizes, self.done_BKT[b], strict=True):
                if score > NEVER / 2:
                    written = ids[:size].tolist()
                    ended = written[-1] == self.eos
                    self.found[int(self.who[b])].append(Hypothesis(written[:-1] if ended else written, score, ended))
        self.live_B = self.live_B & ~over_B
        return self.live_B.nonzero().flatten()

    def _keep(self, stay: Tensor) -> None:
        for name in ("who", "live_B", "limit_B", "ids_BKT", "score_BK", "done_BKT", "done_BK", "size_BK"):
            setattr(self, name, getattr(self, name)[stay])


def _take(ids_BKT: Tensor, at_BN: Tensor) -> Tensor:
    """The sequences at `at` of each input: (B, N, T)."""
    return ids_BKT.gather(1, at_BN[:, :, None].expand(-1, -1, ids_BKT.shape[2]))


def largest(logits_RV: Tensor, count: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """``topk(count)`` of each row, by the largest of blocks first: one pass over the logits and no partial sort."""
    R, V = logits_RV.shape
    blocks = V // width
    if logits_RV.device.type != "cpu" or blocks <= 2 * count:
        best = logits_RV.topk(count, dim=1)
        return best.values, best.indices
    whole = logits_RV[:, : blocks * width].view(R, blocks, width)
    # The `count` largest lie in the `count` blocks whose largest are largest, or in the rest that fills no block.
    block_RC = whole.amax(2).topk(count, dim=1).indices
    kept = whole.gather(1, block_RC[:, :, None].expand(-1, -1, width)).flatten(1)
    place = (block_RC[:, :, None] * width + torch.arange(width)).flatten(1)
    if blocks * width < V:
        kept = torch.cat((kept, logits_RV[:, blocks * width :]), 1)
        place = torch.cat((place, torch.arange(blocks * width, V).expand(R, -1)), 1)
    value, at = kept.topk(count, dim=1)
    return value, place.gather(1, at)
