"""From a log of interactions (who did something with what, when) to one row a user: the items so far, and the next.

The log is read once and kept as numbers, twelve bytes an interaction (with times), so that ten million of them fit
easily; the ids are kept once each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from multihead.data.columns import Column, Row
from multihead.data.events import ITEM_NAMES, RATING_NAMES, TIME_NAMES, USER_NAMES
from multihead.data.fastlog import read_fast
from multihead.data.rows import Rows
from multihead.data.store import Store
from multihead.errors import Problem, UserError, tr

EVENTS = (
    Column("user", "id", names=USER_NAMES),
    Column("item", "ids", names=ITEM_NAMES),
    Column("time", "time", required=False, names=TIME_NAMES),
)
RATING = Column("rating", "number", names=RATING_NAMES)
PARTS = ("train", "valid", "test")
_KEPT_PROBLEMS = 1000


@dataclass(frozen=True)
class Filters:
    """Which interactions count."""

    min_rating: float | None = None
    """Those with a lower rating are left out."""
    min_actions: int = 1
    """Users with fewer interactions are left out …"""
    min_users: int = 1
    """… and items with fewer; by turns, until nothing changes (the "k-core" of published data sets)."""
    repeats: Literal["keep", "merge", "drop"] = "keep"
    """An item that a user had before. merge: the same several times in a row counts once; drop: only the first time."""


class Log:
    """The interactions of some files, sorted by user and time: read at first use, then kept.

    Users are in the order in which they first appear. Interactions of one time, or of a file without times, stay in the
    file's order.
    """

    large = 4 << 20
    """Bytes from which on a file is read by whole columns, if it can be."""

    def __init__(self, rows: Rows, filters: Filters, deduplicate: bool = True) -> None:
        self.rows, self.filters, self.deduplicate = rows, filters, deduplicate
        self.rejected: list[Problem] = []
        self.rejected_count = 0
        self.count = 0
        """Usable interactions, before the filters."""
        self.left_out: dict[str, int] = {}
        """Why usable interactions were left out, and how many for each reason."""
        self.users: list[str] = []
        self.items: list[str] = []
        self.item = np.zeros(0, np.int32)
        """(A,) number of each interaction's item."""
        self.time: np.ndarray | None = None
        """(A,) its time; None for a log without."""
        self.starts = np.zeros(1, np.int64)
        """(U + 1,) where each user's interactions begin."""
        self._read_already = False

    def read(self) -> Log:
        """Read the files, if that was not done yet."""
        if not self._read_already:
            user, item, time, rating = self._read()
            self._arrange(*self._filter(user, item, time, rating))
            self._read_already = True
        return self

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self._at_once() or self._row_by_row()

    def _at_once(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """The columns of one large regular file; None where the careful way has to be taken."""
        files, none = self.rows.files, np.zeros(0)
        if len(files) != 1 or files[0].stat().st_size < self.large:
            return None
        wanted = ["user", "item", "time", *(["rating"] if self.filters.min_rating is not None else [])]
        found = read_fast(files[0], self.rows.guess["files"][0], wanted)
        if found is None:
            return None
        (user, self.users), (item, self.items) = found["user"], found["item"]
        self.count = len(item)
        return user, item, found.get("time", none), found.get("rating", none)

    def _row_by_row(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        users, items = dict[str, int](), dict[str, int]()
        user, item, time, rating = array("i"), array("i"), array("d"), array("d")
        timed = any("time" in about["mapping"] for about in self.rows.guess["files"])
        rated = self.filters.min_rating is not None
        own: list[Problem] = []
        faults = 0
        for row in self.rows:
            moment = row.get("time")
            if timed and moment is None:
                faults += 1
                if len(own) < _KEPT_PROBLEMS:
                    own.append(Problem(tr("has no time, though others do", "没有时间，而其他行有时间"), row.where))
                continue
            number = users.setdefault(row["user"], len(users))
            for name in row["item"]:
                user.append(number)
                item.append(items.setdefault(name, len(items)))
                if moment is not None:
                    time.append(moment)
                if rated:
                    rating.append(row["rating"])
        self.users, self.items, self.count = list(users), list(items), len(item)
        self.rejected = [*self.rows.rejected, *own][:_KEPT_PROBLEMS]
        self.rejected_count = self.rows.rejected_count + faults
        return (np.frombuffer(user, np.int32), np.frombuffer(item, np.int32), np.frombuffer(time, np.float64),
                np.frombuffer(rating, np.float64))  # fmt: skip

    def _filter(
        self, user: np.ndarray, item: np.ndarray, time: np.ndarray, rating: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """user, item and time of what counts, sorted."""
        order = np.lexsort((time, user)) if len(time) else np.argsort(user, kind="stable")
        f = self.filters
        if f.min_rating is not None:
            order = self._keep("rating", order, rating[order] >= f.min_rating)
        if len(time) and self.deduplicate:
            # One user, one item, one moment: the same line twice, not the same thing done again.
            first = _first(user[order], item[order], time[order])
            order = self._keep("copies", order, first)
        if f.repeats == "drop":
            order = self._keep("repeats", order, _first(user[order], item[order]))
        elif f.repeats == "merge":
            u, i = user[order], item[order]
            again = np.zeros(len(order), bool)
            again[1:] = (u[1:] == u[:-1]) & (i[1:] == i[:-1])
            order = self._keep("repeats", order, ~again)
        while f.min_actions > 1 or f.min_users > 1:
            u, i = user[order], item[order]
            actions, held = np.bincount(u, minlength=1)[u], np.bincount(i, minlength=1)[i]
            before = len(order)
            order = self._keep("rare", order, (actions >= f.min_actions) & (held >= f.min_users))
            if len(order) == before:
                break
        return user[order], item[order], time[order] if len(time) else time

    def _keep(self, reason: str, order: np.ndarray, kept: np.ndarray) -> np.ndarray:
        lost = int(len(kept) - kept.sum())
        if lost:
            self.left_out[reason] = self.left_out.get(reason, 0) + lost
        return order[kept]

    def _arrange(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        if self.count and not len(item):
            raise UserError(tr(
                f"none of {self.count:,} interactions is left after options.min_rating, min_actions and min_users; "
                "lower them",
                f"{self.count:,} 条交互经 options.min_rating、min_actions、min_users 筛选后一条不剩；请调低它们"),
                self.rows.guess["files"][0]["file"])
        kept_users, where = np.unique(user, return_inverse=True)
        self.users = [self.users[u] for u in kept_users.tolist()]
        self.starts = np.concatenate(([0], np.cumsum(np.bincount(where, minlength=0)))).astype(np.int64)
        self.item, self.time = item, time if len(time) else None

    @property
    def lengths(self) -> np.ndarray:
        """(U,) interactions of each user."""
        return np.diff(self.starts)

    def names(self, user: int, first: int, last: int) -> list[str]:
        """Ids of the items `first` up to but not including `last` of one user."""
        start = int(self.starts[user])
        return [self.items[i] for i in self.item[start + first : start + last].tolist()]

    def times(self, user: int, first: int, last: int) -> list[float]:
        """When the items `first` up to but not including `last` of one user were chosen; the log has times."""
        assert self.time is not None
        start = int(self.starts[user])
        return self.time[start + first : start + last].tolist()

    def describe(self) -> list[str]:
        """What was found, as lines to print."""
        lengths = self.lengths
        if not len(lengths):
            return []
        held = len(np.unique(self.item))
        median, low, high = np.median(lengths), lengths.min(), lengths.max()
        few = int((lengths < 3).sum())
        lines = [tr(
            f"{len(lengths):,} users, {held:,} items, {len(self.item):,} interactions; of one user {low} to {high}, "
            f"median {median:g}; fewer than 3: {few:,} users",
            f"{len(lengths):,} 个用户，{held:,} 个物品，{len(self.item):,} 条交互；每个用户 {low} 到 {high} 条，"
            f"中位数 {median:g}；少于 3 条的用户：{few:,} 个")]
        if self.time is None:
            lines.append(tr("no times: the order of the file is taken for the order of time",
                            "没有时间列：以文件中的顺序作为时间顺序"))
        words = {"rating": ("rated below options.min_rating", "评分低于 options.min_rating"),
                 "copies": ("exact copies", "完全重复"),
                 "repeats": ("repeats (options.repeats)", "重复交互（options.repeats）"),
                 "rare": ("of users or items with too few (options.min_actions, min_users)",
                          "用户或物品的交互太少（options.min_actions、min_users）")}
        lines += [tr(f"left out, {words[why][0]}: {n:,} interactions", f"略去 {n:,} 条交互：{words[why][1]}")
                  for why, n in self.left_out.items()]
        again = len(self.item) - int(_first(np.repeat(np.arange(len(lengths)), lengths), self.item).sum())
        if again:
            share = f"{100 * again / len(self.item):.3g}"
            lines.append(tr(f"{again:,} interactions ({share} %) repeat an item that the user had before; where people "
                            "come back to things, set options.seen=keep",
                            f"{again:,} 条交互（{share} %）是用户再次选择之前的物品；若重复选择是常态，"
                            "请设置 options.seen=keep"))
        return lines


def _first(*keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which rows are the first with their keys."""
    order = np.lexsort(keys)
    same = np.ones(len(order), bool)
    for key in keys:
        found = key[order]
        same[1:] &= found[1:] == found[:-1]
    same[:1] = False
    first = np.empty(len(order), bool)
    first[order] = ~same  # lexsort is stable: of equal rows the earliest stands first
    return first


class Histories:
    """Rows of a log, one a user: ``{"user", "history": items so far, "item": the one that came next}``.

    Made to stand where `Rows` stand: files, guess, count and rejected are those of the log, told once.

    Args:
        cut: (log) → for each user the place of "item" among the user's interactions, −1 for no row; or (U, 2), the
            first such place and the one behind the last, where a user has several rows.
        first: whether faults and findings of the log are told here.
    """

    def __init__(self, log: Log, cut: Any, first: bool) -> None:
        self.log, self.cut, self.first = log, cut, first
        self.also: list[Path] = []
        """Further files that what is prepared depends on."""
        self.timed = False
        self.count = 0
        self.rejected: list[Problem] = []
        self.rejected_count = 0

    def ask_times(self, why: str) -> None:
        """Rows hold ``"times"`` too, when each item of the history was chosen.

        Raises:
            UserError: the log has no times, which the option `why` asks for.
        """
        untimed = [about["file"] for about in self.guess["files"] if "time" not in about["mapping"]]
        if untimed:
            raise UserError(tr(f"{why} asks for times, and this file has no time column; name it in data.columns.time",
                               f"{why} 需要时间，但这个文件没有时间列；请用 data.columns.time 指明"), untimed[0])
        self.timed = True

    @property
    def files(self) -> list[Path]:
        """The files of the log; none where another part has told them."""
        return [*(self.log.rows.files if self.first else ()), *self.also]

    @property
    def guess(self) -> dict[str, Any]:
        """As `Rows.guess`."""
        return self.log.rows.guess

    def describe(self) -> list[str]:
        """As `Rows.describe`, and what the log holds."""
        return [*self.log.rows.describe(), *self.log.describe()] if self.first else []

    def __iter__(self) -> Iterator[Row]:
        log = self.log.read()
        if self.first:
            self.count, self.rejected, self.rejected_count = log.count, log.rejected, log.rejected_count
        places = self.cut(log)
        if places.ndim == 1:
            places = np.stack((places, places + (places >= 0)), 1)
        if not self.first:
            self.count = int((places[:, 1] - places[:, 0]).sum())
            if not self.count and log.count:
                raise UserError(tr(
                    f"none of {len(log.users):,} users has enough interactions to hold some out for validation and "
                    "test; give more data, or set data.split.by=random to hold out whole users",
                    f"{len(log.users):,} 个用户中没有一个的交互多到可以留出验证和测试；"
                    "请给出更多数据，或设置 data.split.by=random 以留出整个用户"), self.guess["files"][0]["file"])
        where = tr("user", "用户")
        for user in np.flatnonzero(places[:, 1] > places[:, 0]).tolist():
            begin, end = places[user].tolist()
            name, items = log.users[user], log.names(user, 0, end)
            times = log.times(user, 0, end - 1) if self.timed else []
            for at in range(begin, end):
                row: dict[str, Any] = {"user": name, "history": items[:at], "item": items[at]}
                if self.timed:
                    row["times"] = times[:at]
                yield Row(row, where=f"{where} {name}")


def histories(
    sources: Mapping[str, Rows], filters: Filters, by: str, shares: Mapping[str, float], deduplicate: bool = True,
    every: bool = False,
) -> dict[str, Histories]:
    """Each part's rows: one a user, but for `every`.

    Files of their own hold users of their own: of each, the last item is the one to foretell. What has no file is cut
    from the training log:

    - by "last" (leave-one-out): of every user the last item is for the test, the one before it for validation, all else
      for training. Users too short for that are for training only.
    - by "time": two moments part the log; validation and test ask, of every user who was there before and comes back in
      the period, for the first item of that period; with `every`, for each item of the period from all that its user
      did before it, and of newcomers too.
    - else no cut: the rows are whole users, to be dealt out as any rows are.

    Args:
        shares: of the parts "valid" and "test"; by "last" only whether they are 0 counts.

    Raises:
        UserError: by "time" where the log has no times.
    """
    logs = {part: Log(rows, filters, deduplicate) for part, rows in sources.items()}
    found = {part: Histories(log, _ending, first=True) for part, log in logs.items()}
    wanted = [part for part in ("test", "valid") if part not in logs and shares.get(part, 0) > 0]
    if "train" not in logs or by not in ("last", "time") or not wanted:
        return found
    log = logs["train"]
    if by == "time" and not all("time" in about["mapping"] for about in log.rows.guess["files"]):
        raise UserError(tr(
            "data.split.by is time, and this file has no time column; name it in data.columns.time, or split by last",
            "data.split.by 是 time，但这个文件没有时间列；请用 data.columns.time 指明，或改为按 last 划分"),
            next(about["file"] for about in log.rows.guess["files"] if "time" not in about["mapping"]))
    cuts = _by_time(wanted, shares, every) if by == "time" else _by_last(wanted)
    return found | {part: Histories(log, cut, first=part == "train") for part, cut in cuts.items()}


def _ending(log: Log) -> np.ndarray:
    return log.lengths - 1


def _by_last(wanted: list[str]) -> dict[str, Any]:
    def cut(back: int) -> Any:
        def places(log: Log) -> np.ndarray:
            n = log.lengths
            short = n <= len(wanted)
            if back == len(wanted):
                return np.where(short, n - 1, n - 1 - back)
            return np.where(short, -1, n - 1 - back)

        return places

    return {part: cut(back) for back, part in enumerate(wanted)} | {"train": cut(len(wanted))}


def _by_time(wanted: list[str], shares: Mapping[str, float], every: bool) -> dict[str, Any]:
    def edges(log: Log) -> list[float]:
        """The moments at which training ends and each later part begins, and the end of time."""
        assert log.time is not None
        later = [float(np.quantile(log.time, 1 - sum(shares[p] for p in wanted[: i + 1]))) for i in range(len(wanted))]
        return [*reversed(later), np.inf]

    def cut(part: str) -> Any:
        def places(log: Log) -> np.ndarray:
            assert log.time is not None
            at = edges(log)
            owner = np.repeat(np.arange(len(log.users)), log.lengths)
            before = [np.bincount(owner, log.time < moment, len(log.users)).astype(np.int64) for moment in at]
            if part == "train":
                return before[0] - 1
            k = len(wanted) - 1 - wanted.index(part)
            if every:
                return np.stack((before[k], before[k + 1]), 1)
            return np.where((before[k] > 0) & (before[k + 1] > before[k]), before[k], -1)

        return places

    return {part: cut(part) for part in (*wanted, "train")}


class Slices(Sequence[dict[str, np.ndarray]]):
    """Training sequences ``{"items": (T,)}``, T ≤ room + 1: each row's history and what came next. A longer one comes
    in several, counted from the end, so that every item but the first is foretold once, from up to `room` before it.

    Args:
        gaps: with them ``"gaps"`` (T − 1,), those of all items but the last.
    """

    def __init__(self, store: Store, room: int, gaps: bool = False) -> None:
        self.store, self.gaps = store, gaps
        total = store.lengths("history") + 1
        count = np.where(total > 1, -(-(total - 1) // room), 0)
        self.row = np.repeat(np.arange(len(total)), count)
        nth = np.arange(len(self.row)) - np.repeat(np.cumsum(count) - count, count)
        self.end = np.repeat(total, count) - nth * room
        self.start = np.maximum(self.end - room - 1, 0)
        if not len(self.row):
            raise UserError(tr("no user has two interactions to learn an order from",
                               "没有用户有两次以上的交互，无从学习先后"))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:  # type: ignore[override]  # slices are not served
        example = self.store[self.row[i]]
        items = np.append(example["history"], example["item"].astype(np.int32))
        first, last = int(self.start[i]), int(self.end[i])
        return {"items": items[first:last], **({"gaps": example["gaps"][first : last - 1]} if self.gaps else {})}

    def lengths(self, key: str) -> np.ndarray:
        """Items of each."""
        return self.end - self.start
