"""Which part each row of the data goes to: train, valid or test, so that no two copies of a row lie in different parts.

One reading of the files is enough. Of each row eight bytes are kept that stand for what makes it itself, and as many
for its group and its target where they are needed; never the row.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from multihead.data.rows import Row, Rows
from multihead.errors import Problem, UserError, nearest, tr
from multihead.recipe import Recipe
from multihead.task import Task

PARTS = ("train", "valid", "test")
DROPPED = 255
SHOWN = 10
Tick = Callable[[int], None]


@dataclass
class Dealt:
    """Which part each row of one source goes to, and what was found on the way."""

    rows: Rows
    parts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """One byte a usable row: index into PARTS, or DROPPED."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hash of each row's inputs: what makes it itself."""
    groups: np.ndarray | None = None
    """Hash of each row's group, where rows are dealt by group."""
    targets: np.ndarray | None = None
    """Hash of what is to be learned of each row, 0 where it has none; None for tasks without such columns."""
    copies: int = 0
    """Rows that also stand earlier in this source."""
    leaks: int = 0
    """Rows left out because they also stand in a later part."""
    rejected: list[Problem] = field(default_factory=list)
    rejected_count: int = 0

    def of(self, part: str) -> Iterator[Row]:
        """The rows dealt to `part`, read anew."""
        wanted = PARTS.index(part)
        for row, dealt in zip(self.rows, self.parts.tobytes(), strict=False):
            if dealt == wanted:
                yield row

    def at(self, indices: Iterable[int]) -> dict[int, Row]:
        """The usable rows of these numbers, read anew."""
        wanted = set(indices)
        if not wanted:
            return {}
        first = enumerate(itertools.islice(self.rows, max(wanted) + 1))
        return {i: row for i, row in first if i in wanted}


class PartRows:
    """The rows of one part; may be read as often as a task's ``fit`` likes."""

    def __init__(self, dealt: Dealt, part: str) -> None:
        self.dealt, self.part = dealt, part

    def __iter__(self) -> Iterator[Row]:
        return self.dealt.of(self.part)


# -- reading -----------------------------------------------------------------------------------------------------------


def _targets(task: Task) -> list[str]:
    return [column.name for column in task.columns if column.target]


_TEXT = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _hash(values: Sequence[Any]) -> int:
    return xxhash.xxh3_64_intdigest(_TEXT(values).encode("utf-8", "surrogatepass"))


def count(rows: Rows, task: Task, tick: Tick, limit: int | None = None, group: str | None = None) -> Dealt:
    """The first reading of one source: every usable row goes to part 0.

    Raises:
        UserError: rows without a value in the column `group`, each with its place.
    """
    inputs, targets, grouped = list(task.identity()), _targets(task), _Groups(group)
    keys, learned = array("Q"), array("Q")
    for n, row in enumerate(itertools.islice(iter(rows), limit), 1):
        keys.append(_hash([row.get(name) for name in inputs or sorted(row)]))
        if targets:
            values = [row.get(name) for name in targets]
            learned.append(_hash(values) if any(v is not None for v in values) else 0)
        if group is not None:
            grouped.add(row)
        if n % 4096 == 0:
            tick(4096)
    dealt = Dealt(rows, np.zeros(len(keys), np.uint8), np.array(keys, np.uint64), grouped.ids())
    dealt.targets = np.array(learned, np.uint64) if targets else None
    dealt.rejected, dealt.rejected_count = list(rows.rejected), rows.rejected_count
    return dealt


class _Groups:
    """The groups of rows as they are read, and the rows that have none."""

    def __init__(self, column: str | None) -> None:
        self.column = column
        self._ids = array("Q")
        self._bad: list[Row] = []
        self._faults = 0

    def add(self, row: Row) -> None:
        value = row.get(self.column or "")
        if value is None or value == "":
            self._faults += 1
            self._bad += [row] if len(self._bad) < SHOWN else []
        self._ids.append(_hash([str(value)]))

    def ids(self) -> np.ndarray | None:
        """The hashes. UserError where a row had no group."""
        if self.column is None:
            return None
        if self._faults and self._faults == len(self._ids):
            known = ", ".join(map(str, self._bad[0]))
            near = nearest(self.column, self._bad[0])
            raise UserError(tr(f"there is no column '{self.column}' (data.split.group){near}; the columns are: {known}",
                               f"没有 '{self.column}' 这一列（data.split.group）{near}；现有的列：{known}"),
                            self._bad[0].where)
        if self._faults:
            empty = tr(f"the group column '{self.column}' is empty", f"分组列 '{self.column}' 为空")
            problems = [Problem(empty, row.where) for row in self._bad]
            problems.append(Problem(tr(f"{self._faults} rows have no group; fill them in or remove these rows",
                                       f"有 {self._faults} 行没有组；请补上或删去这些行")))
            raise UserError.many(problems)
        return np.array(self._ids, np.uint64)


