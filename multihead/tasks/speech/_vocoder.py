"""Frames → waveform by a small network that learns beside the synthesiser: spectra, with their phases, of real frames.

Legend: B recordings, T frames, M mel bands, F frequencies, N samples, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.codec import voice
from multihead.codec.voice import HOP, QUIET

KERNEL, DEPTH = 7, 4
SEGMENT = 48
"""Frames of a recording that one step learns from: 0.6 s."""
RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))
"""Sizes and steps of the spectra that a waveform is judged by."""
LOUDEST = 6.0
"""Natural logarithm of the largest amplitude that is made."""


class Neighbours(nn.Module):
    """(B, T, D) → (B, T, D): each channel over `KERNEL` frames, a norm, two linear maps with GELU between, added to
    what came in (Liu et al. 2022, "ConvNeXt", as in Siuzdak 2023, "Vocos", section 3.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        nn.init.normal_(self.down.weight, std=0.1 * (3 * width) ** -0.5)
        nn.init.zeros_(self.down.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.norm(self.depthwise(x_BTD.mT).mT)
        return x_BTD + self.down(F.gelu(self.up(y_BTD)))


class Vocoder(nn.Module):
    """Normalized log-mel frames (B, T, M) → waveforms (B, (T − 1) · HOP) by amplitudes and phases of spectra and the
    inverse transform (Siuzdak 2023, section 3.2).

    It begins with the amplitudes that a mel band has on the mean and learns what to add to their logarithms.

    Args:
        mean, std: of each band, as in `VoiceCodec`.
    """

    mean_M: Tensor
    std_M: Tensor
    spread_FM: Tensor

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        super().__init__()
        mels, size = len(mean), voice.FFT // 2 + 1
        bank_MF = voice.bank(mels)
        share_FM = bank_MF.T / bank_MF.sum(0)[:, None].clamp(min=1e-6)
        for name, value in (("mean_M", mean), ("std_M", std), ("spread_FM", share_FM / bank_MF.sum(1))):
            self.register_buffer(name, value.float(), persistent=False)
        self.first = nn.Conv1d(mels, width, KERNEL, padding=KERNEL // 2)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Neighbours(width) for _ in range(DEPTH))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * size)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)

    def spectra(self, x_BTM: Tensor) -> Tensor:
        """Complex spectra (B, F, T), in float32: bfloat16 has none."""
        with torch.autocast(x_BTM.device.type, enabled=False):
            return self._spectra(x_BTM.float())

    def _spectra(self, x_BTM: Tensor) -> Tensor:
        start_BTF = ((x_BTM * self.std_M + self.mean_M).exp() @ self.spread_FM.T).clamp(min=QUIET / 10).log()
        h_BTD = self.norm(self.first(x_BTM.mT).mT)
        for block in self.blocks:
            h_BTD = block(h_BTD)
        more_BTF, real_BTF, imaginary_BTF = self.head(self.last(h_BTD)).chunk(3, dim=-1)
        size_BTF = (start_BTF + more_BTF).clamp(max=LOUDEST).exp()
        # A point of the plane instead of an angle, which would jump where it has gone round.
        length_BTF = (real_BTF.square() + imaginary_BTF.square() + 1e-6).sqrt()
        return torch.complex(size_BTF * real_BTF / length_BTF, size_BTF * imaginary_BTF / length_BTF).mT

    def forward(self, x_BTM: Tensor) -> Tensor:
        return voice.istft(self.spectra(x_BTM), (x_BTM.shape[1] - 1) * HOP)

    def errors(self, x_BTM: Tensor, wave_BN: Tensor) -> Tensor:
        """How far the waveforms of frames are from the real ones, (B,): spectra at several resolutions (Yamamoto et
        al. 2020, "Parallel WaveGAN", section 2.2) and log-mel bands."""
        with torch.autocast(x_BTM.device.type, enabled=False):
            made_BN, wave_BN = self(x_BTM), wave_BN.float()
            total_B = torch.stack([apart(made_BN, wave_BN, *one) for one in RESOLUTIONS]).mean(0)
            bank_MF = voice.bank(x_BTM.shape[2]).to(made_BN.device)
            made, real = ((bank_MF @ amplitude(voice.stft(x))).clamp(min=QUIET).log() for x in (made_BN, wave_BN))
            return total_B + (made - real).abs().mean((1, 2))


def apart(made_BN: Tensor, real_BN: Tensor, size: int, step: int) -> Tensor:
    """Spectral convergence and the mean difference of log amplitudes, (B,)."""
    window = torch.hann_window(size, device=made_BN.device)
    made, real = (amplitude(torch.stft(x, size, step, window=window, pad_mode="constant", return_complex=True))
                  for x in (made_BN, real_BN))
    convergence_B = (real - made).square().sum((1, 2)).add(1e-8).sqrt() / real.square().sum((1, 2)).add(1e-4).sqrt()
    return convergence_B + (made.clamp(min=QUIET).log() - real.clamp(min=QUIET).log()).abs().mean((1, 2))


def amplitude(spectra: Tensor) -> Tensor:
    """|x|, with a gradient at 0."""
    return (spectra.real.square() + spectra.imag.square() + 1e-10).sqrt()


def segment(mel_BTM: Tensor, wave_BN: Tensor, frames_B: Tensor, place_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each recording as many frames as the shortest has, `SEGMENT` at most, and their samples.

    Args:
        place_B: where, from 0 (at its beginning) to 1 (at its end).
    """
    length = min(SEGMENT, int(frames_B.min()))
    first_B = ((frames_B - length) * place_B).long()
    at_BT = first_B[:, None] + torch.arange(length, device=mel_BTM.device)
    at_BN = first_B[:, None] * HOP + torch.arange((length - 1) * HOP, device=mel_BTM.device)
    mels = at_BT[..., None].expand(-1, -1, mel_BTM.shape[2])
    return mel_BTM.gather(1, mels), wave_BN.gather(1, at_BN)
