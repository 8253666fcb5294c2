"""The plain loop from prompts to tokens, for every model that has ``start`` and ``step``.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multihead.errors import UserError, tr
from multihead.generation.fast import prepared
from multihead.generation.lookup import Lookup, ahead, wanted
from multihead.generation.sampling import Sampling, sample
from multihead.transformer.cache import Cache

WORTH_PACKING = 16  # new tokens from which packing the weights costs less than it saves


class Emitter(nn.Module):
    """A model that emits tokens: subclasses give ``start`` and ``step``, this gives ``generate``."""

    config: Any

    @property
    def max_length(self) -> int:
        """The longest sequence the model can hold, prompt included."""
        return self.config.max_length

    def start(self, batch: dict[str, Tensor]) -> tuple[Cache, Tensor]:
        """Read prompts ``ids`` (B, T), right-padded, of ``lengths`` (B,): state and the next token's logits (B, V)."""
        raise NotImplementedError(f"{type(self).__name__}.start")

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """One more token a row (B,): the logits of the one after it (B, V). Advances the state."""
        raise NotImplementedError(f"{type(self).__name__}.step")

    def generate(
        self,
        ids: Tensor,
        max_length: int = 20,
        num_samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos: int | None = None,
        lookup: int = 0,
    ) -> Tensor:
        """Go on with prompts.

        Args:
            ids: one prompt (T,) or several of one length (B, T).
            max_length: length of what is returned, the prompt included.
            num_samples: continuations of each prompt.
            eos: the token that ends a row; what follows it is filled with it. None: rows end at `max_length` only.
            lookup: see `Sampling`.

        Returns:
            (B · num_samples, at most max_length) int64, the samples of one prompt next to each other, prompts included.
        """
        ids_BT = ids[None] if ids.dim() == 1 else ids
        B, T = ids_BT.shape
        check_length(T, self.max_length)
        if not T < max_length <= self.max_length:
            raise UserError(tr(
                f"max_length is {max_length}; with a prompt of {T} tokens it must be {T + 1} to {self.max_length}",
                f"max_length 是 {max_length}；提示有 {T} 个词元时应在 {T + 1} 到 {self.max_length} 之间",
            ))
        sampling = Sampling.of(dict(
            max_tokens=max_length - T, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, lookup=lookup,
        ))
        batch = {"ids": ids_BT.long(), "lengths": torch.full((B,), T, device=ids_BT.device)}
        return emit(self, batch, ids_BT.tolist(), sampling, num_samples, eos, fill=eos or 0)


def emit(
    model: Emitter,
    batch: dict[str, Tensor],
    begun: Sequence[Sequence[int]],
    sampling: Sampling,
    num_samples: int,
    eos: int | None,
    fill: int,
) -> Tensor:
    """What `generate` returns: rows that begin with `begun`, `num_samples` of each, as long as the longest of them.

    Args:
        batch: what ``start`` takes, as many rows as `begun`.
        fill: stands behind the end of the shorter ones.
    """
    if num_samples < 1:
        raise UserError(tr(
            f"num_samples is {num_samples}; it must be at least 1", f"num_samples 是 {num_samples}，至少要为 1"
        ))
    rows = [Sequel(ids, sampling, sampling.generator(i), eos) for ids in begun for i in range(num_samples)]
    device, dtype = batch["ids"].device, next(model.parameters()).dtype
    if sampling.max_tokens >= WORTH_PACKING and dtype == torch.float32 and device.type == "cpu":
        model = prepared(model, "float32", rows=len(rows))
    with Decoding(model):
        state, logits_BV = model.start(batch)
        if num_samples > 1:
            repeat = torch.arange(len(begun), device=device).repeat_interleave(num_samples)
            state, logits_BV = state.select(repeat), logits_BV[repeat]
        decode(model, state, logits_BV, rows)
    longest = max(len(row.ids) for row in rows)
    return torch.tensor([row.ids + [fill] * (longest - len(row.ids)) for row in rows], device=device)


class Decoding:
    """Evaluation mode without gradients while decoding; the model's own mode afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training, self.inference = model, model.training, torch.inference_mode()

    def __enter__(self) -> None:
        if self.training:
            self.model.eval()
        self.inference.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inference.__exit__(*error)
        if self.training:
            self.model.train()


class Sequel:
    """One row on its way: a prompt and what has been added to it."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: random.Random,
        eos: int | Collection[int] | None,
        text: TextStream | None = None,
    ) -> None:
        self.ids = list(prompt)
        self.sampling, self.generator, self.text = sampling, generator, text
        self.ends = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        self.left = sampling.max_tokens
        self.lookup = Lookup()
        self.reason = ""

    def draft(self) -> list[int]:
        """What may follow, by what followed earlier; never beyond the row's end."""
        return self.lookup.draft(self.ids, min(self.sampling.lookup, self.left - 1))

    def push(self, token: int) -> bool:
        """Add a token; True where the row has come to its end (``reason``: "stop" or "length")."""
        self.ids.append(token)
        self.left -= 1
        if token in self.ends:
            self.reason = "stop"
            return True
        if self.text is not None:
            self.text.push(token)
            if self.text.stopped:
                self.reason = "stop"
                return True
        if self.left <= 0:
            self.reason = "length"
        return bool(self.reason)


