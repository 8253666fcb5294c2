"""The model of speech recognition, and how it reads recordings of any length.

Legend: B recordings, N samples, T frames, S = ⌈T / 4⌉ positions of 40 ms, D d_model, V vocabulary, L tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multihead.codec.audio import HOP, AudioCodec, frames_of, spec_augment
from multihead.generation.loop import Emitter
from multihead.transformer.cache import Cache
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import TokenHead
from multihead.transformer.inputs import TokenInput
from multihead.transformer.sounds import SUBSAMPLING, subsampled
from multihead.transformer.trunk import Trunk

POSITION = HOP * SUBSAMPLING
"""Samples of one position: 640, 40 ms."""


class Recogniser(Emitter):
    """Samples (B, N) → log-probabilities of CTC (B, S, V), and a decoder that writes the text by attention.

    Args:
        size: the vocabulary; id 0 is CTC's blank and the padding of texts.
        entry: makes vectors of the codec's frames.
        decoder_layers: blocks of the decoder; 0: CTC alone.
        text_length: most tokens that the decoder holds; None: `config.max_length`.
        ctc: whether there is CTC; else the decoder is all there is.
    """

    def __init__(self, config: TransformerConfig, codec: AudioCodec, size: int, bos: int, eos: int, entry: nn.Module,
                 decoder_layers: int, text_length: int | None = None, ctc: bool = True) -> None:
        super().__init__()
        self.config, self.vocab_size, self.pad, self.bos, self.eos = config, size, 0, bos, eos
        self.features = codec.features()
        self.input = entry
        self.encoder = Trunk(config)
        self.ctc: nn.Linear | None = None
        if ctc:
            self.ctc = nn.Linear(config.d_model, size)
            nn.init.normal_(self.ctc.weight, std=config.d_model**-0.5)
            nn.init.zeros_(self.ctc.bias)
        self.decoder: Trunk | None = None
        if decoder_layers:
            writing = replace(config, num_layers=decoder_layers, max_length=text_length or config.max_length)
            self.target = TokenInput(writing, size)
            self.decoder = Trunk(writing, causal=True, cross_attention=True)
            self.head = TokenHead(config.d_model, size, self.target.token)

    @property
    def trunk(self) -> Trunk:
        return self.encoder

    def encode(self, samples_BN: Tensor, lengths_B: Tensor, spans: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Recordings as the decoder sees them: (B, S, D), and how many of the S positions of each are real (B,).

        Args:
            samples_BN: int16, with anything behind each of `lengths_B`.
            spans: rectangles to hide, see `spec_augment`.
        """
        behind_BN = torch.arange(samples_BN.shape[1], device=samples_BN.device) >= lengths_B[:, None]
        x_BTM = self.features(samples_BN.masked_fill(behind_BN, 0), lengths_B)
        if spans is not None:
            x_BTM = spec_augment(x_BTM, spans)
        x_BSD, lengths_B = self.input(x_BTM, self.features.frames(lengths_B))
        real_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device) < lengths_B[:, None]
        return self.encoder(x_BSD, mask=None if bool(real_BS.all()) else real_BS), lengths_B

    def ctc_scores(self, memory_BSD: Tensor) -> Tensor:
        """Log-probabilities of tokens and blank (B, S, V), in float32."""
        assert self.ctc is not None
        return self.ctc(memory_BSD).float().log_softmax(-1)

    def states(self, memory_BSD: Tensor, lengths_B: Tensor, target_BL: Tensor) -> Tensor:
        """What the decoder makes logits of the next token of: (B, L, D)."""
        assert self.decoder is not None
        mask_BS = torch.arange(memory_BSD.shape[1], device=memory_BSD.device) < lengths_B[:, None]
        return self.decoder(self.target(target_BL), memory=memory_BSD, memory_mask=mask_BS)

    def begin(self, memory_BSD: Tensor, prompt_BP: Tensor | None = None) -> tuple[Cache, Tensor]:
        """Begin the text of each recording, all of one length: the state, and the logits (B, V) of the first token.

        Args:
            prompt_BP: what stands before each text; None: <bos>.
        """
        assert self.decoder is not None
        B = len(memory_BSD)
        if prompt_BP is None:
            prompt_BP = torch.full((B, 1), self.bos, device=memory_BSD.device)
        cache = Cache(self.decoder.config.num_layers, [0] * B)
        return cache, self._next(prompt_BP, cache, memory_BSD)

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """One more token a row (B,): the logits of the one after it (B, V). Advances the cache by one."""
        return self._next(ids_B[:, None], cache)

    def _next(self, ids_BP: Tensor, cache: Cache, memory: Tensor | None = None) -> Tensor:
        assert self.decoder is not None
        P, device = ids_BP.shape[1], ids_BP.device
        positions_BP = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(P, device=device)
        x_BPD = self.decoder(self.target(ids_BP, positions_BP), memory=memory, cache=cache)
        cache.advance(P)
        return self.head(x_BPD[:, -1])


def heard(model: Recogniser, samples_BN: Tensor, lengths_B: Tensor, chunk: float, overlap: float
          ) -> list[tuple[np.ndarray, Tensor | None]]:
    """Of each recording the log-probabilities (S, V) of CTC, and, where it was read in one piece, what the decoder sees
    (1, S, D).

    Recordings longer than `chunk` seconds are read in pieces that overlap by `overlap`; of every two pieces each gives
    the half of the overlap that is nearer to its own middle.
    """
    window = max(2, int(chunk * 16000) // POSITION)
    shared = min(window // 2, int(overlap * 16000) // POSITION) // 2 * 2
    found: list[tuple[np.ndarray, Tensor | None] | None] = [None] * len(lengths_B)
    lengths = lengths_B.tolist()
    short = [i for i, n in enumerate(lengths) if n <= window * POSITION]
    if short:
        at = torch.tensor(short, device=samples_BN.device)
        memory_BSD, size_B = model.encode(samples_BN[at, : max(lengths[i] for i in short)], lengths_B[at])
        logp_BSV = model.ctc_scores(memory_BSD).cpu().numpy()
        for b, (i, size) in enumerate(zip(short, size_B.tolist(), strict=True)):
            found[i] = logp_BSV[b, :size], memory_BSD[b : b + 1, :size]
    for i, n in enumerate(lengths):
        if found[i] is None:
            found[i] = _in_pieces(model, samples_BN[i, :n], window, shared), None
    return [one for one in found if one is not None]


def _in_pieces(model: Recogniser, samples_N: Tensor, window: int, shared: int) -> np.ndarray:
    n, parts, start = len(samples_N), [], 0
    while True:
        piece = samples_N[start * POSITION : (start + window) * POSITION]
        last = start * POSITION + len(piece) >= n
        memory_1SD, _ = model.encode(piece[None], torch.tensor([len(piece)], device=piece.device))
        logp_SV = model.ctc_scores(memory_1SD)[0].cpu().numpy()
        parts.append(logp_SV[shared // 2 if start else 0 : None if last else window - shared // 2])
        if last:
            return np.concatenate(parts)
        start += window - shared


def positions_of(samples: Any) -> Any:
    """Positions of so many samples."""
    return subsampled(frames_of(samples))
