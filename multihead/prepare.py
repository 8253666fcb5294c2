"""Step 1, prepare: from a person's files to stores of encoded rows, and a report of what the data holds.

Rows are read three times and never all kept: once to count, to find copies and to deal rows out to parts; once to fit
the codecs on the training part; once to encode. Nothing is written before the first reading has gone well.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from multihead import recipe as recipes
from multihead.data.rows import Row, Rows, open_rows
from multihead.data.store import Store, StoreWriter
from multihead.errors import Problem, UserError, tr
from multihead.recipe import Data, Recipe
from multihead.run import RECIPE, RunFolder, file_hash
from multihead.task import Task, find

PARTS = ("train", "valid", "test")
DROPPED = 255
MAY_CHANGE = ("serve.", "evaluate.", "train.log_every", "train.save_every", "train.keep", "train.device", "train.tensorboard")
"""Keys that a resumed run may change: they touch neither the data nor the weights."""
Tick = Callable[[int], None]


@dataclass
class Dealt:
    """Which part each row of one source goes to, and what was found on the way."""

    rows: Rows
    parts: bytearray = field(default_factory=bytearray)
    """One byte a usable row: index into PARTS, or DROPPED."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of each row's identity."""
    groups: array[int] = field(default_factory=lambda: array("Q"))
    copies: int = 0
    leaks: int = 0

    def of(self, part: str) -> Iterator[Row]:
        """The rows dealt to `part`, read anew."""
        wanted = PARTS.index(part)
        for row, dealt in zip(self.rows, self.parts, strict=False):
            if dealt == wanted:
                yield row


class PartRows:
    """The rows of one part; may be read as often as a task's ``fit`` likes."""

    def __init__(self, dealt: Dealt, part: str) -> None:
        self.dealt, self.part = dealt, part

    def __iter__(self) -> Iterator[Row]:
        return self.dealt.of(self.part)


def run_step(
    path: str | Path,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    restart: bool = False,
    tick: Tick | None = None,
) -> tuple[RunFolder, dict[str, Any]]:
    """The first step on its own: the run folder with data and codecs, and the data report.

    Args and errors: as `multihead.train.train`.
    """
    with begin(path, overrides, run, restart, tick) as (folder, _, _, report):
        return folder, report


@contextlib.contextmanager
def begin(
    path: str | Path, overrides: Sequence[str], run: str | Path | None, restart: bool, tick: Tick | None = None
) -> Iterator[tuple[RunFolder, Recipe, Task, dict[str, Any]]]:
    """A run folder, locked and prepared, with its recipe, its task and the data report; new, or as it was left.

    A folder made for a run that never got as far as its data is removed again.
    """
    recipe = recipes.load(path, overrides, find=find)
    task = make_task(recipe, Path(path).parent)
    folder = claim(recipe, Path(run) if run else Path("runs") / recipe.name, restart)
    try:
        with folder.lock():
            report = prepared(folder, recipe)
            if report is None:
                report = prepare(recipe, task, folder, tick)
            else:
                task.load(folder.file("codec"))
                folder.write_atomic(RECIPE, recipe.dump())
            yield folder, recipe, task, report
    finally:
        if not folder.file("data/report.json").exists():
            folder.discard()


def make_task(recipe: Recipe, base: Path) -> Task:
    """The recipe's task, without codecs yet. `base`: the folder a task file's path is relative to."""
    return find(recipe.task, base)(recipe.options, seed=recipe.seed)


