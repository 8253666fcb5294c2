"""A language model's say in a search, against sums over all paths and whole passes without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multihead.codec.text import TextCodec
from multihead.generation import fusion
from multihead.generation.ctc import joint_search, prefix_beam
from multihead.generation.fusion import Fusion, TextScorer, completed
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.config import TransformerConfig
from tests.generation.test_ctc import Uniform, all_texts, scores

LINES = ["the cat sat on the mat", "今天天气很好 the end", "a b a b a"]


def language_model(codec: TextCodec, **more) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(TransformerConfig(d_model=16, num_layers=2, num_heads=2, **more), codec.vocab_size).eval()
    torch.nn.init.normal_(model.input.token.weight, std=1)
    return model


@torch.no_grad()
def truth(model: LanguageModel, codec: TextCodec, text: str) -> float:
    """log P by one whole pass."""
    ids = [*codec.begin, *codec.encode(text).tolist()]
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    return float(sum(logp[i - 1, ids[i]] for i in range(len(codec.begin), len(ids))))


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("more", [{}, {"ngrams": (2, 3), "ngram_buckets": 64}, {"positions": "learned"}])
def test_scores_by_kept_states_are_those_of_whole_passes(kind, more, monkeypatch):
    codec = TextCodec.fit(LINES * 4, kind, 300)
    model = language_model(codec, **more)
    texts = ["", "the", "the cat", "the cab", "今天", "今天 the", "a b", *LINES]
    expected = {text: truth(model, codec, text) for text in texts}
    for states in (128, 2):
        monkeypatch.setattr(fusion, "STATES", states)
        scorer = TextScorer(model, codec)
        for part in (texts, texts[3:6], texts):
            assert scorer(part) == pytest.approx([expected[text] for text in part], abs=1e-4)
        assert len(scorer._states) <= states


def test_a_text_longer_than_the_model_is_read_in_windows():
    codec = TextCodec.fit(LINES, "char", 100)
    model = language_model(codec, max_length=16)
    scorer, text = TextScorer(model, codec), LINES[0] * 3
    step = scorer([text[: n + 1] for n in range(len(text))])
    assert np.isfinite(step).all() and (np.diff(step) < 0).all()
    assert TextScorer(model, codec)([text])[0] == pytest.approx(step[-1], abs=1e-4)
    assert step[10] == pytest.approx(truth(model, codec, text[:11]), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_prefix_beam_finds_the_text_that_both_find_likeliest(seed, weight):
    letters = TextCodec.fit(["abc"], "char", 100)  # of the language model; those of CTC are 1, 2, 3
    model, logp = language_model(letters), scores(5, 4, seed)

    def write(ids):
        return "".join("_abc"[i] for i in ids)

    both = {text: np.log(p) + weight * truth(model, letters, write(text)) for text, p in all_texts(logp).items()}
    ranked = sorted(both.items(), key=lambda one: -one[1])
    say = Fusion(TextScorer(model, letters), write, weight)
    found = prefix_beam(logp, beam=400, width=4, sure=1e-12, fusion=say)
    assert [tuple(r.ids) for r in found[:5]] == [text for text, _ in ranked[:5]]
    assert [r.score for r in found[:5]] == pytest.approx([score for _, score in ranked[:5]], abs=1e-4)
    narrow = prefix_beam(logp, beam=8, width=4, sure=1e-12, fusion=say)[0]
    assert tuple(narrow.ids) == ranked[0][0]


def test_joint_search_adds_the_language_model_to_both():
    letters = TextCodec.fit(["abc"], "char", 100)
    model, logp, eos = language_model(letters), scores(5, 5, 1), 4
    logp[:, eos] = -1e9

    def write(ids):
        return "".join("_abc"[i] for i in ids)

    one, say = Uniform(), Fusion(TextScorer(model, letters), write, 0.5)
    # The decoder finds each of its 5 tokens equally likely, the end too.
    both = {text: 0.6 * np.log(p) - 0.4 * (len(text) + 1) * np.log(5) + 0.5 * truth(model, letters, write(text))
            for text, p in all_texts(logp[:, :4]).items()}  # fmt: skip
    found = joint_search(one, one, torch.zeros(1, 5), logp, eos, beam=400, weight=0.6, limit=5, fusion=say)[0]
    best = max(both, key=lambda text: both[text])
    assert tuple(found.ids) == best and found.score == pytest.approx(both[best], abs=1e-4)


def test_words_are_judged_when_they_are_complete_and_characters_of_chinese_at_once():
    assert [completed(t) for t in ("the ca", "the cat ", "今天天", "今天abc", "zhong1 guo", "x", "好\ufffd")] == [
        "the ", "the cat ", "今天天", "今天", "zhong1 ", "", "好"]  # fmt: skip
    codec = TextCodec.fit(LINES * 4, "bpe", 300)
    model = language_model(codec)
    say = Fusion(TextScorer(model, codec), lambda ids: "".join(map(chr, ids)), 1.0)
    cut, same, whole = [ord(c) for c in "the ca"], [ord(c) for c in "the cats"], [ord(c) for c in "the cat "]
    a, b, c = say.scores([cut, same, whole])
    assert a == b == pytest.approx(truth(model, codec, "the"), abs=1e-4)
    assert c == pytest.approx(truth(model, codec, "the cat"), abs=1e-4)
    assert say.scores([cut], whole=True)[0] == pytest.approx(truth(model, codec, "the ca"), abs=1e-4)
