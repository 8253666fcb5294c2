"""question-answering: find the answer to a question in a passage, word by word as it stands there, or say it has none.

Question and passage are read together; each token of the passage gets a score as the first and as the last of the
answer (Devlin et al. 2019, "BERT", section 4.2), the first position one as "no answer" (section 4.3). A long passage is
read in overlapping windows whose scores share one softmax, so that windows can be compared (Clark & Gardner 2018,
"Simple and Effective Multi-Paragraph Reading Comprehension", section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec import words
from multihead.codec.text import TextCodec
from multihead.data.rows import Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics import answers as metrics
from multihead.metrics.text import mean
from multihead.task import Answer, Batch, Example, Loss, Task, check_room, pad
from multihead.tasks.language import _passages as passages
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk

NONE, UNKNOWN = -1, -2  # in place of an answer's tokens: the passage has none; it has one that is not to be found
AT_ONCE = 32  # windows read together when answering: a document of a thousand windows needs no more memory than these
MISTAKES = 30
FAR = -1e30


class Reader(nn.Module):
    """Windows of question and passage → (N, L, 2) scores of each position as an answer's first and last token.

    Args:
        overlap: learn what it means that a token of the passage stands in the question too.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, overlap: bool) -> None:
        super().__init__()
        self.segments = config.segments > 0
        self.input = TokenInput(config, vocab_size)
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.d_model, 2)
        # 0: no token of the passage; 1 …: one whose run of shared tokens is 0 … LONGEST long.
        self.overlap = nn.Embedding(passages.LONGEST + 2, config.d_model) if overlap else None
        nn.init.normal_(self.head.weight, std=config.d_model**-0.5)
        nn.init.zeros_(self.head.bias)
        if self.overlap is not None:
            nn.init.zeros_(self.overlap.weight)

    def forward(self, ids_NL: Tensor, lengths_N: Tensor, segments_NL: Tensor, overlap_NL: Tensor) -> Tensor:
        real_NL = torch.arange(ids_NL.shape[1], device=ids_NL.device) < lengths_N[:, None]
        x_NLD = self.input(ids_NL, segments_BT=segments_NL if self.segments else None)
        if self.overlap is not None:
            x_NLD = x_NLD + self.overlap(overlap_NL)
        # No mask where nothing is padded, which is faster and, for one window alone, always so.
        return self.head(self.trunk(x_NLD, mask=None if bool(real_NL.all()) else real_NL)).float()


