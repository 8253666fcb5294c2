"""text-generation: learn to go on with a text, from any text files.

A decoder-only Transformer over bytes joined to words (BPE) or over characters, trained to predict the next token
(Radford et al. 2019). Files are one stream; a training example is a window of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.foreign import ForeignCodec
from multihead.codec.text import TextCodec
from multihead.data.rows import Column
from multihead.data.store import Store, Windows
from multihead.errors import UserError, tr
from multihead.generation.loop import Emitter
from multihead.task import Answer, Batch, Example, Loss, Task, check_room
from multihead.transformer.cache import Cache
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import TokenHead
from multihead.transformer.inputs import TokenInput
from multihead.transformer.losses import vocabulary_loss
from multihead.transformer.trunk import Trunk

_COLUMN = re.compile(r"\{([^{}]+)\}")


class LanguageModel(Emitter):
    """Decoder-only language model: ids (B, T) → logits (B, T, vocab_size)."""

    def __init__(self, config: TransformerConfig, vocab_size: int, tied: bool = True) -> None:
        super().__init__()
        self.config = config
        self.input = TokenInput(config, vocab_size)
        self.trunk = Trunk(config, causal=True)
        self.head = TokenHead(config.d_model, vocab_size, self.input.token if tied else None)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.states(ids_BT))

    def states(self, ids_BT: Tensor) -> Tensor:
        """What `forward` makes logits of: (B, T, D)."""
        return self.trunk(self.input(ids_BT))

    def start(self, batch: Batch) -> tuple[Cache, Tensor]:
        """Read prompts ``ids`` (B, T), right-padded, of ``lengths`` (B,): the state and the next logits (B, V)."""
        ids_BT, lengths = batch["ids"], batch["lengths"].tolist()
        cache = Cache(self.config.num_layers, [0] * len(lengths))
        x_BTD = self.trunk(self.input(ids_BT), cache=cache)
        cache.advance(lengths)
        reach = self.input.memory
        if reach:
            padded = F.pad(ids_BT, (reach, 0), value=-1)
            cache.recent_BN = torch.stack([row[n : n + reach] for row, n in zip(padded, lengths, strict=True)])
        last_B = batch["lengths"].to(x_BTD.device) - 1
        return cache, self.head(x_BTD[torch.arange(len(lengths), device=x_BTD.device), last_B])

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """One more token a row (B,): the logits of the one after it (B, V). Advances the cache by one."""
        ids_B1 = ids_B[:, None]
        positions = None
        if self.config.positions in ("learned", "sinusoidal"):
            positions = torch.tensor(cache.lengths, device=ids_B.device)[:, None]
        x_B1D = self.trunk(self.input(ids_B1, positions, cache.recent_BN), cache=cache)
        cache.advance(1)
        if cache.recent_BN is not None:
            cache.recent_BN = torch.cat((cache.recent_BN[:, 1:], ids_B1), dim=1)
        return self.head(x_B1D[:, 0])

    def extend(self, ids_BT: Tensor, cache: Cache) -> Tensor:
        """Several more tokens a row (B, T), as far as they turn out right: the logits after each (B, T, V). ``keep``
        says how many were."""
        positions = None
        if self.config.positions in ("learned", "sinusoidal"):
            positions = torch.tensor(cache.lengths, device=ids_BT.device)[:, None] + torch.arange(ids_BT.shape[1])
        return self.head(self.trunk(self.input(ids_BT, positions, cache.recent_BN), cache=cache))

    def keep(self, ids_BT: Tensor, counts: Sequence[int], cache: Cache) -> None:
        """Advance the cache by the first `counts` of the tokens that ``extend`` took in, one number a row."""
        cache.advance(counts)
        if cache.recent_BN is not None:
            reach, known = cache.recent_BN.shape[1], torch.cat((cache.recent_BN, ids_BT), dim=1)
            cache.recent_BN = torch.stack([row[n : n + reach] for row, n in zip(known, counts, strict=True)])


class TextGeneration(Task):
    """Next-token prediction over the windows of a stream of text."""

    field = "language"
    title = ("go on with a text: a language model of your own files", "续写文本：用自己的文件训练语言模型")
    columns = (Column("text", "text", names=("text", "content", "正文", "文本", "内容", "paragraphs")),)
    metric = ("loss", "min")
    unit = "tokens"
    emits = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "data": {"split": {"valid": 0.1, "test": 0.0, "by": "order"}, "deduplicate": False},
        "model": {"max_length": 256},
        "train": {"optimizer": "muon"},
    }

    class Options(base.Options):
        tokenizer: Literal["bpe", "char"] = "bpe"
        """bpe: byte-level pairs, any language, nothing is unknown. char: one token a character.
        bpe：字节级词片，适合任何语言，没有未知字符；char：每个字符一个词元。"""
        vocab_size: int = Field(8000, ge=260)
        """Size of the BPE vocabulary; with char, the characters of the training text decide.
        BPE 词表大小；char 时由训练文本的字符决定。"""
        context: int = Field(256, ge=2)
        """Tokens in one training window.
        一个训练窗口的词元数。"""
        tied: bool = True
        """Share the token embedding with the output.
        输入与输出共用词嵌入。"""
        template: str | None = None
        """How a row becomes one text, for tables with more to read than one column: "《{title}》{author}\\n{text}\\n".
        A prompt is taken as it is: "《春望》" asks for what follows such a title.
        把一行的多列拼成一段文本，例如 "《{title}》{author}\\n{text}\\n"；提示原样使用，如 "《春望》"。"""
        prompts: list[str] = Field(default_factory=list)
        """Texts that the report goes on with, to show what the model writes.
        报告中让模型续写的开头。"""

    codec: TextCodec

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        if self.origin is not None:
            self.codec = self.origin.codec()
            return
        texts = map(self._text, rows)
        self.codec = TextCodec.fit(texts, kind=self.options.tokenizer, vocab_size=self.options.vocab_size)

    def _text(self, row: dict[str, Any]) -> str:
        """A row as the text that is learned: the template filled in. A row of `text` alone is a prompt, taken as is."""
        template = self.options.template
        if template is None or not row.keys() - {"text"}:
            return row["text"]
        missing = [name for name in _COLUMN.findall(template) if name not in row]
        if missing:
            raise UserError(tr(
                f"options.template asks for {{{missing[0]}}}, which this row lacks; it has: {', '.join(row)}",
                f"options.template 需要 {{{missing[0]}}}，这一行没有；现有的列：{'、'.join(row)}"))
        return _COLUMN.sub(lambda found: str(row[found[1]]), template)

    def encode(self, row: dict[str, Any]) -> Example:
        text = self._text(row)
        ids = self.codec.encode(text)
        # <eos> (or what a foreign tokenizer begins with) stands before every document, and so between two: a model
        # learns to end one by foretelling it, as GPT-2's separator. A piece that continues a longer file has none.
        if not row.get("joined", False):
            ids = np.concatenate((np.array(self.codec.begin, dtype=ids.dtype), ids))
        size = np.array(len(text.encode("utf-8", "surrogatepass")), dtype=np.int64)
        return {"ids": ids, "bytes": size}

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        """Windows of context + 1 tokens. Training windows overlap by half, so that no cut is always at the same place;
        the others lie end to end, so that every token is predicted exactly once."""
        context = self.options.context
        return Windows(store, "ids", context + 1, max(1, context // 2) if part == "train" else context)

    def describe(self, store: Store) -> dict[str, Any]:
        tokens, size = int(store.lengths("ids").sum()), int(store.stream("bytes").sum())
        return {"tokens": tokens, "bytes": size, "bytes_per_token": round(size / max(1, tokens), 3)}

    def save(self, folder: Path) -> None:
        self.codec.save(folder)

    def load(self, folder: Path) -> None:
        self.codec = TextCodec.load(folder)

    def model(self, config: TransformerConfig) -> LanguageModel:
        check_room("context", self.options.context, config)
        return LanguageModel(config, self.codec.vocab_size, self.options.tied)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, LanguageModel)
        ids_BT, lengths_B = batch["ids"].long(), batch["ids_lengths"]
        x_BTD, target_BT = model.states(ids_BT[:, :-1]), ids_BT[:, 1:]
        if int(lengths_B.min()) == ids_BT.shape[1]:
            x_ND, target_N = x_BTD.flatten(0, 1), target_BT.flatten()
        else:
            real_BT = torch.arange(target_BT.shape[1], device=ids_BT.device) < lengths_B[:, None] - 1
            x_ND, target_N = x_BTD[real_BT], target_BT[real_BT]
        return Loss(vocabulary_loss(x_ND, model.head.linear.weight, target_N), len(target_N))

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """With ``ask["evaluate"]``: how well each window is foretold. Else: each prompt gone on with.

        `ask` may hold the fields of `Sampling` (max_tokens, temperature, top_k, top_p, repetition_penalty, stop, seed).
        """
        if ask.get("evaluate"):
            return self._foretell(model, batch)
        from multihead.generation.loop import complete
        from multihead.generation.sampling import Sampling

        if not isinstance(model, Emitter):
            raise TypeError(f"{type(model).__name__} has no start and step")
        sampling = Sampling.of(ask)
        prompts = [row[:n].tolist() for row, n in zip(batch["ids"], batch["ids_lengths"].tolist(), strict=True)]
        return [
            {"text": done.text, "tokens": len(done.ids), "finish_reason": done.reason}
            for done in complete(model, self.codec, prompts, sampling)
        ]

    def _foretell(self, model: nn.Module, batch: Batch) -> list[Answer]:
        ids_BT, lengths_B = batch["ids"].long(), batch["ids_lengths"]
        logits_BTV = model(ids_BT[:, :-1]).float()
        target_BT = ids_BT[:, 1:]
        loss_BT = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none").view_as(target_BT)
        real_BT = torch.arange(target_BT.shape[1], device=ids_BT.device) < lengths_B[:, None] - 1
        right_BT = (logits_BTV.argmax(-1) == target_BT) & real_BT
        answers = []
        for loss, real, right, target in zip(loss_BT, real_BT, right_BT, target_BT, strict=True):
            ids = target[real].tolist()
            answers.append({
                "loss": float(loss[real].sum()),
                "tokens": len(ids),
                "bytes": sum(len(self.codec.token(i)) for i in ids),
                "right": int(right.sum()),
            })
        return answers

    def score(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Loss in nats a token, its exponent (perplexity), bits a byte of text, and share of first guesses right."""
        loss, tokens = sum(a["loss"] for a in answers), max(1, sum(a["tokens"] for a in answers))
        size = max(1, sum(a["bytes"] for a in answers))
        return {
            "loss": loss / tokens,
            "perplexity": math.exp(min(700.0, loss / tokens)),
            "bits_per_byte": loss / math.log(2) / size,
            "token_accuracy": sum(a["right"] for a in answers) / tokens,
        }

    def request(self, body: Any) -> dict[str, Any]:
        return {"text": body} if isinstance(body, str) else dict(body)

    def prompt(self, messages: Sequence[dict[str, str]]) -> str | list[int]:
        """A conversation as a prompt: ids by the chat template that came with the weights; else one text, which is what
        a model that only goes on with texts can read."""
        if isinstance(self.codec, ForeignCodec) and self.codec.chat_template is not None:
            return self.codec.chat(messages)
        return "\n".join(message["content"] for message in messages)
