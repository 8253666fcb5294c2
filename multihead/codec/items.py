"""The catalogue: ids of things, strings or numbers of any size, as numbers from 0; with counts, titles and features."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multihead.errors import UserError, tr
from multihead.run import write_json

ITEMS = "items.json"


class ItemCodec:
    """Ids ↔ numbers 0 … I − 1, the most frequent item first.

    An id is a text: 7, "7" and 7.0 of three writers are one item, 07 is another.

    Args:
        names: the ids.
        counts: how often each was chosen in training.
        titles: id → what is shown of it, such as {"title": "Toy Story (1995)"}; for ids of the catalogue only.
        features: for each item the numbers of its features; none for a catalogue without.
        feature_names: what they are called, "brand=Nivea".
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        titles: Mapping[str, dict[str, Any]] | None = None,
        features: Sequence[Sequence[int]] = (),
        feature_names: Sequence[str] = (),
    ) -> None:
        self.names, self.counts = list(names), np.asarray(counts, dtype=np.int64)
        self._numbers = {name: i for i, name in enumerate(self.names)}
        self.titles = {name: about for name, about in (titles or {}).items() if name in self._numbers}
        self.features, self.feature_names = [list(one) for one in features], list(feature_names)

    @classmethod
    def fit(cls, counts: Mapping[str, int], about: Mapping[str, Mapping[str, Any]] | None = None) -> ItemCodec:
        """A catalogue of the items that occur.

        Args:
            about: what a file of items says of them: id → {"title": …, "features": ["brand=Nivea", …]}, both optional.

        Raises:
            UserError: fewer than two items.
        """
        if len(counts) < 2:
            raise UserError(tr(f"the training part holds {len(counts)} different items; a recommendation needs two at "
                               "least. Is this the right column? data.columns.item names another",
                               f"训练部分只有 {len(counts)} 种物品，至少需要两种才能推荐。"
                               "列选对了吗？可用 data.columns.item 指定另一列"))
        names = sorted(counts, key=lambda name: -counts[name])  # stable: of equals the first met
        found = about or {}
        titles = {name: {"title": found[name]["title"]} for name in names if found.get(name, {}).get("title")}
        numbers: dict[str, int] = {}
        features = [[numbers.setdefault(f, len(numbers)) for f in found.get(name, {}).get("features", ())]
                    for name in names]  # fmt: skip
        return cls(names, [counts[name] for name in names], titles, features if numbers else (), list(numbers))

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, ids: Iterable[Any]) -> tuple[np.ndarray, list[str]]:
        """(numbers (T,) int32 of the known ids, the unknown ones); both in the order given."""
        known, unknown = [], []
        for name in ids:
            number = self._numbers.get(str(name))
            if number is None:
                unknown.append(str(name))
            else:
                known.append(number)
        return np.array(known, dtype=np.int32), unknown

    def numbers(self, ids: Sequence[str]) -> np.ndarray | None:
        """(T,) int32 where every id is a text of the catalogue, else None: the quick road of rows out of a log."""
        try:
            return np.array([self._numbers[name] for name in ids], dtype=np.int32)
        except (KeyError, TypeError):
            return None

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def decode(self, number: int) -> str:
        """The id of item `number`."""
        return self.names[int(number)]

    def shown(self, number: int) -> dict[str, Any]:
        """The id of item `number` and, where there is one, its title."""
        name = self.names[int(number)]
        return {"id": name, **self.titles.get(name, {})}

    def described(self) -> Iterator[dict[str, Any]]:
        """Every item in order: its id, its title where there is one, and its features, "brand" → ["Nivea", …]."""
        for number in range(len(self)):
            found = self.shown(number)
            for feature in self.features[number] if self.features else ():
                name, _, value = self.feature_names[feature].partition("=")
                if name not in ("id", "title"):
                    found.setdefault(name, []).append(value)
            yield found

    def save(self, folder: Path) -> None:
        """Write ``items.json`` into `folder`."""
        write_json(folder / ITEMS, {"names": self.names, "counts": self.counts.tolist(), "titles": self.titles,
                                    "features": self.features, "feature_names": self.feature_names})  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> ItemCodec:
        """Read what ``save`` wrote. Raises UserError where it is missing or broken."""
        path = Path(folder) / ITEMS
        try:
            held = json.loads(path.read_text("utf-8"))
            made = cls([str(n) for n in held["names"]], held["counts"], held["titles"], held["features"],
                       held["feature_names"])  # fmt: skip
            sound = len(made.names) == len(made.counts) == len(made._numbers)
            sound = sound and len(made.features) in (0, len(made))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise UserError(tr("the catalogue is missing or damaged; run `multihead prepare` again",
                               "物品目录缺失或已损坏；请重新运行 `multihead prepare`"), str(path))
        return made