def decode(model: Emitter, state: Cache, logits_BV: Tensor, rows: Sequence[Sequel]) -> None:
    """Step all `rows` to their ends, taking each out of the batch as it ends."""
    going = list(rows)
    looks = wanted(model, [row.sampling for row in rows])
    while True:
        chosen = sample(
            logits_BV, [r.ids for r in going], [r.sampling for r in going], [r.generator for r in going]
        ).tolist()
        for i in reversed(range(len(going))):
            if going[i].push(chosen[i]):
                going[i], chosen[i] = going[-1], chosen[-1]
                going.pop()
                chosen.pop()
                state.drop(i)
        if not going:
            return
        drafts = [row.draft() for row in going] if looks else []
        if not any(drafts):
            logits_BV = model.step(torch.tensor(chosen, device=logits_BV.device), state)
            continue
        logits_BV, ended = ahead(
            model, state, chosen, drafts, [r.ids for r in going], [r.sampling for r in going],
            lambda i, token: going[i].push(token),
        )
        for i in reversed(ended):
            going[i] = going[-1]
            going.pop()
            state.drop(i)
            logits_BV[i] = logits_BV[-1]
            logits_BV = logits_BV[:-1]
        if not going:
            return


class TextStream:
    """Text as tokens arrive: never half a character, and never a piece of a stop text.

    Args:
        codec: the model's text codec.
        stop: texts that end the answer. What could be the beginning of one is held back until it is known.
    """

    def __init__(self, codec: Any, stop: Sequence[str] = ()) -> None:
        self.stream = codec.stream()
        self.stop = tuple(stop)
        self.held = ""
        self.text = ""
        """All that was released."""
        self.stopped = False

    def push(self, token: int) -> str:
        """One token more: the text that can now be released (often empty)."""
        return self._take(self.stream.push(token), last=False)

    def flush(self) -> str:
        """No more tokens: what was held back."""
        return self._take(self.stream.flush(), last=True)

    def _take(self, piece: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += piece
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self.held) if last else len(self.held) - self._overlap()
        out, self.held = self.held[:keep], self.held[keep:]
        self.text += out
        return out

    def _overlap(self) -> int:
        """Length of the longest end of what is held that begins a stop text."""
        longest = 0
        for stop in self.stop:
            for n in range(min(len(stop) - 1, len(self.held)), longest, -1):
                if self.held.endswith(stop[:n]):
                    longest = n
                    break
        return longest


@dataclass(frozen=True)
class Done:
    """What a prompt was continued with."""

    text: str
    """Without the prompt, the stop text and special tokens."""
    ids: list[int]
    """The new tokens, those of the stop included."""
    reason: str
    """"stop": the end token or a stop text came; "length": max_tokens or the model's longest sequence was reached."""


def complete(model: Emitter, codec: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Done]:
    """Continue each prompt (any lengths; an empty one begins at the codec's ``bos``), as a batch.

    A row's tokens are the same whatever else is in the batch, up to the rounding of the logits.

    Raises:
        UserError: a prompt is too long for the model.
    """
    begun = [list(prompt) or [codec.bos] for prompt in prompts]
    if not begun:
        return []
    for prompt in begun:
        check_length(len(prompt), model.max_length)
    rows = [Sequel(p, sampling, sampling.generator(), ends_of(codec), TextStream(codec, sampling.stop)) for p in begun]
    for row in rows:
        row.left = min(row.left, model.max_length - len(row.ids))
    with Decoding(model):
        state, logits = model.start(padded(begun, next(model.parameters()).device))
        decode(model, state, logits, rows)
    answers = []
    for row, prompt in zip(rows, begun, strict=True):
        assert row.text is not None
        row.text.flush()
        answers.append(Done(row.text.text, row.ids[len(prompt) :], row.reason))
    return answers


def ends_of(codec: Any) -> Collection[int]:
    """The ids that end a text of this codec: its ``eos``, and what else a foreign tokenizer's model ends with."""
    return getattr(codec, "ends", (codec.eos,))


def padded(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Prompts as ``start`` takes them: ``ids`` (B, longest) padded with 0 on the right, ``lengths`` (B,)."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    return {"ids": ids, "lengths": torch.tensor([len(p) for p in prompts], device=device)}


def check_length(tokens: int, max_length: int) -> None:
    """A `UserError` where a prompt leaves no room for even one more token."""
    if tokens >= max_length:
        raise UserError(tr(
            f"the prompt has {tokens} tokens; at most {max_length - 1} may be given: "
            f"the model holds {max_length} with the answer",
            f"提示有 {tokens} 个词元；至多可给 {max_length - 1} 个：模型连同回答最多容纳 {max_length} 个",
        ))
