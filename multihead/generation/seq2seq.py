"""Encoder–decoders on the one trunk: reading one sequence of ids, writing another (Vaswani et al. 2017).

Legend: B rows, S source positions, T target positions, N real target positions of a batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from multihead.errors import Problem, UserError, tr
from multihead.generation.loop import Emitter, emit
from multihead.generation.sampling import Sampling
from multihead.transformer.cache import Cache
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import TokenHead
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk


class EncoderDecoder(Emitter):
    """A trunk that reads and a trunk that writes, of any shape: source (B, S), target (B, T) → logits (B, T, V).

    Positions, the causal order of the target and the padding of both sides are seen to in here.

    Args:
        config: the shape of both sides.
        source_size, target_size: their vocabularies.
        pad: the id of padding, on both sides. It is never looked at and never emitted.
        bos, eos: the ids that begin and end a target.
        shared: one table for source, target and output (section 3.4).
        tied: target and output share a table; always so where `shared`.
        decoder_layers: blocks of the writing side; None: as many as of the reading one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        source_size: int,
        target_size: int | None = None,
        *,
        pad: int = 0,
        bos: int = 2,
        eos: int = 3,
        shared: bool = True,
        tied: bool = True,
        decoder_layers: int | None = None,
    ) -> None:
        super().__init__()
        target_size = target_size or source_size
        if shared and target_size != source_size:
            raise ValueError(f"one table cannot hold vocabularies of {source_size} and {target_size}")
        self.config, self.vocab_size, self.pad, self.bos, self.eos = config, target_size, pad, bos, eos
        writing = replace(config, num_layers=decoder_layers or config.num_layers)
        self.source = TokenInput(config, source_size)
        self.target = self.source if shared else TokenInput(writing, target_size)
        self.encoder = Trunk(config)
        self.decoder = Trunk(writing, causal=True, cross_attention=True)
        self.head = TokenHead(config.d_model, target_size, self.target.token if shared or tied else None)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits of every next target token.

        Hand over the whole target, ``[bos, w1, w2, …, eos]``: ``logits[:, t]`` foretells ``tgt[:, t + 1]`` and has seen
        ``tgt[:, : t + 1]`` and the source only. The loss is therefore
        ``cross_entropy(logits[:, :-1].flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=pad)``.

        Args:
            src: (B, S) int64, `pad` behind the end of shorter rows.
            tgt: (B, T) int64, likewise.

        Returns:
            (B, T, V)
        """
        return self.head(self.states(src, tgt))

    def states(self, src: Tensor, tgt: Tensor) -> Tensor:
        """What `forward` makes logits of: (B, T, D)."""
        self._check(src, "src", "源序列")
        self._check(tgt, "tgt", "目标序列")
        memory_BSD, mask_BS = self.encode(src)
        # Padding lies behind a target's end, where the causal order keeps every real position from seeing it.
        return self.decoder(self.target(tgt), memory=memory_BSD, memory_mask=mask_BS)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor | None]:
        """The source as the decoder sees it: (B, S, D), and (B, S) bool, True where it may look (None: everywhere)."""
        mask_BS = src != self.pad
        if bool(mask_BS.all()):
            return self.encoder(self.source(src)), None
        # A source of nothing but padding is let be seen: a softmax over nothing is NaN.
        mask_BS = mask_BS | ~mask_BS.any(1, keepdim=True)
        return self.encoder(self.source(src), mask=mask_BS), mask_BS

    def start(self, batch: dict[str, Tensor]) -> tuple[Cache, Tensor]:
        """Read sources ``ids`` (B, S), of ``lengths`` (B,), and begin each target with `bos`: the state and the logits
        (B, V) of the first token."""
        src = batch["ids"]
        behind_BS = torch.arange(src.shape[1], device=src.device) >= batch["lengths"][:, None]
        memory_BSD, mask_BS = self.encode(src.masked_fill(behind_BS, self.pad))
        cache = Cache(self.decoder.config.num_layers, [0] * len(src), memory_mask_BS=mask_BS)
        begin_B1 = torch.full((len(src), 1), self.bos, device=src.device)
        reach = self.target.memory
        if reach:
            cache.recent_BN = F.pad(begin_B1, (reach - 1, 0), value=-1)
        return cache, self._next(self.target(begin_B1), cache, memory_BSD)

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """One more target token a row (B,): the logits of the one after it (B, V). Advances the cache by one."""
        ids_B1, positions_B1 = ids_B[:, None], torch.tensor(cache.lengths, device=ids_B.device)[:, None]
        x_B1D = self.target(ids_B1, positions_B1, cache.recent_BN)
        if cache.recent_BN is not None:
            cache.recent_BN = torch.cat((cache.recent_BN[:, 1:], ids_B1), dim=1)
        return self._next(x_B1D, cache)

    def _next(self, x_B1D: Tensor, cache: Cache, memory_BSD: Tensor | None = None) -> Tensor:
        logits_BV = self.head(self.decoder(x_B1D, memory=memory_BSD, cache=cache)[:, 0])
        cache.advance(1)
        logits_BV[:, self.pad] = -torch.inf
        return logits_BV

    def generate(  # type: ignore[override]
        self,
        src: Tensor,
        max_length: int = 20,
        num_samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Write a target for each source.

        Args:
            src: one source (S,) or several (B, S), `pad` behind the end of shorter ones.
            max_length: length of what is returned, `bos` included.
            num_samples: targets for each source.

        Returns:
            (B · num_samples, at most max_length) int64: `bos`, the target, `eos`, then `pad`; the samples of one source
            next to each other.
        """
        src_BS = src[None] if src.dim() == 1 else src
        self._check(src_BS, "src", "源序列")
        if not 1 < max_length <= self.max_length:
            raise UserError(tr(
                f"max_length is {max_length}; it must be 2 to {self.max_length}",
                f"max_length 是 {max_length}，应在 2 到 {self.max_length} 之间",
            ))
        sampling = Sampling.of(dict(
            max_tokens=max_length - 1, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed,
        ))
        B, S = src_BS.shape
        batch = {"ids": src_BS.long(), "lengths": torch.full((B,), S, device=src.device)}
        return emit(self, batch, [[self.bos]] * B, sampling, num_samples, self.eos, fill=self.pad)

    def _check(self, ids: Tensor, en: str, zh: str) -> None:
        length, most = ids.shape[-1], self.max_length
        if length > most:
            raise UserError(tr(
                f"{en} has {length} positions; the model holds {most}: build it with a larger max_length",
                f"{zh}有 {length} 个位置；模型最多容纳 {most} 个：请用更大的 max_length 构建模型",
            ))


