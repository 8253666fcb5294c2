"""text-classification: give each text a label (its sentiment, its topic, any label), or several.

A Transformer that looks both ways over characters or BPE tokens, and one vector a text pooled from all positions. A
long text keeps its head and its tail, which hold most of what it says (Sun et al. 2019, "How to Fine-Tune BERT for
Text Classification", section 5.3.1).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.text import SPECIAL, LabelCodec, TextCodec
from multihead.data.rows import LABEL_NAMES, TEXT_NAMES, Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import text as metrics
from multihead.run import write_atomic, write_json
from multihead.task import Answer, Batch, Example, Loss, Task, check_room
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import PoolHead, WideHead
from multihead.transformer.inputs import TokenInput, ngram_hashes
from multihead.transformer.trunk import Trunk

BINS = 15
BUCKETS = 1 << 17
MISTAKES = 30


class Classifier(nn.Module):
    """Texts → logits over classes. ids (B, T), padded on the right, of lengths (B,) → (B, C).

    Two readers that learn apart: a trunk reads the order of the words and, where `wide` is given, a linear map reads
    their n-grams. The answer is a mean of their logits, the trunk's weighed by `share`. In training the trunk also
    guesses hidden words.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        classes: int,
        pool: str,
        dropout: float,
        wide: WideHead | None,
        share: float,
        guess: bool,
    ) -> None:
        super().__init__()
        self.share = share
        self.input = TokenInput(config, vocab_size)
        self.trunk = Trunk(config)
        self.head = PoolHead(config.d_model, classes, pool, dropout)
        self.wide = wide
        self.guess = nn.Linear(config.d_model, config.d_model) if guess else None
        self.guess_bias = nn.Parameter(torch.zeros(vocab_size)) if guess else None

    def deep(self, ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's vectors (B, T, D) and its logits (B, C) in float32."""
        real_BT = real(ids_BT, lengths_B)
        x_BTD = self.trunk(self.input(ids_BT), mask=real_BT)
        return x_BTD, self.head(x_BTD, real_BT).float()

    def guesses(self, x_ND: Tensor) -> Tensor:
        """Which word stands at hidden positions: (N, D) → (N, V), by the input's own embeddings."""
        assert self.guess is not None and self.guess_bias is not None
        return F.linear(self.guess(x_ND), self.input.token.weight, self.guess_bias)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        deep_BC = self.deep(ids_BT, lengths_B)[1]
        if self.wide is None:
            return deep_BC
        return self.share * deep_BC + (1 - self.share) * self.wide(ids_BT, real(ids_BT, lengths_B))


def real(ids_BT: Tensor, lengths_B: Tensor) -> Tensor | None:
    """(B, T) bool, where a row has tokens; None where nothing is padded, which is faster and, for one text, always so.
    """
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
    return None if bool(real_BT.all()) else real_BT


class TextClassification(Task):
    """Labels for texts: one a text, or with ``options.multiple`` any number."""

    field = "language"
    title = ("label a text: sentiment, topic, any labels of your own", "给文本打标签：情感、主题或自定义标签")
    columns = (
        Column("text", "text", names=TEXT_NAMES),
        Column("label", "label", names=LABEL_NAMES, target=True),
    )
    metric = ("log_loss", "min")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {
            "d_model": 96, "num_layers": 2, "num_heads": 3, "norm": "layernorm", "activation": "relu2",
            "ngrams": [2, 3], "ngram_buckets": 32768,
        },
        "train": {"steps": 1100, "batch_size": 64, "ema": 0.99},
    }

    class Options(base.Options):
        multiple: bool = False
        """Several labels a text: a list in JSON, or separated by ; | , 、 in a table.
        每条文本可有多个标签：JSON 中为列表，表格中用 ; | , 、 分隔。"""
        tokenizer: Literal["char", "bpe"] = "char"
        """char: one token a character. bpe: pieces of words, shorter for languages with an alphabet.
        char：每个字符一个词元；bpe：词的片段，适合拼音文字。"""
        vocab_size: int = Field(8000, ge=260)
        """Most tokens; rarer characters count as unknown.
        词元数上限；更罕见的字符视为未知。"""
        max_tokens: int = Field(256, ge=2)
        """Of a longer text, the first and the last tokens are read, half of each.
        更长的文本只读开头和结尾，各占一半。"""
        pool: Literal["attention", "mean", "first"] = "attention"
        """How positions become one vector. mean: their average; attention: a learned average beside the largest values;
        first: the first position, as BERT does.
        各位置如何合成一个向量。mean：取平均；attention：学到的加权平均加上最大值；first：取首位置，同 BERT。"""
        wide: tuple[int, ...] = (1, 2, 3)
        """Also read a text as a bag of n-grams of these lengths, weighed by tf-idf; [] reads it by the trunk alone.
        同时把文本当作这些长度的 n 元组的集合来读（tf-idf 加权）；[] 表示只用主干网络。"""
        wide_rate: float = Field(3.0, gt=0)
        """Step of the bag of n-grams for each row; 1 to 4, more where texts are long or epochs few.
        n 元组部分每行的步长；1 到 4，文本较长或轮数较少时取大一些。"""
        share: float = Field(0.4, ge=0, le=1)
        """The trunk's share of the answer; the bag of n-grams, which is less sure of itself, has the rest.
        主干网络在结果中所占的比重；其余来自 n 元组（其把握通常较小）。"""
        hidden: float = Field(0.2, ge=0, le=0.5)
        """Share of tokens hidden in training, in each text from none to twice as many, so that no single word decides.
        训练时随机遮住的词元比例（每条文本在 0 到两倍之间），使结果不依赖单个词。"""
        guess: float = Field(0.3, ge=0)
        """Weight of guessing the hidden tokens beside giving the label: the texts themselves teach the language.
        除了打标签，还要猜出被遮住的词元，这一项的权重：文本本身就能教会模型语言。"""
        head_dropout: float = Field(0.3, ge=0, lt=1)
        """Share of the pooled vector set to zero in training.
        训练时池化向量随机置零的比例。"""
        label_smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of certainty taken from the true label, for labels that are sometimes wrong.
        从正确标签上拿走的确定性比例，适合标注有误差的数据。"""
        class_weights: Literal["none", "balanced"] = "none"
        """balanced: rare labels count more, each label as much as any other.
        balanced：罕见标签权重更大，各标签总权重相同。"""
        threshold: float = Field(0.5, gt=0, lt=1)
        """With `multiple`: the probability from which a label is given.
        multiple 时，概率达到多少就给出该标签。"""

    codec: TextCodec
    labels: LabelCodec
    counts: list[int]
    """Training rows that have each label, then all rows."""
    tokens: int
    """Tokens of all training rows."""
    idf: np.ndarray
    """(orders · buckets,) Of each bucket of n-grams, ln(rows / rows that hold it) + 1; 0 for none."""

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        if self.options.multiple:
            several = Column("label", "labels", names=LABEL_NAMES, target=True)
            self.columns = (self.columns[0], several)  # type: ignore[misc]

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        options, counts, total = self.options, Counter[str](), 0
        for row in rows:
            total += 1
            counts.update(row["label"] if options.multiple else [row["label"]])
        self.labels = LabelCodec.fit(counts)
        if self.origin is not None and set(self.origin.labels or ()) == set(self.labels.names):
            self.labels = LabelCodec(self.origin.labels)  # in its order, so that its head can be taken
        if len(self.labels) < 2 and not options.multiple:
            only = self.labels.names[0]
            raise UserError(tr(f"all rows have the same label, '{only}'; there is nothing to tell apart. "
                               "Is this the right column? data.columns.label names another",
                               f"所有行的标签都是 '{only}'，没有可区分的类别。"
                               "列选对了吗？可用 data.columns.label 指定另一列"))
        self.counts = [*(counts[name] for name in self.labels.names), total]
        if self.origin is not None:
            self.codec = self.origin.codec()
        else:
            texts = (row["text"] for row in rows)
            self.codec = TextCodec.fit(texts, options.tokenizer, options.vocab_size, (*SPECIAL, "<mask>"))
        held, self.tokens = np.zeros(len(options.wide) * BUCKETS, dtype=np.float32), 0
        for row in rows:
            ids = torch.from_numpy(self._ids(row["text"])).long()
            self.tokens += len(ids)
            if options.wide:
                held[ngram_hashes(ids[None], None, options.wide, BUCKETS).unique().numpy()] += 1
        self.idf = np.where(held > 0, np.log((1 + total) / (1 + held)) + 1, 0).astype(np.float32)

    def _ids(self, text: str) -> np.ndarray:
        ids = self.codec.encode(text)
        most = self.options.max_tokens - len(self.codec.frame(ids[:0]))
        if len(ids) > most:
            ids = np.concatenate((ids[: most - most // 2], ids[len(ids) - most // 2 :]))
        ids = self.codec.frame(ids)
        return ids if len(ids) else np.array([self.codec.unk], dtype=ids.dtype)

    def encode(self, row: dict[str, Any]) -> Example:
        example = {"ids": self._ids(row["text"])}
        if row.get("label") is not None:
            example["label"] = self._target(row["label"])
        return example

    def _target(self, label: Any) -> np.ndarray:
        if not self.options.multiple:
            return np.array(self.labels.encode(label), dtype=np.int64)
        target = np.zeros(len(self.labels), dtype=np.uint8)
        target[[self.labels.encode(name) for name in label]] = 1
        return target

    def describe(self, store: Store) -> dict[str, Any]:
        held = store.stream("label")
        size = len(self.labels)
        counts = held.reshape(-1, size).sum(0) if self.options.multiple else np.bincount(held, minlength=size)
        return {"classes": dict(zip(self.labels.names, counts.tolist(), strict=True))}

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        self.labels.save(folder)
        write_json(folder / "counts.json", {"labels": self.counts, "tokens": self.tokens})
        write_atomic(folder / "idf.safetensors", safetensors.numpy.save({"idf": self.idf}))

    def load(self, folder: Path) -> None:
        self.codec, self.labels = TextCodec.load(folder), LabelCodec.load(folder)
        counts = json.loads((folder / "counts.json").read_text("utf-8"))
        self.counts, self.tokens = counts["labels"], counts["tokens"]
        self.idf = safetensors.numpy.load_file(folder / "idf.safetensors")["idf"]

    def model(self, config: TransformerConfig) -> Classifier:
        check_room("max_tokens", self.options.max_tokens, config)
        orders, classes = self.options.wide, len(self.labels)
        rate = self.options.wide_rate
        wide = WideHead(orders, torch.from_numpy(self.idf.copy()), classes, rate) if orders else None
        guess = bool(self.options.guess and self.options.hidden)
        o = self.options
        return Classifier(config, self.codec.vocab_size, classes, o.pool, o.head_dropout, wide, o.share, guess)

    def anew(self) -> Sequence[str]:
        """What gives an answer, where the origin's classes are not these in this order."""
        return () if self.origin.labels == self.labels.names else ("head.linear.", "wide.")

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("ids")

    @property
    def _mask(self) -> int:
        return self.codec.unk if self.codec.mask is None else self.codec.mask

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Choose tokens to hide ("word dropout", Iyyer et al. 2015, section 3.2), of each text another share:
        ``hidden`` (T,)."""
        ids, most = np.asarray(example["ids"]), 2 * self.options.hidden
        if not most:
            return example
        hidden = rng.random(len(ids)) < most * rng.random()
        hidden &= (ids != self.codec.bos) & (ids != self.codec.eos)
        return {**example, "hidden": hidden.astype(np.uint8)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Each reader's own loss, since they err on different rows only if neither leans on the other; and in training
        what it costs to guess the hidden tokens."""
        o, ids_BT, lengths_B, label = self.options, batch["ids"].long(), batch["ids_lengths"], batch["label"]
        hidden_BT = batch["hidden"].bool() if "hidden" in batch else None
        seen_BT = ids_BT if hidden_BT is None else ids_BT.masked_fill(hidden_BT, self._mask)
        x_BTD, deep_BC = model.deep(seen_BT, lengths_B)  # type: ignore[operator]
        parts = {"deep": self._one_loss(deep_BC, label, model.training)}
        if o.wide:
            wide_BC = model.wide(ids_BT, real(ids_BT, lengths_B))  # type: ignore[operator]
            parts["wide"] = self._one_loss(wide_BC, label, model.training)
        if o.guess and hidden_BT is not None:
            logits_NV = model.guesses(x_BTD[hidden_BT]).float()  # type: ignore[operator]
            told = F.cross_entropy(logits_NV, ids_BT[hidden_BT], reduction="sum")
            # By the mean number of hidden tokens, not by this batch's own: a sum over rows stays a sum over rows.
            parts["guess"] = told * (o.guess / (o.hidden * self.tokens / self.counts[-1]))
        return Loss(torch.stack(list(parts.values())).sum(), len(label), parts)

    def _one_loss(self, logits_BC: Tensor, target: Tensor, training: bool) -> Tensor:
        weight_C = self._weights(logits_BC.device)
        smooth = self.options.label_smoothing if training else 0.0
        if not self.options.multiple:
            return F.cross_entropy(logits_BC, target, weight_C, reduction="sum", label_smoothing=smooth)
        target_BC = target.to(logits_BC.dtype) * (1 - smooth) + smooth / 2
        total = F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="sum", pos_weight=weight_C)
        return total / logits_BC.shape[1]

    def _weights(self, device: torch.device) -> Tensor | None:
        """Balanced: of one label, so that a row weighs 1 on average; of several, what a label's presence weighs."""
        if self.options.class_weights == "none":
            return None
        rows_C, total = torch.tensor(self.counts[:-1], dtype=torch.float32, device=device), self.counts[-1]
        return (total - rows_C).clamp(min=1) / rows_C if self.options.multiple else total / (len(rows_C) * rows_C)

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"label", "scores": {label: probability, likeliest first}}``; with `multiple`, ``labels`` is a list."""
        logits_BC = model(batch["ids"].long(), batch["ids_lengths"]).double()
        names = self.labels.names
        likely_BC = logits_BC.sigmoid() if self.options.multiple else logits_BC.softmax(-1)
        answers: list[Answer] = []
        for row in likely_BC.cpu().numpy():
            order = np.argsort(-row, kind="stable")
            scores = {names[i]: float(f"{row[i]:.6g}") for i in order}
            if self.options.multiple:
                given = [name for name, p in scores.items() if p >= self.options.threshold]
                answers.append({"labels": given, "scores": scores})
            else:
                answers.append({"label": names[order[0]], "scores": scores})
        return answers

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Accuracy, macro F1, calibration error, log loss; with `multiple` micro and macro F1, exact match, log loss.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        if self.options.multiple:
            target, guess, likely = self._several(answers, rows)
            hits = metrics.label_hits(target, guess, weights)
            return {
                "micro_f1": metrics.micro_f1(*hits),
                "macro_f1": metrics.macro_f1(*hits),
                "exact_match": metrics.exact_match(target, guess, weights),
                "log_loss": metrics.binary_log_loss(likely, target, weights),
            }
        target, guess, sure, likely = self._single(answers, rows)
        return {
            "accuracy": metrics.accuracy(target, guess, weights),
            "macro_f1": metrics.macro_f1(*metrics.hits(target, guess, len(self.labels), weights)),
            "calibration_error": metrics.calibration_error(sure, target == guess, weights, BINS),
            "log_loss": metrics.log_loss(likely, weights),
        }

    def _single(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """True and guessed class, probability of the guess and of the truth: each (n,)."""
        target = np.array([self.labels.encode(row["label"]) for row in rows], dtype=np.int64)
        guess = np.array([self.labels.encode(a["label"]) for a in answers], dtype=np.int64)
        sure = np.array([a["scores"][a["label"]] for a in answers])
        likely = np.array([a["scores"][str(row["label"])] for a, row in zip(answers, rows, strict=True)])
        return target, guess, sure, likely

    def _several(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """True labels, given labels (bool) and probabilities: each (n, C)."""
        target = np.stack([self._target(row["label"]) for row in rows]).astype(bool)
        guess = np.stack([self._target(a["labels"]) for a in answers]).astype(bool)
        likely = np.array([[a["scores"][name] for name in self.labels.names] for a in answers])
        return target, guess, likely

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Confusion matrix and calibration (one label), figures of each class, and the surest mistakes."""
        names, found = self.labels.names, dict[str, Any]()
        if self.options.multiple:
            target, guess, likely = self._several(answers, rows)
            hits = metrics.label_hits(target, guess)
            wrong = np.where(target == guess, 0.0, np.abs(likely - target)).max(1)
        else:
            target, guess, sure, _ = self._single(answers, rows)
            hits = metrics.hits(target, guess, len(names))
            wrong = np.where(target == guess, 0.0, sure)
            found["confusion"] = {"labels": names, "matrix": metrics.confusion(target, guess, len(names)).tolist()}
            found["calibration"] = metrics.reliability(sure, target == guess, BINS)
        found["classes"] = metrics.class_table(names, *hits)
        key = "labels" if self.options.multiple else "label"
        found["mistakes"] = [
            {"text": rows[i]["text"], "truth": rows[i]["label"], "answer": answers[i][key], "score": float(wrong[i]),
             "where": getattr(rows[i], "where", "")}
            for i in np.argsort(-wrong, kind="stable")[:MISTAKES] if wrong[i] > 0
        ]  # fmt: skip
        return found
