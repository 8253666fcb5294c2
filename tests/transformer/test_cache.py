"""Cached = uncached, whatever the positions, however rows come, go and are reordered."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from multihead.generation.loop import padded
from multihead.tasks.language.text_generation import LanguageModel
from multihead.transformer.cache import Cache
from multihead.transformer.config import TransformerConfig
from multihead.transformer.trunk import Trunk

VOCABULARY = 50
KINDS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "qk_norm": True},
    {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    {"positions": "sinusoidal", "norm": "layernorm", "norm_position": "after", "activation": "relu", "bias": True},
    {"positions": "none", "activation": "relu2", "norm_position": "after"},
    {"ngrams": (2, 3), "ngram_buckets": 97},
    {"num_kv_heads": 2, "qkv_bias": True, "rope_llama3": (8.0, 1.0, 4.0, 32.0)},
    {"positions": "learned", "activation": "gelu_tanh", "embedding_norm": True, "segments": 2, "bias": True},
]


def build(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=4, max_length=200, **options)
    model = LanguageModel(config, VOCABULARY)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "ngram" in name:
            nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    return model.eval()


@torch.inference_mode()
def last(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The next token's logits without a cache, one row alone: the slow twin."""
    return model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("options", KINDS, ids=str)
@torch.inference_mode()
def test_cached_is_uncached_and_ragged_is_one_by_one(options: dict[str, Any]) -> None:
    model, chance = build(**options), random.Random(1)
    for lengths in ((5, 5, 5), (70, 1, 9), (1,), (64, 63)):
        rows = [[chance.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
        cache, logits = model.start(padded(rows))
        for _ in range(4):
            for row, got in zip(rows, logits, strict=True):
                assert (got - last(model, row)).abs().max() < 1e-4
            new = [chance.randrange(VOCABULARY) for _ in rows]
            for row, token in zip(rows, new, strict=True):
                row.append(token)
            logits = model.step(torch.tensor(new), cache)
        assert cache.lengths == [len(row) for row in rows]


@pytest.mark.parametrize("options", KINDS, ids=str)
@torch.inference_mode()
def test_rows_join_leave_and_are_chosen_at_any_time(options: dict[str, Any]) -> None:
    """A random walk over join, drop, select and step; every row always says what it would say alone."""
    model, chance = build(**options), random.Random(2)
    rows: list[list[int]] = []
    cache: Cache | None = None
    logits = torch.empty(0, VOCABULARY)
    for _ in range(25):
        act = chance.choice(["join", "drop", "select", "step", "step"]) if rows else "join"
        if act == "join" and len(rows) < 7:
            lengths = [chance.choice([1, 3, 40, 70]) for _ in range(chance.choice([1, 2]))]
            more = [[chance.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
            state, new = model.start(padded(more))
            if cache is None:
                cache = state
            else:
                cache.join(state)
            rows, logits = rows + more, torch.cat((logits, new))
        assert cache is not None
        if act == "drop" and len(rows) > 1:
            i = chance.randrange(len(rows))
            cache.drop(i)
            rows[i], logits[i] = rows[-1], logits[-1]
            rows, logits = rows[:-1], logits[:-1]
        if act == "select":
            index = [chance.randrange(len(rows)) for _ in range(chance.choice([1, len(rows), len(rows) + 1]))]
            cache = cache.select(torch.tensor(index))
            rows, logits = [list(rows[i]) for i in index], logits[index]
        if act == "step":
            chosen = [chance.randrange(VOCABULARY) for _ in rows]
            logits = model.step(torch.tensor(chosen), cache)
            rows = [[*row, token] for row, token in zip(rows, chosen, strict=True)]
        assert cache.lengths == [len(row) for row in rows]
        for row, got in zip(rows, logits, strict=True):
            assert (got - last(model, row)).abs().max() < 1e-4


@torch.inference_mode()
def test_rows_join_an_empty_cache_and_the_last_may_leave() -> None:
    model = build()
    cache = Cache(2, [])
    state, _ = model.start(padded([[1, 2, 3], [4]]))
    cache.join(state)
    logits = model.step(torch.tensor([5, 6]), cache)
    assert (logits[1] - last(model, [4, 6])).abs().max() < 1e-4
    cache.drop(0)
    cache.drop(0)
    assert cache.rows == 0


@pytest.mark.parametrize("positions", ["rotary", "none"])
@torch.inference_mode()
def test_a_prompt_read_in_pieces(positions: str) -> None:
    """Several tokens at once into a cache that already holds some, of equal and of different lengths."""
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(d_model=32, num_layers=2, num_heads=4, positions=positions), causal=True)
    x = torch.randn(2, 150, 32)
    whole = trunk(x)
    cache, parts = Cache(2, [0, 0]), []
    for begin, end in ((0, 7), (7, 8), (8, 80), (80, 150)):
        parts.append(trunk(x[:, begin:end], cache=cache))
        cache.advance(end - begin)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
    cache = Cache(2, [0, 0])
    trunk(x[:, :7], cache=cache)
    cache.advance([7, 4])
    more = torch.stack((x[0, 7:12], x[1, 4:9]))
    got = trunk(more, cache=cache)
    assert (got[0] - whole[0, 7:12]).abs().max() < 1e-4
    assert (got[1] - whole[1, 4:9]).abs().max() < 1e-4


@torch.inference_mode()
def test_memories_of_other_lengths_join() -> None:
    """Encoder–decoder rows: the shorter memory is padded and masked."""
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(d_model=32, num_layers=2, num_heads=4), causal=True, cross_attention=True)
    memories, x = [torch.randn(1, n, 32) for n in (3, 8, 5)], torch.randn(3, 6, 32)
    cache = Cache(2, [])
    for row, memory in enumerate(memories):
        alone = Cache(2, [0])
        trunk(x[row : row + 1, :2], memory=memory, cache=alone)
        alone.advance(2)
        cache.join(alone)
    cache.drop(0)
    for t in range(2, 6):
        got = trunk(x[[2, 1], t : t + 1], cache=cache)
        cache.advance(1)
        for row, one in zip((2, 1), got, strict=True):
            whole = trunk(x[row : row + 1, : t + 1], memory=memories[row])
            assert (one[0] - whole[0, -1]).abs().max() < 1e-4


@torch.inference_mode()
def test_a_row_that_leaves_and_comes_back_elsewhere_leaves_nothing_behind() -> None:
    """What a longer row wrote stays in memory; a shorter row in its place must not see it."""
    model = build()
    cache, _ = model.start(padded([[7] * 100, [1, 2]]))
    cache.drop(0)
    late, _ = model.start(padded([[3]]))
    cache.join(late)
    logits = model.step(torch.tensor([4, 5]), cache)
    assert (logits[0] - last(model, [1, 2, 4])).abs().max() < 1e-4
    assert (logits[1] - last(model, [3, 5])).abs().max() < 1e-4