def prepare(recipe: Recipe, task: Task, folder: RunFolder, tick: Tick | None = None) -> dict[str, Any]:
    """Read the recipe's data, deal it into parts, fit the task's codecs and write ``data/`` and ``codec/``.

    Returns:
        The data report, also written to ``data/report.json`` (last, so that it marks a finished preparation).

    Raises:
        UserError: with the place of what is wrong; nothing has been written then where the fault lies in the rows.
    """
    tick = tick or (lambda rows: None)
    sources = {part: _open(recipe.data, getattr(recipe.data, part), task, folder)
               for part in PARTS if getattr(recipe.data, part) is not None}
    dealt = _deal(recipe, task, sources, tick)
    _refuse_empty(dealt["train"], recipe)
    task.fit(PartRows(dealt["train"], "train"))
    folder.write_atomic(RECIPE, recipe.dump())  # first: it is what makes the folder a run that can be taken up again
    report: dict[str, Any] = {
        "guess": {part: source.guess for part, source in sources.items()},
        "reading": {part: source.describe() for part, source in sources.items()},
        "parts": {},
    }
    faults: list[Problem] = []
    for part in PARTS:
        source = dealt.get(part) or dealt["train"]
        store, bad = _encode(task, PartRows(source, part), folder.file(f"data/{part}"), keep_rows=part != "train", tick=tick)
        faults += bad
        report["parts"][part] = describe(task, store)
    _refuse_many(faults, sum(p["rows"] for p in report["parts"].values()), recipe.data.max_rejected)
    rejected = [problem for source in sources.values() for problem in source.rejected] + faults
    report["rejected"] = {
        "count": sum(source.rejected_count for source in sources.values()) + len(faults),
        "examples": [{"where": p.where, "message": p.message} for p in rejected[:50]],
    }
    report["duplicates"] = {
        "copies": sum(d.copies for d in dealt.values()),
        "leaks": sum(d.leaks for d in dealt.values()),
        "dropped": recipe.data.deduplicate,
    }
    report["data"] = files_of(sources.values())
    codec = folder.file("codec")
    codec.mkdir(parents=True, exist_ok=True)
    task.save(codec)
    folder.write_json("data/report.json", report)
    return report


def read_part(recipe: Recipe, task: Task, paths: str | list[str], folder: Path, base: Path, tick: Tick | None = None) -> tuple[Store, Rows]:
    """Encode new data by codecs already fitted, into a store at `folder` (evaluation of files that training never saw).

    Args:
        base: folder that relative paths start from.

    Raises:
        UserError: as ``prepare`` does.
    """
    rows = _open(recipe.data, paths, task, RunFolder(base))
    writer = PartRows(_count(rows, task, tick or (lambda n: None)), "train")
    _refuse_many(list(rows.rejected), len(writer.dealt.parts) + rows.rejected_count, recipe.data.max_rejected, rows.rejected_count)
    if not writer.dealt.parts:
        raise UserError(tr("holds no usable row", "没有可用的数据行"), str(paths))
    store, faults = _encode(task, writer, folder, keep_rows=True, tick=tick or (lambda n: None))
    _refuse_many(faults, len(store) + len(faults), recipe.data.max_rejected)
    return store, rows


def describe(task: Task, store: Store) -> dict[str, Any]:
    """Rows, lengths and what the task itself has to say of one part."""
    if not len(store):
        return {"rows": 0}
    found: dict[str, Any] = {"rows": len(store)}
    ragged = next((key for key in store.keys if store[0][key].ndim), None)
    if ragged is not None:
        lengths = store.lengths(ragged)
        counts, edges = np.histogram(lengths, bins=min(30, max(1, int(lengths.max() - lengths.min()))))
        found["lengths"] = {
            "of": ragged, "min": int(lengths.min()), "median": float(np.median(lengths)), "mean": round(float(lengths.mean()), 2),
            "p95": float(np.percentile(lengths, 95)), "max": int(lengths.max()),
            "histogram": {"counts": counts.tolist(), "edges": [round(float(e), 2) for e in edges]},
        }
    return found | task.describe(store)


