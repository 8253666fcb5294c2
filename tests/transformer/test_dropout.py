"""Dropout: bytes compared eight at a time are those compared one by one, and what is left keeps its mean."""

import torch

from multihead.transformer.dropout import at_least, dropout


def test_every_threshold_agrees_with_comparing_bytes():
    words = torch.empty(512, dtype=torch.int64).random_(-(2**63), None)
    words[:32] = torch.arange(256, dtype=torch.uint8).view(torch.int64)  # every byte there is
    for least in range(1, 256):
        assert torch.equal(at_least(words, least).bool(), words.view(torch.uint8) >= least), least


def test_of_what_is_left_every_element_is_scaled_alike():
    x = torch.randn(7, 333)
    y = dropout(x, 0.25)
    assert torch.equal(y[y != 0], (x * (4 / 3))[y != 0])
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.05
