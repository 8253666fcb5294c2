"""CTC against the sum over all paths, written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from multihead.generation.ctc import PrefixScorer, align, best_path, joint_search, prefix_beam


def scores(T: int, V: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(0, 2, (T, V))
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


def text_of(path) -> tuple[int, ...]:
    return tuple(v for v, _ in itertools.groupby(path) if v)


def all_texts(logp: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every text: over every path."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(logp.shape[1]), repeat=len(logp)):
        p = float(np.exp(sum(logp[t, v] for t, v in enumerate(path))))
        found[text_of(path)] = found.get(text_of(path), 0.0) + p
    return found


@pytest.mark.parametrize("seed", range(4))
def test_prefix_beam_finds_the_likeliest_text(seed):
    logp = scores(6, 4, seed)
    ranked = sorted(all_texts(logp).items(), key=lambda one: -one[1])
    found = prefix_beam(logp, beam=200, width=4, sure=1e-12)
    assert [tuple(r.ids) for r in found[:5]] == [text for text, _ in ranked[:5]]
    assert found[0].score == pytest.approx(np.log(ranked[0][1]), abs=1e-9)
    assert tuple(best_path(logp).ids) == text_of(logp.argmax(1))


def test_scores_of_texts_are_torchs():
    logp = scores(8, 4)
    texts = {tuple(r.ids): r.score for r in prefix_beam(logp, beam=4000, width=4, sure=1e-12)[:8]}
    for text, score in texts.items():
        loss = torch.nn.functional.ctc_loss(torch.tensor(logp)[:, None], torch.tensor([text], dtype=torch.long),
                                            torch.tensor([8]), torch.tensor([len(text)]), reduction="sum")  # fmt: skip
        assert score == pytest.approx(-float(loss), abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_prefix_scores_are_sums_over_all_texts_that_begin_so(seed):
    logp = scores(6, 3, seed)
    texts, scorer = all_texts(logp), PrefixScorer(logp)
    states = {(): scorer.first()}
    for prefix in ((), (1,), (2,), (1, 1), (1, 2), (2, 1)):
        if prefix not in states:
            continue
        state = states[prefix][None]
        total = texts.get(prefix, 0.0)
        assert np.exp(scorer.ends(state)[0]) == pytest.approx(total, abs=1e-9)
        last = np.array([prefix[-1] if prefix else -1])
        found, longer = scorer.extended(state, last, np.array([[1, 2]]))
        for c in (1, 2):
            begins = sum(p for text, p in texts.items() if text[: len(prefix) + 1] == (*prefix, c))
            assert np.exp(found[0, c - 1]) == pytest.approx(begins, abs=1e-9), (prefix, c)
            states[(*prefix, c)] = longer[0, c - 1]


@pytest.mark.parametrize("ids", [[1], [1, 1], [2, 1, 3], [3, 3, 1]])
def test_the_alignment_is_the_likeliest_path_of_the_text(ids):
    logp = scores(7, 4, len(ids))
    paths = [p for p in itertools.product(range(4), repeat=7) if text_of(p) == tuple(ids)]
    best = max(paths, key=lambda p: sum(logp[t, v] for t, v in enumerate(p)))
    runs, at = [], 0
    for token, group in itertools.groupby(best):
        size = len(list(group))
        runs += [(at, at + size)] if token else []
        at += size
    assert [(a, b) for a, b, _ in align(logp, ids)] == runs
    assert align(logp[:2], [1, 1]) == []


class Uniform:
    """A decoder that finds all tokens equally likely, and its state."""

    def step(self, ids, state):
        return torch.zeros(len(ids), 5)

    def reorder(self, index):
        pass


def test_joint_search_weighs_both():
    logp, eos = scores(6, 5, 1), 4
    logp[:, eos] = -1e9
    one = Uniform()
    found = joint_search(one, one, torch.zeros(1, 5), logp, eos, beam=400, weight=1.0, limit=6)[0]
    best = max(all_texts(logp[:, :4]).items(), key=lambda text: text[1])
    assert tuple(found.ids) == best[0] and found.score == pytest.approx(np.log(best[1]), abs=1e-6)
    short = joint_search(one, one, torch.zeros(1, 5), logp, eos, beam=400, weight=0.0, limit=6)[0]
    assert short.ids == [] and short.score == pytest.approx(-np.log(5))