def prepared(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """The report of an earlier preparation of this run, or None where there is none.

    Raises:
        UserError: where the data files are no longer the ones that were prepared.
    """
    if not folder.file("data/report.json").is_file():
        return None
    report: Any = folder.read_json("data/report.json")
    changed = [name for name, then in report["data"].items() if _changed(Path(name), then)]
    if changed:
        raise UserError(
            tr(f"the data of this run has changed since it was prepared: {', '.join(changed)}; "
               "add --restart to prepare and train anew, or choose another folder with --run",
               f"本次训练的数据在准备之后有改动：{'、'.join(changed)}；加 --restart 重新准备并训练，或用 --run 另选文件夹"),
            str(folder.path))
    return report


def files_of(sources: Iterable[Rows]) -> dict[str, dict[str, Any]]:
    """Size, time and hash of every data file, to notice later that one has changed."""
    found = {}
    for source in sources:
        for path in source.files:
            stat = Path(path).stat()
            found[str(path)] = {"bytes": stat.st_size, "mtime": stat.st_mtime_ns, "hash": file_hash(Path(path))}
    return found


def _changed(path: Path, then: dict[str, Any]) -> bool:
    if not path.is_file():
        return False  # the store holds all that training needs; a file that has moved away is no other data
    stat = path.stat()
    if stat.st_size != then["bytes"]:
        return True
    return stat.st_mtime_ns != then["mtime"] and file_hash(path) != then["hash"]


# -- the run folder -----------------------------------------------------------------------------------------------------


def claim(recipe: Recipe, path: Path, restart: bool = False) -> RunFolder:
    """The run folder for `recipe`: a new one, or the one that an earlier run of the same recipe left.

    Args:
        restart: remove what an earlier run left and begin anew.

    Raises:
        UserError: where the folder belongs to another recipe; it lists what differs.
    """
    folder = RunFolder.create(path)
    if not folder.exists():
        return folder
    if restart:
        with folder.lock():
            folder.empty()
        return folder
    then = yaml.safe_load(folder.file(RECIPE).read_text("utf-8"))
    changed = [d for d in differences(then, recipe.plain()) if not d.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            tr("this run folder belongs to a recipe that differs: " + "; ".join(changed[:12]) +
               ". Choose another folder with --run, or add --restart to remove this run and begin anew",
               "这个训练文件夹属于另一份配方，不同之处：" + "；".join(changed[:12]) +
               "。请用 --run 另选文件夹，或加 --restart 删除旧的训练并重新开始"), str(path))
    return folder


def differences(then: dict[str, Any], now: dict[str, Any], at: str = "") -> list[str]:
    """Keys whose values differ between two resolved recipes: ``train.lr: 0.001 → 0.002``."""
    found = []
    for key in {**then, **now}:
        a, b, name = then.get(key), now.get(key), f"{at}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {yaml.safe_dump(a, allow_unicode=True, default_flow_style=True).splitlines()[0]} → "
                         f"{yaml.safe_dump(b, allow_unicode=True, default_flow_style=True).splitlines()[0]}")
    return found


# -- reading and dealing ------------------------------------------------------------------------------------------------


def _open(data: Data, paths: str | list[str], task: Task, folder: RunFolder) -> Rows:
    return open_rows(paths, task.columns, data.columns, encoding=data.encoding, delimiter=data.delimiter,
                     header=data.header, base=folder.path)


