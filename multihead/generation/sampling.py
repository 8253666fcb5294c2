"""How the next token is chosen from logits: small filters, one after another, each row by its own wishes.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multihead.errors import Problem, UserError, nearest, tr

MAX_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """What one caller wants of the tokens to come."""

    max_tokens: int = 128
    """New tokens at most."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 keeps all (Fan et al. 2018)."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020, section 3.1)."""
    repetition_penalty: float = 1.0
    """Scores of tokens that already stand in the text are divided by it, or multiplied where they are negative
    (Keskar et al. 2019, section 4.1); above 1 repeats less."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """The same seed gives the same tokens; None differs every time."""
    lookup: int = 0
    """With temperature 0: so many tokens may be taken at once from earlier in the text, where it repeats itself. The
    tokens stay the same; long copies come faster. 0: none."""

    @classmethod
    def of(cls, wishes: Mapping[str, Any]) -> Sampling:
        """From a dict as it comes from outside. Unknown names and values out of range raise one `UserError` for all."""
        names = [field.name for field in dataclasses.fields(cls)]
        problems, good = [], {}
        for name, value in wishes.items():
            if name not in names:
                known = ", ".join(names)
                problems.append(Problem(tr(
                    f"no sampling field is called '{name}'{nearest(name, names)}; there are: {known}",
                    f"没有名为 '{name}' 的采样参数{nearest(name, names)}；现有：{known}",
                )))
                continue
            value = _plain(name, value)
            accepts, allowed_en, allowed_zh = RANGES[name]
            if accepts(value):
                good[name] = value
            else:
                problems.append(Problem(tr(
                    f"{name} is {wishes[name]!r}; it must be {allowed_en}",
                    f"{name} 是 {wishes[name]!r}，应为{allowed_zh}",
                )))
        if problems:
            raise UserError.many(problems)
        return cls(**good)

    def generator(self, sample: int = 0) -> random.Random:
        """The row's own source of chance, so that a row's tokens do not depend on who shares its batch.

        Args:
            sample: which of several samples of one prompt; each gets a stream of its own.
        """
        return random.Random() if self.seed is None else random.Random(f"{self.seed}/{sample}")


def _plain(name: str, value: Any) -> Any:
    """Lists and a single string become a tuple of stop texts; whole numbers serve where a fraction may stand."""
    if name == "stop":
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value
    if name in ("temperature", "top_p", "repetition_penalty") and type(value) is int:
        return float(value)
    return value


def _stops(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_STOPS and all(isinstance(s, str) and s for s in value)


RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "max_tokens": (lambda v: type(v) is int and v >= 1, "a whole number from 1", "不小于 1 的整数"),
    "temperature": (lambda v: type(v) is float and 0 <= v <= 10, "a number from 0 to 10", " 0 到 10 之间的数"),
    "top_k": (lambda v: type(v) is int and v >= 0, "a whole number from 0; 0 keeps all", "不小于 0 的整数，0 表示不限"),
    "top_p": (lambda v: type(v) is float and 0 < v <= 1, "a number above 0 and up to 1", "大于 0 且不大于 1 的数"),
    "repetition_penalty": (
        lambda v: type(v) is float and 0 < v <= 10, "a number above 0 and up to 10", "大于 0 且不大于 10 的数"
    ),
    "stop": (
        _stops, f"a text or a list of up to {MAX_STOPS} texts, none empty", f"一个字符串或至多 {MAX_STOPS} 个非空字符串"
    ),
    "lookup": (lambda v: type(v) is int and 0 <= v <= 64, "a whole number from 0 to 64", " 0 到 64 的整数"),
    "seed": (lambda v: v is None or type(v) is int, "a whole number or null", "整数或 null"),
}
"""What each field may be: a check, and the same in English and Chinese."""


def penalise(logits_BV: Tensor, history: Sequence[Sequence[int]], penalties: Sequence[float]) -> Tensor:
    """Divide the positive scores of each row's earlier tokens by its penalty and multiply the negative ones by it."""
    logits_BV = logits_BV.clone()
    for row_V, seen, penalty in zip(logits_BV, history, penalties, strict=True):
        if penalty != 1.0 and seen:
            at = torch.tensor(sorted(set(seen)), device=row_V.device)
            score = row_V[at]
            row_V[at] = torch.where(score > 0, score / penalty, score * penalty)
    return logits_BV


