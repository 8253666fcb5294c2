"""sequential-recommendation: from what somebody chose so far to what they choose next.

A causal Transformer over item ids (SASRec, Kang & McAuley 2018), which learns from every place of every history at
once. It is trained by the full softmax over the catalogue, which ranks far better than the binary loss of the original
(Klenitskiy & Vasilev 2023, "Turning Dross Into Gold Loss"), or for large catalogues by a sampled loss whose
overconfidence is corrected (gSASRec, Petrov & Macdonald 2023). Users are no part of the model: whoever has a history,
new or known, is answered from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.items import ItemCodec
from multihead.data.catalogue import read_items
from multihead.data.columns import Column, convert
from multihead.data.events import USER_NAMES
from multihead.data.interactions import EVENTS, RATING, Filters, Slices, histories
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import ranking
from multihead.task import Answer, Batch, Example, Loss, Task, check_room, pad
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.losses import vocabulary_loss
from multihead.transformer.trunk import Trunk

LIST = 20
"""Length of the lists that an evaluation keeps."""
SAMPLES, SHOWN = 5, 5
"""Users that the report shows, and items of each list."""
MOST = 1000
"""Longest list that a request may ask for."""
HISTORY_NAMES = ("items", "item", "sequence", "clicks", "viewed", "purchased", "历史", "历史记录", "浏览记录",
                 "购买记录")


class ItemInput(TokenInput):
    """Items as vectors: one of their own, plus the mean of their features' vectors, plus the position's.

    Args:
        features: for each item the numbers of its features; empty for none.
        kinds: how many features there are.
    """

    def __init__(self, config: TransformerConfig, items: int, features: Sequence[Sequence[int]], kinds: int) -> None:
        super().__init__(config, items)
        self.feature = nn.EmbeddingBag(kinds, config.d_model, mode="mean") if kinds else None
        flat = torch.tensor([number for one in features for number in one], dtype=torch.long)
        starts = torch.tensor([0, *np.cumsum([len(one) for one in features])][: items if features else 0]).long()
        self.register_buffer("flat", flat, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        if self.feature is not None:
            nn.init.normal_(self.feature.weight, std=config.d_model**-0.5)

    def table(self) -> Tensor:
        """(I, D) the vector of every item, by which it is read and by which it is foretold (Press & Wolf 2017)."""
        own_ID = self.token.weight
        return own_ID if self.feature is None else own_ID + self.feature(self.flat, self.starts)

    def read(self, ids_BT: Tensor, table_ID: Tensor) -> Tensor:
        """Items → vectors the trunk reads: (B, T) → (B, T, D)."""
        if self.feature is None:
            return self(ids_BT)
        mean_ID = table_ID - self.token.weight
        return self(ids_BT) + self.dropout(F.embedding(ids_BT, mean_ID))


class ItemHead(nn.Module):
    """Scores of all items: (…, D) by the items' own vectors (I, D) → (…, I)."""

    def forward(self, x: Tensor, table_ID: Tensor) -> Tensor:
        return F.linear(x, table_ID)


