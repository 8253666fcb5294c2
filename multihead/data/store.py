"""The prepared examples on disk: ragged arrays end to end, read through memory maps.

A store is a folder. Each key has ``KEY.bin`` (all rows' arrays joined on the first axis, little-endian) and, where the
arrays have a first axis, ``KEY.offsets.bin`` (rows + 1 int64: row i is ``[offsets[i], offsets[i + 1])``). Raw rows,
when kept, are lines of JSON in ``rows.jsonl``, with byte offsets beside them; ``index.json`` holds dtypes and sizes.
Nothing in it depends on time or place: the same examples give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from multihead.data.columns import Row
from multihead.errors import UserError, tr

VERSION = 1
INDEX = "index.json"
ROWS = "rows.jsonl"
ROW_OFFSETS = "rows.offsets.bin"
_BUFFER = 1 << 20
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def _buffered(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=_BUFFER)


class _KeyWriter:
    """One key's two files, written as the rows come."""

    def __init__(self, folder: Path, key: str, first: np.ndarray) -> None:
        if not _KEY.match(key) or key in ("rows", "index"):
            raise ValueError(f"a key of an example is a plain name, and not 'rows' or 'index': {key!r}")
        if first.dtype.kind not in "biuf":
            raise ValueError(f"key {key!r}: only numbers and booleans are stored, not dtype {first.dtype}")
        self.key = key
        self.dtype = first.dtype.newbyteorder("<")
        self.ragged = first.ndim > 0
        self.trailing = tuple(first.shape[1:])
        self.total = 0
        self.values: BinaryIO = _buffered(folder / f"{key}.bin")
        self.offsets: BinaryIO | None = None
        if self.ragged:
            self.offsets = _buffered(folder / f"{key}.offsets.bin")
            self.offsets.write((0).to_bytes(8, "little"))

    def add(self, array: np.ndarray, row: int) -> None:
        same = array.dtype == self.dtype  # the rest of this line is slow, and there are millions of rows
        if (not same and array.dtype.newbyteorder("<") != self.dtype) or (array.ndim > 0) != self.ragged \
                or tuple(array.shape[1:]) != self.trailing:
            raise ValueError(
                f"key {self.key!r}, example {row}: dtype {array.dtype} and shape {array.shape} do not go with the "
                f"first example's dtype {self.dtype} and trailing shape {self.trailing}; only the first axis may vary"
            )
        self.values.write(np.ascontiguousarray(array, dtype=self.dtype).tobytes())
        self.total += len(array) if self.ragged else 1
        if self.offsets is not None:
            self.offsets.write(self.total.to_bytes(8, "little"))

    def describe(self) -> dict[str, Any]:
        return {"dtype": self.dtype.str, "ragged": self.ragged, "trailing": list(self.trailing), "total": self.total}


