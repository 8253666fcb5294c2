"""How weights of Whisper write a text down: prompts of special tokens, windows of 30 seconds, the likeliest token of
each step.

Legend: B recordings, S positions, D d_model, P tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multihead.codec import activity
from multihead.codec.audio import WhisperMel
from multihead.codec.foreign import ForeignCodec, read_json
from multihead.errors import UserError, tr
from multihead.run import write_json
from multihead.tasks.speech._recogniser import Recogniser

FILE = "whisper.json"
GENERATION = "generation_config.json"
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
TOGETHER = 8
"""Windows that are read at once."""


@dataclass
class Prompts:
    """What the decoder is told before it writes.

    Attributes:
        start, transcribe, plain: ids of the tokens that begin, that ask for the words as they are spoken, and for no
            times.
        languages: name ("zh") → id; empty for weights of one language.
        never: ids that are no part of a text; never_first: ids that do not begin one.
    """

    start: int
    transcribe: int
    plain: int
    languages: dict[str, int]
    never: list[int]
    never_first: list[int]

    @classmethod
    def of(cls, units: ForeignCodec, folder: Path) -> Prompts:
        """Those of a Hugging Face folder.

        Raises:
            UserError: a special token is missing.
        """
        tokenizer = units.as_tokenizer()
        asks: list[int] = []
        for name in ("startoftranscript", "transcribe", "notimestamps"):
            id = tokenizer.token_to_id(f"<|{name}|>")
            if id is None:
                raise UserError(tr(f"its tokenizer has no <|{name}|>, which Whisper's has; do the two belong together?",
                                   f"分词器里没有 Whisper 应有的 <|{name}|>；它与这些权重配套吗？"), str(folder))
            asks.append(id)
        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        languages = {m[1]: id for name, id in added.items() if (m := _LANGUAGE.fullmatch(name))}
        said = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
        never = {*_ids(said, "suppress_tokens", units.vocab_size), *added.values()} - {units.eos}
        first = _ids(said, "begin_suppress_tokens", units.vocab_size)
        start, transcribe, plain = asks
        return cls(start, transcribe, plain, languages, sorted(never), sorted(first))

    def ids(self, language: str | None) -> list[int]:
        """The prompt. UserError where the language must be known and is not."""
        if not self.languages:
            return [self.start, self.plain]
        if language not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise UserError(tr(f"options.language is {language!r}; these weights know: {known}",
                               f"options.language 是 {language!r}；这些权重认识：{known}"))
        return [self.start, self.languages[language], self.transcribe, self.plain]

    def save(self, folder: Path) -> None:
        """Write ``whisper.json`` into `folder`."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Prompts:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        try:
            return cls(**json.loads((folder / FILE).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(folder / FILE)) from None


def _ids(said: Mapping[str, Any], key: str, size: int) -> list[int]:
    value = said.get(key)
    return [i for i in value if type(i) is int and 0 <= i < size] if isinstance(value, list) else []


@dataclass
class Written:
    """The text of one window: its ids, and the log-probability of these and the end."""

    ids: list[int]
    score: float


@torch.no_grad()
def write(model: Recogniser, memory_BSD: Tensor, prompts: Prompts, language: str | None) -> list[Written]:
    """The likeliest token of every step, of all recordings side by side, until each has ended or is full.

    Args:
        language: None: for each recording the one that the model finds likeliest.
    """
    assert model.decoder is not None
    prompt_BP = prompted(model, memory_BSD, prompts, language)
    cache, logits_BV = model.begin(memory_BSD, prompt_BP)
    found = [Written([], 0.0) for _ in range(len(memory_BSD))]
    going = [True] * len(found)
    first = True
    for _ in range(model.decoder.config.max_length - prompt_BP.shape[1]):
        logits_BV = logits_BV.float()
        logits_BV[:, [*prompts.never, *(prompts.never_first if first else ())]] = -torch.inf
        first = False
        best_B, chosen_B = logits_BV.log_softmax(-1).max(-1)
        for b, (id, logp) in enumerate(zip(chosen_B.tolist(), best_B.tolist(), strict=True)):
            if going[b]:
                found[b].score += logp
                going[b] = id != model.eos
                if going[b]:
                    found[b].ids.append(id)
        if not any(going):
            break
        if max(cache.lengths) < model.decoder.config.max_length:
            logits_BV = model.step(chosen_B, cache)
    return found


def prompted(model: Recogniser, memory_BSD: Tensor, prompts: Prompts, language: str | None) -> Tensor:
    """The prompt of each recording, (B, P)."""
    if language is not None or not prompts.languages:
        return torch.tensor([prompts.ids(language)], device=memory_BSD.device).expand(len(memory_BSD), -1)
    start_B1 = torch.full((len(memory_BSD), 1), prompts.start, device=memory_BSD.device)
    _, logits_BV = model.begin(memory_BSD, start_B1)
    names = list(prompts.languages)
    likeliest_B = logits_BV[:, [prompts.languages[name] for name in names]].argmax(1).tolist()
    return torch.tensor([prompts.ids(names[i]) for i in likeliest_B], device=memory_BSD.device)


def dictated(model: Recogniser, samples_BN: Tensor, lengths_B: Tensor, prompts: Prompts, language: str | None
             ) -> list[list[Written]]:
    """The texts of each recording's windows; one that is longer than a window is cut where it is quietest."""
    assert isinstance(model.features, WhisperMel)
    window = model.features.window
    spans = [(i, start, end) for i, n in enumerate(lengths_B.tolist())
             for start, end in activity.pieces(samples_BN[i, :n].cpu().numpy(), window)]
    found: list[list[Written]] = [[] for _ in lengths_B]
    for first in range(0, len(spans), TOGETHER):
        some = spans[first : first + TOGETHER]
        sizes_B = torch.tensor([end - start for _, start, end in some], device=samples_BN.device)
        held_BN = samples_BN.new_zeros(len(some), int(sizes_B.max()))
        for row, (i, start, end) in zip(held_BN, some, strict=True):
            row[: end - start] = samples_BN[i, start:end]
        memory_BSD, _ = model.encode(held_BN, sizes_B)
        with torch.autocast(held_BN.device.type, enabled=False):
            for (i, _, _), one in zip(some, write(model, memory_BSD.float(), prompts, language), strict=True):
                found[i].append(one)
    return found


def joined(texts: Sequence[str]) -> str:
    """The texts of windows as one: with blanks between, but none between Chinese or Japanese characters."""
    found = ""
    for text in filter(None, (text.strip() for text in texts)):
        wide = found and ord(found[-1]) > 0x2E7F and ord(text[0]) > 0x2E7F
        found += text if wide or not found else " " + text
    return found


def refuse_unfit(samples: int, target_L: np.ndarray, window: int, text_length: int) -> None:
    """UserError where a recording and its text cannot be learned from."""
    if samples > window:
        long, most = f"{samples / 16000:.1f}", f"{window / 16000:g}"
        raise UserError(tr(f"the recording is {long} s long; these weights hear {most} s at once: cut it",
                           f"录音长 {long} 秒；这些权重一次只听 {most} 秒：请剪短"))
    if not 0 < len(target_L) <= text_length - 5:
        raise UserError(tr(f"the text has {len(target_L)} tokens; 1 to {text_length - 5} can be learned",
                           f"文本有 {len(target_L)} 个词元；可学习的是 1 到 {text_length - 5} 个"))
