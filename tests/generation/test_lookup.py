"""Tokens taken from earlier in the text are those that single steps would have written, and fewer steps write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from multihead.codec.text import TextCodec
from multihead.generation.fast import prepared
from multihead.generation.lookup import Lookup
from multihead.generation.loop import Emitter, complete
from multihead.generation.sampling import Sampling
from multihead.transformer.cache import Cache
from tests.transformer.test_cache import KINDS, VOCABULARY, build


def test_the_draft_is_what_followed_last_time() -> None:
    lookup, ids = Lookup(), [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3]
    assert lookup.draft(ids, 2) == [6, 7]
    assert lookup.draft([*ids, 4, 5], 3) == [1, 2, 3]  # 3 4 5 was followed by 1 2 3
    assert lookup.draft([*ids, 4, 5, 9], 3) == [] and Lookup().draft([1], 4) == []


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_random_models_write_the_same_tokens(options: dict[str, Any]) -> None:
    """Greedy texts of random weights soon run in circles, and so copy; rows end at different tokens."""
    plain = build(**options)
    prompts = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    prompts[1, 4:] = prompts[1, :4]
    for model, penalty in ((plain, 1.2), (prepared(plain, "float32"), 1.0)):
        wishes: dict[str, Any] = {"max_length": 40, "temperature": 0, "repetition_penalty": penalty}
        alone = model.generate(prompts, **wishes)
        assert torch.equal(alone, model.generate(prompts, **wishes, lookup=6))
        eos = int(alone[0, 25])
        ended = model.generate(prompts, **wishes, eos=eos)
        assert torch.equal(ended, model.generate(prompts, **wishes, eos=eos, lookup=6))


class Copier(Emitter):
    """Writes its prompt again and again: the token after position t is that of t − `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.steps, self.seen = length, 0, torch.zeros(0)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    max_length = 1000  # type: ignore[assignment]

    def _logits(self, ids: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(ids[-self.length]), 50).float()

    def start(self, batch: dict[str, Tensor]) -> tuple[Cache, Tensor]:
        self.ids = batch["ids"][0].tolist()
        return Cache(1, [len(self.ids)]), self._logits(self.ids)[None]

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        logits_BTV = self.extend(ids_B[:, None], cache)
        self.keep(ids_B[:, None], [1], cache)
        return logits_BTV[:, 0]

    def extend(self, ids_BT: Tensor, cache: Cache) -> Tensor:
        self.steps += 1
        known = ids_BT[0].tolist()
        return torch.stack([self._logits(self.ids + known[: t + 1]) for t in range(len(known))])[None]

    def keep(self, ids_BT: Tensor, counts: list[int], cache: Cache) -> None:
        self.ids += ids_BT[0, : counts[0]].tolist()
        cache.advance(counts)


@pytest.mark.parametrize("stop", [(), ("gh",)])
def test_a_copy_takes_a_step_for_every_nine_tokens(stop: tuple[str, ...]) -> None:
    codec = TextCodec.fit(["abcdefgh"], kind="char")
    prompt = codec.encode("abcdefgh").tolist() * 3
    found = []
    for lookup in (0, 8):
        model = Copier(8)
        done = complete(model, codec, [prompt], Sampling(max_tokens=91, temperature=0, lookup=lookup, stop=stop))[0]
        found.append(done)
        if not stop:
            assert model.steps == (90 if lookup == 0 else 10)
    assert found[0] == found[1] and found[0].text.startswith("abcdef")
