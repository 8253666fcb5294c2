"""Fields of a table as numbers: categories, several of them in a cell, words, quantities, moments.

Every category of every field has a number of its own in one long list; each field's share of it begins with "missing",
"never seen" and the buckets that rare values share by their hash. A quantity becomes its place among the quantiles of
the training rows (the piecewise-linear encoding of Gorishniy et al. 2022, "On Embeddings for Numerical Features",
section 3.2, kept as one number) and its logarithm, standardised.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from multihead.data.columns import blank
from multihead.data.events import seconds
from multihead.errors import UserError, tr
from multihead.run import write_json

FIELDS = "fields.json"
Kind = Literal["categorical", "numeric", "multi", "words", "time", "ignore"]
KINDS: dict[str, tuple[str, str]] = {
    "categorical": ("one category", "类别"), "numeric": ("a number", "数值"),
    "multi": ("several categories", "多值类别"), "words": ("words", "词"), "time": ("a time", "时间"),
    "ignore": ("left out", "不使用"),
}  # fmt: skip
LIMIT = 2_000_000
"""Different values of one field that are counted; those that come later share the buckets."""
MISSING, UNSEEN, BUCKETS = 0, 1, 2
"""Places in a field's share of the list."""
_CODE = re.compile(r"(^|[_\s])(id|code|zip|zipcode|postcode|no)$|[a-z]Id$|ID$|编号|编码|邮编", re.IGNORECASE)
_PADDED = re.compile(r"0\d+\Z")
"""Numbers with a 0 in front (00123) are codes."""
_WORD = re.compile(r"\w+")
_SEPARATORS = ("|", ";", "；", "、", ",", "，")


@dataclass
class Sizes:
    """How fields are fitted."""

    min_count: int = 2
    """Values that occur less often share the buckets."""
    buckets: int = 8
    """Of each field, for rare values."""
    max_values: int = 1_000_000
    """Values of a field that have a place of their own, the most frequent."""
    bins: int = 16
    """Quantiles of a quantity."""


@dataclass
class Field:
    """One field, fitted."""

    name: str
    kind: Kind
    values: list[str] = field(default_factory=list)
    """Those with a place of their own, the most frequent first."""
    rare: list[str] = field(default_factory=list)
    """Those that share the buckets; so that one never seen can be told from them."""
    counts: list[int] = field(default_factory=list)
    """How often missing, unseen, each bucket and each value stood in the training rows."""
    overflow: bool = False
    """Whether there were more values than are kept: then one that is not known may have been seen."""
    separator: str = "|"
    edges: list[float] = field(default_factory=list)
    """Of a quantity, the quantiles, rising."""
    center: float = 0.0
    scale: float = 1.0
    """Mean and deviation of its logarithm."""

    @property
    def numeric(self) -> bool:
        return self.kind in ("numeric", "time")

    @property
    def several(self) -> bool:
        return self.kind in ("multi", "words")


