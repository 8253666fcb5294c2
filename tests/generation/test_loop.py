"""The plain loop: against argmax over whole passes, and against a model that says what it is told to say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multihead.codec.text import TextCodec
from multihead.errors import UserError
from multihead.generation.loop import Emitter, TextStream, complete
from multihead.generation.sampling import Sampling
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.cache import Cache
from multihead.transformer.config import TransformerConfig


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=64), 40)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.fit(["abcdefgh 房间很干净"], kind="char")


@pytest.mark.parametrize("max_length", [8, 40])
def test_greedy_is_argmax_over_whole_passes(model: LanguageModel, max_length: int) -> None:
    ids = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))
    got = model.generate(ids, max_length=max_length, temperature=0)
    model.eval()
    with torch.no_grad():
        while ids.shape[1] < max_length:
            ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(got, ids)


def test_the_documented_call(model: LanguageModel) -> None:
    prompt = torch.tensor([1, 2, 3])
    got = model.generate(prompt, max_length=20, num_samples=5, seed=1)
    assert got.shape == (5, 20) and got.dtype == torch.int64
    assert (got[:, :3] == prompt).all()
    assert len({tuple(row) for row in got.tolist()}) == 5
    assert model.generate(prompt[None]).shape == (1, 20)


def test_samples_of_several_prompts_stand_next_to_each_other_and_do_not_depend_on_company(model: LanguageModel) -> None:
    prompts = torch.tensor([[1, 2], [3, 4]])
    together = model.generate(prompts, num_samples=3, seed=9, top_p=0.95)
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[3 * i : 3 * i + 3], model.generate(prompt, num_samples=3, seed=9, top_p=0.95))
    assert torch.equal(together[[0, 3]], model.generate(prompts, seed=9, top_p=0.95))


def test_rows_end_at_eos_and_are_filled_with_it(model: LanguageModel) -> None:
    ids = torch.randint(0, 40, (6, 3), generator=torch.Generator().manual_seed(2))
    free = model.generate(ids, max_length=60, seed=4)
    eos = int(free[0, 10])
    got = model.generate(ids, max_length=60, seed=4, eos=eos)
    ended = 0
    for a, b in zip(free.tolist(), got.tolist(), strict=True):
        end = a.index(eos, 3) + 1 if eos in a[3:] else len(a)
        ended += end < len(a)
        assert b[: min(end, len(b))] == a[: min(end, len(b))] and set(b[end:]) <= {eos}
    assert ended


def test_generating_leaves_mode_gradients_and_results_usable(model: LanguageModel) -> None:
    model.train()
    got = model.generate(torch.tensor([1, 2]), max_length=30, seed=0)
    assert model.training
    model(got).sum().backward()  # ids made in inference mode would be refused here
    model.zero_grad()


@pytest.mark.parametrize(("ids", "wishes"), [
    ([1] * 64, {}), ([1] * 5, {"max_length": 5}), ([1], {"max_length": 65}), ([1], {"num_samples": 0}),
    ([1], {"temperature": -1}), ([1], {"top_p": 2.0}),
])
def test_what_cannot_be_is_refused(model: LanguageModel, ids: list[int], wishes: dict[str, float]) -> None:
    with pytest.raises(UserError):
        model.generate(torch.tensor(ids), **wishes)


class Parrot(Emitter):
    """Says the scripted tokens, whatever it reads: one script a prompt length."""

    def __init__(self, scripts: dict[int, list[int]], vocabulary: int, limit: int = 200) -> None:
        super().__init__()
        self.scripts, self.vocabulary = scripts, vocabulary
        self.config = TransformerConfig(max_length=limit)
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def start(self, batch: dict[str, Tensor]) -> tuple[Cache, Tensor]:
        cache = Cache(1, batch["lengths"].tolist(), recent_BN=batch["lengths"][:, None].clone())
        self.said = 0
        return cache, self._say(cache)

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        cache.advance(1)
        self.said += 1
        return self._say(cache)

    def _say(self, cache: Cache) -> Tensor:
        assert cache.recent_BN is not None
        logits = torch.zeros(cache.rows, self.vocabulary)
        for row, (key,) in zip(logits, cache.recent_BN.tolist(), strict=True):
            script = self.scripts[key]
            row[script[min(self.said, len(script) - 1)]] = 9.0
        return logits


def say(codec: TextCodec, texts: list[str], **wishes: object) -> list:
    """Completions of prompts of 1, 2, 3 … tokens by a model that says `texts` and then `eos`."""
    scripts = {i + 1: [*codec.encode(text).tolist(), codec.eos] for i, text in enumerate(texts)}
    prompts = [[codec.encode("a")[0].item()] * (i + 1) for i in range(len(texts))]
    return complete(Parrot(scripts, codec.vocab_size), codec, prompts, Sampling.of({"temperature": 0, **wishes}))


def test_ends_of_many_rows_at_their_own_times(codec: TextCodec) -> None:
    done = say(codec, ["abc", "", "房间很干净", "h"])
    assert [d.text for d in done] == ["abc", "", "房间很干净", "h"]
    assert {d.reason for d in done} == {"stop"}
    assert [len(d.ids) for d in done] == [4, 1, 6, 2]


def test_stop_texts_across_token_borders_are_cut(codec: TextCodec) -> None:
    done = say(codec, ["abcdef", "abdcdx", "很干净房间", "ggabc"], stop=["cde", "干净", "ab"])
    assert [d.text for d in done] == ["", "", "很", "gg"]
    done = say(codec, ["abcabcd", "cd", "efgh"], stop=["cabcd", "gha"])
    assert [d.text for d in done] == ["ab", "cd", "efgh"]  # beginnings of a stop text that came to nothing are kept
    assert [d.reason for d in done] == ["stop"] * 3


def test_max_tokens_and_the_models_length_end_a_row(codec: TextCodec) -> None:
    done = say(codec, ["abcdef", "ab"], max_tokens=3)
    assert [(d.text, d.reason) for d in done] == [("abc", "length"), ("ab", "stop")]
    parrot = Parrot({6: codec.encode("abcdefgh").tolist()}, codec.vocab_size, limit=10)
    (done,) = complete(parrot, codec, [[5] * 6], Sampling(temperature=0))
    assert (done.text, done.reason) == ("abcd", "length")


def test_an_empty_prompt_begins_with_bos_and_a_long_one_is_refused(codec: TextCodec) -> None:
    parrot = Parrot({1: [codec.eos]}, codec.vocab_size, limit=10)
    assert complete(parrot, codec, [[]], Sampling()) is not None
    assert complete(parrot, codec, [], Sampling()) == []
    with pytest.raises(UserError, match="at most 9"):
        complete(parrot, codec, [[1], [1] * 10], Sampling())


def test_ragged_prompts_are_continued_as_if_alone(codec: TextCodec) -> None:
    torch.manual_seed(0)
    model = LanguageModel(TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=90), codec.vocab_size)
    prompts = [[5, 6], [7] * 40, [8], [9, 10, 11]]
    for wish in (Sampling(temperature=0), Sampling(seed=3, top_k=9, repetition_penalty=1.2)):
        together = complete(model, codec, prompts, wish)
        for prompt, done in zip(prompts, together, strict=True):
            assert complete(model, codec, [prompt], wish) == [done]


def test_streamed_is_whole_and_holds_back_what_may_become_a_stop() -> None:
    codec = TextCodec.fit(["房间很干净，abc" * 3], vocab_size=262)  # bytes: a Chinese character is several tokens
    text = "很干净 abab 房间"
    stream, pieces = TextStream(codec, ["abc"]), []
    for token in codec.encode(text).tolist():
        pieces.append(stream.push(token))
        assert "�" not in pieces[-1]
        assert stream.held in ("", "a", "ab")
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text == text
    assert max(len(piece) for piece in pieces) < len(text) / 2