def keep_top_k(logits_BV: Tensor, top_k: Sequence[int]) -> Tensor:
    """−inf outside each row's k likeliest tokens (ties with the k-th stay); 0 keeps all."""
    V = logits_BV.shape[1]
    sizes = [k if 0 < k < V else V for k in top_k]
    if min(sizes) == V:
        return logits_BV
    largest_BK = logits_BV.topk(max(k for k in sizes if k < V), dim=1).values
    place_B1 = torch.tensor([min(k, largest_BK.shape[1]) - 1 for k in sizes], device=logits_BV.device)[:, None]
    limited_B1 = torch.tensor([k < V for k in sizes], device=logits_BV.device)[:, None]
    return logits_BV.masked_fill(limited_B1 & (logits_BV < largest_BK.gather(1, place_B1)), -torch.inf)


def keep_top_p(logits_BV: Tensor, top_p: Sequence[float]) -> Tensor:
    """−inf outside each row's smallest set of likeliest tokens whose probability reaches p; at least one stays."""
    if min(top_p) >= 1.0:
        return logits_BV
    V = logits_BV.shape[1]
    limit_B1 = torch.tensor([p if p < 1.0 else torch.inf for p in top_p], device=logits_BV.device)[:, None]
    share_BV = logits_BV.softmax(dim=1)
    # The set is nearly always small, and sorting a whole vocabulary costs more than a step of a small model.
    for size in (256, 4096, V):
        share_BK, order_BK = share_BV.topk(min(size, V), dim=1)
        reached_B1 = share_BK.sum(dim=1, keepdim=True) >= limit_B1
        if bool((reached_B1 | (limit_B1 == torch.inf)).all()):
            break
    kept_BK = share_BK.cumsum(dim=1) - share_BK < limit_B1
    kept_BK[:, 0] = True
    kept_BV = (limit_B1 == torch.inf).expand(-1, V).scatter(1, order_BK, kept_BK)
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def distribution(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The probabilities that ``sample`` draws from, for rows of temperature above 0: (B, V), float32."""
    logits_BV = logits_BV.float()
    if any(s.temperature != 1.0 for s in samplings):
        temperatures = [s.temperature or 1.0 for s in samplings]
        logits_BV = logits_BV / torch.tensor(temperatures, device=logits_BV.device)[:, None]
    logits_BV = keep_top_k(logits_BV, [s.top_k for s in samplings])
    return keep_top_p(logits_BV, [s.top_p for s in samplings]).softmax(dim=1)


def sample(
    logits_BV: Tensor,
    history: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    generators: Sequence[random.Random],
) -> Tensor:
    """The next token of each row: (B,) int64.

    Args:
        logits_BV: scores of the next token.
        history: the ids of each row so far, its prompt included (for the repetition penalty).
        samplings: what each row wants.
        generators: each row's own, from ``Sampling.generator``; one number is drawn a row and token, and none where
            the temperature is 0.
    """
    if any(s.repetition_penalty != 1.0 for s in samplings):
        logits_BV = penalise(logits_BV.float(), history, [s.repetition_penalty for s in samplings])
    greedy = [s.temperature == 0 for s in samplings]
    if all(greedy):
        return likeliest(logits_BV)
    # The inverse of the cumulated distribution at one uniform number a row; in double, so that rare tokens keep their
    # share of it.
    cumulated_BV = distribution(logits_BV, samplings).double().cumsum(dim=1)
    uniform = [0.0 if g else generator.random() for g, generator in zip(greedy, generators, strict=True)]
    point_B1 = torch.tensor(uniform, dtype=torch.float64, device=logits_BV.device)[:, None] * cumulated_BV[:, -1:]
    drawn_B = torch.searchsorted(cumulated_BV, point_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
    if any(greedy):
        drawn_B = torch.where(torch.tensor(greedy, device=drawn_B.device), likeliest(logits_BV), drawn_B)
    return drawn_B


def likeliest(logits_BV: Tensor) -> Tensor:
    """The largest of each row, the first of equals: (B,) int64. On a CPU by numpy, in a tenth of torch's time."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.detach().numpy().argmax(axis=1))
    return logits_BV.argmax(dim=1)