class Transformer(EncoderDecoder):
    """The model of "Attention Is All You Need": source (B, S), target (B, T) → logits (B, T, vocab_size).

    Embeddings times √d_model plus sinusoidal positions, six layers on each side, LayerNorm after each part, ReLU,
    biases.

    Args:
        vocab_size: ids of source and target lie in 0 … vocab_size − 1.
        d_model, nhead, num_layers, d_ff: sizes as in the paper's table 3; `d_ff` None is 4·d_model.
        dropout: on embeddings, attention weights and every part's output (section 5.4).
        pad: the id of padding. It is never looked at and never emitted.
        bos, eos: the ids that begin and end a target.
        max_length: longest source and target.
        shared: one table for source, target and output (section 3.4); else three.
        norm_first: LayerNorm before each part, which trains deep stacks without a long warm-up.

    Raises:
        UserError: sizes that cannot be built, with all that is wrong.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        d_ff: int | None = None,
        dropout: float = 0.1,
        pad: int = 0,
        bos: int = 2,
        eos: int = 3,
        max_length: int = 1024,
        shared: bool = True,
        norm_first: bool = False,
    ) -> None:
        config = TransformerConfig(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=nhead,
            d_ff=d_ff,
            activation="relu",
            norm="layernorm",
            norm_position="before" if norm_first else "after",
            positions="sinusoidal",
            bias=True,
            max_length=max_length,
            dropout=dropout,
        )
        problems = [Problem(tr(en, zh)) for _, en, zh in config.faults()]
        for name, value in (("pad", pad), ("bos", bos), ("eos", eos)):
            if not 0 <= value < vocab_size:
                problems.append(Problem(tr(
                    f"{name} is {value}; it must be an id from 0 to vocab_size − 1 = {vocab_size - 1}",
                    f"{name} 是 {value}，应为 0 到 vocab_size − 1 = {vocab_size - 1} 之间的编号",
                )))
        if problems:
            raise UserError.many(problems)
        super().__init__(config, vocab_size, pad=pad, bos=bos, eos=eos, shared=shared, tied=False)
