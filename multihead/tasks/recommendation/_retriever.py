"""What every retriever has in common: histories out of a log, requests in, lists of items out, and their figures.

A retriever is a model that scores the whole catalogue for a user or a history (`Retriever.scores`); how it does so is
the matter of the task.

Legend: B batch, I items of the catalogue, K length of a list, R resamples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.items import ItemCodec
from multihead.data.catalogue import read_items
from multihead.data.columns import Column, convert
from multihead.data.events import USER_NAMES
from multihead.data.interactions import EVENTS, RATING, Filters, Log, histories
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import ranking
from multihead.task import Answer, Batch, Example, Task

LIST = 20
"""Length of the lists that an evaluation keeps."""
SAMPLES, SHOWN = 5, 5
"""Users that the report shows, and items of each list."""
MOST = 1000
"""Longest list that a request may ask for; also how many of a user's last items are remembered."""
NOTE = json.JSONEncoder(ensure_ascii=False).encode
HISTORY_NAMES = ("items", "item", "sequence", "clicks", "viewed", "purchased", "历史", "历史记录", "浏览记录",
                 "购买记录")


class Retriever(Task):
    """Items of a catalogue for whoever comes with a history, or is remembered."""

    field = "recommendation"
    columns = (
        Column("history", "ids", required=False, names=HISTORY_NAMES),
        Column("exclude", "ids", required=False, names=("排除",)),
        Column("user", "id", required=False, names=USER_NAMES),
        Column("item", "id", names=("next", "target", "下一个"), target=True),
    )
    events: tuple[Column, ...] = EVENTS
    metric = ("ndcg@10", "max")
    retrieves = True
    asks = ("k", "seen")

    class Options(base.Options):
        seen: Literal["drop", "keep"] = "drop"
        """drop: what is in the history is not recommended. keep: where people come back to the same things.
        drop：不推荐历史中已有的物品；keep：适合会重复选择同一物品的场景。"""
        min_rating: float | None = None
        """Only interactions rated so well count; asks for a rating column.
        只计入评分不低于此值的交互；需要评分列。"""
        min_actions: int = Field(1, ge=1)
        """Users with fewer interactions are left out …
        交互少于此数的用户不计入……"""
        min_users: int = Field(1, ge=1)
        """… and items with fewer; by turns, until nothing changes (k-core).
        ……物品也是；交替进行直到不再变化（k-core）。"""
        repeats: Literal["keep", "merge", "drop"] = "keep"
        """An item had before. merge: several times in a row count once; drop: only the first time counts.
        重复的物品。merge：连续多次计一次；drop：只计第一次。"""
        items: str | None = None
        """A file about the items: a table with id and title (and features), or a JSON object of id → attributes.
        物品信息文件：含编号与标题（及特征）的表格，或 编号 → 属性列表 的 JSON 对象。"""
        features: tuple[str, ...] = ()
        """Columns of that file (such as brand, category) that the model reads beside the id; of a JSON object,
        attributes.
        该文件中供模型使用的列（如品牌、类别）；JSON 对象时写 attributes。"""
        remember: bool = False
        """Keep every user's last items with the model, so that a request may name the user instead of a history.
        把每个用户最近的物品与模型一起保存，请求时可只给用户编号。"""

    codec: ItemCodec
    known: dict[str, dict[str, Any]]
    """What a request of every user would hold, ``{"history": last items}``, with `remember`; else empty."""

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.known = {}
        self._logs: list[Any] = []
        if self.options.min_rating is not None:
            self.events = (*EVENTS, RATING)

    # -- prepare ------------------------------------------------------------------------------------------------------

    def gather(self, sources: Mapping[str, Any], data: Any) -> dict[str, Any]:
        o = self.options
        filters = Filters(o.min_rating, o.min_actions, o.min_users, o.repeats)
        shares = {"valid": data.split.valid, "test": data.split.test}
        found = histories(sources, filters, data.split.by, shares, data.deduplicate)
        self._logs = [found[part].log for part in sources]
        if o.items and "train" in found:
            found["train"].also = [Path(o.items)]
        return dict(found)

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        counts = Counter[str]()
        for row in rows:
            counts.update([*row["history"], row["item"]])
        o = self.options
        if o.features and not o.items:
            raise UserError(tr("options.features names columns of a file of items; give it as options.items",
                               "options.features 是物品信息文件中的列；请用 options.items 给出该文件"))
        about = read_items(o.items, o.features) if o.items else {}
        if about and not any(name in about for name in counts):
            some, other = next(iter(counts)), next(iter(about))
            raise UserError(tr(f"none of the {len(counts):,} items of the log is in this file: ids there look like "
                               f"'{other}', in the log like '{some}'",
                               f"日志中的 {len(counts):,} 个物品在该文件里一个也没有：那里的编号形如 '{other}'，"
                               f"日志中形如 '{some}'"), str(o.items))
        self.codec = ItemCodec.fit(counts, about)
        for log in self._logs if o.remember else ():
            for i, (user, n) in enumerate(zip(log.users, log.lengths.tolist(), strict=True)):
                first = max(0, n - MOST)
                self.known[user] = {"history": log.names(i, first, n), **self.remembered(log, i, first, n)}

    def remembered(self, log: Log, user: int, first: int, last: int) -> dict[str, Any]:
        """What is remembered of the interactions `first` … `last` − 1 of a user, beside the items."""
        return {}

    def encode(self, row: dict[str, Any]) -> Example:
        """history (T,), exclude → "without" (E,), and "note": what the answer says of the request, as JSON bytes."""
        note: dict[str, Any] = {}
        if row.get("user") is not None:
            note["user"] = str(row["user"])
        if row.get("history") is None:
            row = row | self._known(note)
        history, unknown = self._ids("history", row["history"])
        without, strange = self._ids("exclude", row.get("exclude"))
        if unknown or strange:
            note["unknown"] = list(dict.fromkeys([*unknown, *strange]))
        more = self.beside(row, len(history))
        said = NOTE(note).encode("utf-8", "replace") if note else b""
        example = {"history": history, "without": without, "note": np.frombuffer(said, dtype=np.uint8), **more}
        if row.get("item") is not None:
            number, _ = self.codec.encode([row["item"]])
            example["item"] = np.array(number[0] if len(number) else -1, dtype=np.int64)
        return example

    def beside(self, row: Mapping[str, Any], count: int) -> Example:
        """Further arrays of a row, its history found; `count`: its known items."""
        return {}

    def _known(self, note: dict[str, Any]) -> dict[str, Any]:
        """What is remembered of the user; of one who is not known, nothing, and the answer says so."""
        user = note.get("user")
        if user is not None and self.known:
            if user not in self.known:
                note["unknown_user"] = user
            return self.known.get(user, {"history": []})
        if user is None:
            raise UserError(tr("has no 'history': give the ids of the items so far, [] for a newcomer",
                               "没有 'history'：请给出以往物品的编号列表，新用户写 []"))
        raise UserError(tr("has no 'history', and this model keeps none of its users (options.remember)",
                           "没有 'history'，而该模型没有保存用户的历史（options.remember）"))

    def _ids(self, name: str, value: Any) -> tuple[np.ndarray, list[str]]:
        """Numbers of the known ids, and the unknown ids. A single text that is no id may hold several: "12 7 9"."""
        if value is None or (isinstance(value, (list, tuple, str)) and not value):
            return self.codec.encode([])
        if isinstance(value, list) and (numbers := self.codec.numbers(value)) is not None:
            return numbers, []
        ids, fault = convert(Column(name, "ids"), value)
        if fault:
            raise UserError(fault)
        if len(ids) == 1 and ids[0] not in self.codec:
            parts = ids[0].replace(",", " ").replace("，", " ").replace("|", " ").split()
            ids = parts if any(part in self.codec for part in parts) else ids
        return self.codec.encode(ids)

    def describe(self, store: Store) -> dict[str, Any]:
        """Interactions, different items, and which share of the interactions the most popular items have."""
        target = np.array(store.stream("item"))
        chosen = np.concatenate((store.stream("history"), target[target >= 0]))
        counts = np.sort(np.bincount(chosen, minlength=len(self.codec)))[::-1]
        shares = {}
        for percent in (1, 10, 50):
            n = max(1, round(len(counts) * percent / 100))
            shares[f"{n:,} ({percent} %)"] = int(counts[:n].sum())
        return {"interactions": len(chosen), "items": int((counts > 0).sum()), "unknown_next": int((target < 0).sum()),
                "most_popular": shares}  # fmt: skip

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        if self.known:
            text = json.dumps(self.known, ensure_ascii=False)
            (folder / "users.json").write_text(text, encoding="utf-8")

    def load(self, folder: Path) -> None:
        self.codec = ItemCodec.load(folder)
        path = folder / "users.json"
        held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.known = {user: about if isinstance(about, dict) else {"history": about} for user, about in held.items()}

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, I) float32, how well each item of the catalogue suits."""
        raise NotImplementedError(f"{type(self).__name__}.scores")

    def shown_as(self, scores_BI: Tensor) -> Callable[[Tensor], Tensor]:
        """From the best scores (B, K) to what an answer shows; called before any item is taken out of the running."""
        return lambda best_BK: best_BK

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"items": [{"id", "title", "score"}, …], "user", "unknown", "basis"}``; in an evaluation the ids and where
        the right item stands: ``rank``, ``tied``, ``candidates``.
        """
        scores_BI = self.scores(model, batch)
        if not ask.get("evaluate"):
            shown = self.shown_as(scores_BI)
        seen = self._seen(ask.get("seen"))
        for key in ("history", "without") if seen == "drop" else ("without",):
            forbid(scores_BI, batch[key].long(), batch[f"{key}_lengths"])
        if ask.get("evaluate"):
            return self._placed(scores_BI, batch["item"])
        k = self._k(ask.get("k"))
        best_BK, index_BK = scores_BI.topk(min(k, scores_BI.shape[1]))
        told_BK = shown(best_BK).tolist()
        answers: list[Answer] = []
        for row, (values, numbers) in enumerate(zip(best_BK.tolist(), index_BK.tolist(), strict=True)):
            items = [{**self.codec.shown(i), "score": float(f"{p:.6g}")}
                     for i, p, value in zip(numbers, told_BK[row], values, strict=True) if value > float("-inf")]
            note = bytes(batch["note"][row, : int(batch["note_lengths"][row])].tolist())
            basis = "history" if int(batch["history_lengths"][row]) else "popularity"
            answers.append({"items": items, "basis": basis, **(json.loads(note) if note else {})})
        return answers

    def _seen(self, wish: Any) -> str:
        if wish not in (None, "drop", "keep"):
            raise UserError(tr(f"seen is {wish!r}; it may be drop or keep",
                               f"seen 是 {wish!r}；可选 drop 或 keep"), "seen")
        return wish or self.options.seen

    def _k(self, wish: Any) -> int:
        if wish is None:
            return 10
        if isinstance(wish, bool) or not isinstance(wish, int) or not 1 <= wish <= MOST:
            raise UserError(tr(f"k is {wish!r}; it must be a whole number from 1 to {MOST}",
                               f"k 是 {wish!r}；应是 1 到 {MOST} 的整数"), "k")
        return wish

    def _placed(self, scores_BI: Tensor, target_B: Tensor) -> list[Answer]:
        higher, tied, candidates = ranking.places(scores_BI, target_B.clamp(min=0))
        tied = torch.where(target_B >= 0, tied, 0)
        _, best_BK = scores_BI.topk(min(LIST, scores_BI.shape[1]))
        possible = scores_BI.gather(1, best_BK) > float("-inf")
        names = self.codec.names
        return [
            {"items": [names[i] for i, real in zip(ids, good, strict=True) if real],
             "rank": h + 1 if t else None, "tied": t, "candidates": c}
            for ids, good, h, t, c in zip(best_BK.tolist(), possible.tolist(), higher.tolist(), tied.tolist(),
                                          candidates.tolist(), strict=True)
        ]  # fmt: skip

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Hit rate, NDCG and MRR over all items; the same among 100 drawn ones; and what the lists are made of.

        An item that training never saw cannot be recommended: where it was the next, that is a miss.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        place = np.array([(a["rank"] or 1, a["tied"], a["candidates"]) for a in answers], dtype=np.int64).reshape(-1, 3)
        higher, tied, candidates = place[:, 0] - 1, place[:, 1], place[:, 2]
        found: dict[str, Any] = {}
        for k in (10, 5):
            found[f"ndcg@{k}"] = ranking.mean(ranking.ndcg(higher, tied, k), weights)
            found[f"hr@{k}"] = ranking.mean(ranking.hit(higher, tied, k), weights)
        found["recall@50"] = ranking.mean(ranking.hit(higher, tied, 50), weights)
        found["mrr"] = ranking.mean(ranking.reciprocal_rank(higher, tied), weights)
        hit, ndcg = ranking.sampled(higher, tied, candidates, 10)
        found["ndcg@10_of_100_sampled"] = ranking.mean(ndcg, weights)
        found["hr@10_of_100_sampled"] = ranking.mean(hit, weights)
        return found | self._lists(answers, weights)

    def _lists(self, answers: Sequence[Answer], weights: np.ndarray | None) -> dict[str, Any]:
        lists, counts = np.full((len(answers), 10), -1), self.codec.counts
        for row, answer in zip(lists, answers, strict=True):
            numbers, _ = self.codec.encode(answer["items"][:10])
            row[: len(numbers)] = numbers
        found = {
            "novelty@10": ranking.mean(ranking.novelty(lists, counts), weights),
            "popularity@10": ranking.mean(ranking.popularity(lists, counts), weights),
        }
        if weights is not None:  # drawing users anew covers fewer items each time: an interval would mislead
            return found | dict.fromkeys(("coverage@10", "gini@10"), np.full(len(weights), np.nan))
        found["coverage@10"] = ranking.coverage(lists, len(self.codec))
        return found | {"gini@10": ranking.gini(ranking.exposure(lists, len(self.codec)))}

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Some histories with what was recommended and what came next, by title where there is one."""

        def shown(names: Sequence[str]) -> str:
            return " · ".join(str(self.codec.titles.get(name, {}).get("title", name)) for name in names)

        chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLES).astype(int)).tolist() if len(rows) else []
        found = [(rows[i], answers[i]) for i in chosen if rows[i].get("item")]
        return {"samples": [{
            "prompt": f"{tr('history', '历史')}: {shown(row['history'][-SHOWN:])}\n",
            "text": f"{tr('recommended', '推荐')}: {shown(answer['items'][:SHOWN])}\n"
                    f"{tr('came next', '实际')}: {shown([row['item']])} "
                    f"({tr('place', '名次')} {answer['rank'] or '–'})",
        } for row, answer in found]}  # fmt: skip


def forbid(scores_BI: Tensor, ids_BS: Tensor, lengths_B: Tensor) -> None:
    """Take items out of the running, in place."""
    real_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lengths_B[:, None]
    row_N = real_BS.nonzero()[:, 0]
    scores_BI[row_N, ids_BS[real_BS]] = float("-inf")
