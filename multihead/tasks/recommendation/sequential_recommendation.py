"""sequential-recommendation: from what somebody chose so far to what they choose next.

A causal Transformer over item ids (SASRec, Kang & McAuley 2018), which learns from every place of every history at
once. It is trained by the full softmax over the catalogue, which ranks far better than the binary loss of the original
(Klenitskiy & Vasilev 2023, "Turning Dross Into Gold Loss"), or for large catalogues by a sampled loss whose
overconfidence is corrected (gSASRec, Petrov & Macdonald 2023). Or a bidirectional one that fills in hidden items
(BERT4Rec, Sun et al. 2019). Users are no part of the model: whoever has a history, new or known, is answered from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multihead.data.columns import Column
from multihead.data.events import seconds
from multihead.data.interactions import Log, Slices
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.task import Batch, Example, Loss, check_room, pad
from multihead.tasks.recommendation._next_item import NextItem, gap_kinds, gbce, hide
from multihead.tasks.recommendation._retriever import Retriever
from multihead.transformer.config import TransformerConfig
from multihead.transformer.losses import vocabulary_loss

TIMES = Column("times", "ids", required=False, names=("timestamps", "时间"))
"""When each item of a history was chosen: seconds since 1970, or dates."""


class SequentialRecommendation(Retriever):
    """The next item for a history of items."""

    title = ("what a user will choose next, from what they chose so far", "根据用户以往的选择，推荐下一个物品")
    unit = "items"
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"split": {"by": "last"}},
        "model": {
            "d_model": 64, "num_layers": 2, "num_heads": 2, "max_length": 50, "dropout": 0.3, "norm": "layernorm",
            "activation": "gelu", "positions": "rotary",
        },
        "train": {"steps": 4000, "batch_size": 128, "weight_decay": 0.01},
    }

    class Options(Retriever.Options):
        max_items: int = Field(50, ge=1)
        """Of a longer history, this many of the last items are read. In training a longer one is cut into several.
        历史更长时，只读最近的这么多个物品；训练时则切成几段。"""
        form: Literal["causal", "bidirectional"] = "causal"
        """causal: every item is foretold from those before it (SASRec). bidirectional: some items are hidden and filled
        in from both sides, which learns more slowly (BERT4Rec).
        causal：由之前的物品预测下一个（SASRec）；bidirectional：遮住部分物品，由前后文补全，学得较慢（BERT4Rec）。"""
        hidden: float = Field(0.2, gt=0, lt=1)
        """With the bidirectional form: the share of items that is hidden.
        bidirectional 时被遮住的物品比例。"""
        gaps: bool = False
        """Read how long after the one before it each item was chosen; asks for a time column. For the causal form.
        读入每个物品与前一个物品之间相隔的时间；需要时间列，仅用于 causal。"""
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

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        o = self.options
        self.causal = o.form == "causal"
        if o.gaps and not self.causal:
            raise UserError(tr("options.gaps goes with form causal: where an item is hidden, so must be its time",
                               "options.gaps 只用于 causal：物品被遮住时，它的时间也应隐去"))
        if not self.causal and o.max_items < 2:
            raise UserError(tr("options.max_items must be 2 or more with form bidirectional",
                               "form 为 bidirectional 时 options.max_items 至少为 2"))

    def inputs(self) -> list[Column]:
        return [*super().inputs(), *([TIMES] if self.options.gaps else [])]

    # -- prepare ------------------------------------------------------------------------------------------------------

    def gather(self, sources: Mapping[str, Any], data: Any) -> dict[str, Any]:
        found = super().gather(sources, data)
        for part in found.values() if self.options.gaps else ():
            part.ask_times("options.gaps")
        return found

    def remembered(self, log: Log, user: int, first: int, last: int) -> dict[str, Any]:
        return {"times": log.times(user, first, last)} if self.options.gaps else {}

    def beside(self, row: Mapping[str, Any], count: int) -> Example:
        """With ``options.gaps`` "gaps" (T,): which kind the time before each known item is."""
        if not self.options.gaps:
            return {}
        names, times = row["history"], row.get("times")
        if times is None:
            return {"gaps": np.zeros(count, np.uint8)}
        if isinstance(times, str) or isinstance(names, str) or len(times) != len(names):
            raise UserError(tr("'times' must be a list with a time for each item of 'history'",
                               "times 应是列表，与 history 中的物品一一对应"))
        moments = [seconds(time) for time in times]
        if None in moments:
            odd = times[moments.index(None)]
            raise UserError(tr(f"'times' holds {odd!r}, which is no time: give seconds since 1970, or dates",
                               f"times 中的 {odd!r} 不是时间：请给出自 1970 年起的秒数或日期"))
        return {"gaps": gap_kinds([m for name, m in zip(names, moments, strict=True) if str(name) in self.codec])}

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        room = self.options.max_items - (not self.causal)
        return Slices(store, room, gaps=self.options.gaps) if part == "train" else store

    def length(self, store: Any) -> np.ndarray:
        return store.lengths("history")

    # -- build --------------------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> NextItem:
        check_room("max_items", self.options.max_items, config)
        codec = self.codec
        return NextItem(config, len(codec), codec.features, len(codec.feature_names), self.causal, self.options.gaps)

    # -- train --------------------------------------------------------------------------------------------------------

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        if self.causal:
            return example
        ids, targets = hide(example["items"], self.options.hidden, len(self.codec), rng)
        return {"items": ids, "targets": targets}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Of training slices ``items``; of rows ``recent``, what the model reads, beside everything in ``history``."""
        if "items" in examples[0]:
            return pad(examples)
        return pad([{**example, **self._recent(example)} for example in examples])

    def _recent(self, example: Example) -> Example:
        most = self.options.max_items
        if self.causal:
            return {key: example[name][-most:] for key, name in (("recent", "history"), ("gaps", "gaps"))
                    if name in example}  # fmt: skip
        return {"recent": np.append(example["history"][1 - most :], len(self.codec)).astype(np.int32)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """How surprising every item of a slice but its first was, or every hidden one; a sum over items."""
        ids_BT, lengths_B, gaps = batch["items"].long(), batch["items_lengths"], batch.get("gaps")
        if self.causal:
            x_BTD, table_ID = model(ids_BT[:, :-1], None if gaps is None else gaps.long())
            targets_BT, lengths_B = ids_BT[:, 1:], lengths_B - 1
        else:
            x_BTD, table_ID = model(ids_BT, None, lengths_B)
            targets_BT = batch["targets"].long()
        real_BT = torch.arange(targets_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        real_BT = real_BT & (targets_BT >= 0)
        x_ND, target_N = x_BTD[real_BT], targets_BT[real_BT]
        o = self.options
        if o.loss == "softmax":
            return Loss(vocabulary_loss(x_ND, table_ID, target_N), len(target_N))
        return Loss(gbce(x_ND, table_ID, target_N, o.negatives, o.calibration), len(target_N))

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, I) float32, what each item scores next; where no item of the history is known, the logarithm of how
        often it was chosen."""
        recent_BT, lengths_B, gaps = batch["recent"].long(), batch["recent_lengths"], batch.get("gaps")
        x_BTD, table_ID = model(recent_BT, None if gaps is None else gaps.long(), lengths_B)
        last_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), (lengths_B - 1).clamp(min=0)]
        with torch.autocast(last_BD.device.type, enabled=False):  # in bfloat16 many items would tie
            scores_BI = model.head(last_BD.float(), table_ID.float())  # type: ignore[operator]
        known_B = batch["history_lengths"] > 0
        if bool(known_B.all()):
            return scores_BI
        popular_I = torch.from_numpy(self.codec.counts).to(scores_BI).log()
        return torch.where(known_B[:, None], scores_BI, popular_I)

    def shown_as(self, scores_BI: Tensor) -> Callable[[Tensor], Tensor]:
        """The probability that the item comes next; with loss gbce, that it is chosen at all."""
        if self.options.loss == "gbce":
            return torch.sigmoid
        norm_B1 = scores_BI.logsumexp(-1, keepdim=True)
        return lambda best_BK: (best_BK - norm_B1).exp()

    def item_vectors(self, model: nn.Module) -> Tensor:
        return model.input.table()  # type: ignore[operator, union-attr]