class StoreWriter:
    """Writes a store row by row into a hidden folder beside `folder`, and puts it in place on ``close()``.

    As a context manager it closes on success and removes what it wrote on an exception. An older store at `folder`
    stands until the new one is whole.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._work = self.folder.parent / f".{self.folder.name}.writing"
        if self._work.exists():
            shutil.rmtree(self._work)
        self._work.mkdir()
        self._keys: dict[str, _KeyWriter] = {}
        self._count = 0
        self._raw: BinaryIO | None = None
        self._raw_offsets: BinaryIO | None = None
        self._raw_total = 0
        self._open = True

    def __len__(self) -> int:
        return self._count

    def add(self, example: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> None:
        """Append one example (key → array; the first axis may vary) and, for all rows or for none, its raw row.

        Raises ValueError where keys, dtypes or trailing shapes differ from the first example's.
        """
        arrays = {key: np.asarray(value) for key, value in example.items()}
        if self._count == 0:
            self._keys = {key: _KeyWriter(self._work, key, arrays[key]) for key in sorted(arrays)}
            if row is not None:
                self._raw = _buffered(self._work / ROWS)
                self._raw_offsets = _buffered(self._work / ROW_OFFSETS)
                self._raw_offsets.write((0).to_bytes(8, "little"))
        if arrays.keys() != self._keys.keys():
            raise ValueError(f"example {self._count} has keys {sorted(arrays)}, the first had {sorted(self._keys)}")
        if (row is not None) != (self._raw is not None):
            raise ValueError("raw rows are stored for every example or for none")
        for key, array in arrays.items():
            self._keys[key].add(array, self._count)
        if row is not None:
            self._add_raw(row)
        self._count += 1

    def _add_raw(self, row: Mapping[str, Any]) -> None:
        assert self._raw is not None and self._raw_offsets is not None
        held = {"row": dict(row), "where": getattr(row, "where", "")}
        line = _LINE(held).encode("utf-8", "replace")
        self._raw.write(line + b"\n")
        self._raw_total += len(line) + 1
        self._raw_offsets.write(self._raw_total.to_bytes(8, "little"))

    def _files(self) -> list[BinaryIO]:
        held = [f for k in self._keys.values() for f in (k.values, k.offsets)] + [self._raw, self._raw_offsets]
        return [f for f in held if f is not None]

    def close(self) -> None:
        """Flush everything to the disk and move the store into its place."""
        if not self._open:
            return
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        index = {
            "version": VERSION,
            "rows": self._count,
            "keys": {key: writer.describe() for key, writer in sorted(self._keys.items())},
            "raw_bytes": self._raw_total if self._raw is not None else None,
        }
        with open(self._work / INDEX, "wb") as held:
            held.write((json.dumps(index, indent=1, sort_keys=True) + "\n").encode())
            held.flush()
            os.fsync(held.fileno())
        _sync_folder(self._work)
        self._open = False
        _replace_folder(self._work, self.folder)

    def abandon(self) -> None:
        """Remove what was written; an older store at the place is left as it is."""
        if self._open:
            self._open = False
            for file in self._files():
                file.close()
            shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


_LINE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain).encode


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace_folder(new: Path, place: Path) -> None:
    # rename() cannot replace a folder that has files in it: the old one steps aside first and goes last.
    old = place.parent / f".{place.name}.old"
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    _sync_folder(place.parent)
    if old.exists():
        shutil.rmtree(old)


class Store(Sequence[dict[str, np.ndarray]]):
    """A prepared store, opened for reading. Arrays are read-only views of memory-mapped files.

    Raises UserError where the folder is not a whole store: files missing, or sizes other than the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = self._read_index()
        self._rows: int = index["rows"]
        self._values: dict[str, np.ndarray] = {}
        self._offsets: dict[str, np.ndarray | None] = {}
        for key, about in index["keys"].items():
            shape = (about["total"], *about["trailing"])
            self._values[key] = self._map(f"{key}.bin", np.dtype(about["dtype"]), shape)
            self._offsets[key] = self._map_offsets(f"{key}.offsets.bin", about["total"]) if about["ragged"] else None
            if not about["ragged"] and about["total"] != self._rows:
                raise self._broken(tr(f"key {key!r} has {about['total']} values for {self._rows} rows",
                                      f"键 {key!r} 有 {about['total']} 个值，而行数是 {self._rows}"))
        self._raw: np.ndarray | None = None
        self._raw_offsets: np.ndarray | None = None
        if index["raw_bytes"] is not None:
            self._raw = self._map(ROWS, np.dtype("u1"), (index["raw_bytes"],))
            self._raw_offsets = self._map_offsets(ROW_OFFSETS, index["raw_bytes"])

    def _broken(self, what: str) -> UserError:
        return UserError(
            tr(f"the prepared data is not whole: {what}. Run `multihead prepare` again",
               f"准备好的数据不完整：{what}。请重新运行 `multihead prepare`"),
            where=str(self.folder),
        )

    def _read_index(self) -> dict[str, Any]:
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            version = index["version"]
            for about in index["keys"].values():
                np.dtype(about["dtype"]), int(about["total"]), bool(about["ragged"]), tuple(about["trailing"])
            int(index["rows"]), index["raw_bytes"]
        except FileNotFoundError:
            raise self._broken(tr(f"there is no {INDEX}", f"没有 {INDEX}")) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(tr(f"{INDEX} cannot be read ({error})", f"{INDEX} 无法读取（{error}）")) from None
        if version != VERSION:
            raise self._broken(tr(f"it was written as version {version}, this program reads {VERSION}",
                                  f"它的版本是 {version}，本程序读取的版本是 {VERSION}"))
        return index

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / name
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError:
            raise self._broken(tr(f"{name} is missing", f"缺少 {name}")) from None
        if size != expected:
            raise self._broken(tr(f"{name} has {size} bytes, the index says {expected}",
                                  f"{name} 有 {size} 字节，索引记录的是 {expected}"))
        if expected == 0:  # nothing to map
            blank = np.zeros(shape, dtype=dtype)
            blank.flags.writeable = False
            return blank
        # A plain view: slicing np.memmap itself builds a subclass instance each time, several times slower.
        return np.memmap(path, dtype=dtype, mode="r", shape=shape).view(np.ndarray)

    def _map_offsets(self, name: str, total: int) -> np.ndarray:
        offsets = self._map(name, np.dtype("<i8"), (self._rows + 1,))
        if offsets[0] != 0 or offsets[-1] != total:
            raise self._broken(tr(f"{name} does not end at {total}", f"{name} 没有在 {total} 处结束"))
        return offsets

    @property
    def keys(self) -> list[str]:
        """The names of the arrays of every example."""
        return list(self._values)

    def __len__(self) -> int:
        return self._rows

    def _index(self, i: int) -> int:
        index = int(i)
        if not -self._rows <= index < self._rows:
            raise IndexError(f"row {i} of a store of {self._rows} rows")
        return index % self._rows

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        """Example i: key → read-only array; scalars have shape ()."""
        i = self._index(i)
        example = {}
        for key, values in self._values.items():
            offsets = self._offsets[key]
            example[key] = values[offsets[i]:offsets[i + 1]] if offsets is not None else values[i:i + 1].reshape(())
        return example

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    def lengths(self, key: str) -> np.ndarray:
        """Each row's length on the first axis, (rows,) int64; 1 for scalars."""
        offsets = self._offsets[key]
        return np.ones(self._rows, dtype=np.int64) if offsets is None else np.diff(offsets)

    def stream(self, key: str) -> np.ndarray:
        """All rows' arrays of `key` end to end, (total, ...), memory-mapped."""
        return self._values[key]

    def row(self, i: int) -> Row:
        """The raw row i as it was given to the writer; an error where the store was written without raw rows."""
        if self._raw is None or self._raw_offsets is None:
            raise ValueError("this store was written without raw rows")
        i = self._index(i)
        try:
            held = json.loads(self._raw[self._raw_offsets[i]:self._raw_offsets[i + 1]].tobytes())
            return Row(held["row"], where=held["where"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(tr(f"raw row {i} cannot be read ({error})",
                                  f"第 {i} 行原文无法读取（{error}）")) from None

    def where(self, i: int) -> str:
        """The place of raw row i in a person's data; its number where the store was written without raw rows."""
        return tr(f"row {i + 1}", f"第 {i + 1} 行") if self._raw is None else self.row(i).where

    def rows(self) -> Iterator[Row]:
        """All raw rows in order."""
        return (self.row(i) for i in range(len(self)))


class Windows(Sequence[dict[str, np.ndarray]]):
    """Fixed windows over one key's stream: window k holds positions [offset + k·stride, … + length), cut at the ends.

    Every position is in a window and neighbours share ``length - stride`` positions. `offset` shifts the phase: with
    offset o > 0 the first window is the shorter ``[0, o + length - stride)``, so that nothing is lost at the front.
    """

    def __init__(self, store: Store, key: str, length: int, stride: int | None = None, offset: int = 0) -> None:
        stride = length if stride is None else stride
        if not 0 < stride <= length:
            raise ValueError(f"windows of {length} need a stride between 1 and {length}, not {stride}")
        self.key, self.length, self.stride = key, length, stride
        self._stream = store.stream(key)
        shift = offset % stride
        self._first = shift - stride if shift else 0
        total = len(self._stream)
        beyond = total - self._first - length
        self._count = 0 if total == 0 else 1 + max(0, -(-beyond // stride))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        if not -self._count <= i < self._count:
            raise IndexError(f"window {i} of {self._count}")
        start = self._first + (int(i) % self._count) * self.stride
        return {self.key: self._stream[max(start, 0):start + self.length]}
