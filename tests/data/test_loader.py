"""The loader: a pure function of seed and step that visits every row once an epoch, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multihead.data import loader as loading
from multihead.data.loader import Loader, Scattered, sequential, shares
from multihead.errors import UserError

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**40), st.booleans(), st.booleans())


def make(sizes, **more):
    rows, batch_size, seed, shuffle, bucketed = sizes
    lengths = np.random.default_rng(0).integers(1, 99, rows) if bucketed else None
    return Loader(rows, batch_size, seed=seed, shuffle=shuffle, lengths=lengths, **more)


@settings(deadline=None)
@given(SIZES, st.integers(0, 3))
def test_every_row_once_an_epoch_but_for_the_last_incomplete_batch(sizes, epoch):
    loader = make(sizes)
    size = min(sizes[0], sizes[1])
    batches = [loader.batch(epoch * len(loader) + i) for i in range(len(loader))]
    assert all(len(b) == size for b in batches) and len(loader) == sizes[0] // size
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) == sizes[0] // size * size
    assert seen.min() >= 0 and seen.max() < sizes[0]


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 3))
def test_scattered_numbers_are_all_of_them_once(n, seed, epoch):
    found = Scattered(n, seed, epoch, 0)[np.arange(n)]
    np.testing.assert_array_equal(np.sort(found), np.arange(n))


def test_where_rows_are_many_no_order_is_held_and_neighbours_lie_anywhere():
    many = 1 << 40
    loader = Loader(many, 512, seed=3)
    batch = loader.batch(123_456)
    assert len(np.unique(batch)) == 512 and abs(batch.mean() / many - 0.5) < 0.1
    np.testing.assert_array_equal(batch, Loader(many, 512, seed=3).batch(123_456))


@pytest.mark.parametrize("bucketed", [False, True])
def test_many_rows_are_dealt_out_as_few_are(bucketed, monkeypatch):
    monkeypatch.setattr(loading, "LARGE", 100)
    lengths = np.random.default_rng(0).integers(1, 99, 2000) if bucketed else None
    loader = Loader(2000, 6, seed=1, lengths=lengths)
    batches = [loader.batch(len(loader) + i) for i in range(len(loader))]
    assert len(np.unique(np.concatenate(batches))) == 1998
    if lengths is not None:
        assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 5


@settings(deadline=None)
@given(SIZES, st.lists(st.integers(0, 5000), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(sizes, steps):
    walked = make(sizes)
    for step in steps:
        fresh = make(sizes)
        np.testing.assert_array_equal(walked.batch(step), fresh.batch(step))


@settings(deadline=None)
@given(st.integers(1, 200), st.none() | st.integers(1, 250), st.integers(1, 9))
def test_processes_share_a_batch_without_overlap_or_loss(rows, at_once, world):
    if rows < world:
        with pytest.raises(UserError, match="shared by"):
            shares(rows, at_once, 0, world)
        return
    dealt = [shares(rows, at_once, rank, world) for rank in range(world)]
    assert len({len(mine) for mine in dealt}) == 1, "every process takes part in every sum of gradients"
    micros = sorted(micro for mine in dealt for micro in mine)
    assert [number for number, _, _ in micros] == list(range(len(micros)))
    covered = [row for _, start, stop in micros for row in range(start, stop)]
    assert covered == list(range(rows)) and all(start < stop for _, start, stop in micros)
    if at_once:  # a row too many only where each process would else have to work on less than one
        assert max(stop - start for _, start, stop in micros) <= max(at_once, 2)
    if world == 1:
        size = at_once or rows
        assert micros == [(n, start, min(start + size, rows)) for n, start in enumerate(range(0, rows, size))]


def test_epochs_and_seeds_differ():
    loader = Loader(1000, 100, seed=1)
    first = np.concatenate([loader.batch(i) for i in range(10)])
    second = np.concatenate([loader.batch(i) for i in range(10, 20)])
    other = Loader(1000, 100, seed=2).batch(0)
    assert (first != second).mean() > 0.9 and (first[:100] != other).mean() > 0.9
    # Shuffled: a row's place says nothing about its number (correlation of 1000 pairs, sigma 0.03).
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


def test_buckets_save_padding_and_still_differ_each_epoch():
    lengths = np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int) + 1
    plain, bucketed = Loader(20_000, 32), Loader(20_000, 32, lengths=lengths)

    def padding(loader):
        used = [lengths[loader.batch(i)] for i in range(len(loader))]
        return sum(len(u) * u.max() for u in used) / sum(u.sum() for u in used)

    assert padding(bucketed) < 1.3 < 2.5 < padding(plain)
    one, two = bucketed.batch(0), bucketed.batch(len(bucketed))
    assert set(one.tolist()) != set(two.tolist())
    order = [lengths[bucketed.batch(i)].mean() for i in range(len(bucketed))]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.15, "short batches do not all come first"


@given(st.integers(0, 200), st.integers(1, 50), st.booleans())
def test_sequential_covers_every_row_once(n, batch_size, sort):
    lengths = np.random.default_rng(1).integers(0, 50, n) if sort else None
    batches = list(sequential(n, batch_size, lengths))
    seen = np.concatenate([*batches, np.empty(0, np.int64)])
    assert sorted(seen.tolist()) == list(range(n))
    assert all(len(b) == batch_size for b in batches[:-1])
    if lengths is None:
        assert seen.tolist() == list(range(n))
    else:
        assert np.all(np.diff(lengths[seen.astype(int)]) <= 0)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="no rows"):
        Loader([], 8)
    for wrong in ({"batch_size": 0}, {"lengths": np.ones(3)}):
        with pytest.raises(ValueError):
            Loader(**{"examples": 8, "batch_size": 4, **wrong})