def refuse_many(problems: Sequence[Problem], rows: int, tolerance: float, count: int | None = None) -> None:
    """Stop where more rows than the recipe tolerates cannot be used.

    Args:
        problems: why, for the first of them.
        rows: how many there are in all.
        count: how many cannot be used; default: as many as `problems`.
    """
    count = len(problems) if count is None else count
    if count <= tolerance * rows:
        return
    needed = min(1.0, round(count / max(1, rows) + 0.005, 2))
    raise UserError.many([*problems[:SHOWN], Problem(
        tr(f"{count} of {rows} rows cannot be used, more than data.max_rejected ({tolerance:g}) allows. Mend them, or "
           f"set data.max_rejected={needed:g} to go on without them",
           f"{rows} 行中有 {count} 行无法使用，超过 data.max_rejected（{tolerance:g}）。请修正这些行，或设置 "
           f"data.max_rejected={needed:g} 以跳过它们"))])


# -- dealing -----------------------------------------------------------------------------------------------------------


def deal(recipe: Recipe, task: Task, sources: Mapping[str, Rows], tick: Tick) -> dict[str, Dealt]:
    """Deal every row of every source to a part, so that no two copies of a row lie in different parts.

    Given files keep their rows; what also stands in a later part (test before valid before train) is dropped from the
    earlier one, so that published test sets stay whole.

    Raises:
        UserError: no usable row, more faulty ones than the recipe tolerates, or too few to make every part.
    """
    data = recipe.data
    dealt: dict[str, Dealt] = {}
    for part, source in sources.items():
        group = data.split.group if part == "train" and data.split.by == "group" else None
        found = dealt[part] = count(source, task, tick, data.limit, group)
        refuse_many(found.rejected, source.count + found.rejected_count, data.max_rejected, found.rejected_count)
        refuse_none(found)
    later: list[np.ndarray] = []
    for part in ("test", "valid", "train"):
        if part in dealt:
            dealt[part].parts[:] = PARTS.index(part)
            _drop(dealt[part], later, data.deduplicate)
            later.append(dealt[part].keys)
    train = dealt["train"]
    _refuse_nothing_left(train)
    _cut(train, recipe, [part for part in ("test", "valid") if part not in dealt])
    _refuse_nothing_left(train)
    return dealt


def _refuse_nothing_left(train: Dealt) -> None:
    if not (train.parts == 0).any():
        raise UserError(
            tr(f"no row is left to train on: of {len(train.parts)} rows, {train.leaks} also stand in the test or "
               "validation part; give other data.train, or change data.test, data.valid or data.split",
               f"没有剩下可训练的数据：{len(train.parts)} 行中有 {train.leaks} 行也出现在测试或验证部分；"
               "请更换 data.train，或修改 data.test、data.valid、data.split"), names(train.rows))


def refuse_none(dealt: Dealt) -> None:
    """UserError where a source holds no usable row."""
    if not len(dealt.keys):
        raise UserError(tr(f"holds no usable row ({dealt.rejected_count} rejected); name another file",
                           f"没有可用的数据行（{dealt.rejected_count} 行被拒绝）；请换一个文件"), names(dealt.rows))


def names(rows: Rows) -> str:
    """A source's files as a person named them: the first, and how many more."""
    found = [about["file"] for about in rows.guess["files"]]
    return found[0] + (tr(f" and {len(found) - 1} more", f" 等 {len(found)} 个文件") if found[1:] else "")


def _drop(dealt: Dealt, later: Sequence[np.ndarray], deduplicate: bool) -> None:
    """Mark rows that stand in a later part, and where asked all but the first of those alike within this source."""
    leaks = np.isin(dealt.keys, np.concatenate([*later, dealt.keys[:0]]))
    copies = ~leaks
    copies[np.unique(dealt.keys, return_index=True)[1]] = False
    dealt.leaks, dealt.copies = int(leaks.sum()), int(copies.sum())
    dealt.parts[leaks | copies if deduplicate else leaks] = DROPPED


