"""Heads turned all at once are those turned pair by pair, and so are their gradients."""

import torch

from multihead.transformer.rotary import heads_turned, rotary_table


def pair_by_pair(x, angles):
    """Each pair (e, e + E/2) as a complex number, times that of its angle."""
    turns = torch.complex(angles[..., 0, :], angles[..., 1, :]).to(torch.complex128)[..., None, :]
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_turned_heads_and_their_gradients():
    B, T, E, sizes = 2, 5, 8, (3, 2, 2)
    x = torch.randn(B, T, sum(sizes), E, dtype=torch.float64, requires_grad=True)
    angles = rotary_table(E, 64, 100.0)[torch.randint(64, (B, T))]
    q, k, v = x.split(sizes, dim=2)
    expected = pair_by_pair(q, angles), pair_by_pair(k, angles), v
    found = heads_turned(x, angles, sizes, kept=1)
    wanted = [torch.randn(B, n, T, E, dtype=torch.float64).transpose(1, 2) for n in sizes]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, wanted), torch.autograd.grad(expected, x, wanted))
