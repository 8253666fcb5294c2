"""click-through-rate: how likely it is that what is shown is clicked, for ads and for ranking.

Rows are impressions: fields of any kind (who, what, where, when) and whether there was a click; or ratings, of which
those from a threshold on count as clicks. Fields attend to one another on the trunk, beside crosses and a wide linear
reader (see `_fields`). Tables of users and items are joined by their ids, when training and when serving alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.fields import UNSEEN, FieldCodec, Kind, Sizes
from multihead.data.attributes import read_attributes
from multihead.data.columns import Column
from multihead.data.events import ITEM_NAMES, RATING_NAMES, USER_NAMES
from multihead.data.store import Store
from multihead.errors import UserError, nearest, tr
from multihead.metrics import clicks
from multihead.run import write_json
from multihead.task import Answer, Batch, Example, Loss, Task, pad
from multihead.tasks.recommendation._candidates import Candidates, joined
from multihead.tasks.recommendation._fields import ClickModel
from multihead.tasks.recommendation._importance import importance
from multihead.transformer.config import TransformerConfig

LABEL_NAMES = ("click", "clicked", "isClick", "clk", "label", "target", "y", "converted", "conversion", "purchased",
               "liked", "点击", "是否点击", "标签", *RATING_NAMES)
TRUE, FALSE = ("1", "true", "yes", "y", "t", "是"), ("0", "-1", "false", "no", "n", "f", "否")
SOME = 5000
"""Rows that the importance of fields is measured on."""
STEP = 1024
"""Rows answered at once meanwhile."""


class ClickThroughRate(Task):
    """The probability of a click for a row of fields."""

    field = "recommendation"
    title = ("how likely a click is, from any table of users, items and circumstances",
             "根据用户、物品与场景的任意字段，预测点击的概率")
    columns: tuple[Column, ...] = (  # type: ignore[misc]
        Column("user", "id", required=False, names=USER_NAMES),
        Column("item", "id", required=False, names=ITEM_NAMES),
        Column("label", "any", names=LABEL_NAMES, target=True),
    )
    metric = ("auc", "max")
    ranks = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"deduplicate": False},
        "model": {
            "d_model": 32, "num_layers": 2, "num_heads": 4, "max_length": 1024, "dropout": 0.1, "norm": "layernorm",
            "activation": "gelu", "positions": "none",
        },
        "train": {"steps": 2000, "batch_size": 512, "precision": "float32"},
    }

    class Options(base.Options):
        threshold: float | None = None
        """Where the label is a number such as a rating: from this value on it counts as a click.
        标签是评分等数值时，不低于此值算作点击。"""
        fields: dict[str, Kind] = Field(default_factory=dict)
        """What a field holds, where the guess is wrong: categorical, numeric, multi (A|B), words, time or ignore.
        指定字段的类型（猜错时用）：categorical、numeric、multi（A|B）、words、time 或 ignore。"""
        users: str | None = None
        """A table about the users, joined by their id.
        用户信息表，按用户编号关联。"""
        items: str | None = None
        """A table about the items, joined by their id.
        物品信息表，按物品编号关联。"""
        user_columns: dict[str, str | int] | None = None
        """Of the table of users only these columns, ours: theirs (a name or a number); none given: all.
        只用用户表的这些列，我们的名称: 表中的列名或列号；不写则全部使用。"""
        item_columns: dict[str, str | int] | None = None
        """Of the table of items only these columns; a run such as "6-24" of columns of 0 and 1 is one field of several.
        只用物品表的这些列；连续的 0/1 列可写成 "6-24"，合为一个多值字段。"""
        min_count: int = Field(2, ge=1)
        """Values that occur less often in the training rows share a few places by their hash.
        训练数据中出现次数更少的取值按哈希共用少数几个位置。"""
        buckets: int = Field(8, ge=1)
        """How many such places each field has.
        每个字段这样的位置数。"""
        max_values: int = Field(1_000_000, ge=1)
        """Values of a field that have a place of their own, the most frequent.
        每个字段最多有多少个取值（最常见的）拥有自己的位置。"""
        bins: int = Field(16, ge=1, le=1024)
        """Pieces into which the quantiles of the training rows cut a number.
        数值按训练数据的分位数分成的段数。"""
        cross: int = Field(16, ge=0)
        """Width of the vectors whose products stand beside attention; 0: none.
        注意力之外的两两交叉项的向量宽度；0 表示不用。"""
        members: int = Field(1, ge=1, le=64)
        """Models that are trained at once and averaged; they share the trunk and each has vectors of its own. Some 4 to
        16 help where rows are few.
        同时训练并取平均的成员模型数：共用主干，各有自己的向量。数据较少时 4 到 16 个有益。"""
        l2: float = Field(0.5, ge=0)
        """Pull of each value's bias towards 0: as much in an epoch as logistic regression's 1 / (2 C).
        每个取值的偏置向 0 收缩的强度，每轮相当于逻辑回归的 1 / (2 C)。"""
        l2_vectors: float = Field(10.0, ge=0)
        """The same for the vectors that attention and the crosses read, which learn rare values by heart sooner.
        注意力与交叉项所读向量的收缩强度；它们更容易死记少见取值。"""
        unseen: float = Field(0.0, ge=0, le=1)
        """A value that occurs n times is taken for one never seen in a share of unseen / n of its rows, so that such
        values are learned too.
        出现 n 次的取值，有 unseen / n 的比例在训练时当作未见过的取值，使模型学会处理新值。"""
        importance: bool = True
        """Measure in the evaluation how much worse the order becomes without each field.
        评估时测量缺少每个字段后排序变差多少。"""

    codec: FieldCodec
    tables: dict[str, dict[str, dict[str, Any]]]
    """What is joined: "user" and "item" → id → {field: value}."""
    share: float = 0.5
    """Of clicks in the training rows …"""
    rows: int = 0
    """… and how many these are."""

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.tables = {}
        self.names: list[str] = []
        self._candidates: Candidates | None = None
        known = {column.name for column in type(self).columns}
        more = tuple(Column(name, "any", required=False) for name in self.options.fields if name not in known)
        self.columns = (*type(self).columns[:2], *more, type(self).columns[2])

    def inputs(self) -> list[Column]:
        """User, item and every field of the log by its own name."""
        own = [column for column in self.columns if not column.target]
        known = {column.name for column in own}
        return own + [Column(name, "any", required=False) for name in self.names if name not in known]

    # -- prepare ------------------------------------------------------------------------------------------------------

    def gather(self, sources: Mapping[str, Any], data: Any) -> dict[str, Any]:
        o = self.options
        if "train" not in sources:  # new rows for a model that is there
            return dict(sources)
        self.names = _names(sources)
        also = []
        for key, names, columns in (("user", USER_NAMES, o.user_columns), ("item", ITEM_NAMES, o.item_columns)):
            path = getattr(o, f"{key}s")
            if path:
                chosen = None if columns is None else {ours: str(theirs) for ours, theirs in columns.items()}
                self.tables[key] = read_attributes(path, key, names, chosen, data.encoding)
                also.append(Path(path))
        return {part: _Log(rows, also, self) for part, rows in sources.items()}

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        o = self.options
        joined = {name: None for key in self.tables for held in self.tables[key].values() for name in held}
        names = list(dict.fromkeys([*self.names, *joined]))
        unknown = [name for name in o.fields if name not in names]
        if unknown:
            raise UserError(tr(f"options.fields names '{unknown[0]}'{nearest(unknown[0], names)}; the fields are: "
                               f"{', '.join(names)}",
                               f"options.fields 中的 '{unknown[0]}' 不是字段{nearest(unknown[0], names)}；现有字段："
                               f"{'、'.join(names)}"))
        found = _Joined(rows, self)
        self.codec = FieldCodec.fit(found, names, o.fields, Sizes(o.min_count, o.buckets, o.max_values, o.bins))
        self.share, self.rows = found.clicks / max(1, found.rows), found.rows
        if found.clicks in (0, found.rows):
            what = (tr("no click", "没有点击"), tr("nothing but clicks", "全是点击"))[found.clicks > 0]
            raise UserError(tr(f"among the {found.rows:,} training rows there is {what}; there is nothing to tell "
                               "apart. Is options.threshold right, and data.columns.label?",
                               f"{found.rows:,} 行训练数据中{what}，没有可区分的内容。请检查 options.threshold 与 "
                               "data.columns.label"))
        for key, table in self.tables.items():
            found.joins(key, table)

    def clicked(self, value: Any) -> bool:
        """Whether a label stands for a click. UserError where it is neither 0 nor 1 nor, with a threshold, a number."""
        limit = self.options.threshold
        if limit is not None:
            try:
                return float(value) >= limit
            except (TypeError, ValueError):
                raise UserError(tr(f"the label is {value!r}; with options.threshold it must be a number",
                                   f"标签是 {value!r}；设置了 options.threshold 时应为数值")) from None
        said = str(value).strip().casefold()
        said = said[:-2] if said.endswith(".0") else said
        if said in TRUE or said in FALSE:
            return said in TRUE
        raise UserError(tr(f"the label is {value!r}; it may be 0 or 1. For ratings set options.threshold: the value "
                           "from which on one counts as a click",
                           f"标签是 {value!r}；可以是 0 或 1。若是评分，请设置 options.threshold：不低于它的算作点击"))

    def joined(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with what the tables say of its user and item; what it says itself stands."""
        found: dict[str, Any] = {}
        for key, table in self.tables.items():
            if row.get(key) is not None:
                found |= table.get(str(row[key]), {})
        return {**found, **row}

    def encode(self, row: dict[str, Any]) -> Example:
        """one (C,), several (N,), quantity (M, 2): see `FieldCodec.encode`; and label, 0 or 1."""
        held = self.joined(row)
        if not any(held.get(f.name) is not None for f in self.codec.used):
            shown = ", ".join(f.name for f in self.codec.used)
            raise UserError(tr(f"holds none of the fields: {shown}", f"没有任何字段：{shown}"))
        example, _ = self.codec.encode(held)
        if row.get("label") is not None:
            example["label"] = np.array(self.clicked(row["label"]), dtype=np.float32)
        return example

    def describe(self, store: Store) -> dict[str, Any]:
        label = np.asarray(store.stream("label"))
        return {"clicks": int(label.sum()), "share_of_clicks": float(label.mean()) if len(label) else 0.0}

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        used = {f.name for f in self.codec.used}
        write_json(folder / "log.json", {"names": self.names, "share": self.share, "rows": self.rows})
        for key, table in self.tables.items():
            held = {name: {k: v for k, v in about.items() if k in used} for name, about in table.items()}
            (folder / f"{key}s.json").write_text(json.dumps(held, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self.codec = FieldCodec.load(folder)
        held = json.loads((folder / "log.json").read_text("utf-8"))
        self.names, self.share, self.rows, self._candidates = held["names"], held["share"], held.get("rows", 0), None
        self.tables = {key: json.loads(path.read_text("utf-8")) for key in ("user", "item")
                       if (path := folder / f"{key}s.json").is_file()}

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> ClickModel:
        start, o = float(np.log(self.share / (1 - self.share))), self.options
        return ClickModel(self.codec, config, o.cross, start, o.members)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Some values taken for ones never seen, rare ones more often (`Options.unseen`)."""
        if not self.options.unseen or not len(example["one"]):
            return example
        one = example["one"]
        starts = np.array([self.codec.starts[f.name] for f in self.codec.single], dtype=np.int32)
        counts = np.array([f.counts[i] for f, i in zip(self.codec.single, one - starts, strict=True)])
        hide = (rng.random(len(one)) < self.options.unseen / np.maximum(counts, 1)) & (one > starts)
        return {**example, "one": np.where(hide, starts + UNSEEN, one).astype(np.int32)}

    def collate(self, examples: Sequence[Example]) -> Batch:
        fixed = {key: torch.from_numpy(np.stack([example[key] for example in examples]))
                 for key in ("one", "quantity", "label") if key in examples[0]}
        return fixed | pad([{"several": example["several"]} for example in examples])

    def request(self, body: Any) -> dict[str, Any]:
        """A row: an object of fields, or the same written as JSON."""
        if isinstance(body, str) and body.lstrip().startswith("{"):
            body = json.loads(body)
        if not isinstance(body, dict):
            raise UserError(tr("a row is an object of fields, {\"user\": 7, …}",
                               "一行应是由字段组成的对象，如 {\"user\": 7, …}"))
        return body

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return batch["one"].long(), batch["several"].long(), batch["several_lengths"], batch["quantity"]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        read = self._read(batch)
        # Each member learns for itself; together they would learn as one large model does.
        logit_PB = model.each(*read) if model.training else model(*read)[None]  # type: ignore[operator]
        label_PB, rows = batch["label"].expand_as(logit_PB), len(batch["label"])
        told = F.binary_cross_entropy_with_logits(logit_PB, label_PB, reduction="sum") / len(logit_PB)
        if not model.training:
            return Loss(told, rows)
        # A value that stands in n rows is pulled n times in an epoch, by an n-th each time.
        counts = torch.tensor([n for f in self.codec.used for n in f.counts], device=told.device)
        once_V, once, o = 1 / counts.clamp(min=1).float(), 1 / max(1, self.rows), self.options
        pull = model.penalty(read, once_V, once, o.l2, o.l2_vectors)  # type: ignore[operator]
        return Loss(told + pull, rows, {"told": told.detach()})

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"p": probability of a click}``, and ``"unseen"``: the fields whose value training never saw."""
        likely = model(*self._read(batch)).double().sigmoid().tolist()
        answers: list[Answer] = [{"p": float(f"{p:.6g}")} for p in likely]
        if not ask.get("evaluate"):
            for answer, one, several in zip(answers, batch["one"].tolist(), batch["several"].tolist(), strict=True):
                if found := self._unseen(one, several):
                    answer["unseen"] = found
        return answers

    def _unseen(self, one: Sequence[int], several: Sequence[int]) -> list[str]:
        starts, held = self.codec.starts, set(several)
        found = [f.name for f, i in zip(self.codec.single, one, strict=True) if i == starts[f.name] + UNSEEN]
        return found + [f.name for f in self.codec.several if starts[f.name] + UNSEEN in held]

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """AUC, AUC within each user, log loss, calibration error, and clicks foretold over clicks made.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        p, clicked = self._compared(answers, rows)
        found = {"auc": clicks.auc(p, clicked, weights)}
        if any(row.get("user") is not None for row in rows):
            users = np.unique([str(row.get("user")) for row in rows], return_inverse=True)[1]
            found["gauc"] = clicks.grouped_auc(p, clicked, users, weights)
        found["log_loss"] = clicks.log_loss(p, clicked, weights)
        found["calibration_error"] = clicks.calibration_error(p, clicked, weights)
        found["expected_over_clicks"] = clicks.expected_over_clicks(p, clicked, weights)
        return found

    def _compared(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([answer["p"] for answer in answers]), np.array([self.clicked(row["label"]) for row in rows])

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The reliability of the probabilities."""
        return {"calibration": clicks.reliability(*self._compared(answers, rows))}

    def explain(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
        """How much AUC is lost where the values of one field are dealt out anew among the rows (Breiman 2001, "Random
        Forests", section 10), the most first."""
        chosen = np.unique(np.linspace(0, len(examples) - 1, min(SOME, len(examples))).astype(int)).tolist()
        held = [examples[i] for i in chosen]
        if not self.options.importance or not held:
            return {}
        return {"importance": importance(self.codec, held, lambda some: self._probabilities(model, some))}

    def _probabilities(self, model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
        device = next(model.parameters()).device
        found = []
        for start in range(0, len(examples), STEP):
            batch = {k: v.to(device) for k, v in self.collate(examples[start : start + STEP]).items()}
            with torch.inference_mode():
                found.append(model(*self._read(batch)).double().sigmoid().cpu().numpy())
        return np.concatenate(found)

    # -- ranking ------------------------------------------------------------------------------------------------------

    def _of_items(self) -> list[str]:
        """Fields that are the item's own: its id, and what its table says."""
        table = self.tables.get("item", {})
        return ["item", *dict.fromkeys(name for about in table.values() for name in about)]

    def context(self) -> list[Column]:
        """Fields of the log that are neither the user's nor the item's."""
        table = self.tables.get("user", {})
        own = {*self._of_items(), "user", *(name for about in table.values() for name in about)}
        return [Column(f.name, "any", required=False) for f in self.codec.used if f.name not in own]

    def catalogue(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Encode these items ahead; what the own table says of one stands before what the retriever says."""
        names, used = self._of_items(), {f.name for f in self.codec.used}
        table = self.tables.get("item", {})
        about = {str(item["id"]): table.get(str(item["id"])) or {k: v for k, v in item.items() if k in used}
                 for item in items}
        self._candidates = Candidates(self.codec, {**table, **about}, names)
        self._candidates.add(list(about))

    def rank(self, model: nn.Module, requests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """The probability of a click for each item of each request, all in one pass."""
        if self._candidates is None:
            self.catalogue([])
        assert self._candidates is not None
        asked = [request for request in requests if request["items"]]
        if not asked:
            return [[] for _ in requests]
        users = self.tables.get("user", {})
        batches = []
        for request in asked:
            user = request.get("user")
            row = {} if user is None else {**users.get(str(user), {}), "user": str(user)}
            row |= request.get("context") or {}
            batches.append(self._candidates.batch(row, [str(item) for item in request["items"]]))
        device = next(model.parameters()).device
        with torch.inference_mode():
            batch = {key: torch.from_numpy(held).to(device) for key, held in joined(batches).items()}
            scores = iter(model(*self._read(batch)).double().sigmoid().tolist())
        return [[next(scores) for _ in request["items"]] for request in requests]


class _Log:
    """The rows of a log, with the tables that are joined to it among its files."""

    def __init__(self, rows: Any, also: Sequence[Path], task: ClickThroughRate) -> None:
        self.rows, self.also, self.task = rows, list(also), task
        self.joins: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    @property
    def files(self) -> list[Path]:
        """The files that are read, the tables too."""
        return [*self.rows.files, *self.also]

    def describe(self) -> list[str]:
        """How the files are read, and what each field was taken for."""
        return [*self.rows.describe(), *self.task.codec.describe()]


class _Joined:
    """Training rows with what is joined to them; counts clicks on the way."""

    def __init__(self, rows: Iterable[dict[str, Any]], task: ClickThroughRate) -> None:
        self.source, self.task = rows, task
        self.rows = self.clicks = 0
        self.met = {key: 0 for key in task.tables}
        self.some: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.source:
            try:
                self.clicks += self.task.clicked(row["label"])
            except UserError:
                continue  # told with its place when it is encoded
            self.rows += 1
            for key, table in self.task.tables.items():
                self.met[key] += str(row.get(key)) in table
                self.some.setdefault(key, str(row.get(key)))
            yield self.task.joined(row)

    def joins(self, key: str, table: Mapping[str, Any]) -> None:
        """UserError where a table's ids are of another kind than the log's."""
        if not self.met[key]:
            other = next(iter(table), "-")
            raise UserError(tr(f"none of the {self.rows:,} rows finds its {key} in this table: ids there look like "
                               f"'{other}', in the log like '{self.some.get(key)}'",
                               f"{self.rows:,} 行中没有一行能在该表里找到自己的 {key}：那里的编号形如 '{other}'，"
                               f"日志中形如 '{self.some.get(key)}'"), str(getattr(self.task.options, f"{key}s")))


def _names(sources: Mapping[str, Any]) -> list[str]:
    """The fields of a log's files: ours where a column is known, else the file's own names."""
    found: dict[str, None] = {}
    for source in sources.values():
        for about in source.guess["files"]:
            ours = {theirs: name for name, theirs in about["mapping"].items()}
            found |= dict.fromkeys(ours.get(name, name) for name in about["columns"])
    found.pop("label", None)
    return list(found)
