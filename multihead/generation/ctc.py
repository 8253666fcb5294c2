"""Reading a text off the frames of a recording: Connectionist Temporal Classification (Graves et al. 2006), alone and
together with an attention decoder (Watanabe et al. 2017).

A frame says a token or blank (id 0); repeats without a blank between them are one token.

Legend: T frames, V vocabulary, L tokens, K beams, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from multihead.generation.fusion import Fusion
from multihead.transformer.cache import Cache

BLANK = 0
WIDER = 4
"""So many times the beam are shown to a language model, the likeliest by what is known before it speaks."""
NEVER = -1e30
Scores = np.ndarray


class Reading(NamedTuple):
    """A text read from a recording."""

    ids: list[int]
    score: float
    """Its log-probability: by CTC, or the weighted sum of both where they were searched together."""


def best_path(logp_TV: Scores) -> Reading:
    """The likeliest token of each frame, repeats and blanks taken out: fast, and nearly the likeliest text."""
    path_T = logp_TV.argmax(1)
    new_T = (path_T != BLANK) & (path_T != np.concatenate(([-1], path_T[:-1])))
    return Reading(path_T[new_T].tolist(), float(logp_TV.max(1).sum()))


def prefix_beam(logp_TV: Scores, beam: int = 8, width: int = 16, sure: float = 1e-4, fusion: Fusion | None = None
                ) -> list[Reading]:
    """The likeliest texts, each the sum over all its paths (Graves 2008, section 7.5.3; Hannun et al. 2014, algorithm
    1).

    Args:
        beam: prefixes kept at every frame.
        width: tokens looked at in every frame, and `sure`: none less likely than this.
        fusion: adds a language model's say to the log-probability of each text.
    """
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, NEVER)}  # prefix → ends in blank, ends in token
    judged: dict[tuple[int, ...], float] = {(): 0.0}
    width = min(width, logp_TV.shape[1])
    least = np.log(sure)
    for logp_V in logp_TV.astype(np.float64):
        likely = np.argpartition(-logp_V, width - 1)[:width]
        tokens = [(int(v), float(logp_V[v])) for v in likely if v != BLANK and logp_V[v] > least]
        blank = float(logp_V[BLANK])
        found: dict[tuple[int, ...], list[float]] = {}
        for prefix, (in_blank, in_token) in beams.items():
            both = _add(in_blank, in_token)
            here = found.setdefault(prefix, [NEVER, NEVER])
            here[0] = _add(here[0], both + blank)
            if prefix:
                here[1] = _add(here[1], in_token + float(logp_V[prefix[-1]]))
            for token, logp in tokens:
                longer = found.setdefault((*prefix, token), [NEVER, NEVER])
                longer[1] = _add(longer[1], (in_blank if prefix and prefix[-1] == token else both) + logp)
        beams = _best(found, beam, judged, fusion)
    if fusion is not None:
        judged = dict(zip(beams, fusion.scores(list(beams), whole=True).tolist(), strict=True))
    readings = [Reading(list(prefix), _add(a, b) + judged.get(prefix, 0.0)) for prefix, (a, b) in beams.items()]
    return readings if fusion is None else sorted(readings, key=lambda one: -one.score)


def _best(found: dict[tuple[int, ...], list[float]], beam: int, judged: dict[tuple[int, ...], float],
          fusion: Fusion | None) -> dict[tuple[int, ...], tuple[float, float]]:
    """The `beam` likeliest prefixes; `judged` (prefix → the language model's say) learns of new ones."""
    total = {prefix: _add(*both) for prefix, both in found.items()}
    if fusion is not None:
        hoped = {prefix: judged.get(prefix, judged.get(prefix[:-1], 0.0)) for prefix in total}
        shown = sorted(total, key=lambda prefix: (-total[prefix] - hoped[prefix], prefix))[: WIDER * beam]
        fresh = [prefix for prefix in shown if prefix not in judged]
        judged |= zip(fresh, fusion.scores(fresh).tolist(), strict=True)
        total = {prefix: total[prefix] + judged[prefix] for prefix in shown}
    ranked = sorted(total, key=lambda prefix: (-total[prefix], prefix))[:beam]
    return {prefix: (found[prefix][0], found[prefix][1]) for prefix in ranked}


def _add(a: float, b: float) -> float:
    """log(eᵃ + eᵇ)."""
    if a < b:
        a, b = b, a
    return a if b <= NEVER / 2 else a + float(np.log1p(np.exp(b - a)))


def align(logp_TV: Scores, ids: list[int]) -> list[tuple[int, int, float]]:
    """The likeliest path of a known text through the frames (Viterbi over blanks and tokens).

    Returns:
        Of each token its first frame, the frame behind its last, and its mean probability there; empty where the text
        has more tokens than the frames can say.
    """
    states = np.full(2 * len(ids) + 1, BLANK)
    states[1::2] = ids
    S, T = len(states), len(logp_TV)
    skips = np.zeros(S, bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    score_S = np.full(S, NEVER)
    score_S[:2] = logp_TV[0, states[:2]]
    moves_TS = np.zeros((T, S), np.int8)
    for t in range(1, T):
        before = np.full((3, S), NEVER)
        before[0] = score_S
        before[1, 1:] = score_S[:-1]
        before[2, 2:] = np.where(skips[2:], score_S[:-2], NEVER)
        moves_TS[t] = before.argmax(0)
        score_S = before.max(0) + logp_TV[t, states]
    at = S - 1 if S == 1 or score_S[-1] >= score_S[-2] else S - 2
    if not ids or score_S[at] <= NEVER / 2:
        return []
    path = np.zeros(T, int)
    for t in range(T - 1, -1, -1):
        path[t] = at
        at -= moves_TS[t, at]
    found = []
    for i, token in enumerate(ids):
        frames = np.flatnonzero(path == 2 * i + 1)
        found.append((int(frames[0]), int(frames[-1]) + 1, float(np.exp(logp_TV[frames, token]).mean())))
    return found


# -- CTC and attention together ----------------------------------------------------------------------------------------


class PrefixScorer:
    """log P(a text begins so | recording) by CTC, a token at a time (Watanabe et al. 2017, algorithm 2).

    The state of a prefix is (T, 2): of each frame the log-probability of all paths that have said just the prefix there
    and end in a token, and in a blank.
    """

    def __init__(self, logp_TV: Scores) -> None:
        self.logp_TV = logp_TV.astype(np.float64)

    def first(self) -> Scores:
        """The state of the empty prefix."""
        blank_T = self.logp_TV[:, BLANK].cumsum()
        return np.stack((np.full_like(blank_T, NEVER), blank_T), axis=1)

    def ends(self, state_KT2: Scores) -> Scores:
        """log P(the text is the prefix), (K,)."""
        return np.logaddexp(state_KT2[:, -1, 0], state_KT2[:, -1, 1])

    def extended(self, state_KT2: Scores, last_K: Scores, token_KC: Scores) -> tuple[Scores, Scores]:
        """Each prefix with each of its candidates behind it: scores (K, C) and states (K, C, T, 2).

        Args:
            last_K: the prefixes' last tokens, −1 for the empty one.
        """
        T, (K, C) = len(self.logp_TV), token_KC.shape
        say_TKC = self.logp_TV[:, token_KC]
        both_KT = np.logaddexp(state_KT2[..., 0], state_KT2[..., 1])
        same_KC = token_KC == last_K[:, None]
        # What leads to the token at t: all paths of the prefix until t − 1; after the same token, through a blank only.
        before_TKC = np.where(same_KC, state_KT2[..., 1].T[..., None], both_KT.T[..., None])
        out_TKC2 = np.full((T, K, C, 2), NEVER)
        out_TKC2[0, ..., 0] = np.where(last_K[:, None] < 0, say_TKC[0], NEVER)
        total_KC = out_TKC2[0, ..., 0].copy()
        for t in range(1, T):
            token, blank = out_TKC2[t - 1, ..., 0], out_TKC2[t - 1, ..., 1]
            out_TKC2[t, ..., 0] = np.logaddexp(token, before_TKC[t - 1]) + say_TKC[t]
            out_TKC2[t, ..., 1] = np.logaddexp(token, blank) + self.logp_TV[t, BLANK]
            total_KC = np.logaddexp(total_KC, before_TKC[t - 1] + say_TKC[t])
        return total_KC, np.moveaxis(out_TKC2, 0, 2)


@dataclass
class _Alive:
    """The beams that go on."""

    ids: list[list[int]]
    heard_K: Scores
    """Log-probability of each by the decoder."""
    state_KT2: Scores
    judged_K: Scores
    """What a language model adds to each; 0 without one."""


@torch.no_grad()
def joint_search(
    model: Any, state: Cache, logits_1V: torch.Tensor, logp_TV: Scores, eos: int, beam: int = 8, weight: float = 0.3,
    limit: int = 200, never: tuple[int, ...] = (BLANK,), fusion: Fusion | None = None,
) -> list[Reading]:
    """The texts that CTC and the attention decoder together find likeliest, the best first (Watanabe et al. 2017,
    section II-C): weight · log P_CTC + (1 − weight) · log P_attention.

    Neither probability grows with a token more, so the search is over once no beam that goes on is worth more than the
    best that has ended. CTC, which must account for every frame, keeps texts from ending early and from going in
    circles: no penalty on length is needed.

    Args:
        model: with ``step(ids, cache)``, begun for this one recording: `state`, `logits_1V`.
        limit: most tokens.
        never: ids that are no part of a text.
        fusion: adds a language model's say to the score of each text; it too grows with no token more, but for a
            tokenizer that finds a longer, likelier token for the same characters.
    """
    scorer = PrefixScorer(logp_TV)
    alive = _Alive([[]], np.zeros(1), scorer.first()[None], np.zeros(1))
    ended: list[Reading] = []
    logits_KV = logits_1V
    for _ in range(limit + 1):
        logp_KV = logits_KV.float().log_softmax(-1).cpu().numpy().astype(np.float64)
        end_K = (1 - weight) * (alive.heard_K + logp_KV[:, eos]) + weight * scorer.ends(alive.state_KT2)
        end_K = end_K if fusion is None else end_K + fusion.scores(alive.ids, whole=True)
        ended += [Reading(ids, float(score)) for ids, score in zip(alive.ids, end_K, strict=True)]
        logp_KV[:, [*never, eos]] = NEVER
        C = min(2 * beam, logp_KV.shape[1] - len(never) - 1)
        token_KC = np.argpartition(-logp_KV, C - 1, axis=1)[:, :C]
        last_K = np.array([ids[-1] if ids else -1 for ids in alive.ids])
        ctc_KC, state_KCT2 = scorer.extended(alive.state_KT2, last_K, token_KC)
        heard_KC = alive.heard_K[:, None] + np.take_along_axis(logp_KV, token_KC, 1)
        score_X = ((1 - weight) * heard_KC + weight * ctc_KC).ravel()
        judged_X = alive.judged_K.repeat(C)
        if fusion is not None:
            shown = np.argsort(-score_X - judged_X, kind="stable")[: WIDER * beam]
            judged_X[shown] = fusion.scores([[*alive.ids[x // C], int(token_KC.flat[x])] for x in shown])
            score_X[np.setdiff1d(np.arange(len(score_X)), shown)] = NEVER
        score_X = score_X + judged_X
        chosen = np.argsort(-score_X, kind="stable")[:beam]
        chosen = chosen[score_X[chosen] > max(max(r.score for r in ended), NEVER / 2)]
        if not len(chosen) or len(alive.ids[0]) >= limit:
            break
        row, column = np.divmod(chosen, C)
        token_K = token_KC[row, column]
        alive = _Alive([[*alive.ids[k], int(v)] for k, v in zip(row, token_K, strict=True)], heard_KC[row, column],
                       state_KCT2[row, column], judged_X[chosen])
        state.reorder(torch.from_numpy(row))
        logits_KV = model.step(torch.from_numpy(token_K).to(logits_KV.device), state)
    return sorted(ended, key=lambda one: -one.score)[:beam]
