"""The autoencoder: shapes, what it sees of a picture, and its loss against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from multihead.transformer.autoencoder import Autoencoder, autoencoder_loss


@pytest.mark.parametrize(("shrink", "latent_channels", "channels"), [(2, 3, 1), (4, 4, 3), (8, 6, 3), (16, 8, 1)])
def test_latents_are_as_many_times_smaller_as_asked(shrink: int, latent_channels: int, channels: int) -> None:
    torch.manual_seed(0)
    net, x = Autoencoder(channels, shrink, latent_channels, width=8), torch.randn(2, channels, 32, 32)
    z = net.encode(x)
    assert z.shape == (2, latent_channels, 32 // shrink, 32 // shrink) and net.decode(z).shape == x.shape


def test_a_piece_of_a_picture_is_read_as_within_the_whole() -> None:
    torch.manual_seed(0)
    net, x = Autoencoder(3, 4, 4, width=8), torch.randn(1, 3, 128, 128)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)  # so that residuals, which begin as nothing, are seen
    whole, piece = net.encode(x), net.encode(x[:, :, 32:96, 32:96])
    torch.testing.assert_close(piece[:, :, 5:11, 5:11], whole[:, :, 13:19, 13:19], rtol=1e-4, atol=1e-5)


def test_latents_are_scaled_by_what_was_measured_and_decoded_without() -> None:
    torch.manual_seed(0)
    net, x = Autoencoder(1, 2, 2, width=8), torch.randn(3, 1, 8, 8)
    raw, plain = net.posterior(x)[0], net.decode(net.encode(x))
    net.measure(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25]))
    torch.testing.assert_close(net.encode(x)[:, 1], (raw[:, 1] + 1) / 0.25)
    torch.testing.assert_close(net.decode(net.encode(x)), plain)


class Known(nn.Module):
    """Latents of a known distribution, and pictures that are wrong by a known amount."""

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, picture: torch.Tensor) -> None:
        super().__init__()
        self.told, self.picture = (mean, log_variance), picture

    def posterior(self, x: torch.Tensor) -> Any:
        return self.told

    def up(self, z: torch.Tensor) -> torch.Tensor:
        return self.picture


def test_the_loss_is_that_of_values_of_edges_and_of_the_latents() -> None:
    torch.manual_seed(0)
    mean, log_variance, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 8, 8)
    noise = torch.randn(2, 3, 4, 4)
    lighter: Any = Known(mean, log_variance, x + 0.25)  # every value is wrong, no edge
    assert autoencoder_loss(lighter, x, noise, 0.0).item() == pytest.approx(0.25, rel=1e-5)
    ramp = torch.arange(8.0).expand(2, 1, 8, 8)  # wrong by 0 … 7 across, so by 1 between neighbours
    steep: Any = Known(mean, log_variance, x + ramp)
    assert autoencoder_loss(steep, x, noise, 0.0).item() == pytest.approx(3.5 + 0.5, rel=1e-5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    exact: Any = Known(mean, log_variance, x)
    assert autoencoder_loss(exact, x, noise, 2.0).item() == pytest.approx(2 * expected.item(), rel=1e-5)
