"""fill-mask: learn a language from one's own texts by guessing hidden words; nothing needs a label.

A Transformer that looks both ways sees texts in which some tokens are hidden, and says what stood there (Devlin et al.
2019, section 3.1). What it learns serves three uses: it fills gaps, it gives texts vectors to compare them by, and
other recipes start from it (``model.from``).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec import words
from multihead.codec.text import SPECIAL, TextCodec
from multihead.data.pieces import Bundles, Pieces, unbundle
from multihead.data.rows import TEXT_NAMES, Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import text as metrics
from multihead.task import Answer, Batch, Example, Loss, Task, check_room
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import MaskedHead
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk

MARK = re.compile(r"<mask>|\[MASK\]")
FILLINGS, MOST_FILLINGS = 5, 100
SAMPLES = 12
TRY = 48  # tokens of a text that the page offers to try


class MaskedModel(nn.Module):
    """A token embedding, a trunk that looks both ways, and the head that names hidden tokens."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.input = TokenInput(config, vocab_size)
        self.trunk = Trunk(config)
        self.head = MaskedHead(config.d_model, vocab_size, self.input.token, config.norm_eps)

    def forward(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """ids (B, T), real where `real_BT` → the trunk's vectors (B, T, D)."""
        # No mask where nothing is padded, which is faster and, for one text alone, always so.
        return self.trunk(self.input(ids_BT), mask=None if bool(real_BT.all()) else real_BT)


class FillMask(Task):
    """Hidden tokens of texts named from both sides; texts as vectors."""

    field = "language"
    title = ("fill gaps in texts; learn a language from your own texts, and turn texts into vectors",
             "填补文本中的空缺；用自己的文本学习语言，并把文本变成向量")  # fmt: skip
    columns = (Column("text", "text", names=TEXT_NAMES),)
    metric = ("loss", "min")
    unit = "tokens"
    embeds = True
    asks = ("top_k",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {
            "d_model": 128, "num_layers": 3, "num_heads": 4, "norm": "layernorm", "activation": "relu2",
            "ngrams": [2, 3], "ngram_buckets": 32768,
        },
        "train": {
            "steps": 2400, "batch_size": 64, "optimizer": "muon", "lr": 0.002, "muon_lr": None, "weight_decay": 0.05,
        },
    }

    class Options(base.Options):
        tokenizer: Literal["char", "bpe"] = "char"
        """char: one token a character. bpe: pieces of words, shorter for languages with an alphabet.
        char：每个字符一个词元；bpe：词的片段，适合拼音文字。"""
        vocab_size: int = Field(8000, ge=261)
        """Most tokens; with char, rarer characters count as unknown.
        词元数上限；char 时更罕见的字符视为未知。"""
        context: int = Field(256, ge=8)
        """Most tokens read at once; longer texts are cut into several examples.
        一次最多读的词元数；更长的文本切成多个样本。"""
        bundle: int | None = Field(None, ge=1)
        """Train on bundles of short texts of about so many tokens, so that a step reads as many whatever their length.
        把短文本合成约这么多词元的样本来训练，使每一步读到的词元数大致相同，与文本长短无关。"""
        masked: float = Field(0.15, gt=0, lt=1)
        """Share of tokens to be guessed: of them 80 % are hidden, 10 % replaced by any other, 10 % left as they are.
        要猜的词元比例：其中 80% 被遮住，10% 换成随机词元，10% 保持原样。"""
        whole_words: bool = False
        """Hide words, not single tokens: Chinese words as jieba finds them, others by their blanks.
        整词遮盖，而不是单个词元：中文用 jieba 分词，其他文字按空格分词。"""
        simplify: bool = False
        """Read traditional Chinese as simplified (needs OpenCC).
        把繁体字当作简体字读（需要 OpenCC）。"""

    codec: TextCodec

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        if self.origin is not None:
            self.codec = self.origin.codec()
            if self.codec.mask is None:
                where = self.origin.path
                raise UserError(tr(f"the tokenizer of {where} has no mask token; fill-mask starts from weights "
                                   "that were trained to fill masks (fill-mask, BERT, RoBERTa)",
                                   f"{where} 的分词器没有遮盖词元；fill-mask 只能从做过遮盖训练的权重开始"
                                   "（fill-mask、BERT、RoBERTa）"))
            return
        texts = (self._text(row) for row in rows)
        self.codec = TextCodec.fit(texts, self.options.tokenizer, self.options.vocab_size, (*SPECIAL, "<mask>"))

    def _text(self, row: dict[str, Any]) -> str:
        return words.simplifier()(row["text"]) if self.options.simplify else row["text"]

    def encode(self, row: dict[str, Any]) -> Example:
        """``ids`` (T,): the text's own tokens, where ``<mask>`` or ``[MASK]`` is the mask; and with
        `options.whole_words` ``starts`` (T,): 1 where a word begins."""
        text = self._text(row)
        parts, pieces, starts = MARK.split(text), [], []
        for i, part in enumerate(parts):
            if i:
                pieces.append(np.array([self._mask], dtype=np.int32))
                starts.append(np.ones(1, dtype=np.uint8))
            # A blank before a mask is part of the hidden word, as it is of any word of a byte-level BPE.
            part = part.rstrip(" ") if i < len(parts) - 1 and self.codec.kind != "char" else part
            if self.options.whole_words:
                own, spans = self.codec.spans(part)
                pieces.append(own)
                starts.append(words.starts(part, spans))
            else:
                pieces.append(self.codec.encode(part))
        ids = np.concatenate(pieces)
        if not len(ids):
            ids, starts = np.array([self.codec.unk], dtype=np.int32), [np.ones(1, dtype=np.uint8)]
        return {"ids": ids, "starts": np.concatenate(starts)} if self.options.whole_words else {"ids": ids}

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        """Texts, the long ones in several pieces. For training, the pieces of a text overlap by half, so that no cut is
        always at the same place; else they lie end to end, and what is hidden in them depends on them alone."""
        if part != "train":
            return Hidden(self, Pieces(store, self.room, overlap=False))
        pieces = Pieces(store, self.room, overlap=True)
        return pieces if self.options.bundle is None else Bundles(pieces, self.options.bundle)

    def length(self, store: Any) -> np.ndarray:
        return store.lengths("ids")

    def describe(self, store: Store) -> dict[str, Any]:
        ids = store.stream("ids")
        return {"tokens": len(ids), "unknown": int((ids == self.codec.unk).sum())}

    def save(self, folder: Path) -> None:
        self.codec.save(folder)

    def load(self, folder: Path) -> None:
        self.codec = TextCodec.load(folder)

    # -- build --------------------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> MaskedModel:
        check_room("context", self.options.context, config)
        return MaskedModel(config, self.codec.vocab_size)

    @property
    def _mask(self) -> int:
        assert self.codec.mask is not None
        return self.codec.mask

    @cached_property
    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids that stand before and behind every text: none for our own codecs, [CLS] and [SEP] for BERT's."""
        framed = np.asarray(self.codec.frame(np.array([self._mask], dtype=np.int32)))
        at = int(np.flatnonzero(framed == self._mask)[0])
        return framed[:at], framed[at + 1 :]

    @property
    def room(self) -> int:
        """Most tokens of a text that are read at once: `options.context` without the frame."""
        return self.options.context - sum(map(len, self.frame))

    @cached_property
    def is_text(self) -> np.ndarray:
        """(V,) bool: which ids stand for text; all but the special ones."""
        return np.array([bool(self.codec.token(i)) for i in range(self.codec.vocab_size)])

    # -- train --------------------------------------------------------------------------------------------------------

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Hide some tokens; ``truth`` (T,) holds those to be guessed plus one, else 0.

        Of the chosen tokens 80 % become the mask, 10 % any other token and 10 % stay, so that a token that is seen says
        nothing about whether it is asked for (Devlin et al. 2019, section 3.1).
        """
        ids = np.asarray(example["ids"])
        starts = np.array(example["starts"]) if "starts" in example else None
        if starts is not None and "sizes" in example:
            starts[np.cumsum(example["sizes"])[:-1]] = 1  # a word that a cut has left does not reach into the next text
        chosen = self._choose(ids, starts, rng)
        plain = np.flatnonzero(self.is_text)
        how, other = rng.random(len(ids)), plain[rng.integers(len(plain), size=len(ids))]
        seen = np.where(how < 0.8, self._mask, np.where(how < 0.9, other, ids))
        found = {"ids": np.where(chosen, seen, ids).astype(np.int32), "truth": np.where(chosen, ids + 1, 0)}
        return found | {key: example[key] for key in ("sizes",) if key in example}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row a text: bundles are taken apart."""
        return base.pad([piece for example in examples for piece in unbundle(example)])

    def _choose(self, ids: np.ndarray, starts: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        """(T,) bool: the share `options.masked` of the tokens that stand for text, whole words where `starts` says."""
        open_ = self.is_text[ids]
        group = np.arange(len(ids)) if starts is None else np.cumsum(starts) - 1 + (1 - int(starts[0]))
        sizes = np.bincount(group, weights=open_)
        order = np.argsort(rng.random(len(sizes)), kind="stable")
        order = order[sizes[order] > 0]
        # Rounded at random, so that short texts too have this share hidden on average; but never nothing.
        wanted = max(1, int(open_.sum() * self.options.masked + rng.random()))
        filled = np.cumsum(sizes[order])
        taken = order[(filled - sizes[order] / 2 <= wanted) & (filled - sizes[order] < wanted)]
        if not len(taken):
            taken = order[:1]
        return np.isin(group, taken) & open_

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Cross-entropy of the tokens to be guessed; logits are made for them alone."""
        truth_BT = batch["truth"].long()
        x_BTD = self._read(model, batch["ids"].long(), batch["ids_lengths"])[0]
        asked_BT = truth_BT > 0
        logits_NV = model.head(x_BTD[asked_BT]).float()  # type: ignore[operator]
        return Loss(F.cross_entropy(logits_NV, truth_BT[asked_BT] - 1, reduction="sum"), int(asked_BT.sum()))

    def _read(self, model: nn.Module, ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk's vectors at the texts' own positions (B, T, D); and with the frame's, (B, L + T + R, D), and which
        of those are real, (B, L + T + R)."""
        before, behind = (torch.from_numpy(side).to(ids_BT) for side in self.frame)
        (B, T), left, right = ids_BT.shape, len(before), len(behind)
        place_T = torch.arange(left + T + right, device=ids_BT.device)
        real_BT = place_T < lengths_B[:, None] + left + right
        if left + right:
            framed_BT = F.pad(ids_BT, (left, right))
            framed_BT[:, :left] = before
            for i, token in enumerate(behind):
                framed_BT[torch.arange(B, device=ids_BT.device), lengths_B + left + i] = token
            ids_BT = framed_BT.masked_fill(~real_BT, self.codec.pad)
        x_BTD = model(ids_BT, real_BT)
        return x_BTD[:, left : left + T], x_BTD, real_BT

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """With ``ask["evaluate"]``: how well the hidden tokens of each piece are guessed. Else ``{"fillings": [for each
        mask, likeliest first: {"text", "score"}]}``; ``ask["top_k"]`` says how many, 5 unless told, 100 at most.
        Several masks are filled each by itself."""
        if ask.get("evaluate"):
            return self._guess(model, batch)
        most = min(int(ask.get("top_k") or FILLINGS), MOST_FILLINGS)
        lengths = batch["ids_lengths"].tolist()
        rows = [self._around(row[:n]) for row, n in zip(batch["ids"].long(), lengths, strict=True)]
        lengths_B = torch.tensor([len(row) for row in rows], device=batch["ids"].device)
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        x_BTD = self._read(model, ids_BT, lengths_B)[0]
        answers: list[Answer] = []
        for i, row in enumerate(rows):
            logits_NV = model.head(x_BTD[i, : len(row)][row == self._mask]).double()  # type: ignore[operator]
            answers.append({"fillings": [self._fillings(likely_V, most) for likely_V in logits_NV.softmax(-1)]})
        return answers

    def _around(self, ids_T: Tensor) -> Tensor:
        """As much of a text as is read at once, with its masks in the middle."""
        if len(ids_T) <= self.room:
            return ids_T
        masks = (ids_T == self._mask).nonzero().flatten().tolist() or [0]
        start = (masks[0] + masks[-1] + 1) // 2 - self.room // 2
        start = max(0, min(start, len(ids_T) - self.room))
        return ids_T[start : start + self.room]

    def _fillings(self, likely_V: Tensor, most: int) -> list[dict[str, Any]]:
        """The likeliest tokens that are text by themselves: a special one or half a character is no filling."""
        found: list[dict[str, Any]] = []
        for likely, token in zip(*(t.tolist() for t in likely_V.topk(min(len(likely_V), 2 * most + 300))), strict=True):
            text = self.codec.token(token).decode("utf-8", "replace").strip()
            if text and "\ufffd" not in text:
                found.append({"text": text, "score": float(f"{likely:.6g}")})
            if len(found) == most:
                break
        return found

    def _guess(self, model: nn.Module, batch: Batch) -> list[Answer]:
        truth_BT, lengths = batch["truth"].long(), batch["ids_lengths"].tolist()
        ids_BT, asked_BT = batch["ids"].long(), truth_BT > 0
        row_N = asked_BT.nonzero()[:, 0]
        truth_N = truth_BT[asked_BT] - 1
        logits_NV = model.head(self._read(model, ids_BT, batch["ids_lengths"])[0][asked_BT]).float()  # type: ignore[operator]
        loss_N = F.cross_entropy(logits_NV, truth_N, reduction="none")
        best_NK = logits_NV.topk(min(5, logits_NV.shape[1])).indices
        hit_NK = best_NK == truth_N[:, None]
        answers: list[Answer] = []
        for i, length in enumerate(lengths):
            own = row_N == i
            first, ids = best_NK[own, 0].tolist(), ids_BT[i, :length].tolist()
            truth = truth_BT[i, :length].tolist()
            answers.append({
                "tokens": int(own.sum()), "loss": float(loss_N[own].sum()), "right": int(hit_NK[own, 0].sum()),
                "near": int(hit_NK[own].sum()), **self._told(ids, truth, first),
            })  # fmt: skip
        return answers

    def _told(self, ids: list[int], truth: list[int], first: list[int]) -> dict[str, str]:
        """A piece as it was read, and with the guesses: ``[right]``, or ``[wrong≠truth]``."""
        read, told, guesses = list[bytes](), list[bytes](), iter(first)
        for token, real in zip(ids, truth, strict=True):
            read.append("▢".encode() if token == self._mask else self.codec.token(token))
            if real:
                guess = next(guesses)
                wrong = "" if guess == real - 1 else f"≠{self._spell(real - 1)}"
                told.append(f"[{self._spell(guess)}{wrong}]".encode())
            else:
                told.append(self.codec.token(token))
        return {"read": b"".join(read).decode("utf-8", "replace"), "told": b"".join(told).decode("utf-8", "replace")}

    def _spell(self, token: int) -> str:
        return self.codec.token(token).decode("utf-8", "replace") or "�"

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Over all hidden tokens: loss in nats, its exponent (perplexity), and the shares where the first guess, or one
        of the first five, is right.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        tokens, loss, right, near = (
            metrics.total(np.array([a[key] for a in answers]), weights)
            for key in ("tokens", "loss", "right", "near")
        )
        tokens = np.maximum(tokens, 1)
        return {
            "loss": loss / tokens,
            "perplexity": np.exp(np.minimum(loss / tokens, 700.0)),
            "accuracy": right / tokens,
            "top5_accuracy": near / tokens,
        }

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        chosen = sorted({int(i) for i in np.linspace(0, len(answers) - 1, SAMPLES)})
        return {"samples": [{"prompt": answers[i]["read"] + "\n", "text": answers[i]["told"]} for i in chosen]}

    # -- serve --------------------------------------------------------------------------------------------------------

    def request(self, body: Any) -> dict[str, Any]:
        """A text with one mask or several."""
        row = {"text": body} if isinstance(body, str) else dict(body)
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            return row  # said where the columns are checked
        masks = np.flatnonzero(self.encode({"text": text})["ids"] == self._mask)
        if not MARK.search(text):
            raise UserError(tr("this text has no mask; write <mask> (or [MASK]) where a word is to be filled in",
                               "文本中没有遮盖标记；请在要填写的位置写 <mask>（或 [MASK]）"))
        span = int(masks[-1] - masks[0]) + 1
        if span > self.room:
            raise UserError(tr(f"from the first mask to the last there are {span} tokens; this model reads {self.room} "
                               "at once. Send the masks one by one",
                               f"首尾两个遮盖标记之间有 {span} 个词元，而这个模型一次只读 {self.room} 个。请分开发送"))
        return row

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        """The beginning of a text with a word in its middle hidden."""
        text = self._text(row)
        ids, spans = (part[:TRY] for part in self.codec.spans(text))
        if not len(ids):
            return {"text": "<mask>"}
        plain = [i for i, token in enumerate(ids) if self._spell(token).strip().isalpha()] or [len(ids) // 2]
        start, end = spans[min(plain, key=lambda i: abs(i - len(ids) // 2))]
        return {"text": text[:start] + "<mask>" + text[end : spans[-1, 1]]}

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of the trunk's vectors over all positions, scaled to length 1: (B, D). A text longer than the
        context is read in pieces, end to end; the mean is over all of them."""
        ids_BT, lengths_B = batch["ids"].long(), batch["ids_lengths"]
        totals, counts = [], []
        for start in range(0, max(1, ids_BT.shape[1]), self.room):
            rows = (lengths_B > start).nonzero().flatten()
            left_N = (lengths_B[rows] - start).clamp(max=self.room)
            _, x_NTD, real_NT = self._read(model, ids_BT[rows, start : start + int(left_N.max())], left_N)
            total_ND = (x_NTD.float() * real_NT[..., None]).sum(1)
            totals.append(total_ND.new_zeros(len(ids_BT), total_ND.shape[1]).index_copy(0, rows, total_ND))
            counts.append(total_ND.new_zeros(len(ids_BT)).index_copy(0, rows, real_NT.sum(1).to(total_ND.dtype)))
        total_BD, count_B1 = torch.stack(totals).sum(0), torch.stack(counts).sum(0)[:, None]
        return F.normalize(total_BD / count_B1, dim=-1)


class Hidden(Sequence[Example]):
    """Pieces with some of their tokens hidden, the same ones every time: the noise is drawn from the tokens."""

    def __init__(self, task: FillMask, pieces: Pieces) -> None:
        self.task, self.pieces, self.lengths = task, pieces, pieces.lengths

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: Any) -> Example:  # type: ignore[override]  # slices are not served
        example = self.pieces[i]
        seed = zlib.crc32(np.ascontiguousarray(example["ids"], dtype="<i4").tobytes())
        return self.task.augment(example, np.random.default_rng([self.task.seed, seed]))