class QuestionAnswering(Task):
    """The span of a passage that answers a question."""

    field = "language"
    title = ("answer a question from a passage, in the passage's own words", "从段落中找出问题的答案（抽取原文）")
    columns = (
        Column("question", "text", names=("query", "问题", "提问")),
        Column("context", "text", names=("passage", "paragraph", "article", "document", "text", "段落", "文章", "原文",
                                         "正文")),
        Column("answers", "answers", names=("answer", "答案", "回答"), target=True),
        Column("answer_start", "number", names=("start", "答案位置"), required=False, target=True),
    )
    metric = ("f1", "max")
    asks: ClassVar[tuple[str, ...]] = ("threshold",)
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Several questions share a passage: dealt at random, passages that are tested on would be trained on.
        "data": {"split": {"valid": 0.1, "test": 0.1, "by": "group", "group": "context"}},
        "model": {
            "d_model": 128, "num_layers": 4, "num_heads": 4, "norm": "layernorm", "activation": "relu2",
            "ngrams": [2, 3], "ngram_buckets": 32768, "max_length": 512,
        },
        "train": {"steps": 1500, "batch_size": 16},
    }

    class Options(base.Options):
        tokenizer: Literal["char", "bpe"] = "char"
        """char: one token a character, right for Chinese. bpe: pieces of words, for languages with an alphabet.
        char：每个字符一个词元，适合中文；bpe：词的片段，适合拼音文字。"""
        vocab_size: int = Field(8000, ge=260)
        """Most tokens; rarer characters count as unknown.
        词元数上限；更罕见的字符视为未知。"""
        max_tokens: int = Field(256, ge=16)
        """Tokens of one window: the question and a part of the passage.
        一个窗口的词元数：问题加上段落的一部分。"""
        stride: int = Field(128, ge=1)
        """Tokens from the beginning of one window to that of the next.
        相邻窗口起点之间的词元数。"""
        max_question: int = Field(64, ge=1)
        """Of a longer question the first tokens are read.
        更长的问题只读前面的词元。"""
        max_answer: int = Field(30, ge=1)
        """Most tokens of an answer.
        答案最多的词元数。"""
        other_windows: float = Field(1.0, ge=0)
        """In training a passage is read through one window with the answer and, on average, so many others.
        训练时每个段落读一个含答案的窗口，另外平均再读这么多个其他窗口。"""
        hidden: float = Field(0.0, ge=0, lt=1)
        """Share of tokens hidden in training, so that no single word decides; for small data and models from scratch.
        训练时随机遮住的词元比例，使结果不依赖单个词；适合小数据和从头训练的模型。"""
        overlap: bool = True
        """Tell the model which tokens of the passage stand in the question; a small model gains much by it.
        告诉模型段落中哪些词元也出现在问题里；小模型由此获益很大。"""
        simplify: bool = False
        """Read traditional Chinese as simplified; answers stay as the passage writes them (needs OpenCC).
        把繁体字当作简体来读；答案仍按原文给出（需要 OpenCC）。"""
        no_answer: bool = False
        """Some questions have no answer in their passage (as in SQuAD 2.0).
        有些问题在段落中没有答案（如 SQuAD 2.0）。"""
        threshold: float = 0.0
        """With `no_answer`: by how much the log odds must speak for none, before none is given.
        no_answer 时，“无答案”的对数优势超过多少才回答没有。"""
        metric: Literal["auto", "squad", "cmrc"] = "auto"
        """Whose rules count exact match and F1. auto: cmrc where the answers are Chinese, else squad.
        按谁的规则计算完全匹配率和 F1。auto：答案为中文时用 cmrc，否则用 squad。"""

    codec: TextCodec

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        origin = self.origin
        self.codec = origin.codec() if origin else TextCodec.fit(
            self._texts(rows), self.options.tokenizer, self.options.vocab_size)

    def _texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Questions, and each passage once for all questions that follow on it."""
        last = ""
        for row in rows:
            if row["context"] != last:
                last = row["context"]
                yield self._read(last)
            yield self._read(row["question"])

    def _read(self, text: str) -> str:
        return words.simplifier()(text) if self.options.simplify else text

    def check(self, row: dict[str, Any], part: str) -> None:
        """A row to learn from has an answer that stands in its passage; to be measured on, the texts are enough."""
        if part != "train":
            return
        given = row["answers"]
        if not given and not self.options.no_answer:
            raise UserError(tr("this question has no answer; options.no_answer=true learns to say so",
                               "这个问题没有答案；设置 options.no_answer=true 可以学会回答“没有”"))
        if given and self._place(row) is None:
            text, start = given[0]["text"], _starts(row)[0]
            shown = text if len(text) <= 40 else text[:40] + "…"
            size = len(row["context"])
            beyond = start is not None and not 0 <= start < size
            raise UserError(tr(
                f"the answer “{shown}” does not stand in its passage"
                + (f", and answer_start {start} lies beyond its {size} characters" if beyond else "")
                + "; answers are copied from the passage letter by letter",
                f"段落中没有答案“{shown}”" + (f"，answer_start {start} 也超出了段落的 {size} 个字符" if beyond else "")
                + "；答案必须与段落原文逐字一致"))

    def _place(self, row: dict[str, Any]) -> tuple[int, int] | None:
        """Characters of the first answer that stands in the passage: (first, behind the last)."""
        for answer, start in zip(row["answers"], _starts(row), strict=True):
            for text in (answer["text"], answer["text"].strip()):
                found = passages.locate(row["context"], text, start)
                if found is not None:
                    return found, found + len(text)
        return None

    def encode(self, row: dict[str, Any]) -> Example:
        """question (Q,), context (T,), their tokens; spans (T, 2) and text (C,): the passage's characters, and which of
        them each token is; overlap (T,); windows (W,), where each begins; target (2,): the answer's first and last
        token, or NONE, or UNKNOWN."""
        context, options = self._read(row["context"]), self.options
        asked, asked_spans = self.codec.spans(question := self._read(row["question"]))
        asked, asked_spans = asked[: options.max_question], asked_spans[: options.max_question]
        ids, spans = self.codec.spans(context)
        if not len(ids):
            raise UserError(tr("the passage holds no token that can be read", "段落中没有可读的词元"))
        words = [[text[a:b].lower() for a, b in where.tolist()]
                 for text, where in ((context, spans), (question, asked_spans))]
        example = {
            "question": asked, "context": ids, "spans": spans,
            "text": np.frombuffer(row["context"].encode("utf-32-le"), dtype="<i4"),
            "overlap": passages.shared_runs(*words),
            "windows": passages.window_starts(len(ids), self._room(asked), options.stride),
        }
        if row.get("answers") is not None:
            example["target"] = self._target(row, spans)
        return example

    def _room(self, asked: np.ndarray) -> int:
        """Tokens of the passage that a window holds beside the question."""
        room = self.options.max_tokens - len(self.codec.frame_pair(asked, asked[:0])[0])
        if room < 1:
            raise UserError(tr(f"options.max_tokens {self.options.max_tokens} leaves no room for the passage beside a "
                               f"question of {len(asked)} tokens; raise it, or lower options.max_question",
                               f"options.max_tokens 是 {self.options.max_tokens}，除去 {len(asked)} 个词元的问题后"
                               "放不下段落；请调大它，或调小 options.max_question"))
        return room

    def _target(self, row: dict[str, Any], spans: np.ndarray) -> np.ndarray:
        if not row["answers"]:
            return np.array([NONE, NONE], dtype=np.int32)
        place = self._place(row)
        tokens = passages.tokens_of(spans, *place) if place else None
        return np.array(tokens or (UNKNOWN, UNKNOWN), dtype=np.int32)

    def describe(self, store: Store) -> dict[str, Any]:
        first = store.stream("target")[::2] if "target" in store.keys else np.zeros(0, dtype=np.int32)
        return {"windows": int(store.lengths("windows").sum()), "no_answer": int((first == NONE).sum()),
                "not_in_passage": int((first == UNKNOWN).sum())}

    def save(self, folder: Path) -> None:
        self.codec.save(folder)

    def load(self, folder: Path) -> None:
        self.codec = TextCodec.load(folder)

    # -- build, train -------------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> Reader:
        check_room("max_tokens", self.options.max_tokens, config)
        return Reader(config, self.codec.vocab_size, self.options.overlap)

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("context")

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Hide tokens; of a passage of several windows, one around the answer, cut anywhere, and some without it."""
        if self.options.hidden:
            mask = self.codec.unk if self.codec.mask is None else self.codec.mask
            hide = {key: rng.random(len(example[key])) < self.options.hidden for key in ("question", "context")}
            example = example | {key: np.where(hide[key], mask, example[key]).astype(np.int32) for key in hide}
        starts, length = example["windows"], len(example["context"])
        if len(starts) == 1:
            return example
        first, last = example["target"].tolist()
        room, others = self._room(example["question"]), self.options.other_windows
        low, high = max(0, last - room + 1), min(first, length - room)
        without = rng.permutation(starts[(starts > last) | (starts + room <= first)] if first >= 0 else starts)
        count = int(others) + (rng.random() < others % 1) + (first < 0)
        chosen = list(without[:count])
        if first >= 0:
            # An answer longer than a window is read through the windows of its two ends.
            chosen += [rng.integers(low, high + 1)] if low <= high else [high, low]
        return {**example, "windows": np.array(sorted(map(int, chosen)), dtype=starts.dtype)}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """ids, segments, overlap (B, W, L); lengths (B, W), 0 where a passage has fewer windows; begin, at (B, W): the
        first passage token of a window within the passage and within the window; and what answering needs."""
        made = [self._windows(example) for example in examples]
        W, L = max(len(windows) for windows in made), max(len(ids) for windows in made for ids, *_ in windows)
        ids_BWL = np.full((len(made), W, L), self.codec.pad, dtype=np.int32)
        segments_BWL, overlap_BWL = np.zeros_like(ids_BWL), np.zeros_like(ids_BWL)
        lengths_BW, begin_BW, at_BW = (np.zeros((len(made), W), dtype=np.int64) for _ in range(3))
        for b, windows in enumerate(made):
            for w, (ids, segments, overlap, begin, at) in enumerate(windows):
                ids_BWL[b, w, : len(ids)], segments_BWL[b, w, : len(ids)] = ids, segments
                overlap_BWL[b, w, : len(ids)] = overlap
                lengths_BW[b, w], begin_BW[b, w], at_BW[b, w] = len(ids), begin, at
        arrays = {"ids": ids_BWL, "segments": segments_BWL, "overlap": overlap_BWL, "lengths": lengths_BW,
                  "begin": begin_BW, "at": at_BW}
        keys = [key for key in ("spans", "text", "target") if key in examples[0]]
        rest = pad([{key: example[key] for key in keys} for example in examples])
        return {**{key: torch.from_numpy(value) for key, value in arrays.items()}, **rest}

    def _windows(self, example: Example) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int, int]]:
        """Of each window: ids, segments and overlap levels (L,), and its first token of the passage: where in the
        passage, and where in the window."""
        asked, room = example["question"], self._room(example["question"])
        at = len(self.codec.frame_pair(asked, asked[:0])[0]) - 1  # before the mark that ends the passage
        found = []
        for begin in example["windows"].tolist():
            part = slice(begin, begin + room)
            ids, segments = self.codec.frame_pair(asked, example["context"][part])
            overlap = np.zeros(len(ids), dtype=np.int32)
            overlap[at : len(ids) - 1] = example["overlap"][part].astype(np.int32) + 1
            found.append((np.asarray(ids), np.asarray(segments), overlap, begin, at))
        return found

    def _scores(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log probabilities over all windows of a question, of its first and its last token: two (B, W, L)."""
        lengths_BW, ids_BWL = batch["lengths"], batch["ids"]
        real_N = torch.nonzero(lengths_BW.flatten() > 0).squeeze(1)
        parts = [
            model(ids_BWL.flatten(0, 1)[n].long(), lengths_BW.flatten()[n],
                  batch["segments"].flatten(0, 1)[n].long(), batch["overlap"].flatten(0, 1)[n].long())
            for n in (real_N.split(AT_ONCE) if not torch.is_grad_enabled() else [real_N])
        ]
        logits_NL2 = torch.cat(parts)
        full = logits_NL2.new_full((lengths_BW.numel(), *logits_NL2.shape[1:]), FAR).index_copy(0, real_N, logits_NL2)
        scores_BWL2 = full.view(*ids_BWL.shape, 2).masked_fill(~self._allowed(batch)[..., None], FAR)
        both_BX2 = scores_BWL2.flatten(1, 2).log_softmax(1).view_as(scores_BWL2)
        return both_BX2[..., 0], both_BX2[..., 1]

    def _allowed(self, batch: Batch) -> Tensor:
        """(B, W, L) bool: tokens of the passage, and the first position where a question may have no answer."""
        place_L = torch.arange(batch["ids"].shape[2], device=batch["ids"].device)
        lengths_BW1, at_BW1 = batch["lengths"][..., None], batch["at"][..., None]
        allowed = (place_L >= at_BW1) & (place_L < lengths_BW1 - 1)
        return allowed | ((place_L == 0) & (lengths_BW1 > 0)) if self.options.no_answer else allowed

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """−ln of what first and last token of the answer are given, wherever among the windows they stand."""
        first_BWL, last_BWL = self._scores(model, batch)
        target_B2 = batch["target"].long()
        place_L = torch.arange(first_BWL.shape[2], device=first_BWL.device)
        inside_BWL = (place_L >= batch["at"][..., None]) & (place_L < batch["lengths"][..., None] - 1)
        token_BWL = place_L - batch["at"][..., None] + batch["begin"][..., None]
        is_first, is_last = ((token_BWL == target_B2[:, i, None, None]) & inside_BWL for i in (0, 1))
        # A window that holds but half the answer counts only where no window holds all of it.
        whole_BW1 = is_first.any(2, keepdim=True) & is_last.any(2, keepdim=True)
        some_B11 = whole_BW1.any(1, keepdim=True)
        none_BWL = ((place_L == 0) & (batch["lengths"][..., None] > 0)) & (target_B2[:, 0, None, None] == NONE)
        known_B = target_B2[:, 0] != UNKNOWN
        total = first_BWL.new_zeros(())
        for scores_BWL, is_it in ((first_BWL, is_first), (last_BWL, is_last)):
            right_BWL = (is_it & (whole_BW1 | ~some_B11)) | none_BWL
            told_B = scores_BWL.masked_fill(~right_BWL, FAR).flatten(1).logsumexp(1)
            total = total - torch.where(known_B, told_B, 0.0).sum() / 2
        return Loss(total, int(known_B.sum()))

    # -- answer, evaluate ---------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"answer", "score", "start", "end"}``: text, probability, and its characters in the passage.

        With `no_answer` also ``none``, the log odds of no answer against the best one; where they lie above
        ``ask["threshold"]``, default ``options.threshold``, answer, start and end are null. ``best`` is what else would
        have been answered.
        """
        first_BWL, last_BWL = self._scores(model, batch)
        allowed = self._allowed(batch)
        none_B = None
        if self.options.no_answer:
            none_B = (first_BWL[..., 0].logsumexp(1) + last_BWL[..., 0].logsumexp(1)).double().tolist()
            first_BWL, last_BWL = (x.clone().index_fill_(2, torch.tensor([0], device=x.device), FAR)
                                   for x in (first_BWL, last_BWL))
            allowed[..., 0] = False
        best_BWL, more_BWL = torch.full_like(first_BWL, 2 * FAR), torch.zeros_like(batch["ids"])
        for more in range(min(self.options.max_answer, first_BWL.shape[2])):
            size = first_BWL.shape[2] - more
            score = first_BWL[..., :size] + last_BWL[..., more:]
            better = (score > best_BWL[..., :size]) & allowed[..., more:]
            best_BWL[..., :size] = torch.where(better, score, best_BWL[..., :size])
            more_BWL[..., :size] = torch.where(better, more, more_BWL[..., :size])
        value_B, place_B = best_BWL.flatten(1).max(1)
        answers: list[Answer] = []
        for b, (value, place) in enumerate(zip(value_B.double().tolist(), place_B.tolist(), strict=True)):
            w, i = divmod(place, first_BWL.shape[2])
            token = int(batch["begin"][b, w]) + i - int(batch["at"][b, w])
            spans = batch["spans"][b].tolist()
            start, end = spans[token][0], spans[token + int(more_BWL[b, w, i])][1]
            answers.append(_answer(batch["text"][b], start, end, value))
            if none_B is not None:
                limit = ask.get("threshold", self.options.threshold)
                answers[-1] = _or_none(answers[-1], none_B[b], value, limit)
        return answers

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Exact match and F1; with `no_answer` also F1 at the threshold that is best for it, and that threshold.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        truths, rules = self._truths(rows)
        exact, f1 = metrics.each([a["answer"] or "" for a in answers], truths, rules)
        found = {"f1": mean(f1, weights), "exact_match": mean(exact, weights)}
        if self.options.no_answer:
            _, given = metrics.each([a["best"] for a in answers], truths, rules)
            silent = np.array([float(not true) for true in truths])
            none = np.array([a["none"] for a in answers])
            found["best_f1"], found["best_threshold"] = metrics.best_threshold(none, given, silent, weights)
        return found

    def _truths(self, rows: Sequence[dict[str, Any]]) -> tuple[list[list[str]], metrics.Rules]:
        truths = [[answer["text"] for answer in row["answers"]] for row in rows]
        return truths, metrics.rules_for(truths) if self.options.metric == "auto" else self.options.metric

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The surest mistakes: no word in common with a true answer."""
        truths, rules = self._truths(rows)
        _, f1 = metrics.each([a["answer"] or "" for a in answers], truths, rules)
        wrong = [i for i in np.argsort([-a["score"] for a in answers], kind="stable").tolist() if f1[i] == 0]
        nothing = tr("no answer", "没有答案")
        return {"mistakes": [
            {"text": rows[i]["question"], "truth": " / ".join(dict.fromkeys(truths[i])) or nothing,
             "answer": answers[i]["answer"] or nothing, "score": answers[i]["score"],
             "where": getattr(rows[i], "where", "")}
            for i in wrong[:MISTAKES]]}


def _starts(row: dict[str, Any]) -> list[int | None]:
    """Where each answer is said to begin: its own answer_start, or the row's for the first."""
    given: list[int | None] = [answer.get("answer_start") for answer in row["answers"]]
    if given and given[0] is None and row.get("answer_start") is not None:
        given[0] = int(row["answer_start"])
    return given


def _answer(text: Tensor, start: int, end: int, value: float) -> Answer:
    """The characters `start` … `end` − 1 of a passage without the blanks around them."""
    found = "".join(map(chr, text[start:end].tolist()))
    start += len(found) - len(found.lstrip())
    found = found.strip()
    return {"answer": found, "score": _rounded(float(np.exp(value))), "start": start, "end": start + len(found)}


def _or_none(answer: Answer, none: float, value: float, threshold: float) -> Answer:
    said = {**answer, "none": _rounded(none - value), "best": answer["answer"]}
    if none - value > threshold:
        said |= {"answer": None, "start": None, "end": None, "score": _rounded(float(np.exp(none)))}
    return said


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
