"""Where pictures are drawn in the latents of an autoencoder: how it is learned, kept and asked.

It is a codec like any other: learned in prepare from the training pictures, saved beside the run's other codecs, and
the only road between pixels and what the model sees. So the one training loop, its checkpoints and averages know no
more of it than of a tokenizer.

Legend: n pictures, C channels, S side, N times smaller, G = S / N, Z channels of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multihead.codec.image import ImageCodec
from multihead.errors import UserError, tr
from multihead.runtime import checkpoint, device, optim
from multihead.runtime.log import Progress
from multihead.tasks.vision._drawn import bytes_of
from multihead.transformer.autoencoder import Autoencoder, autoencoder_loss

FILE = "autoencoder.safetensors"
PIECE, BATCH = 32, 32
"""It learns from so many pieces of pictures at a time, of so many pixels a side."""
RATE, WARMUP, DIVERGENCE = 4e-3, 50, 1e-4
HELD = 1 << 28
"""Bytes of pictures that are held while it learns."""
AT_ONCE = 1 << 20
"""Pixels that are encoded or decoded side by side."""
ROUNDING = 1 / 12
"""What rounding to whole grey levels leaves: the mean of its squared error, in levels."""
Say = Callable[[int, float], None]


def values(pictures: Tensor) -> Tensor:
    """uint8 → values from −1 to 1."""
    return pictures.float() / 127.5 - 1


class Latents:
    """Pictures, uint8 (n, C, S, S) ↔ latents (n, Z, G, G) of mean 0 and deviation 1, by a trained autoencoder."""

    def __init__(self, net: Autoencoder) -> None:
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def learn(cls, pictures: Iterable[str], codec: ImageCodec, options: Any, seed: int) -> Latents:
        """Train one on pictures (data URIs, evenly taken from the training data, damaged ones passed over)."""
        held = np.stack(list(_decoded(pictures, codec)))
        where = device.choose_device()
        with Progress(options.latent_steps, unit=tr("pieces", "图块")) as bar:
            bar.say(tr(f"learning an autoencoder from {len(held):,} pictures, {options.latent_steps} steps",
                       f"用 {len(held):,} 张图片学习自编码器，共 {options.latent_steps} 步"))

            def say(step: int, loss: float) -> None:
                bar.advance(step, BATCH, loss=loss)

            return cls(trained(held, options.latent, options.latent_channels, options.latent_steps, seed, where, say,
                               options.flip))

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (n, C, S, S) → float32 (n, Z, G, G)."""
        where = self.net.mean_Z.device
        parts = _parts(torch.from_numpy(np.array(pictures)))
        with torch.no_grad(), torch.autocast(where.type, enabled=False):
            return torch.cat([self.net.encode(values(part.to(where))).cpu() for part in parts]).numpy()

    def decode(self, z: Tensor) -> Tensor:
        """Latents (n, Z, G, G) → values from −1 to 1, (n, C, S, S), on the device of the latents."""
        self.net.to(z.device)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return torch.cat([self.net.decode(part.float()) for part in _parts(z, self.net.shrink)]).clamp(-1, 1)

    def rebuilt(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures as the autoencoder gives them back: uint8 (n, C, S, S)."""
        return bytes_of(self.decode(torch.from_numpy(self.encode(pictures)).to(self.net.mean_Z.device)))

    def save(self, folder: Path) -> None:
        """Write ``autoencoder.safetensors`` into `folder`."""
        checkpoint.save_weights(folder / FILE, self.net)

    @classmethod
    def load(cls, folder: Path, channels: int, options: Any) -> Latents:
        """Read what ``save`` wrote. UserError where it is missing, altered, or of other options."""
        net = Autoencoder(channels, options.latent, options.latent_channels)
        checkpoint.load_model(net, checkpoint.load_weights(folder / FILE), str(folder / FILE))
        return cls(net)


def trained(
    pictures: np.ndarray, shrink: int, latent_channels: int, steps: int, seed: int,
    where: torch.device | str = "cpu", say: Say = lambda step, loss: None, flip: bool = False,
) -> Autoencoder:
    """An autoencoder of pictures, uint8 (n, C, S, S): with AdamW, by a rate that falls to nothing, on pieces of them.

    The same seed gives the same weights (on a CPU with as many threads).
    """
    rng, where = np.random.default_rng([seed, shrink]), torch.device(where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Autoencoder(pictures.shape[1], shrink, latent_channels).to(where)
    optimizer = optim.build(net, optimizer="adamw", lr=RATE, betas=(0.9, 0.99))
    side = min(pictures.shape[2], max(PIECE, 4 * shrink))
    warmup = min(WARMUP, steps // 10)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for step in range(steps):
            x = values(torch.from_numpy(_pieces(pictures, side, rng, flip)).to(where))
            noise = rng.standard_normal((len(x), latent_channels, side // shrink, side // shrink), dtype=np.float32)
            loss = autoencoder_loss(net, x, torch.from_numpy(noise).to(where), DIVERGENCE)
            loss.backward()
            optim.clip(net.parameters(), 1.0)
            optim.set_lr(optimizer, optim.lr_scale(step, steps=steps, warmup=warmup))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            say(step + 1, float(loss.detach()))
        _measure(net, pictures)
    return net


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of pictures, uint8 (n, C, S, S) each: decibels (n,), at most 58.9, since grey levels
    are whole numbers."""
    wrong = ((one.astype(np.float64) - other) ** 2).reshape(len(one), -1).mean(1)
    return 10 * np.log10(255**2 / np.maximum(wrong, ROUNDING))


def every(total: int, codec: ImageCodec) -> int:
    """Each how-many-th of so many pictures are to be learned from, for memory's sake."""
    return max(1, -(-total * codec.channels * codec.size**2 // HELD))


def _decoded(pictures: Iterable[str], codec: ImageCodec) -> Iterator[np.ndarray]:
    for picture in pictures:
        try:
            yield codec.encode(picture)
        except UserError:
            continue


def _pieces(pictures: np.ndarray, side: int, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """Pieces of pictures drawn at random, from places drawn at random: uint8 (BATCH, C, side, side)."""
    room = pictures.shape[2] - side + 1
    found = []
    for i, top, left, turn in zip(rng.integers(len(pictures), size=BATCH), *rng.integers(room, size=(2, BATCH)),
                                  rng.random(BATCH), strict=True):
        piece = pictures[i, :, top : top + side, left : left + side]
        found.append(piece[:, :, ::-1] if flip and turn < 0.5 else piece)
    return np.stack(found)


@torch.no_grad()
def _measure(net: Autoencoder, pictures: np.ndarray) -> None:
    """Mean and deviation of each latent channel over the pictures."""
    where, count = net.mean_Z.device, 0
    total, squares = (torch.zeros(net.latent_channels, dtype=torch.float64) for _ in range(2))
    for part in _parts(torch.from_numpy(pictures)):
        z = net.posterior(values(part.to(where)))[0].double().cpu()
        total, squares = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3))
        count += z[:, 0].numel()
    mean = total / count
    net.measure(mean.to(where), (squares / count - mean.square()).clamp(min=0).sqrt().to(where))


def _parts(x: Tensor, shrink: int = 1) -> Iterator[Tensor]:
    """Some at a time of pictures, or of what is `shrink` times smaller."""
    size = max(1, AT_ONCE // (x.shape[-1] * shrink) ** 2)
    return (x[start : start + size] for start in range(0, len(x), size))