def _cut(dealt: Dealt, recipe: Recipe, wanted: Sequence[str]) -> None:
    """Deal some of the training rows to the parts in `wanted`, by order, by group or at random (copies together)."""
    split = recipe.data.split
    kept = np.flatnonzero(dealt.parts == 0)
    shares = {part: getattr(split, part) for part in wanted if getattr(split, part) > 0}
    if not shares:
        return
    if split.by in ("last", "time"):
        raise UserError(tr(f"data.split.by={split.by} cuts each user's interactions, and the rows of this task are no "
                           "interactions; use random, order or group",
                           f"data.split.by={split.by} 用于切分每个用户的交互记录，而本任务的数据不是交互记录；"
                           "请用 random、order 或 group"), names(dealt.rows))
    units = _units(dealt, kept, split.by, recipe.seed)
    sizes = np.bincount(units)
    if len(sizes) <= len(shares):
        what = tr("groups", "组") if split.by == "group" else tr("different rows", "行不同的数据")
        keys = " ".join(f"data.split.{part}=0" for part in shares)
        raise UserError(tr(f"{len(sizes)} {what} cannot be dealt to {len(shares) + 1} parts (train, "
                           f"{', '.join(shares)}); give more data, or train on all of it with {keys}",
                           f"{len(sizes)} {what}无法分成 {len(shares) + 1} 个部分（train、{'、'.join(shares)}）；"
                           f"请给出更多数据，或用 {keys} 全部用于训练"), names(dealt.rows))
    part_of = np.zeros(len(sizes), np.uint8)
    for left, part in zip(range(len(shares), 0, -1), shares, strict=True):
        free = np.flatnonzero(part_of == 0)
        part_of[_take(free, sizes, max(1, round(shares[part] * len(kept))), least=left)] = PARTS.index(part)
    dealt.parts[kept] = part_of[units]
    if split.by != "random" and not recipe.data.deduplicate:
        _part(dealt)


def _units(dealt: Dealt, kept: np.ndarray, by: str, seed: int) -> np.ndarray:
    """The number of what each kept row is dealt together with; the units with the highest numbers are dealt first."""
    if by == "order":
        return np.arange(len(kept))
    keys = dealt.groups if by == "group" else dealt.keys
    assert keys is not None
    _, units = np.unique(keys[kept], return_inverse=True)
    total = int(units.max()) + 1
    # Order of first appearance, then the seed's order: the same split whatever the hash values are.
    first = np.full(total, len(kept))
    np.minimum.at(first, units, np.arange(len(kept)))
    rank = np.empty(total, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.random.default_rng([seed, 0x5B117]).permutation(total)
    return rank[units]


def _take(free: np.ndarray, sizes: np.ndarray, room: int, least: int) -> list[int] | np.ndarray:
    """Units for one part: from the last on, all that still fit into `room` rows, one at least; `least` stay free."""
    most = len(free) - least
    if sizes[free].max() == 1:
        return free[-min(room, most):]
    chosen: list[int] = []
    for unit in free[::-1].tolist():
        if room == 0 or len(chosen) == most:
            break
        if sizes[unit] <= room:
            chosen.append(unit)
            room -= int(sizes[unit])
    return chosen or [int(free[len(free) - 1 - np.argmin(sizes[free[::-1]])])]


def _part(dealt: Dealt) -> None:
    """Drop rows from a part where a copy went to a later one: by order and by group, copies are not dealt together."""
    for early, late in ((1, (2,)), (0, (1, 2))):
        elsewhere = dealt.keys[np.isin(dealt.parts, late)]
        leaks = (dealt.parts == early) & np.isin(dealt.keys, elsewhere)
        dealt.parts[leaks] = DROPPED
        dealt.leaks += int(leaks.sum())


# -- rows that contradict each other -----------------------------------------------------------------------------------


def conflicts(dealt: Iterable[Dealt], task: Task) -> dict[str, Any]:
    """Rows that are the same but for what is to be learned of them, over all sources.

    Returns:
        ``{"identities", "rows", "examples"}``: how many different rows there are with more than one target, how many
        rows that makes, and of the first ten their places and targets.
    """
    sources = [d for d in dealt if d.targets is not None]
    if not sources:
        return {"identities": 0, "rows": 0, "examples": []}
    keys = np.concatenate([d.keys for d in sources])
    targets = np.concatenate([d.targets for d in sources if d.targets is not None])
    known = np.flatnonzero(targets)
    order = known[np.lexsort((known, targets[known], keys[known]))]
    k, t = keys[order], targets[order]
    other = np.flatnonzero((k[1:] == k[:-1]) & (t[1:] != t[:-1]))  # where the target changes within one identity
    alike = np.isin(keys, k[other]) & (targets != 0)
    rows = np.flatnonzero(alike)
    first: dict[int, dict[int, int]] = {}
    for i in rows.tolist():
        seen = first.setdefault(int(keys[i]), {}) if len(first) < SHOWN or int(keys[i]) in first else {}
        seen.setdefault(int(targets[i]), i)
    examples = _examples(sources, list(first.values()), task)
    return {"identities": len(np.unique(k[other])), "rows": len(rows), "examples": examples}


def _examples(sources: Sequence[Dealt], found: Iterable[Mapping[int, int]], task: Task) -> list[list[dict[str, Any]]]:
    """Place and targets of the rows of these numbers, counted over all sources."""
    chosen = [list(rows.values())[:4] for rows in found]
    read: dict[int, Row] = {}
    start = 0
    for source in sources:
        end = start + len(source.keys)
        wanted = [i - start for group in chosen for i in group if start <= i < end]
        read |= {start + i: row for i, row in source.at(wanted).items()}
        start = end
    targets = _targets(task)
    return [[{"where": read[i].where, "target": {n: read[i][n] for n in targets if n in read[i]}} for i in group]
            for group in chosen]
