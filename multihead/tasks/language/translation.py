"""translation: from sentences in one language to sentences in another, learned from pairs.

An encoder–decoder Transformer (Vaswani et al. 2017) over word pieces or characters, with label smoothing, and beam
search for the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from multihead import task as base
from multihead.codec.text import TextCodec
from multihead.data.rows import Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.generation.beam import Hypothesis, beam_search
from multihead.generation.fast import prepared
from multihead.generation.seq2seq import EncoderDecoder
from multihead.metrics.translation import TranslationScores, sacrebleu
from multihead.task import Answer, Batch, Example, Loss, Task, check_room
from multihead.transformer.config import TransformerConfig
from multihead.transformer.losses import vocabulary_loss

SAMPLES = 20
ROOM = 10  # a translation may be one and a half times as long as its source, and so many tokens longer
MOST_BEAMS = 32


class Translation(Task):
    """Source text → target text."""

    field = "language"
    title = ("translate: learn from pairs of sentences", "翻译：从成对的句子学习")
    columns = (
        Column("source", "text", names=("src", "en", "eng", "english", "input", "原文", "源文", "源语言", "英文")),
        Column("target", "text", names=("tgt", "translation", "de", "zh", "cmn", "chinese", "german", "fr", "es", "ja",
                                        "output", "译文", "目标", "目标语言", "中文"), target=True),
    )  # fmt: skip
    # Not the loss: it turns up again long before the translations get worse.
    metric = ("bleu", "max")
    unit = "tokens"
    asks = ("beam", "length_penalty", "max_tokens")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # A sentence with two translations is two examples, not a copy; it never lies in two parts.
        "data": {"deduplicate": False},
        "model": {
            "d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 512, "norm": "layernorm", "activation": "relu",
            "positions": "sinusoidal", "bias": True, "dropout": 0.2,
        },
        "train": {"steps": 4000, "batch_size": 128, "optimizer": "muon", "lr": 0.002, "ema": 0.995},
    }  # fmt: skip

    class Options(base.Options):
        tokenizer: Literal["bpe", "char"] = "bpe"
        """bpe: pieces of words, any language, nothing is unknown. char: one token a character.
        bpe：词的片段，适合任何语言，没有未知字符；char：每个字符一个词元。"""
        target_tokenizer: Literal["bpe", "char"] | None = None
        """The same for the target; null: as the source. Needs shared_vocabulary: false where it differs.
        目标语言的切分方式；null 表示与源语言相同；若不同，须设 shared_vocabulary: false。"""
        vocab_size: int = Field(6000, ge=260)
        """Size of a vocabulary.
        词表大小。"""
        shared_vocabulary: bool = True
        """One vocabulary for both languages, for those that share an alphabet; else one for each.
        两种语言共用一个词表，适合字母相同的语言；否则各用一个。"""
        max_tokens: int = Field(256, ge=2)
        """Longest sentence in tokens, on either side; longer ones are refused.
        句子最长的词元数（两边相同）；更长的不接受。"""
        label_smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of certainty taken from the true word.
        从正确的词上拿走的确定性比例。"""
        beam: int = Field(5, ge=1, le=MOST_BEAMS)
        """Sentences kept in the search for a translation; 1 takes the likeliest word each time.
        搜索译文时保留的句子数；1 表示每次取最可能的词。"""
        length_penalty: float = Field(1.0, ge=-5, le=5)
        """A translation of n tokens is worth log P / n to this power: higher gives longer ones.
        n 个词元的译文得分为 log P / n 的此次方：越大译文越长。"""

    codec: TextCodec
    target_codec: TextCodec
    _packed: tuple[EncoderDecoder, int, EncoderDecoder] | None = None

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        sacrebleu()  # told of now, not at the first evaluation
        options = self.options
        kinds = (options.tokenizer, options.target_tokenizer or options.tokenizer)
        if options.shared_vocabulary and kinds[0] != kinds[1]:
            raise UserError(tr(
                f"options.tokenizer is {kinds[0]} and options.target_tokenizer {kinds[1]}: set "
                "options.shared_vocabulary: false",
                f"options.tokenizer 是 {kinds[0]}，options.target_tokenizer 是 {kinds[1]}：请设置 "
                "options.shared_vocabulary: false",
            ))
        if self.origin is not None:
            self.codec = self._taken(self.origin)
        elif options.shared_vocabulary:
            self.codec = TextCodec.fit(_Both(rows), kinds[0], options.vocab_size)
        else:
            self.codec = TextCodec.fit((row["source"] for row in rows), kinds[0], options.vocab_size)
        if options.shared_vocabulary:
            self.target_codec = self.codec
        else:
            self.target_codec = TextCodec.fit((row["target"] for row in rows), kinds[1], options.vocab_size)

    def _taken(self, origin: Any) -> TextCodec:
        """The codec of the weights that the reading side starts from."""
        codec: TextCodec = origin.codec()
        if codec.pad != 0:
            raise UserError(tr(
                f"its token for padding has the number {codec.pad}; a translation model starts only from weights where "
                "it is 0, such as BERT's or those of fill-mask",
                f"其填充词元的编号是 {codec.pad}；翻译模型只能从填充编号为 0 的权重开始，例如 BERT 或 fill-mask 的权重",
            ), str(origin.path))
        return codec

    def encode(self, row: dict[str, Any]) -> Example:
        """``ids``: the source and <eos>; ``target``: <bos>, the target, <eos>."""
        source = self.codec.frame(self.codec.encode(row["source"])).tolist()
        if source[-1:] != [self.codec.eos]:
            source.append(self.codec.eos)
        example = {"ids": self._checked(source, "source")}
        if row.get("target") is not None:
            target = [self.target_codec.bos, *self.target_codec.encode(row["target"]).tolist(), self.target_codec.eos]
            example["target"] = self._checked(target, "target")
        return example

    def _checked(self, ids: list[int], side: str) -> np.ndarray:
        most = self.options.max_tokens
        if len(ids) > most:
            raise UserError(tr(
                f"'{side}' has {len(ids)} tokens, more than options.max_tokens, {most}: cut it into sentences, or "
                "raise options.max_tokens and train anew",
                f"“{side}”有 {len(ids)} 个词元，超过 options.max_tokens（{most}）：请拆成句子，"
                "或调大 options.max_tokens 后重新训练",
            ))
        return np.array(ids, dtype=np.int32)

    def describe(self, store: Store) -> dict[str, Any]:
        return {"source_tokens": int(store.lengths("ids").sum()), "target_tokens": int(store.lengths("target").sum())}

    def save(self, folder: Path) -> None:
        self.codec.save(folder / "source")
        if not self.options.shared_vocabulary:
            self.target_codec.save(folder / "target")

    def load(self, folder: Path) -> None:
        self.codec = TextCodec.load(folder / "source")
        shared = self.options.shared_vocabulary
        self.target_codec = self.codec if shared else TextCodec.load(folder / "target")

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> EncoderDecoder:
        check_room("max_tokens", self.options.max_tokens, config)
        target = self.target_codec
        return EncoderDecoder(
            config, self.codec.vocab_size, target.vocab_size, pad=target.pad, bos=target.bos, eos=target.eos,
            shared=self.options.shared_vocabulary,
        )  # fmt: skip

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("ids") + store.lengths("target")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, EncoderDecoder)
        target_BT = batch["target"].long()
        x_BTD = model.states(batch["ids"].long(), target_BT[:, :-1])
        wanted_BT = target_BT[:, 1:]
        real_BT = wanted_BT != model.pad
        wanted_N = wanted_BT[real_BT]
        total = vocabulary_loss(x_BTD[real_BT], model.head.linear.weight, wanted_N, self.options.label_smoothing)
        return Loss(total, len(wanted_N))

    # -- evaluate and serve -------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"text", "score", "tokens", "finish_reason"}``; `ask` may hold `beam`, `length_penalty` and `max_tokens`.

        With ``ask["evaluate"]`` also how well the true target is foretold: ``loss`` over ``target_tokens``.
        """
        assert isinstance(model, EncoderDecoder)
        wishes = self._wishes(ask)
        ids_BT, lengths_B = batch["ids"].long(), batch["ids_lengths"]
        most = min(wishes["max_tokens"], model.max_length)
        limits = [min(most, n + n // 2 + ROOM) for n in lengths_B.tolist()]
        inputs = {"ids": ids_BT, "lengths": lengths_B}
        with torch.autocast(ids_BT.device.type, enabled=False):  # packed weights do their own rounding
            found = beam_search(
                self._fast(model), inputs, self.target_codec.eos, wishes["beam"], wishes["length_penalty"], limits
            )
        answers = [self._answer(one[0]) for one in found]
        if ask.get("evaluate"):
            for answer, (loss, tokens) in zip(answers, self._foretell(model, batch), strict=True):
                answer |= {"loss": loss, "target_tokens": tokens}
        return answers

    def _fast(self, model: EncoderDecoder) -> EncoderDecoder:
        """The model with packed weights, kept for as long as they do not change."""
        if next(model.parameters()).dtype != torch.float32:
            return model
        # Weights made under inference_mode cannot change, and have no count of their changes.
        version = sum(0 if p.is_inference() else p._version for p in model.parameters())
        if self._packed is None or self._packed[0] is not model or self._packed[1] != version:
            self._packed = (model, version, prepared(model, "float32"))
        return self._packed[2]

    def _answer(self, best: Hypothesis) -> Answer:
        return {
            "text": self.target_codec.decode(best.ids),
            "score": round(best.score, 6),
            "tokens": len(best.ids),
            "finish_reason": "stop" if best.ended else "length",
        }

    def _wishes(self, ask: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        wishes = {"beam": options.beam, "length_penalty": options.length_penalty, "max_tokens": options.max_tokens}
        wishes |= {name: ask[name] for name in wishes if ask.get(name) is not None}
        for name, low, high in (("beam", 1, MOST_BEAMS), ("max_tokens", 1, math.inf), ("length_penalty", -5, 5)):
            value = wishes[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (name == "length_penalty" and isinstance(value, float))) or not low <= value <= high:
                upper = f" to {high}" if high < math.inf else " or more"
                raise UserError(tr(f"{name} is {value!r}; it must be a number, {low}{upper}",
                                   f"{name} 是 {value!r}，应为数字，最小 {low}，最大 {high}"))
        return wishes

    def _foretell(self, model: EncoderDecoder, batch: Batch) -> list[tuple[float, int]]:
        """Of each row the loss in nats of its true target, and that target's tokens."""
        target_BT = batch["target"].long()
        x_BTD = model.states(batch["ids"].long(), target_BT[:, :-1])
        rows = zip(x_BTD, target_BT[:, 1:], (batch["target_lengths"] - 1).tolist(), strict=True)
        weight = model.head.linear.weight
        with torch.no_grad():
            return [(float(vocabulary_loss(x_TD[:n], weight, wanted_T[:n])), n) for x_TD, wanted_T, n in rows]

    def _scores(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> TranslationScores:
        return TranslationScores([a["text"] for a in answers], [row["target"] for row in rows])

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """BLEU and chrF of the translations, and loss in nats a token of the true targets.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        loss, tokens = (np.array([a[name] for a in answers], dtype=float) for name in ("loss", "target_tokens"))
        mean = loss.sum() / tokens.sum() if weights is None else weights @ loss / (weights @ tokens)
        return {**self._scores(answers, rows).scores(weights), "loss": mean}

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Some translations beside source and reference, evenly spread, and how BLEU and chrF were counted."""
        chosen = sorted({int(i) for i in np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows)))})
        samples = [
            {"prompt": f"{rows[i]['source']}\n", "text": f"→ {answers[i]['text']}\n= {rows[i]['target']}"}
            for i in chosen
        ]
        return {"samples": samples, "signatures": self._scores(answers, rows).signatures()}


class _Both:
    """The texts of both sides, a pair at a time, so that a sample holds as much of either; may be read again."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            yield f"{row['source']} {row['target']}"
