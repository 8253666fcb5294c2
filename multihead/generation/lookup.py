"""Tokens foretold from the text itself, several proved in one step (Yang et al. 2023, "Inference with Reference").

Where a text copies (a name, a quotation, a passage of its prompt) its last few tokens stand somewhere before, and what
followed them there is likely to follow again. A step that reads the weights once takes all of that in and says for each
whether the model would have written it; from the first that it would not, the rest is forgotten. So the tokens are
those of one step each, up to the rounding of the logits.

Legend: B rows, T tokens taken in, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multihead.generation.sampling import Sampling, sample
from multihead.transformer.cache import Cache

LENGTH = 3  # tokens that must be the same for what follows to be taken


class Lookup:
    """One text, and what followed each run of three tokens when it last came."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}
        self.read = LENGTH

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, which only ever grow from call to call."""
        for end in range(self.read, len(ids)):
            self.places[tuple(ids[end - LENGTH : end])] = end
        self.read = max(self.read, len(ids))
        at = self.places.get(tuple(ids[-LENGTH:]))
        return [] if at is None else list(ids[at : at + most])


def wanted(model: Any, samplings: Sequence[Sampling]) -> bool:
    """Whether these rows look ahead: all ask for it, always take the likeliest token, and the model can."""
    return hasattr(model, "extend") and all(s.lookup > 0 and s.temperature == 0 for s in samplings)


def ahead(
    model: Any,
    state: Cache,
    chosen: Sequence[int],
    drafts: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    push: Callable[[int, int], bool],
) -> tuple[Tensor, list[int]]:
    """Take in each row's chosen token and as much of its draft as the model would write.

    Args:
        chosen: a token a row, pushed already.
        history: each row's ids, which `push` makes longer.
        push: (row, token) of the draft that is right; True where the row has come to its end.

    Returns:
        The logits of each row's next token (B, V), and the rows that ended; the state has not dropped them.
    """
    T = 1 + max(map(len, drafts))
    ids = [[first, *draft, *[0] * (T - 1 - len(draft))] for first, draft in zip(chosen, drafts, strict=True)]
    ids_BT = torch.tensor(ids, device=state.kv_L2RKCE.device if state.kv_L2RKCE is not None else None)
    logits_BTV = model.extend(ids_BT, state)
    taken, ended = [], []
    for i, draft in enumerate(drafts):
        n = 0
        while n < len(draft) and int(sample(logits_BTV[i, n : n + 1], [history[i]], [samplings[i]], [])) == draft[n]:
            n += 1
            if push(i, draft[n - 1]):
                ended.append(i)
                break
        taken.append(n)
    model.keep(ids_BT, [1 + n for n in taken], state)
    return logits_BTV[torch.arange(len(taken)), torch.tensor(taken)], ended