class NextItem(nn.Module):
    """Histories → what comes next. ids (B, T), padded on the right, which a causal trunk never looks at."""

    def __init__(
        self, config: TransformerConfig, items: int, features: Sequence[Sequence[int]] = (), kinds: int = 0
    ) -> None:
        super().__init__()
        self.input = ItemInput(config, items, features, kinds)
        self.trunk = Trunk(config, causal=True)
        self.head = ItemHead()

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What each place foretells, (B, T, D), and the table (I, D) to read it by."""
        table_ID = self.input.table()
        return self.trunk(self.input.read(ids_BT, table_ID)), table_ID


class SequentialRecommendation(Task):
    """The next item for a history of items."""

    field = "recommendation"
    title = ("what a user will choose next, from what they chose so far", "根据用户以往的选择，推荐下一个物品")
    columns = (
        Column("history", "ids", required=False, names=HISTORY_NAMES),
        Column("exclude", "ids", required=False, names=("排除",)),
        Column("user", "id", required=False, names=USER_NAMES),
        Column("item", "id", names=("next", "target", "下一个"), target=True),
    )
    events: tuple[Column, ...] = EVENTS
    metric = ("ndcg@10", "max")
    unit = "items"
    asks = ("k", "seen")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"split": {"by": "last"}},
        "model": {
            "d_model": 64, "num_layers": 2, "num_heads": 2, "max_length": 50, "dropout": 0.3, "norm": "layernorm",
            "activation": "gelu", "positions": "rotary",
        },
        "train": {"steps": 4000, "batch_size": 128, "weight_decay": 0.01},
    }

    class Options(base.Options):
        max_items: int = Field(50, ge=1)
        """Of a longer history, this many of the last items are read. In training a longer one is cut into several.
        历史更长时，只读最近的这么多个物品；训练时则切成几段。"""
        loss: Literal["softmax", "gbce"] = "softmax"
        """softmax: the next item against the whole catalogue. gbce: against `negatives` drawn at random, for catalogues
        of hundreds of thousands.
        softmax：与全部物品比较；gbce：与随机抽取的 negatives 个物品比较，适合几十万以上的物品。"""
        negatives: int = Field(256, ge=1)
        """With gbce: items drawn a step.
        gbce 时每一步抽取的物品数。"""
        calibration: float = Field(0.75, ge=0, le=1)
        """With gbce: 1 corrects the overconfidence that sampling brings in full, 0 not at all (gSASRec's t).
        gbce 时对抽样造成的过度自信的校正程度：1 为完全校正，0 为不校正（gSASRec 的 t）。"""
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
    known: Mapping[str, Sequence[str]]
    """The last items of every user, with `remember`; else empty."""

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
        if o.remember:
            self.known = {user: log.names(i, max(0, n - o.max_items), n) for log in self._logs
                          for i, (user, n) in enumerate(zip(log.users, log.lengths.tolist(), strict=True))}  # fmt: skip

    def encode(self, row: dict[str, Any]) -> Example:
        """history (T,), exclude → "without" (E,), and "note": what the answer says of the request, as JSON bytes."""
        note: dict[str, Any] = {}
        if row.get("user") is not None:
            note["user"] = str(row["user"])
        past = row.get("history")
        if past is None:
            past = self._known(note.get("user"))
        history, unknown = self._ids("history", past)
        without, strange = self._ids("exclude", row.get("exclude"))
        if unknown or strange:
            note["unknown"] = list(dict.fromkeys([*unknown, *strange]))
        said = json.dumps(note, ensure_ascii=False).encode("utf-8", "replace") if note else b""
        example = {"history": history, "without": without, "note": np.frombuffer(said, dtype=np.uint8)}
        if row.get("item") is not None:
            number, _ = self.codec.encode([row["item"]])
            example["item"] = np.array(number[0] if len(number) else -1, dtype=np.int64)
        return example

    def _known(self, user: str | None) -> Sequence[str]:
        if user is not None and user in self.known:
            return self.known[user]
        if user is None:
            raise UserError(tr("has no 'history': give the ids of the items so far, [] for a newcomer",
                               "没有 'history'：请给出以往物品的编号列表，新用户写 []"))
        if not self.known:
            raise UserError(tr("has no 'history', and this model keeps none of its users (options.remember)",
                               "没有 'history'，而该模型没有保存用户的历史（options.remember）"))
        raise UserError(tr(f"has no 'history', and no user '{user}' is known; give one, [] for a newcomer",
                           f"没有 'history'，也没有用户 '{user}' 的记录；请给出 history，新用户写 []"))

    def _ids(self, name: str, value: Any) -> tuple[np.ndarray, list[str]]:
        """Numbers of the known ids, and the unknown ids. A single text that is no id may hold several: "12 7 9"."""
        if value is None or (isinstance(value, (list, tuple, str)) and not value):
            return self.codec.encode([])
        ids, fault = convert(Column(name, "ids"), value)
        if fault:
            raise UserError(fault)
        if len(ids) == 1 and ids[0] not in self.codec:
            parts = ids[0].replace(",", " ").replace("，", " ").replace("|", " ").split()
            ids = parts if any(part in self.codec for part in parts) else ids
        return self.codec.encode(ids)

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        return Slices(store, self.options.max_items) if part == "train" else store

    def length(self, store: Any) -> np.ndarray:
        return store.lengths("history")

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
        self.known = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    # -- build --------------------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> NextItem:
        check_room("max_items", self.options.max_items, config)
        return NextItem(config, len(self.codec), self.codec.features, len(self.codec.feature_names))

    # -- train --------------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Of training slices ``items``; of rows ``recent``, the last items, beside everything in ``history``."""
        if "items" in examples[0]:
            return pad(examples)
        most = self.options.max_items
        return pad([{**example, "recent": example["history"][-most:]} for example in examples])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Of every item of a slice but its first, how surprising it was; a sum over items."""
        ids_BT, lengths_B = batch["items"].long(), batch["items_lengths"]
        x_BTD, table_ID = model(ids_BT[:, :-1])
        real_BT = torch.arange(ids_BT.shape[1] - 1, device=ids_BT.device) < lengths_B[:, None] - 1
        x_ND, target_N = x_BTD[real_BT], ids_BT[:, 1:][real_BT]
        if self.options.loss == "softmax":
            return Loss(vocabulary_loss(x_ND, table_ID, target_N), len(target_N))
        return Loss(self._gbce(x_ND, table_ID, target_N), len(target_N))

    def _gbce(self, x_ND: Tensor, table_ID: Tensor, target_N: Tensor) -> Tensor:
        """Binary cross-entropy whose positive term is weighed by β (Petrov & Macdonald 2023, eq. 14); all places of a
        batch share the drawn items, which makes the scores one matrix product."""
        o, items = self.options, len(table_ID)
        drawn_K = torch.randperm(items, device=x_ND.device)[: min(o.negatives, items - 1)]
        alpha = len(drawn_K) / (items - 1)
        beta = alpha * (o.calibration * (1 - 1 / alpha) + 1 / alpha)
        right_N = (x_ND * table_ID[target_N]).sum(-1).float()
        wrong_NK = (x_ND @ table_ID[drawn_K].T).float()
        counts_NK = drawn_K != target_N[:, None]
        wrong_N = (F.logsigmoid(-wrong_NK) * counts_NK).sum(-1)
        return -(beta * F.logsigmoid(right_N) + wrong_N).sum() / (len(drawn_K) + 1)

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, I) float32, what each item scores next; where no item of the history is known, the logarithm of how
        often it was chosen."""
        recent_BT, lengths_B = batch["recent"].long(), batch["recent_lengths"]
        x_BTD, table_ID = model(recent_BT)
        last_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), (lengths_B - 1).clamp(min=0)]
        with torch.autocast(last_BD.device.type, enabled=False):  # in bfloat16 many items would tie
            scores_BI = model.head(last_BD.float(), table_ID.float())  # type: ignore[operator]
        if bool((lengths_B > 0).all()):
            return scores_BI
        popular_I = torch.from_numpy(self.codec.counts).to(scores_BI).log()
        return torch.where((lengths_B > 0)[:, None], scores_BI, popular_I)

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"items": [{"id", "title", "score"}, …], "user", "unknown", "basis"}``; in an evaluation the ids and where
        the right item stands: ``rank``, ``tied``, ``candidates``.

        Score is the probability that the item comes next (with loss gbce, that it is chosen at all).
        """
        scores_BI = self.scores(model, batch)
        told = self.options.loss == "softmax" and not ask.get("evaluate")
        norm_B1 = scores_BI.logsumexp(-1, keepdim=True) if told else None
        seen = self._seen(ask.get("seen"))
        for key in ("history", "without") if seen == "drop" else ("without",):
            _forbid(scores_BI, batch[key].long(), batch[f"{key}_lengths"])
        if ask.get("evaluate"):
            return self._placed(scores_BI, batch["item"])
        k = self._k(ask.get("k"))
        best_BK, index_BK = scores_BI.topk(min(k, scores_BI.shape[1]))
        told_BK = ((best_BK - norm_B1).exp() if norm_B1 is not None else best_BK.sigmoid()).tolist()
        answers: list[Answer] = []
        for row, (values, numbers) in enumerate(zip(best_BK.tolist(), index_BK.tolist(), strict=True)):
            items = [{**self.codec.shown(i), "score": float(f"{p:.6g}")}
                     for i, p, value in zip(numbers, told_BK[row], values, strict=True) if value > float("-inf")]
            note = bytes(batch["note"][row, : int(batch["note_lengths"][row])].tolist())
            basis = "history" if int(batch["recent_lengths"][row]) else "popularity"
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


def _forbid(scores_BI: Tensor, ids_BS: Tensor, lengths_B: Tensor) -> None:
    """Take items out of the running, in place."""
    real_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < lengths_B[:, None]
    row_N = real_BS.nonzero()[:, 0]
    scores_BI[row_N, ids_BS[real_BS]] = float("-inf")
