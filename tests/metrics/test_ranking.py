"""Ranking figures against closed forms, and against slow twins that order and draw everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from multihead.metrics import ranking


def twin(scores: np.ndarray, target: int, k: int) -> tuple[float, float, float]:
    """Hit, NDCG and reciprocal rank of one row, as the mean over every order of tied items."""
    possible = [i for i in range(len(scores)) if scores[i] > -np.inf]
    if target not in possible:
        return 0.0, 0.0, 0.0
    found = []
    for order in itertools.permutations(possible):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            place = order.index(target) + 1
            found.append((place <= k, (place <= k) / math.log2(1 + place), 1 / place))
    return tuple(np.mean(found, 0))  # type: ignore[return-value]


def test_ties_count_as_the_mean_over_all_orders() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, size=(40, 6)).astype(float)
    scores[rng.random(scores.shape) < 0.15] = -np.inf
    target = rng.integers(6, size=40)
    higher, tied, _ = ranking.places(scores, target)
    for k in (1, 2, 4):
        expected = np.array([twin(row, t, k) for row, t in zip(scores, target, strict=True)])
        np.testing.assert_allclose(ranking.hit(higher, tied, k), expected[:, 0], atol=1e-12)
        np.testing.assert_allclose(ranking.ndcg(higher, tied, k), expected[:, 1], atol=1e-12)
        np.testing.assert_allclose(ranking.reciprocal_rank(higher, tied), expected[:, 2], atol=1e-12)


def test_one_score_for_all_gets_what_chance_gets() -> None:
    higher, tied, candidates = ranking.places(np.zeros((3, 50)), np.array([0, 7, 49]))
    assert ranking.hit(higher, tied, 10) == pytest.approx(np.full(3, 10 / 50))
    hit, _ = ranking.sampled(higher, tied, candidates, 10, negatives=20)
    assert hit == pytest.approx(np.full(3, 10 / 21))


def test_torch_and_numpy_find_the_same_places() -> None:
    rng = np.random.default_rng(1)
    scores, target = rng.integers(0, 9, size=(20, 30)).astype(np.float32), rng.integers(30, size=20)
    ours = ranking.places(torch.from_numpy(scores), torch.from_numpy(target))
    for a, b in zip(ours, ranking.places(scores, target), strict=True):
        assert a.tolist() == b.tolist()


def test_sampled_figures_are_the_mean_over_all_draws() -> None:
    scores = np.array([[5.0, 3, 9, 1, 3, 8, -np.inf]])
    for target in range(6):
        others = [i for i in range(6) if i != target]
        drawn = [twin(scores[0][[target, *some]], 0, 2) for some in itertools.combinations(others, 3)]
        hit, ndcg = ranking.sampled(*ranking.places(scores, np.array([target])), k=2, negatives=3)
        assert (hit[0], ndcg[0]) == pytest.approx(np.mean(drawn, 0)[:2])


def test_sampling_as_many_as_there_are_is_the_full_ranking() -> None:
    rng = np.random.default_rng(2)
    place = ranking.places(rng.normal(size=(50, 30)), rng.integers(30, size=50))
    hit, ndcg = ranking.sampled(*place, k=5, negatives=100)
    np.testing.assert_allclose(hit, ranking.hit(*place[:2], 5), atol=1e-9)
    np.testing.assert_allclose(ndcg, ranking.ndcg(*place[:2], 5), atol=1e-9)


def test_means_weigh_rows_as_drawn_rows_would() -> None:
    rng = np.random.default_rng(3)
    values, drawn = rng.normal(size=9), rng.integers(9, size=(4, 9))
    weights = np.stack([np.bincount(d, minlength=9) for d in drawn]).astype(float)
    np.testing.assert_allclose(ranking.mean(values, weights), values[drawn].mean(1))


def test_what_lists_are_made_of() -> None:
    lists = np.array([[0, 1], [0, 2], [0, -1]])
    assert ranking.exposure(lists, 5).tolist() == [3, 1, 1, 0, 0]
    assert ranking.coverage(lists, 5) == 0.6
    counts = np.array([8, 4, 2, 1, 1])
    assert ranking.popularity(lists, counts).tolist() == [6, 5, 8]
    assert ranking.novelty(lists, counts).tolist() == [1.5, 2, 1]  # shares 1/2, 1/4, 1/8: 1, 2 and 3 bits


def test_gini_by_its_definition() -> None:
    assert ranking.gini(np.full(7, 3)) == pytest.approx(0)
    assert ranking.gini(np.array([0, 0, 0, 9])) == pytest.approx(3 / 4)
    counts = np.random.default_rng(4).integers(20, size=30)
    apart = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
    assert ranking.gini(counts) == pytest.approx(apart)
