"""two-tower-retrieval: users and items as vectors, so that the best items for a user are the nearest ones.

A user tower and an item tower (Covington et al. 2016; Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for
Large Corpus Item Recommendations"), both read by one causal Transformer: an item is its id, its fields and texts; a
user is an id, fields, texts and what was chosen so far. They learn by telling the item that came next from the other
items of the batch, whose logits are corrected for how often an item gets into a batch (logQ, section 3 of Yi et al.).
An item that nobody chose yet is found by what is known of it, a new user by a history or by what is known of them.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multihead.codec.items import ItemCodec
from multihead.codec.sides import Side
from multihead.data.attributes import read_attributes
from multihead.data.catalogue import read_items
from multihead.data.events import ITEM_NAMES, USER_NAMES
from multihead.data.interactions import Filters, histories
from multihead.data.store import Store
from multihead.errors import UserError, nearest, tr
from multihead.metrics import ranking
from multihead.task import Answer, Batch, Example, Loss, check_room, pad
from multihead.tasks.recommendation._nearest import Index, recall
from multihead.tasks.recommendation._retriever import Retriever
from multihead.tasks.recommendation._towers import TwoTower, tastes
from multihead.tasks.recommendation._visits import Visits
from multihead.transformer.config import TransformerConfig

FAR = -1e9
"""The logit of what is no candidate: not −∞, whose slope is no number where there is no other."""
LARGE = 500_000
"""Items beyond which index auto is faiss."""
TASTES = "tastes.safetensors"
Kind = Literal["categorical", "numeric", "multi", "words", "text", "time", "ignore"]


class TwoTowerRetrieval(Retriever):
    """The nearest items for a user."""

    title = ("the items that suit a user, by vectors of users and items", "用户与物品的双塔召回")
    metric = ("recall@50", "max")
    unit = "items"
    offers = ("embed_user", "embed_item")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"split": {"by": "last"}},
        "model": {
            "d_model": 64, "num_layers": 1, "num_heads": 2, "max_length": 128, "dropout": 0.2, "norm": "layernorm",
            "activation": "gelu", "positions": "rotary",
        },
        "train": {"steps": 4000, "batch_size": 64, "weight_decay": 0.05},
    }

    class Options(Retriever.Options):
        max_items: int = Field(50, ge=1)
        """Of a longer history, this many of the last items are read. In training a longer one is cut into several.
        历史更长时，只读最近的这么多个物品；训练时则切成几段。"""
        targets: Literal["every", "first"] = "every"
        """With data.split.by=time. every: validation and test ask for each item of their period, from all that the user
        did before it, and of newcomers too. first: only for the first one of every user who was there before.
        data.split.by=time 时：every 对该时段内的每次选择提问（含新用户）；first 只问老用户在该时段的第一次选择。"""
        users: str | None = None
        """A file about the users: a table with their id; its columns are read with `user_features`.
        用户信息文件：含用户编号的表格；用 user_features 指定要读的列。"""
        user_features: tuple[str, ...] = ()
        """Columns of that file: names, or "ours=theirs", where theirs may be a number, "age=3"; a run of columns of 0
        and 1, "tags=6-24". `features` takes the same of the file of items.
        该文件中供模型使用的列：列名，或 "自定名=列名或列号"，如 age=3；0/1 列的区间写作 tags=6-24。features 亦同。"""
        fields: dict[str, Kind] = Field({})
        """Of a feature, what it is, where the guess is wrong: categorical, numeric, multi (several divided by | or
        commas), text (read as tokens), words (read as a bag of words), time or ignore.
        特征的类型（猜错时指定）：categorical、numeric、multi（多值）、text（按词元读）、words（词袋）、time、ignore。"""
        vocab_size: int = Field(2000, ge=260)
        """Tokens of the text codec, which is fitted on the features that are text.
        文本编码器的词表大小；在文本类特征上训练。"""
        text_tokens: int = Field(16, ge=1)
        """Of the texts of a user or an item, this many tokens are read.
        每个用户或物品的文本最多读取的词元数。"""
        negatives: Literal["in-batch", "catalogue"] = "in-batch"
        """in-batch: an item is told from the other items of its batch (of a micro-batch, with train.micro_batch).
        catalogue: from all items; better where there are but thousands of them, and slower.
        in-batch：与同一批中的其他物品区分；catalogue：与全部物品区分，物品只有几千时更好，但更慢。"""
        logq: bool = True
        """In-batch: correct for popular items being in every batch.
        in-batch 时，校正热门物品更常出现在批次中的偏差。"""
        temperature: float = Field(0.1, gt=0.01, le=1)
        """Cosines are divided by it.
        余弦相似度除以该温度。"""
        learn_temperature: bool = True
        """Learn the temperature, beginning with that.
        以上值为起点学习温度。"""
        tastes: int = Field(0, ge=0, le=1024)
        """So many further directions of every vector hold which items were chosen by the same users, found in the log
        at once (a singular value decomposition) and turned in training; 64 suits thousands of items. 0: none.
        每个向量另加这么多维，由日志直接求得（奇异值分解）：同一批用户选择的物品彼此靠近；
        物品为几千个时可取 64，0 表示不用。"""
        hide_items: float = Field(0.1, ge=0, lt=1)
        """In training, so many item ids are read as unknown: what is known of an item must do, as it must for new ones.
        训练时按此比例隐藏物品编号，使模型学会仅凭特征认识新物品。"""
        hide_users: float = Field(0.5, ge=0, lt=1)
        """The same of user ids.
        训练时按此比例隐藏用户编号。"""
        remember: bool = True
        """Keep every user's last items with the model, so that a request may name the user instead of a history.
        把每个用户最近的物品与模型一起保存，请求时可只给用户编号。"""
        index: Literal["auto", "exact", "faiss"] = "auto"
        """How the nearest items are found: by comparing all, or by an index of faiss; auto: faiss beyond 500,000 items.
        最近邻的查找方式：逐一比较，或 faiss 索引；auto 在超过 50 万个物品时用 faiss。"""

    options: Any
    items: Side
    users: Side

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._made: tuple[Tensor, Index] | None = None
        self.taste: Tensor | None = None

    # -- prepare ------------------------------------------------------------------------------------------------------

    def gather(self, sources: Mapping[str, Any], data: Any) -> dict[str, Any]:
        o = self.options
        self._named()
        filters = Filters(o.min_rating, o.min_actions, o.min_users, o.repeats)
        shares = {"valid": data.split.valid, "test": data.split.test}
        found = histories(sources, filters, data.split.by, shares, data.deduplicate, every=o.targets == "every")
        self._logs = [found[part].log for part in sources]
        if "train" in found:
            found["train"].also = [Path(path) for path in (o.items, o.users) if path]
        return dict(found)

    def _named(self) -> None:
        """UserError where `fields` names what is no feature."""
        o = self.options
        names = [one.partition("=")[0] for one in (*o.features, *o.user_features)]
        for name in o.fields:
            if name not in names:
                near, shown = nearest(name, names), ", ".join(names) or "-"
                raise UserError(tr(f"options.fields names '{name}'{near}; the features are: {shown}. Features are "
                                   "named in options.features and options.user_features",
                                   f"options.fields 中的 '{name}' 不是特征{near}；现有特征：{shown}。"
                                   "特征在 options.features 与 options.user_features 中指定"))

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        """Items of the file of items that nobody chose are in the catalogue too: they are found by their features."""
        o = self.options
        counts, users, pairs = Counter[str](), dict[str, None](), (array("i"), array("i"))
        numbers: dict[str, int] = {}
        for row in rows:
            chosen = [*row["history"], row["item"]]
            counts.update(chosen)
            users[row["user"]] = None
            if o.tastes:
                pairs[0].extend([len(users) - 1] * len(chosen))
                pairs[1].extend(numbers.setdefault(name, len(numbers)) for name in chosen)
        table, wanted = self._table("items", "item", o.features, ITEM_NAMES)
        about = read_items(o.items) if o.items else {}
        self._same_ids(counts, about, o.items)
        new = {name: 0 for name in about if name not in counts} if table else {}
        met = len(counts)
        order = sorted(counts, key=lambda name: -counts[name])
        self.items = Side.fit([*order, *new], met, table, wanted, o.fields, o.vocab_size, o.text_tokens)
        if o.tastes:
            to = torch.tensor([self.items.numbers[name] for name in numbers])
            user_A, item_A = (torch.from_numpy(np.array(one, dtype=np.int64)) for one in pairs)
            self.taste = tastes(user_A, to[item_A], met, o.tastes)
        told = self.items.features(table)
        self.codec = ItemCodec.fit(counts | new, {name: {**one, "features": told.get(name, [])}
                                                  for name, one in about.items()})  # fmt: skip
        table, wanted = self._table("users", "user", o.user_features, USER_NAMES)
        self._same_ids(users, table, o.users)
        names = [*users, *(name for name in table if name not in users)]
        self.users = Side.fit(names, len(users), table, wanted, o.fields, o.vocab_size, o.text_tokens)
        if o.remember:
            self.known = {user: {"history": log.names(i, max(0, n - 1000), n)} for log in self._logs
                          for i, (user, n) in enumerate(zip(log.users, log.lengths.tolist(), strict=True))}  # fmt: skip

    def _table(
        self, option: str, key: str, features: Sequence[str], names: Sequence[str]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """A file's rows by their ids, and the fields that are read of them."""
        path, own = getattr(self.options, option), "features" if key == "item" else "user_features"
        if features and not path:
            raise UserError(tr(f"options.{own} names columns of a file; give it as options.{option}",
                               f"options.{own} 是文件中的列；请用 options.{option} 给出该文件"))
        if not path or not features:
            return {}, []
        columns = dict(one.partition("=")[::2] if "=" in one else (one, one) for one in features)
        try:
            return read_attributes(path, key, names, columns), list(columns)
        except UserError as error:
            if not any("data.encoding" in str(problem) for problem in error.problems):
                raise
            # Such a table has no data.encoding of its own; what is no Unicode is Latin-1, as MovieLens' films are.
            return read_attributes(path, key, names, columns, "latin-1"), list(columns)

    def _same_ids(self, log: Mapping[str, Any], table: Mapping[str, Any], path: str | None) -> None:
        if table and not any(name in table for name in log):
            some, other = next(iter(log)), next(iter(table))
            raise UserError(tr(f"none of the {len(log):,} ids of the log is in this file: ids there look like "
                               f"'{other}', in the log like '{some}'",
                               f"日志中的 {len(log):,} 个编号在该文件里一个也没有：那里的编号形如 '{other}'，"
                               f"日志中形如 '{some}'"), str(path))

    def encode(self, row: dict[str, Any]) -> Example:
        """As `Retriever.encode`, and ``user``, the user's number; that of nobody where they are unknown."""
        example = super().encode(row)
        return {**example, "user": np.array(self.users.number(row.get("user")), dtype=np.int64)}

    def _known(self, note: dict[str, Any]) -> dict[str, Any]:
        """What is remembered of the user; one who is but in the file of users is known by that."""
        user = note.get("user")
        if user is None:
            return super()._known(note)
        if user not in self.known and user not in self.users.numbers:
            note["unknown_user"] = user
        return self.known.get(user, {"history": []})

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        return Visits(store, self.options.max_items) if part == "train" else store

    def length(self, store: Any) -> np.ndarray:
        return store.lengths("history")

    def describe(self, store: Store) -> dict[str, Any]:
        found = super().describe(store)
        lines = [*self.items.describe(), *self.users.describe()]
        return found | {"new_items": len(self.codec) - self.items.met, **({"fields": lines} if lines else {})}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.items.save(folder / "items")
        self.users.save(folder / "users")
        if self.taste is not None:
            save_file({"taste": self.taste.contiguous()}, str(folder / TASTES))

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.items, self.users = Side.load(folder / "items"), Side.load(folder / "users")
        path = folder / TASTES
        self.taste = load_file(str(path))["taste"] if path.is_file() else None

    # -- build --------------------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> TwoTower:
        o = self.options
        if config.positions not in ("rotary", "none"):
            raise UserError(tr(f"model.positions is {config.positions}; a tower reads rotary positions or none",
                               f"model.positions 是 {config.positions}；双塔模型只支持 rotary 或 none"))
        hidden, counts = (o.hide_users, o.hide_items), torch.from_numpy(self.codec.counts)
        made = TwoTower(config, self.users, self.items, o.temperature, o.learn_temperature, hidden, counts, self.taste)
        check_room("max_items", o.max_items + made.user.length, config)
        check_room("text_tokens", made.item.length, config)
        made.reader = self
        return made

    # -- train --------------------------------------------------------------------------------------------------------

    @property
    def rows_apart(self) -> bool:
        return self.options.negatives == "catalogue"

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Of training slices ``items``; of rows ``recent``, the last items, beside everything in ``history``."""
        if "items" in examples[0]:
            return pad(examples)
        most = self.options.max_items
        return pad([{**example, "recent": example["history"][-most:]} for example in examples])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Of every item of a slice how surprising it was among the others; a sum over items.

        What a user chose anywhere in the slice is no negative of theirs: it is there by their choice, not by chance.
        """
        assert isinstance(model, TwoTower)
        o = self.options
        ids_BT, lengths_B = batch["items"].long(), batch["items_lengths"]
        at_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        asked_BT = (at_T < lengths_B[:, None]) & (at_T >= batch["first"][:, None])
        if o.negatives == "catalogue":
            number_U, where_BT = torch.arange(self.items.met, device=ids_BT.device), ids_BT
        else:
            number_U, where_BT = ids_BT.unique(return_inverse=True)
        vector_UD, plain_UD = model.item_tower(number_U)
        user_BTD = model.user_tower(batch["user"], plain_UD[where_BT[:, :-1]])
        with torch.autocast(ids_BT.device.type, enabled=False):  # bfloat16 has but three digits, and cosines more
            logits_NU = user_BTD[asked_BT] @ vector_UD.T / model.warmth()
        target_N = where_BT[asked_BT]
        right_N = logits_NU.gather(1, target_N[:, None])[:, 0]
        if o.negatives == "in-batch":
            drawn_U = torch.bincount(target_N, minlength=len(number_U))
            share_U = self._shares(number_U).to(logits_NU) if o.logq else torch.ones_like(logits_NU[0])
            logits_NU = logits_NU + torch.where(drawn_U > 0, (drawn_U / share_U).log(), FAR)
            right_N = right_N - share_U.log()[target_N]
        own_BT = torch.where(at_T < lengths_B[:, None], where_BT, where_BT[:, :1])
        all_N = logits_NU.scatter(1, own_BT[asked_BT.nonzero()[:, 0]], FAR).logsumexp(1)
        return Loss((torch.logaddexp(all_N, right_N) - right_N).sum(), len(target_N))

    def _shares(self, number_U: Tensor) -> Tensor:
        """Which share of all interactions each item has: how likely a target is this one."""
        counts = torch.from_numpy(self.codec.counts[: self.items.met]).to(number_U.device)
        return counts[number_U].clamp(min=1) / counts.sum()

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def user_vectors(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, D) float32 vectors of the users of a batch of requests."""
        assert isinstance(model, TwoTower)
        return model.users(batch["user"], batch["recent"].long(), batch["recent_lengths"])

    def item_vectors(self, model: nn.Module) -> Tensor:
        """(I, D) float32, every item's vector of length 1."""
        assert isinstance(model, TwoTower)
        return model.all_items()

    def _nobody(self, batch: Batch) -> Tensor:
        """(B,) whether nothing at all is known of a row's user."""
        told = len(self.users) if self.users.arrays else self.users.met
        return (batch["history_lengths"] == 0) & (batch["user"] >= told)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, I) cosines; where nothing is known of a user, how often each item was chosen, as a share of the most."""
        with torch.autocast(batch["user"].device.type, enabled=False):
            scores_BI = self.user_vectors(model, batch).float() @ self.item_vectors(model).float().T
        nobody_B = self._nobody(batch)
        if not bool(nobody_B.any()):
            return scores_BI
        counts_I = torch.from_numpy(self.codec.counts).to(scores_BI)
        return torch.where(nobody_B[:, None], counts_I / counts_I.max(), scores_BI)

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """As `Retriever.predict`; score is the cosine of the two vectors. ``basis`` is "user" where there is no history
        and something is known of the user."""
        if ask.get("evaluate"):
            answers = super().predict(model, batch, ask)
            if self._indexed:
                users_BD, items_ID = self.user_vectors(model, batch), self.item_vectors(model)
                found = recall(self._index(model), users_BD @ items_ID.T, users_BD, 50)
                answers = [{**one, "index": share} for one, share in zip(answers, found.tolist(), strict=True)]
            return answers
        answers = self._from_index(model, batch, ask) if self._indexed else super().predict(model, batch, ask)
        for answer, nobody in zip(answers, self._nobody(batch).tolist(), strict=True):
            if answer["basis"] == "popularity" and not nobody:
                answer["basis"] = "user"
        return answers

    @property
    def _indexed(self) -> bool:
        kind = self.options.index
        return kind == "faiss" or (kind == "auto" and len(self.codec) > LARGE)

    def _index(self, model: nn.Module) -> Index:
        """The index of the model's items, made anew where they have changed."""
        items_ID = self.item_vectors(model)
        if self._made is None or self._made[0] is not items_ID:
            self._made = items_ID, Index(items_ID)
        return self._made[1]

    def _from_index(self, model: nn.Module, batch: Batch, ask: Mapping[str, Any]) -> list[Answer]:
        """What `Retriever.predict` gives, from the index: no row meets all items."""
        k, seen = self._k(ask.get("k")), self._seen(ask.get("seen"))
        gone: list[set[int]] = []
        for row in range(len(batch["user"])):
            keys = ("history", "without") if seen == "drop" else ("without",)
            gone.append({i for key in keys for i in batch[key][row, : int(batch[f"{key}_lengths"][row])].tolist()})
        wide = min(len(self.codec), k + max(map(len, gone)))
        best_BK, number_BK = self._index(model).search(self.user_vectors(model, batch), wide)
        counts = self.codec.counts
        answers: list[Answer] = []
        for row, nobody in enumerate(self._nobody(batch).tolist()):
            pairs = zip(number_BK[row].tolist(), best_BK[row].tolist(), strict=True)
            if nobody:  # the catalogue stands in the order of popularity
                pairs = ((i, counts[i] / counts[0]) for i in range(wide))  # type: ignore[assignment]
            items = [{**self.codec.shown(i), "score": float(f"{p:.6g}")}
                     for i, p in pairs if i >= 0 and i not in gone[row]]
            note = bytes(batch["note"][row, : int(batch["note_lengths"][row])].tolist())
            basis = "history" if int(batch["history_lengths"][row]) else "popularity"
            answers.append({"items": items[:k], "basis": basis, **(json.loads(note) if note else {})})
        return answers

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """As `Retriever.score`; with an index of faiss also which share of the 50 nearest items it finds."""
        found = super().score(answers, rows, weights)
        if answers and "index" in answers[0]:
            found["index_recall@50"] = ranking.mean(np.array([a["index"] for a in answers]), weights)
        return found

    def embed_user(self, model: TwoTower, ids: Any) -> Tensor:
        """See `TwoTower.embed_user`."""
        several = isinstance(ids, (list, tuple, np.ndarray, Tensor))
        given = [one if isinstance(one, Mapping) else {"user": _id(one)} for one in (ids if several else [ids])]
        if not given:
            return torch.zeros(0, model.width)
        rows = [one if one.get("history") is not None or one.get("user") is not None else {**one, "history": []}
                for one in given]  # fmt: skip
        batch = self.collate([self.encode(dict(row)) for row in rows])
        found = self.user_vectors(model, {key: value.to(model.item.end.device) for key, value in batch.items()})
        return found if several else found[0]

    def embed_item(self, model: TwoTower, ids: Any) -> Tensor:
        """See `TwoTower.embed_item`."""
        several = isinstance(ids, (list, tuple, np.ndarray, Tensor))
        given = [_id(one) for one in (ids if several else [ids])]
        unknown = [one for one in given if one not in self.codec]
        if unknown:
            shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
            raise UserError(tr(f"the catalogue has no item {shown}{nearest(unknown[0], self.codec.names[:5000])}",
                               f"物品目录中没有 {shown}{nearest(unknown[0], self.codec.names[:5000])}"))
        found = self.item_vectors(model)[torch.from_numpy(self.codec.encode(given)[0]).long()]
        return found if several else found[0]


def _id(value: Any) -> str:
    """An id as the log has it: 7, 7.0, "7" and a tensor's 7 are one."""
    value = value.item() if hasattr(value, "item") else value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
