"""Filters against their definitions and against transformers' own; draws against the probabilities they come from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multihead.errors import UserError
from multihead.generation.sampling import Sampling, distribution, keep_top_k, keep_top_p, penalise, sample

logits_BV = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
scores = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30)


def one(**wishes: object) -> list[Sampling]:
    return [Sampling.of(wishes)] * len(logits_BV)


def test_temperature_divides_logits() -> None:
    for t in (0.3, 1.0, 2.5):
        got = distribution(logits_BV, one(temperature=t))
        assert torch.allclose(got, (logits_BV / t).softmax(1), atol=1e-6)


@given(scores, st.integers(1, 40))
@settings(deadline=None)
def test_top_k_keeps_the_k_largest_and_their_ties(row: list[float], k: int) -> None:
    kept = keep_top_k(torch.tensor([row]), [k])[0].isfinite().tolist()
    least = sorted(row, reverse=True)[min(k, len(row)) - 1]
    assert kept == [value >= least for value in row]


@given(scores, st.floats(0.01, 0.999))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    kept = keep_top_p(torch.tensor([row]), [p])[0].isfinite()
    share = torch.tensor(row).double().softmax(0)
    inside = share[kept]
    assert inside.sum() >= p - 1e-5
    assert inside.sum() - inside.min() < p + 1e-5
    # The sampler adds up in float32: scores closer together than its rounding are one to it.
    assert not (~kept).any() or share[~kept].max() <= inside.min() + 1e-6


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 9.0])
def test_top_p_of_a_large_vocabulary(spread: float) -> None:
    """Sets of a few tokens up to nearly all: however far the search has to go, the set is the smallest."""
    rows = torch.randn(3, 9000, generator=torch.Generator().manual_seed(3)) * spread
    kept = keep_top_p(rows, [0.9, 1.0, 0.3]).isfinite()
    assert kept[1].all()
    for row, inside, p in ((rows[0], kept[0], 0.9), (rows[2], kept[2], 0.3)):
        share = row.double().softmax(0).sort(descending=True).values
        smallest = int((share.cumsum(0) < p).sum()) + 1
        assert abs(int(inside.sum()) - smallest) <= 1  # the last one may hang on float32's rounding
        assert row[inside].min() > row[~inside].max()


def test_each_row_has_its_own_wishes() -> None:
    wishes = [
        Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(temperature=0.1), Sampling(top_k=5, top_p=0.9)
    ]
    together = distribution(logits_BV, wishes)
    for i, wish in enumerate(wishes):
        assert torch.equal(together[i : i + 1], distribution(logits_BV[i : i + 1], [wish]))
    assert (together[1] > 0).sum() == 3


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_formula(penalty: float) -> None:
    history = [[1, 2, 2], [], [39], [0, 5], [7]]
    got = penalise(logits_BV, history, [penalty] * 4 + [1.0])
    for row, (scores_V, seen) in enumerate(zip(logits_BV, history, strict=True)):
        for token, score in enumerate(scores_V.tolist()):
            if token in seen and row < 4:
                score = score / penalty if score > 0 else score * penalty
            assert float(got[row, token]) == pytest.approx(score, rel=1e-6)


def test_filters_equal_those_of_transformers() -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.randint(0, 40, (5, 12), generator=torch.Generator().manual_seed(1))
    chain = [
        logits_process.RepetitionPenaltyLogitsProcessor(1.4), logits_process.TemperatureLogitsWarper(0.8),
        logits_process.TopKLogitsWarper(12), logits_process.TopPLogitsWarper(0.85),
    ]
    expected = logits_BV.clone()
    for part in chain:
        expected = part(ids, expected)
    wishes = one(temperature=0.8, top_k=12, top_p=0.85, repetition_penalty=1.4)
    got = distribution(penalise(logits_BV, ids.tolist(), [1.4] * 5), wishes)
    assert torch.allclose(got, expected.softmax(1), atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Pearson's χ² of 20,000 draws stays below its 99.99 % quantile, and nothing outside top-k is drawn."""
    wish, draws = Sampling(top_k=6, temperature=1.5, seed=7), 20_000
    row_V, generator = logits_BV[0], wish.generator()
    counts = torch.zeros(40)
    for _ in range(draws // 500):
        chosen = sample(row_V.expand(500, -1), [[]] * 500, [wish] * 500, [generator] * 500)
        counts += torch.bincount(chosen, minlength=40)
    expected = distribution(row_V[None], [wish])[0] * draws
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    assert ((counts - expected)[inside] ** 2 / expected[inside]).sum() < 25.7  # 5 degrees of freedom


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    wishes = [Sampling(seed=i, temperature=0 if i == 2 else 1.0, top_p=0.9) for i in range(5)]
    history = [[1]] * 5
    together = [w.generator() for w in wishes]
    alone = [w.generator() for w in wishes]
    for _ in range(20):
        ids = sample(logits_BV, history, wishes, together).tolist()
        for i in range(5):
            assert ids[i] == int(sample(logits_BV[i : i + 1], [[1]], [wishes[i]], [alone[i]]))
    assert ids[2] == int(logits_BV[2].argmax())


def test_seeds_repeat_and_samples_differ() -> None:
    def draw(wish: Sampling, which: int = 0) -> list[int]:
        generator = wish.generator(which)
        return [int(sample(logits_BV[:1] / 9, [[]], [wish], [generator])) for _ in range(30)]

    assert draw(Sampling(seed=5)) == draw(Sampling(seed=5)) != draw(Sampling(seed=6))
    assert draw(Sampling(seed=5), 1) != draw(Sampling(seed=5), 0)
    assert draw(Sampling()) != draw(Sampling())


def test_greedy_takes_the_largest_after_the_penalty() -> None:
    best = logits_BV.argmax(1)
    assert torch.equal(sample(logits_BV, [[]] * 5, one(temperature=0), [Sampling().generator()] * 5), best)
    history = [[int(i)] for i in best]
    got = sample(logits_BV, history, one(temperature=0, repetition_penalty=10), [Sampling().generator()] * 5)
    assert (got != best).all()


@pytest.mark.parametrize(("name", "value"), [
    ("max_tokens", 0), ("max_tokens", 2.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", math.nan),
    ("temperature", "hot"), ("temperature", math.inf), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1),
    ("repetition_penalty", 0), ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 17), ("stop", 3), ("seed", "a"),
    ("seed", 1.0), ("top_p", None), ("max_tokens", None),
])
def test_values_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        Sampling.of({name: value})


def test_all_faults_are_told_at_once_and_unknown_names_get_a_hint() -> None:
    with pytest.raises(UserError) as caught:
        Sampling.of({"temprature": 1, "top_k": -3, "stop": "。", "seed": 4})
    assert len(caught.value.problems) == 2
    assert "did you mean 'temperature'" in str(caught.value)


def test_what_is_given_is_kept() -> None:
    got = Sampling.of({"stop": ["a", "b"], "temperature": 1, "top_k": 4, "seed": -1, "max_tokens": 3})
    assert got == Sampling(3, 1.0, 4, 1.0, 1.0, ("a", "b"), -1)
    assert Sampling.of({"stop": "end"}).stop == ("end",)
    assert Sampling.of({}) == Sampling()
