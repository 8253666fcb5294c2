"""What a file of items says of them: titles, and features such as brand or category."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multihead.data.columns import Column, plain_name
from multihead.data.events import ITEM_NAMES
from multihead.data.files import find_sources
from multihead.data.formats import texts
from multihead.data.rows import Rows, open_rows
from multihead.errors import UserError, nearest, tr

TITLE_NAMES = ("title", "name", "itemName", "productName", "movieTitle", "标题", "名称", "商品名称", "片名", "品名")
_SEPARATORS = re.compile(r"[|;,、，；]")


def read_items(path: str, features: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """id → {"title", "features"}, from a table (csv, tsv, jsonl, Parquet, MovieLens' ``::``) with a column of ids and
    one of titles, or from one JSON object of id → list of attributes.

    Args:
        features: columns whose values, several divided by ``|`` or commas, are features; of a JSON object,
            "attributes".

    Raises:
        UserError: no such file, no column of ids, or no such feature column.
    """
    try:
        return _read(path, features, None)
    except UserError as error:
        if not any("data.encoding" in str(problem) for problem in error.problems):
            raise
        # A side table has no data.encoding of its own; what is no Unicode is Latin-1, as MovieLens' films are.
        return _read(path, features, "latin-1")


def _read(path: str, features: Sequence[str], encoding: str | None) -> dict[str, dict[str, Any]]:
    (source, *_), _ = find_sources(path, Path.cwd())
    head = next(iter(texts(source, encoding)), "").lstrip()[:1]
    if head == "{" and (held := _object(source, encoding)) is not None:
        return {str(key): {"features": [f"attributes={v}" for v in values] if features else []}
                for key, values in held.items()}  # fmt: skip
    rows = _open(path, encoding)
    theirs = rows.guess["files"][0]
    wanted = _columns(features, theirs["columns"], path)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        about: dict[str, Any] = {"title": row["title"].strip()} if row.get("title") else {}
        about["features"] = [f"{ours}={value}" for ours, name in wanted.items() for value in _values(row.get(name))]
        found.setdefault(row["item"], about)
    return found


def _open(path: str, encoding: str | None) -> Rows:
    """A table of items: with ids and titles; without a header, ids first and titles second; or with ids alone."""
    item, title = Column("item", "id", names=("id", *ITEM_NAMES)), Column("title", "text", names=TITLE_NAMES)
    both, by_place = [item, title], {"item": "1", "title": "2"}
    for columns, mapping in ((both, None), (both, by_place), ([item, replace(title, required=False)], None)):
        try:
            rows = open_rows(path, columns, mapping, encoding=encoding)
        except UserError as error:
            last = error
            continue
        if mapping is None or not rows.guess["files"][0]["header"]:
            return rows
    raise last


def _object(source: Any, encoding: str | None) -> dict[str, list[Any]] | None:
    """The file as one JSON object of lists; None where it is something else."""
    try:
        held = json.loads("".join(texts(source, encoding)))
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) and held and all(isinstance(v, list) for v in held.values()) else None


def _columns(features: Sequence[str], header: Sequence[str], path: str) -> dict[str, str]:
    plain = {plain_name(name): name for name in header}
    missing = [name for name in features if plain_name(name) not in plain]
    if missing:
        raise UserError(tr(
            f"there is no column '{missing[0]}' (options.features){nearest(missing[0], header)}; the columns are: "
            f"{', '.join(header)}",
            f"没有 '{missing[0]}' 这一列（options.features）{nearest(missing[0], header)}；"
            f"现有的列：{'、'.join(header)}"), path)
    return {name: plain[plain_name(name)] for name in features}


def _values(cell: Any) -> list[str]:
    parts = cell if isinstance(cell, (list, tuple)) else _SEPARATORS.split(str(cell)) if cell is not None else []
    return [text for part in parts if (text := str(part).strip())]
