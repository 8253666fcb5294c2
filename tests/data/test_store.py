"""The store: what is written is read, the same bytes every time, and nothing broken is opened."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from multihead.data.columns import Row
from multihead.data.store import Store, StoreWriter, Windows
from multihead.errors import UserError

VALUES = st.sampled_from(["<i4", ">i2", "u1", "<f4", "?", "<i8", "float16"])


@st.composite
def examples(draw):
    """A list of examples with equal keys, dtypes and trailing shapes, the first axis ragged or absent."""
    keys = draw(st.dictionaries(st.sampled_from(["ids", "label", "mel", "weights"]),
                                st.tuples(VALUES, st.booleans(), st.lists(st.integers(1, 3), max_size=2)), min_size=1))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        row = {}
        for key, (dtype, ragged, trailing) in keys.items():
            shape = (draw(st.integers(0, 5)), *trailing) if ragged else ()
            row[key] = draw(hnp.arrays(np.dtype(dtype), shape))
        rows.append(row)
    return rows


def write(folder, rows, raw=None):
    with StoreWriter(folder) as writer:
        for i, row in enumerate(rows):
            writer.add(row, None if raw is None else raw[i])
    return Store(folder)


@settings(max_examples=40, deadline=None)
@given(examples())
def test_what_is_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("s")
    raw = [Row({"text": f"第{i}行\n\x00\u2028", "n": i, "list": ["a"]}, where=f"a.csv:{i}") for i in range(len(rows))]
    store = write(folder / "one", rows, raw)
    assert len(store) == len(rows) and sorted(store.keys) == sorted(rows[0])
    for i, row in enumerate(rows):
        for key, array in row.items():
            found = store[i][key]
            assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder("<")
            np.testing.assert_array_equal(found, array)
            assert not found.flags.writeable
        assert store.row(i) == raw[i] and store.row(i).where == raw[i].where
    for key in store.keys:
        np.testing.assert_array_equal(store.lengths(key), [len(r[key]) if r[key].ndim else 1 for r in rows])
        joined = np.concatenate([np.atleast_1d(r[key]) for r in rows])
        np.testing.assert_array_equal(store.stream(key), joined)
    assert store[-1].keys() == rows[0].keys() and list(store.rows()) == raw
    with pytest.raises(IndexError):
        store[len(rows)]
    write(folder / "two", rows, raw)
    files = sorted(p.name for p in (folder / "one").iterdir())
    assert files == sorted(p.name for p in (folder / "two").iterdir())
    assert all((folder / "one" / f).read_bytes() == (folder / "two" / f).read_bytes() for f in files)


def test_an_empty_store_and_empty_arrays(tmp_path):
    assert len(write(tmp_path / "none", [])) == 0
    store = write(tmp_path / "blank", [{"ids": np.zeros(0, np.int32)}])
    assert store[0]["ids"].shape == (0,) and len(Windows(store, "ids", 4)) == 0


def test_a_store_replaces_the_old_one_only_when_whole(tmp_path):
    write(tmp_path / "s", [{"ids": np.arange(3)}])
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s") as writer:
        writer.add({"ids": np.arange(9)})
        raise RuntimeError
    assert len(Store(tmp_path / "s")[0]["ids"]) == 3
    abandoned = StoreWriter(tmp_path / "s")  # killed: neither closed nor abandoned
    abandoned.add({"ids": np.arange(5)})
    assert len(Store(tmp_path / "s")[0]["ids"]) == 3
    write(tmp_path / "s", [{"ids": np.arange(4)}])
    assert len(Store(tmp_path / "s")[0]["ids"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "nothing left beside it"


def test_a_swap_cut_in_the_middle_is_healed(tmp_path):
    write(tmp_path / "s", [{"ids": np.arange(3)}])
    (tmp_path / "s").rename(tmp_path / ".s.old")  # killed between the two renames
    with pytest.raises(UserError, match="prepare"):
        Store(tmp_path / "s")
    write(tmp_path / "s", [{"ids": np.arange(4)}])
    assert len(Store(tmp_path / "s")[0]["ids"]) == 4 and not (tmp_path / ".s.old").exists()


@pytest.mark.parametrize("second", [
    {"ids": np.arange(3)}, {"ids": np.arange(3, dtype=np.int32), "more": np.int64(1)}, {"ids": np.int32(3)},
    {"ids": np.zeros((3, 2), np.int32)}, {}, {"ids": np.array(["a"])},
])
def test_examples_must_agree(tmp_path, second):
    with pytest.raises(ValueError), StoreWriter(tmp_path / "s") as writer:
        writer.add({"ids": np.arange(3, dtype=np.int32)})
        writer.add(second)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../ids", "a b", "", "rows", "index", "ids.offsets"])
def test_keys_are_plain_names(tmp_path, key):
    with pytest.raises(ValueError, match="plain name"), StoreWriter(tmp_path / "s") as writer:
        writer.add({key: np.arange(3)})


def test_a_broken_store_says_to_prepare_again(tmp_path):
    raw = [{"text": "a"}, {"text": "b"}]
    good = tmp_path / "good"
    write(good, [{"ids": np.arange(3), "y": np.int64(1)}, {"ids": np.arange(2), "y": np.int64(0)}], raw)
    index = json.loads((good / "index.json").read_text())

    def damage(change):
        shutil.copytree(good, tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(UserError) as error:
            store = Store(tmp_path / "bad")
            list(store.rows())
        assert "Run `multihead prepare` again" in str(error.value) and str(tmp_path / "bad") in str(error.value)
        shutil.rmtree(tmp_path / "bad")

    for file in sorted(p.name for p in good.iterdir()):
        data = (good / file).read_bytes()
        damage(lambda f, file=file: (f / file).unlink())
        damage(lambda f, file=file, data=data: (f / file).write_bytes(data[:-2]))
        damage(lambda f, file=file, data=data: (f / file).write_bytes(data + b"\0"))
    damage(lambda f: (f / "ids.offsets.bin").write_bytes(np.array([0, 3, 4], "<i8").tobytes()))
    damage(lambda f: (f / "rows.jsonl").write_bytes(b"x" * index["raw_bytes"]))
    for key, value in [("version", 99), ("rows", 3), ("keys", {"ids": {}}), ("keys", []), ("rows", None)]:
        damage(lambda f, k=key, v=value: (f / "index.json").write_text(json.dumps(index | {k: v})))


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """n → a store whose stream of "ids" is 0 … n-1 in two rows."""
    stores = {}

    def get(n):
        halves = [np.arange(n // 2, dtype=np.int32), np.arange(n // 2, n, dtype=np.int32)]
        if n not in stores:
            stores[n] = write(tmp_path_factory.mktemp("w") / "s", [{"ids": half} for half in halves])
        return stores[n]

    return get


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_windows_cover_the_stream_exactly(counted, total, length, stride, offset):
    stride = min(stride, length)
    windows = [w["ids"] for w in Windows(counted(total), "ids", length, stride, offset)]
    overlap = length - stride
    assert all(0 < len(w) <= length for w in windows)
    # Each window after the first repeats `overlap` positions and adds new ones; without those it is the stream.
    parts = windows[:1] + [w[overlap:] for w in windows[1:]]
    assert [int(i) for part in parts for i in part] == list(range(total))
    assert all(len(w) > overlap for w in windows[1:])
    assert all(len(w) == length for w in windows[1:-1])
    phase = offset % stride
    assert all(int(w[0]) % stride == phase for w in windows[1:])


def test_reading_and_writing_are_bounded_in_memory(tmp_path):
    tracemalloc.start()
    with StoreWriter(tmp_path / "s") as writer:
        for i in range(600):
            writer.add({"ids": np.full(25_000, i, np.int32)}, {"text": "x" * 50_000})
    store = Store(tmp_path / "s")
    assert sum(int(example["ids"][-1]) for example in store) == 600 * 599 // 2
    assert sum(len(row["text"]) for row in store.rows()) == 30_000_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20, "the store holds 90 MB"
    tracemalloc.stop()
