"""Beam search: against all sequences there are, against greedy, against transformers, and batched against alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from multihead.errors import UserError
from multihead.generation.beam import Hypothesis, beam_search, largest
from multihead.generation.fast import prepared
from multihead.generation.loop import padded
from multihead.generation.seq2seq import EncoderDecoder, Transformer
from multihead.transformer.config import TransformerConfig

PAD, BOS, EOS = 0, 2, 3


def build(vocab: int = 40, sharp: float = 3.0) -> Transformer:
    """A model of random weights whose choices are sharp."""
    torch.manual_seed(0)
    model = Transformer(vocab, d_model=32, nhead=4, num_layers=2, d_ff=48, max_length=64, norm_first=True, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.source.token.weight.mul_(sharp)
    return model.eval()


@pytest.fixture(scope="module")
def taught() -> Transformer:
    """A model that has half learned to write every second word of its source: it ends at many lengths, unsurely."""
    model = build(sharp=1.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        given = sources(32, seed=100 + step)
        wanted = [[BOS, *source[:-1:2], EOS] for source in given]
        src, tgt = padded(given)["ids"], padded(wanted)["ids"]
        loss = F.cross_entropy(model(src, tgt)[:, :-1].flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sources(count: int, vocab: int = 40, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [[*torch.randint(4, vocab, (n,), generator=generator).tolist(), EOS] for n in sizes]


def likelihood(model: EncoderDecoder, source: list[int], target: tuple[int, ...]) -> float:
    """log P of a target, by one uncached pass; padding may not be written."""
    ids = torch.tensor([[BOS, *target]])
    logits = model(torch.tensor([source]), ids)[0]
    logits[:, PAD] = -torch.inf
    return float(logits.log_softmax(-1)[range(len(target)), list(target)].sum())


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@torch.no_grad()
def test_wide_enough_it_finds_the_best_of_all_sequences(penalty: float) -> None:
    vocab, longest = 6, 4
    model = build(vocab, sharp=2.0)
    source = [4, 5, 4, EOS]
    words = [t for t in range(1, vocab) if t != EOS]
    scores = {}
    for n in range(longest):
        for body in itertools.product(words, repeat=n):
            # Cut at the longest length, a sequence counts as it stands.
            ends = [(EOS,)] if n < longest - 1 else [(t,) for t in (*words, EOS)]
            for end in ends:
                target = (*body, *end)
                scores[target] = likelihood(model, source, target) / len(target) ** penalty
    found = beam_search(model, padded([source]), EOS, beam=len(scores), length_penalty=penalty, max_tokens=longest)[0]
    ranked = sorted(scores, key=lambda t: -scores[t])
    assert len(found) == len(scores)
    for hypothesis, target in zip(found[:20], ranked, strict=False):
        assert (*hypothesis.ids, *([EOS] if hypothesis.ended else [])) == target
        assert hypothesis.score == pytest.approx(scores[target], abs=1e-4)


def test_one_beam_is_greedy(taught: Transformer) -> None:
    model = taught
    for source in sources(12):
        greedy = model.generate(torch.tensor(source), max_length=21, temperature=0)[0].tolist()[1:]
        best = beam_search(model, padded([source]), EOS, beam=1, max_tokens=20)[0][0]
        assert best.ids == [t for t in greedy if t not in (EOS, PAD)] and best.ended == (EOS in greedy)


@pytest.mark.parametrize("fast", [False, True])
def test_a_batch_gives_what_its_rows_give_alone(fast: bool, taught: Transformer) -> None:
    model = taught
    quick = prepared(model, "float32") if fast else model
    given = sources(17)
    limits = [6 + len(s) for s in given]
    together = beam_search(quick, padded(given), EOS, beam=4, max_tokens=limits)
    for source, limit, found in zip(given, limits, together, strict=True):
        alone = beam_search(model, padded([source]), EOS, beam=4, max_tokens=limit)[0]
        assert [h.ids for h in alone] == [h.ids for h in found]
        assert [h.score for h in alone] == pytest.approx([h.score for h in found], abs=1e-4)


def test_the_state_follows_its_beams_with_n_grams_and_rotary_positions_too() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=4, max_length=64, ngrams=(2, 3), ngram_buckets=64)
    model = EncoderDecoder(config, 40, 30, shared=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter) * 0.2)
    for source in sources(5):
        for hypothesis in beam_search(model, padded([source]), EOS, beam=3, max_tokens=9)[0]:
            target = (*hypothesis.ids, *([EOS] if hypothesis.ended else []))
            with torch.no_grad():
                assert hypothesis.score == pytest.approx(likelihood(model, source, target) / len(target), abs=1e-4)


@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (5, 1.0), (4, 0.6), (3, 2.0)])
def test_equals_transformers_generate(beam: int, penalty: float, taught: Transformer) -> None:
    pytest.importorskip("transformers")
    from tests.generation.pegasus import pegasus

    model = taught
    peer, given = pegasus(model), padded(sources(24))
    mask = torch.arange(given["ids"].shape[1]) < given["lengths"][:, None]
    theirs = peer.generate(
        given["ids"], attention_mask=mask.long(), num_beams=beam, length_penalty=penalty, max_new_tokens=5,
        do_sample=False, early_stopping=False, bad_words_ids=[[PAD]],
    )  # fmt: skip
    ours = beam_search(model, given, EOS, beam=beam, length_penalty=penalty, max_tokens=5)
    assert len({h[0].ended for h in ours}) == 2  # some end by themselves, some are cut
    for row, found in zip(theirs.tolist(), ours, strict=True):
        written = row[1:]
        assert found[0].ids == (written[: written.index(EOS)] if EOS in written else [t for t in written if t != PAD])


def test_the_largest_are_those_of_topk() -> None:
    torch.manual_seed(0)
    for vocab in (7, 100, 1000, 6001):
        logits = torch.randn(9, vocab)
        value, at = largest(logits, 5)
        expected = logits.topk(5, dim=1)
        assert torch.equal(value, expected.values) and torch.equal(at, expected.indices)


def test_a_model_that_cannot_stop_is_stopped_and_the_beam_is_checked() -> None:
    model = build()
    with torch.no_grad():
        model.source.token.weight[EOS] = 0
    found = beam_search(model, padded([[5, 6, EOS]]), EOS, beam=3, max_tokens=7)[0]
    assert len(found) == 3 and all(isinstance(h, Hypothesis) and len(h.ids) == 7 and not h.ended for h in found)
    with pytest.raises(UserError, match="beam is 0"):
        beam_search(model, padded([[5]]), EOS, beam=0)
