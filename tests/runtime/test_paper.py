"""The formulas of docs/scale.md: the parameters are those of our own model, on torch's meta device."""

from __future__ import annotations

import pytest
import torch

from multihead.runtime.paper import DECODERS, paper, parameters
from multihead.tasks.language.text_generation import LanguageModel


@pytest.mark.parametrize("name", list(DECODERS))
def test_the_parameters_are_those_of_the_model(name: str) -> None:
    config, vocabulary, tied = DECODERS[name]
    with torch.device("meta"):
        model = LanguageModel(config, vocabulary, tied)
    block, rest = parameters(config, vocabulary, tied)
    assert sum(p.numel() for p in model.parameters()) == config.num_layers * block + rest
    assert sum(p.numel() for p in model.trunk.blocks[0].parameters()) == block


def test_shares_shrink_with_the_processes_and_copies_do_not() -> None:
    config, vocabulary, tied = DECODERS["7B"]
    eight, many = (paper(config, vocabulary, tied, n, 2**22, 8192, 80e9) for n in (8, 512))
    assert eight.state == 64 * many.state and eight.whole == many.whole and eight.activations == many.activations
    copy = paper(config, vocabulary, tied, 8, 2**22, 8192, 80e9, copies=True)
    assert copy.state == 8 * eight.state and copy.whole == 0
    # One process sends nothing, two half of everything; gradients once, and twice in a ring.
    block, rest = parameters(config, vocabulary, tied)
    whole = 32 * block + rest
    assert paper(config, vocabulary, tied, 1, 8192, 8192, 80e9, copies=True).sent == 0
    assert paper(config, vocabulary, tied, 2, 2**22, 8192, 80e9, copies=True).sent == 4 * whole
