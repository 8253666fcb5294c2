"""Figures of ranked lists, exact and vectorised: where the right item stands among all, and what the lists are made of.

A place is told by three numbers: how many candidates score higher than the right item, how many score the same (itself
among them), and how many candidates there are. Of tied items every order is as likely, and each figure is its mean over
all of them (McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the presence
of tied scores"): a model that gives all items one score gets what chance gets, not all or nothing.

Legend: n rows, I items, k length of a list, R resamples (`metrics.intervals.bootstrap`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def places(scores: Any, target: Any) -> tuple[Any, Any, Any]:
    """(higher, tied, candidates), each (n,), of items with scores (n, I), −inf where an item is no candidate; NumPy
    arrays or torch tensors. A target that is no candidate itself has 0 tied.

    Args:
        target: (n,) number of the right item.
    """
    own = scores[range(len(target)), target][:, None]
    nothing = float("-inf")
    return (scores > own).sum(1), (scores == own).sum(1) * (own[:, 0] > nothing), (scores > nothing).sum(1)


def hit(higher: Array, tied: Array, k: int) -> Array:
    """(n,) Whether the right item is among the first k (with ties: how likely); 0 where it is no candidate. With one
    right item a row this is both the hit rate and recall at k."""
    return np.clip(k - higher, 0, tied) / np.maximum(tied, 1)


def ndcg(higher: Array, tied: Array, k: int) -> Array:
    """(n,) 1 / log2(1 + place) where the place is k or better, else 0 (Järvelin & Kekäläinen 2002; the ideal is 1 where
    one item is right)."""
    gain = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))))
    return (gain[np.minimum(higher + tied, k)] - gain[np.minimum(higher, k)]) / np.maximum(tied, 1)


def reciprocal_rank(higher: Array, tied: Array) -> Array:
    """(n,) 1 / place; 0 where the right item is no candidate. The mean is MRR."""
    if not len(higher):
        return np.zeros(0)
    harmonic = np.concatenate(([0.0], np.cumsum(1 / np.arange(1, int((higher + tied).max()) + 1))))
    return (harmonic[higher + tied] - harmonic[higher]) / np.maximum(tied, 1)


def sampled(higher: Array, tied: Array, candidates: Array, k: int, negatives: int = 100) -> tuple[Array, Array]:
    """(hit, NDCG) at k, each (n,), were the right item ranked among `negatives` others drawn at random, as many papers
    do: their expectation over all draws, so that nothing is drawn.

    Of N others of which g score higher, the number that is drawn of those is hypergeometric (Krichene & Rendle 2020,
    "On Sampled Metrics for Item Recommendation", section 4, with replacement there). These figures are far higher than
    those over all items, and need not order models alike.
    """
    most = int(candidates.max()) if len(candidates) else 0
    facts = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, most + 1)))))
    gain = 1 / np.log2(np.arange(2, k + 2))
    # Equal places share the work: of a model without ties there are few, of one that ties all, fewer still.
    keys, back = np.unique(np.stack((higher, tied, candidates), 1), axis=0, return_inverse=True)
    found = np.zeros((len(keys), 2))
    single = np.flatnonzero(keys[:, 1] == 1)
    chance = _few(keys[single, 0], keys[single, 2] - 1, negatives, k, facts)
    found[single] = np.stack((chance.sum(1), chance @ gain), 1)
    for i in np.flatnonzero(keys[:, 1] > 1):
        g, e, count = keys[i].tolist()
        chance = _few(np.arange(g, g + e), np.full(e, count - 1), negatives, k, facts)
        found[i] = chance.sum(1).mean(), (chance @ gain).mean()
    return found[back.ravel(), 0], found[back.ravel(), 1]


def _few(higher: Array, others: Array, negatives: int, k: int, facts: Array) -> Array:
    """(m, k) chance that exactly j = 0 … k − 1 of `negatives` drawn out of `others` (m,) are among those `higher` (m,).

    Args:
        facts: facts[i] = ln i!
    """
    g, total, j = higher[:, None], others[:, None], np.arange(k)[None]
    drawn = np.minimum(negatives, total)
    possible = (j <= g) & (j <= drawn) & (drawn - j <= total - g)
    a, b = np.where(possible, j, 0), np.where(possible, drawn - j, 0)
    rest = np.where(possible, total - g, 0)
    ways = facts[g] - facts[a] - facts[np.maximum(g - a, 0)] + facts[rest] - facts[b] - facts[np.maximum(rest - b, 0)]
    ways = ways - (facts[total] - facts[drawn] - facts[total - drawn])
    return np.where(possible, np.exp(np.where(possible, ways, 0.0)), 0.0)


def mean(values: Array, weights: Array | None = None) -> Any:
    """Mean of (n,) values; with weights (R, n), (R,)."""
    return values.mean() if weights is None else weights @ values / weights.sum(1)


# -- what the lists are made of ----------------------------------------------------------------------------------------


def exposure(lists: Array, items: int) -> Array:
    """(I,) how often each item is recommended. `lists`: (n, k) numbers of items, −1 where a list is shorter."""
    return np.bincount(lists[lists >= 0], minlength=items)


def coverage(lists: Array, items: int) -> float:
    """Share of all items that are in some list."""
    return float((exposure(lists, items) > 0).mean())


def gini(counts: Array) -> float:
    """Gini coefficient of counts (I,): 0 where all items are recommended equally often, near 1 where one has it all."""
    total = float(counts.sum())
    if not total:
        return 0.0
    ordered = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float(((2 * ranks - len(ordered) - 1) @ ordered) / (len(ordered) * total))


def popularity(lists: Array, counts: Array) -> Array:
    """(n,) mean number of training interactions of the items in each list (average recommendation popularity,
    Abdollahpouri et al. 2019); `counts` (I,)."""
    real = lists >= 0
    return np.where(real, counts[lists], 0).sum(1) / np.maximum(real.sum(1), 1)


def novelty(lists: Array, counts: Array) -> Array:
    """(n,) mean self-information in bits of the items in each list, −log2 of an item's share of all training
    interactions (Zhou et al. 2010)."""
    bits = -np.log2(np.maximum(counts, 1) / max(1, int(counts.sum())))
    real = lists >= 0
    return np.where(real, bits[lists], 0.0).sum(1) / np.maximum(real.sum(1), 1)
