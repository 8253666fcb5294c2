"""What is known of users or of items, as numbers: a table with a row for each, and one for whoever is unknown.

Categories, several of them in a cell and quantities are read by `codec.fields`, texts by the text codec.

Legend: n ids, C fields of one category, N categories of the fields of several, M quantities, L tokens of a row's texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multihead.codec.fields import Field, FieldCodec, Sizes, guess, parts
from multihead.codec.text import TextCodec
from multihead.data.columns import blank
from multihead.errors import UserError, tr
from multihead.run import write_json

FIELDS, TABLE = "side.json", "side.safetensors"
TEXT = "text"


@dataclass
class Side:
    """Ids 0 … n − 1 and what is known of each; row n is an unknown id's, of which nothing is known.

    Args:
        names: the ids. Those met in training stand first.
        met: how many they are; only they have a vector of their own.
        fields: the codec of categories and quantities; None without such fields.
        text: the codec of texts; None without.
        kinds: field → kind, "text" among them.
        arrays: ``one`` (n + 1, C), ``several`` (n + 1, N), ``several_lengths`` (n + 1,), ``quantity`` (n + 1, M, 2),
            ``words`` (n + 1, L), ``words_lengths`` (n + 1,); those that there are.
    """

    names: list[str]
    met: int
    fields: FieldCodec | None
    text: TextCodec | None
    kinds: dict[str, str]
    arrays: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.numbers = {name: i for i, name in enumerate(self.names)}

    @classmethod
    def fit(
        cls, names: Sequence[str], met: int, table: Mapping[str, Mapping[str, Any]], wanted: Sequence[str],
        kinds: Mapping[str, str], vocab_size: int = 2000, tokens: int = 16,
    ) -> Side:
        """Fit codecs to the rows of `table` and encode those of `names`.

        Args:
            table: id → field → value as it stands in a file.
            wanted: the fields to read.
            kinds: field → kind where a person says it: "text", or one of `fields.KINDS`.
            tokens: of a row's texts, so many are read.
        """
        found = {name: kinds.get(name) or _guess(name, table) for name in wanted}
        words = [name for name in wanted if found[name] == TEXT]
        plain = [name for name in wanted if found[name] != TEXT]
        fields = None
        if plain:
            fitted = FieldCodec.fit(table.values(), plain, {name: found[name] for name in plain}, Sizes(), ())
            fields = fitted if fitted.used else None
        text = None
        if words:
            text = TextCodec.fit((_text(row, words) for row in table.values()), vocab_size=vocab_size, normalize="nfkc")
        made = cls(list(names), met, fields, text, found, {})
        rows = [*(table.get(name, {}) for name in names), {}]
        made.arrays = made._encoded(rows, words, tokens)
        return made

    def _encoded(self, rows: Sequence[Mapping[str, Any]], words: Sequence[str], tokens: int) -> dict[str, Tensor]:
        arrays: dict[str, np.ndarray] = {}
        if self.fields is not None:
            found = [self.fields.encode(row)[0] for row in rows]
            arrays["one"] = np.stack([one["one"] for one in found])
            arrays["quantity"] = np.stack([one["quantity"] for one in found])
            arrays["several"], arrays["several_lengths"] = _padded([one["several"] for one in found])
        if self.text is not None:
            ids = [self.text.encode(_text(row, words))[:tokens] for row in rows]
            arrays["words"], arrays["words_lengths"] = _padded(ids)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def described(self) -> int:
        """How many ids something is known of beside the id; 0 where no field is read."""
        return len(self.names) if self.arrays else 0

    def number(self, name: Any) -> int:
        """The number of an id; n for one that is unknown."""
        return self.numbers.get(str(name), len(self.names))

    def features(self, table: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """id → its categories as texts, "genres=Drama"."""
        if self.fields is None:
            return {}
        told = [f for f in (*self.fields.single, *self.fields.several) if f.kind != "words"]
        return {name: [f"{f.name}={part}" for f in told if not blank(row.get(f.name)) for part in _parts(row, f)]
                for name, row in table.items()}  # fmt: skip

    def describe(self) -> list[str]:
        """What each field was taken for."""
        lines = self.fields.describe() if self.fields is not None else []
        words = ", ".join(name for name, kind in self.kinds.items() if kind == TEXT)
        return [*lines, tr(f"fields, text: {words}", f"字段（文本）：{words}")] if words else lines

    def save(self, folder: Path) -> None:
        """Write codecs and table into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FIELDS, {"names": self.names, "met": self.met, "kinds": self.kinds})
        save_file(self.arrays, str(folder / TABLE))
        if self.fields is not None:
            self.fields.save(folder)
        if self.text is not None:
            self.text.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Side:
        """Read what ``save`` wrote. Raises UserError where it is missing or broken."""
        try:
            held = json.loads((folder / FIELDS).read_text("utf-8"))
            arrays = load_file(str(folder / TABLE))
            names, met, kinds = list(held["names"]), int(held["met"]), dict(held["kinds"])
        except (OSError, ValueError, KeyError, TypeError, Exception) as error:
            raise UserError(tr("the table is missing or damaged; run `multihead prepare` again",
                               "信息表缺失或已损坏；请重新运行 `multihead prepare`"), str(folder)) from error
        fields = FieldCodec.load(folder) if "one" in arrays else None
        return cls(names, met, fields, TextCodec.load(folder) if "words" in arrays else None, kinds, arrays)


def _guess(name: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    """The kind of a field by its values; what `fields` takes for words is text."""
    values: dict[Any, int] = {}
    lists = False
    for row in table.values():
        value = row.get(name)
        if isinstance(value, (list, tuple)):
            lists = True
        elif not blank(value):
            values[str(value).strip()] = values.get(str(value).strip(), 0) + 1
    kind = guess(name, values, lists)
    return TEXT if kind == "words" else kind


def _parts(row: Mapping[str, Any], field: Field) -> list[str]:
    value = row[field.name]
    return parts(value, field) if field.several else [str(value).strip()]


def _text(row: Mapping[str, Any], names: Iterable[str]) -> str:
    return "\n".join(str(row[name]).strip() for name in names if not blank(row.get(name)))


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(n, longest) with zeros behind each row, and (n,) lengths."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    out = np.zeros((len(rows), max(1, int(lengths.max()))), dtype=np.int32)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out, lengths