def number(value: Any, kind: str = "numeric") -> float | None:
    """A cell as a number; None where it is none."""
    if kind == "time":
        return seconds(value)
    if isinstance(value, bool):
        return float(value)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    """A category as text: 7, 7.0 and " 7 " of three writers are one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value).strip()


def parts(value: Any, about: Field) -> list[str]:
    """The categories that a cell holds."""
    if isinstance(value, (list, tuple)):
        found = [text(v) for v in value if not blank(v)]
    elif about.kind == "words":
        found = _WORD.findall(str(value).casefold())
    else:
        found = [part.strip() for part in text(value).split(about.separator)]
    return list(dict.fromkeys(part for part in found if part))


def _log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


class FieldCodec:
    """Rows ↔ numbers of their fields.

    Legend: C fields of one category, K fields of several, M quantities, V places in the list of all categories.

    Args:
        fields: every field, ignored ones too.
        sizes: how they were fitted.
    """

    def __init__(self, fields: Sequence[Field], sizes: Sizes) -> None:
        self.fields, self.sizes = list(fields), sizes
        used = [f for f in self.fields if f.kind != "ignore"]
        self.single = [f for f in used if f.kind == "categorical"]
        self.several = [f for f in used if f.several]
        self.quantities = [f for f in used if f.numeric]
        self.used = [*self.single, *self.several, *self.quantities]
        """In the order in which the model reads them."""
        self.starts: dict[str, int] = {}
        size = 0
        for one in self.used:
            self.starts[one.name] = size
            size += len(one.counts)
        self.size = size
        self._numbers = {f.name: self._numbered(f) for f in (*self.single, *self.several)}

    def _numbered(self, about: Field) -> dict[str, int]:
        start = self.starts[about.name] + BUCKETS
        buckets = self.sizes.buckets
        found = {name: start + _bucket(name, buckets) for name in about.rare}
        return found | {name: start + buckets + i for i, name in enumerate(about.values)}

    # -- fitting ------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls, rows: Iterable[Mapping[str, Any]], names: Sequence[str], kinds: Mapping[str, str], sizes: Sizes,
        categories: Sequence[str] = ("user", "item"),
    ) -> FieldCodec:
        """Count every field's values, say what kind it is where `kinds` does not, and give its values places.

        Args:
            names: the fields, in order.
            kinds: name → kind, as a person says.
            categories: fields that hold ids, whatever they look like.

        Raises:
            UserError: no field is left to learn from, or one that should hold numbers holds none.
        """
        counted = {name: Counter[Any]() for name in names}
        lists = dict.fromkeys(names, False)
        full = dict.fromkeys(names, False)
        total = 0
        for row in rows:
            total += 1
            for name, counts in counted.items():
                value = row.get(name)
                if isinstance(value, (list, tuple)):
                    lists[name], value = True, tuple(map(text, value)) or None
                key = None if blank(value) else value if isinstance(value, tuple) else text(value)
                if key in counts or len(counts) < LIMIT:
                    counts[key] += 1
                else:
                    full[name] = True
        given = {name: kinds.get(name) or ("categorical" if name in categories else "") for name in names}
        fitted = [_fit(name, given[name] or guess(name, counts, lists[name]), counts, sizes, full[name], total)
                  for name, counts in counted.items()]  # fmt: skip
        made = cls(fitted, sizes)
        if not made.used:
            raise UserError(tr(f"no field is left to learn from; the rows hold: {', '.join(names) or '-'}",
                               f"没有可供学习的字段；各行含有：{'、'.join(names) or '-'}"))
        return made

    def describe(self) -> list[str]:
        """What each field was taken for, one line a kind."""
        lines = []
        for kind, shown in KINDS.items():
            held = [f for f in self.fields if f.kind == kind]
            if held:
                names = ", ".join(f.name + _about(f) for f in held)
                lines.append(tr(f"fields, {shown[0]}: {names}", f"字段（{shown[1]}）：{names}"))
        return lines

    # -- encoding -----------------------------------------------------------------------------------------------------

    def encode(self, row: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
        """({"one" (C,) int32, "several" (N,) int32, "quantity" (M, 2) float32: place among the quantiles and
        standardised logarithm, NaN where missing}, names of the fields that hold values never seen)."""
        unseen: list[str] = []
        one = [self.category(f, row.get(f.name), unseen) for f in self.single]
        several = [number for f in self.several for number in self.categories(f, row.get(f.name), unseen)]
        amounts = [self.quantity(f, row.get(f.name)) for f in self.quantities]
        return {
            "one": np.array(one, dtype=np.int32),
            "several": np.array(several, dtype=np.int32),
            "quantity": np.array(amounts, dtype=np.float32).reshape(len(amounts), 2),
        }, unseen

    def category(self, about: Field, value: Any, unseen: list[str]) -> int:
        """The place of a cell's one category."""
        start = self.starts[about.name]
        if isinstance(value, (list, tuple)):
            value = self.separated(about, value)
        if blank(value):
            return start + MISSING
        return self._place(about, text(value), unseen)

    def separated(self, about: Field, value: Sequence[Any]) -> Any:
        """Of a list where one category is wanted, the one, or all of them as one."""
        return value[0] if len(value) == 1 else about.separator.join(map(text, value))

    def categories(self, about: Field, value: Any, unseen: list[str]) -> list[int]:
        """The places of a cell's categories: at least one, that of "missing"."""
        found = [] if blank(value) else [self._place(about, part, unseen) for part in parts(value, about)]
        return list(dict.fromkeys(found)) or [self.starts[about.name] + MISSING]

    def _place(self, about: Field, name: str, unseen: list[str]) -> int:
        found = self._numbers[about.name].get(name)
        if found is not None:
            return found
        if about.overflow:
            return self.starts[about.name] + BUCKETS + _bucket(name, self.sizes.buckets)
        if about.name not in unseen:
            unseen.append(about.name)
        return self.starts[about.name] + UNSEEN

    def quantity(self, about: Field, value: Any) -> tuple[float, float]:
        """Place among the quantiles, 0 … bins, and standardised logarithm; NaN where there is no number."""
        found = None if blank(value) else number(value, about.kind)
        if found is None:
            return math.nan, math.nan
        place = float(np.interp(found, about.edges, np.arange(len(about.edges))))
        return place, max(-8.0, min(8.0, (_log(found) - about.center) / about.scale))

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write ``fields.json`` into `folder`."""
        write_json(folder / FIELDS, {"sizes": asdict(self.sizes), "fields": [asdict(f) for f in self.fields]})

    @classmethod
    def load(cls, folder: Path) -> FieldCodec:
        """Read what ``save`` wrote. Raises UserError where it is missing or broken."""
        path = Path(folder) / FIELDS
        try:
            held = json.loads(path.read_text("utf-8"))
            return cls([Field(**one) for one in held["fields"]], Sizes(**held["sizes"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(tr("the fields are missing or damaged; run `multihead prepare` again",
                               "字段定义缺失或已损坏；请重新运行 `multihead prepare`"), str(path)) from None


def _bucket(name: str, buckets: int) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) % buckets


def guess(name: str, counts: Mapping[Any, int], lists: bool) -> Kind:
    """What kind of field this is, from its name and its values."""
    values = [v for v in counts if v is not None]
    if len(counts) < 2 and not lists:
        return "ignore"  # the same in every row: nothing to learn from
    if lists:
        return "multi"
    some = values[:20_000]
    if all(number(v) is not None for v in some):
        return "categorical" if _CODE.search(name) or any(map(_PADDED.match, some)) else "numeric"
    if any("|" in v for v in some):
        return "multi"
    if all(seconds(v) is not None for v in some):
        return "time"
    rows = sum(counts.values())
    wordy = sum(len(v.split()) > 1 for v in some) > 0.3 * len(some)
    return "words" if wordy and len(values) > min(100, 0.3 * rows) else "categorical"


def _fit(name: str, kind: str, counts: Counter[Any], sizes: Sizes, overflow: bool, rows: int) -> Field:
    made = Field(name, kind, overflow=overflow)  # type: ignore[arg-type]
    if kind == "ignore":
        return made
    missing = counts.pop(None, 0)
    if made.numeric:
        return _fit_quantity(made, counts, missing, sizes)
    if made.several:
        cells = [v for v in counts if isinstance(v, str)]
        made.separator = next((mark for mark in _SEPARATORS if any(mark in v for v in cells)), "|")
        found = Counter[str]()
        for cell, many in counts.items():
            for part in parts(cell, made):
                found[part] += many
        counts = found
    else:
        counts = Counter({made.separator.join(v) if isinstance(v, tuple) else v: n for v, n in counts.items()})
    order = sorted(counts, key=lambda v: -counts[v])  # stable: of equals the first met
    kept = [v for v in order[: sizes.max_values] if counts[v] >= sizes.min_count]
    made.values, made.rare = kept, order[len(kept) : LIMIT]
    made.overflow = overflow or len(order) > LIMIT
    shared = [0] * sizes.buckets
    for value in made.rare:
        shared[_bucket(value, sizes.buckets)] += counts[value]
    made.counts = [missing, 0, *shared, *(counts[v] for v in kept)]
    return made


def _fit_quantity(made: Field, counts: Mapping[Any, int], missing: int, sizes: Sizes) -> Field:
    found = Counter[float]()
    for value, many in counts.items():
        amount = number(value, made.kind)
        if amount is None:
            missing += many
        else:
            found[amount] += many
    if not found:
        some = next(iter(counts), "")
        raise UserError(tr(f"the field '{made.name}' should hold numbers and holds none: '{some}'. Say what it is in "
                           f"options.fields.{made.name}, for example categorical",
                           f"字段 '{made.name}' 应为数值，却没有一个数：'{some}'。请在 options.fields.{made.name} "
                           "中指明类型，例如 categorical"))
    values = np.array(sorted(found))
    weight = np.array([found[v] for v in values], dtype=np.float64)
    at = (np.cumsum(weight) - weight / 2) / weight.sum()
    quantiles = np.interp(np.linspace(0, 1, sizes.bins + 1), at, values)
    if len(values) <= sizes.bins + 1:
        quantiles = values  # every value a place of its own
    edges = np.unique(quantiles)
    made.edges = [float(e) for e in (edges if len(edges) > 1 else [edges[0], edges[0] + 1])]
    logs = np.array([_log(v) for v in values])
    made.center = float(np.average(logs, weights=weight))
    made.scale = float(np.sqrt(np.average((logs - made.center) ** 2, weights=weight))) or 1.0
    made.counts = [missing]
    return made


def _about(made: Field) -> str:
    if made.kind == "ignore":
        return ""
    if made.numeric:
        return tr(f" ({made.edges[0]:g} to {made.edges[-1]:g})", f"（{made.edges[0]:g} 到 {made.edges[-1]:g}）")
    seen, rare = len(made.values), len(made.rare)
    return tr(f" ({seen:,} values{f', {rare:,} rare' if rare else ''})",
              f"（{seen:,} 个值{f'，{rare:,} 个少见' if rare else ''}）")