def identity(row: dict[str, Any], task: Task) -> int:
    """Hash of what makes a row itself: the columns marked so, else the first."""
    names = [c.name for c in task.columns if c.identity] or [c.name for c in task.columns[:1]] or sorted(row)
    return xxhash.xxh3_64_intdigest(json.dumps([row.get(name) for name in names], ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _count(rows: Rows, task: Task, tick: Tick, limit: int | None = None, group: str | None = None) -> Dealt:
    """First reading of one source: every row goes to part 0."""
    dealt = Dealt(rows)
    for n, row in enumerate(itertools.islice(iter(rows), limit), 1):
        dealt.keys.append(identity(row, task))
        if group is not None:
            if row.get(group) in (None, ""):
                raise UserError(tr(f"has no value in the group column '{group}'; columns: {', '.join(row)}",
                                   f"分组列 '{group}' 没有值；现有的列：{'、'.join(row)}"), row.where)
            dealt.groups.append(xxhash.xxh3_64_intdigest(str(row[group]).encode("utf-8", "surrogatepass")))
        if n % 4096 == 0:
            tick(4096)
    dealt.parts = bytearray(len(dealt.keys))
    return dealt


def _deal(recipe: Recipe, task: Task, sources: dict[str, Rows], tick: Tick) -> dict[str, Dealt]:
    """Deal every row of every source to a part, so that no two copies of a row lie in different parts.

    Given files keep their rows; what also stands in a later part (test before valid before train) is dropped from the
    earlier one, so that published test sets stay whole.
    """
    data, dealt = recipe.data, {}
    for part, source in sources.items():
        group = data.split.group if part == "train" and data.split.by == "group" else None
        dealt[part] = _count(source, task, tick, data.limit, group)
        total = len(dealt[part].keys) + source.rejected_count
        _refuse_many(list(source.rejected), total, data.max_rejected, source.rejected_count)
        if not dealt[part].keys:
            raise UserError(tr("holds no usable row", "没有可用的数据行"), ", ".join(map(str, source.files)))
    seen: set[int] = set()
    for part in ("test", "valid"):
        if part in dealt:
            dealt[part].parts = bytearray([PARTS.index(part)]) * len(dealt[part].keys)
            _drop(dealt[part], seen, data.deduplicate)
            seen.update(dealt[part].keys)
    _drop(dealt["train"], seen, data.deduplicate)
    _cut(dealt["train"], recipe, [part for part in ("valid", "test") if part not in dealt])
    return dealt


def _drop(dealt: Dealt, elsewhere: set[int], deduplicate: bool) -> None:
    """Mark rows that stand in another part, and copies within this one where asked."""
    seen: set[int] = set()
    for i, key in enumerate(dealt.keys):
        if key in elsewhere:
            dealt.parts[i] = DROPPED
            dealt.leaks += 1
        elif key in seen:
            dealt.copies += 1
            if deduplicate:
                dealt.parts[i] = DROPPED
        seen.add(key)


def _cut(dealt: Dealt, recipe: Recipe, wanted: list[str]) -> None:
    """Deal part of the training rows to the parts in `wanted`, by order, by group or at random (whole copies together)."""
    split = recipe.data.split
    kept = np.flatnonzero(np.frombuffer(dealt.parts, dtype=np.uint8) == 0)
    shares = {part: getattr(split, part) for part in wanted if getattr(split, part) > 0}
    if not shares or not len(kept):
        return
    if split.by == "order":
        units = np.arange(len(kept))
    else:
        keys = np.frombuffer(dealt.groups if split.by == "group" else dealt.keys, dtype=np.uint64)[kept]
        _, units = np.unique(keys, return_inverse=True)
        count = int(units.max()) + 1
        # Order of first appearance, then the seed's order: the same split whatever the hash values are.
        first = np.full(count, len(kept))
        np.minimum.at(first, units, np.arange(len(kept)))
        order = np.random.default_rng([recipe.seed, 0x5B117]).permutation(count)
        rank = np.empty(count, dtype=np.int64)
        rank[np.argsort(first, kind="stable")] = order
        units = rank[units]
    sizes = np.bincount(units)
    filled = np.cumsum(sizes)
    parts = np.frombuffer(dealt.parts, dtype=np.uint8).copy()
    end = len(kept)
    for part in ("test", "valid"):
        if part in shares:
            take = max(1, round(shares[part] * len(kept)))
            chosen = (filled[units] > end - take) & (filled[units] <= end)
            parts[kept[chosen]] = PARTS.index(part)
            end -= int(chosen.sum())
    dealt.parts = bytearray(parts.tobytes())


def _encode(task: Task, rows: Iterable[Row], folder: Path, keep_rows: bool, tick: Tick) -> tuple[Store, list[Problem]]:
    """Write the encoded rows; rows that cannot be encoded (a label never seen in training) are left out and listed."""
    faults: list[Problem] = []
    with StoreWriter(folder) as writer:
        for row in rows:
            try:
                writer.add(task.encode(row), row if keep_rows else None)
            except UserError as error:
                faults += [Problem(p.message, p.where or row.where) for p in error.problems]
            if len(writer) % 1024 == 0:
                tick(1024)
    return Store(folder), faults


def _refuse_empty(dealt: Dealt, recipe: Recipe) -> None:
    counts = Counter(dealt.parts)
    if not counts[0]:
        raise UserError(
            tr(f"no row is left to train on: of {len(dealt.parts)} rows, {dealt.leaks} also stand in the test or validation part; "
               "check data.train and data.split",
               f"没有剩下可训练的数据：{len(dealt.parts)} 行中有 {dealt.leaks} 行也出现在测试或验证部分；请检查 data.train 与 data.split"))


def _refuse_many(problems: list[Problem], rows: int, tolerance: float, count: int | None = None) -> None:
    """Stop where more rows than the recipe tolerates cannot be used."""
    count = len(problems) if count is None else count
    if count <= tolerance * rows:
        return
    shown = problems[:10]
    shown.append(Problem(
        tr(f"{count} of {rows} rows cannot be used, more than data.max_rejected ({tolerance:g}) allows. Mend them, or set "
           f"data.max_rejected={min(1.0, round(count / max(1, rows) + 0.005, 2)):g} to go on without them",
           f"{rows} 行中有 {count} 行无法使用，超过 data.max_rejected（{tolerance:g}）。请修正这些行，或设置 "
           f"data.max_rejected={min(1.0, round(count / max(1, rows) + 0.005, 2)):g} 以跳过它们")))
    raise UserError.many(shown)
