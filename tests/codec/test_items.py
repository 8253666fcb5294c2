"""The catalogue: ids of any kind and size, there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multihead.codec.items import ItemCodec
from multihead.errors import UserError

BIG = str(2**64 + 1)
COUNTS = {"7": 2, "sku 9/é": 5, "07": 2, BIG: 1}


def test_the_most_frequent_item_is_number_0_and_equals_keep_their_order() -> None:
    codec = ItemCodec.fit(COUNTS)
    assert codec.names == ["sku 9/é", "7", "07", BIG] and codec.counts.tolist() == [5, 2, 2, 1]


def test_numbers_and_texts_of_any_size_name_the_same_item() -> None:
    codec = ItemCodec.fit(COUNTS)
    known, unknown = codec.encode([7, "7", 2**64 + 1, "nine", "07", 8])
    assert known.tolist() == [1, 1, 3, 2] and known.dtype == np.int32 and unknown == ["nine", "8"]
    assert [codec.decode(i) for i in known] == ["7", "7", BIG, "07"]


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    about = {"7": {"title": "诗", "features": ["brand=a", "brand=b"]}, "gone": {"title": "x", "features": ["brand=c"]}}
    codec = ItemCodec.fit(COUNTS, about)
    assert codec.shown(1) == {"id": "7", "title": "诗"} and codec.shown(0) == {"id": "sku 9/é"}
    assert codec.features == [[], [0, 1], [], []] and codec.feature_names == ["brand=a", "brand=b"]
    codec.save(tmp_path)
    again = ItemCodec.load(tmp_path)
    assert vars(again).keys() == vars(codec).keys()
    for name, value in vars(codec).items():
        assert np.array_equal(value, vars(again)[name]) if name == "counts" else value == vars(again)[name], name


def test_a_damaged_catalogue_and_one_of_a_single_item_are_refused(tmp_path: Path) -> None:
    ItemCodec.fit(COUNTS).save(tmp_path)
    path = tmp_path / "items.json"
    for text in ("", "[]", path.read_text("utf-8").replace('"07"', '"7"'), path.read_text("utf-8")[:-30]):
        path.write_text(text, "utf-8")
        with pytest.raises(UserError, match="damaged"):
            ItemCodec.load(tmp_path)
    with pytest.raises(UserError, match="two at least"):
        ItemCodec.fit({"only": 9})
