"""What a table says of users or items: each id's values under the names of its columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multihead.data.columns import Column, blank, plain_name
from multihead.data.rows import Rows, open_rows
from multihead.errors import UserError, nearest, tr

SECOND = "(second column)"
_RUN = re.compile(r"(\d+)\s*-\s*(\d+)\Z")


def read_attributes(
    path: str | Path, key: str, names: Sequence[str], columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> dict[str, dict[str, Any]]:
    """id → {name: value as it stands in the file}; of an id that stands there twice, the first.

    Args:
        key: "user" or "item": what the table is about.
        names: other names its column of ids may have. A table without a header has the ids first.
        columns: ours → theirs for the columns wanted: a name, a number (1 is the first), or a run of numbers "6-24" of
            columns that hold 0 or 1, which become one value, the list of the numbers that hold 1. None: every column,
            under its own name, in a table without a header as "user_2".
        encoding: where its content does not tell.

    Raises:
        UserError: no such file, no column of ids, or no such column.
    """
    rows = _open(path, key, names, encoding)
    about = rows.guess["files"][0]
    header, first = about["columns"], about["mapping"][key]
    if columns is None:
        named = about["header"] or about["format"] != "csv"
        chosen = {name if named else f"{key}_{name}": [name] for name in header if name != first}
    else:
        chosen = {ours: _places(str(theirs), header, f"options.{key}_columns.{ours}", str(path))
                  for ours, theirs in columns.items()}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if SECOND in row:
            row["2"] = row[SECOND]
        held = {ours: _value(row, theirs) for ours, theirs in chosen.items()}
        found.setdefault(row[key], {name: value for name, value in held.items() if not blank(value)})
    return found


def _open(path: str | Path, key: str, names: Sequence[str], encoding: str | None) -> Rows:
    """The table, its column of ids found by name, or the first of a table without a header."""
    ids = Column(key, "id", names=("id", *names))
    try:
        return open_rows(str(path), [ids], encoding=encoding, base=Path.cwd())
    except UserError as error:
        try:
            # Two columns asked for by their place: then it is a table, whatever stands between them.
            rows = open_rows(str(path), [ids, Column(SECOND, "any", required=False)], {key: "1", SECOND: "2"},
                             encoding=encoding, base=Path.cwd())  # fmt: skip
        except UserError:
            raise error from None
        if rows.guess["files"][0]["header"]:
            raise error from None
        return rows


def _places(theirs: str, header: Sequence[str], key: str, path: str) -> list[str]:
    """The file's columns that `theirs` names."""
    plain = {plain_name(name): name for name in reversed(header)}
    if theirs in header or plain_name(theirs) in plain:
        return [theirs if theirs in header else plain[plain_name(theirs)]]
    run = _RUN.match(theirs)
    numbers = range(int(run[1]), int(run[2]) + 1) if run else [int(theirs)] if theirs.isdecimal() else []
    if numbers and numbers[0] >= 1 and numbers[-1] <= len(header):
        return [header[number - 1] for number in numbers]
    shown = ", ".join(header)
    raise UserError(tr(f"there is no column '{theirs}' ({key}){nearest(theirs, header)}; the columns are: {shown}",
                       f"没有 '{theirs}' 这一列（{key}）{nearest(theirs, header)}；现有的列：{shown}"), path)


def _value(row: Mapping[str, Any], theirs: Sequence[str]) -> Any:
    if len(theirs) == 1:
        return row.get(theirs[0])
    return [name for name in theirs if str(row.get(name)).strip() in ("1", "1.0", "true", "True")]
