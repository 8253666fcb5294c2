"""Recordings ↔ log-mel frames that a voice can be made of again, and waveforms as files.

A synthesiser's frames are wider than a recogniser's (50 ms every 12.5 ms): neighbouring windows must overlap by three
quarters for phases to be found that fit them. Loudness is evened out, and silence at both ends cut to a moment.

Legend: N samples, T frames, M mel bands, F frequencies, B recordings of a batch.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from multihead.codec.activity import active, joined, stretches
from multihead.codec.audio import LONGEST, RATE, decoded, filter_bank
from multihead.codec.audio import _needed as needed
from multihead.data.audio import from_uri
from multihead.errors import UserError, tr
from multihead.run import write_json

FILE = "voice.json"
HOP, FFT, WINDOW = 200, 1024, 800
"""A frame every 12.5 ms, each of 50 ms."""
LOUDNESS = 0.1
"""Root mean square of the loud frames of a recording, of 1: −20 dB."""
QUIET = 1e-3
"""Least amplitude in a band that is told apart: 80 dB and more below that of loud vowels."""
BURST, EDGE = 4, 4
"""Frames: a shorter sound is no voice; so many of silence are left around what is."""
Format = Literal["wav", "flac", "mp3", "opus"]
KINDS = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}
_FORMS = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}


# -- spectrograms ------------------------------------------------------------------------------------------------------


def stft(x_BN: Tensor) -> Tensor:
    """Samples (B, N) → complex spectra (B, F, T) of ⌊N / HOP⌋ + 1 frames; silence stands before and after."""
    window = torch.hann_window(WINDOW, device=x_BN.device)
    return torch.stft(x_BN, FFT, HOP, WINDOW, window, center=True, pad_mode="constant", return_complex=True)


def istft(wave_BFT: Tensor, samples: int) -> Tensor:
    """The waveforms (B, samples) whose spectra are nearest to `wave_BFT` (Griffin & Lim 1984, equation 6)."""
    window = torch.hann_window(WINDOW, device=wave_BFT.device)
    return torch.istft(wave_BFT, FFT, HOP, WINDOW, window, center=True, length=samples)


@functools.cache
def bank(mels: int) -> Tensor:
    """The filter bank (M, F)."""
    return torch.from_numpy(filter_bank(mels, fft=FFT))


def log_mel(samples: np.ndarray, mels: int) -> np.ndarray:
    """(N,) from −1 to 1 → natural logarithm of the amplitude in each band, (T, M) float32."""
    amplitude_FT = stft(torch.from_numpy(np.asarray(samples, np.float32))[None])[0].abs()
    return (bank(mels) @ amplitude_FT).clamp(min=QUIET).log().T.numpy()


def amplitudes(mel_TM: Tensor, rounds: int = 60) -> Tensor:
    """Log-mel (T, M) → amplitudes (F, T), not negative, whose bands are nearest to it in the sense of squares, by
    multiplicative updates (Lee & Seung 2001, theorem 1)."""
    bank_MF = bank(mel_TM.shape[1])
    wanted_MT = mel_TM.float().exp().T
    square_FF, start_FT = bank_MF.T @ bank_MF, bank_MF.T @ wanted_MT
    x_FT = start_FT / (bank_MF.sum(0)[:, None] * bank_MF.sum(1).mean()).clamp(min=1e-8)
    for _ in range(rounds):
        x_FT = x_FT * start_FT / (square_FF @ x_FT).clamp(min=1e-8)
    return x_FT


def griffin_lim(
    amplitude_FT: Tensor, rounds: int = 60, momentum: float = 0.99, seed: int = 0, spectra_FT: Tensor | None = None
) -> Tensor:
    """The waveform (N,) whose spectra have nearly these amplitudes: phases are drawn and made to agree with each other
    round by round (Griffin & Lim 1984), each time a step further than they ask for (Perraudin et al. 2013, "A fast
    Griffin-Lim algorithm", algorithm 1).

    Args:
        spectra_FT: complex, with the phases to begin with; None: random ones.
    """
    F, T = amplitude_FT.shape
    samples = (T - 1) * HOP
    turn_FT = torch.rand((F, T), generator=torch.Generator().manual_seed(seed)) * (2 * np.pi)
    angle_FT = torch.polar(torch.ones_like(turn_FT), turn_FT)
    if spectra_FT is not None:
        angle_FT = spectra_FT / spectra_FT.abs().clamp(min=1e-16)
    before_FT = torch.zeros_like(angle_FT)
    for _ in range(rounds):
        agreed_FT = stft(istft((amplitude_FT * angle_FT)[None], samples))[0]
        angle_FT = agreed_FT - before_FT * (momentum / (1 + momentum))
        angle_FT = angle_FT / angle_FT.abs().clamp(min=1e-16)
        before_FT = agreed_FT
    return istft((amplitude_FT * angle_FT)[None], samples)[0]


# -- recordings --------------------------------------------------------------------------------------------------------


def levelled(samples: np.ndarray) -> np.ndarray:
    """(N,) int16 → float32 of one loudness: the frames that only one in ten is louder than have `LOUDNESS`."""
    x_N = samples.astype(np.float32) / 32768
    frames = x_N[: len(x_N) // HOP * HOP].reshape(-1, HOP) if len(x_N) >= HOP else x_N[None]
    loud = float(np.quantile(np.sqrt((frames**2).mean(1)), 0.9))
    return x_N * (LOUDNESS / max(loud, 1e-5))


def spoken(mel_TM: np.ndarray, below: float, pause: float = 0.0) -> np.ndarray:
    """First and last+1 frame of the stretches that are kept, (K, 2): from the first voice to the last, see
    `codec.activity`; silences between longer than `pause` seconds are shortened to it, 0: none is."""
    level_T = (10 * np.log10(np.exp(2 * mel_TM.astype(np.float64)).sum(1))).astype(np.float32)
    return stretches(active(level_T, below, BURST, EDGE), round(pause * RATE / HOP))


def whole(x_N: np.ndarray) -> np.ndarray:
    """A waveform as int16, made softer where it would be clipped."""
    x_N = np.nan_to_num(x_N)
    peak = float(np.abs(x_N).max(initial=0.0))
    return np.rint(np.clip(x_N * min(1.0, 0.98 / max(peak, 1e-9)), -1, 1) * 32767).astype(np.int16)


class VoiceCodec:
    """Recordings (data URIs) ↔ frames (T, M): log-mel with mean 0 and deviation 1 in each band over the training part.

    Args:
        trim: decibels below the loudest frame that count as silence at the ends; 0: nothing is cut.
        pause: seconds to which longer silences between are cut; 0: they stay.
    """

    def __init__(self, mels: int, trim: float, mean: Iterable[float], std: Iterable[float], pause: float = 0.0) -> None:
        self.mels, self.trim, self.pause = mels, trim, pause
        self.mean, self.std = np.asarray(list(mean), np.float32), np.asarray(list(std), np.float32)

    @classmethod
    def fit(cls, recordings: Iterable[str], mels: int = 80, trim: float = 40.0, pause: float = 0.0,
            most: float = 3600.0) -> VoiceCodec:
        """Learn from at most `most` seconds. Damaged recordings are passed over.

        Raises:
            UserError: no recording that can be decoded.
        """
        plain = cls(mels, trim, np.zeros(mels), np.ones(mels), pause)
        total, squares, count = np.zeros(mels), np.zeros(mels), 0
        fault: UserError | None = None
        for recording in recordings:
            try:
                mel_TM = plain.encode(recording, 60.0).astype(np.float64)
            except UserError as error:
                fault = fault or error
                continue
            total, squares, count = total + mel_TM.sum(0), squares + (mel_TM**2).sum(0), count + len(mel_TM)
            if count * HOP > most * RATE:
                break
        if not count:
            raise fault or UserError(tr("there is no recording in the training data", "训练数据里没有录音"))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-2))
        return cls(mels, trim, np.round(mean, 5), np.round(std, 5), pause)

    def encode(self, recording: str, longest: float = LONGEST) -> np.ndarray:
        """A data URI → frames (T, M) float16. UserError as `codec.audio.decoded`."""
        return self.frames(decoded(from_uri(recording), longest)[0])

    def frames(self, samples: np.ndarray) -> np.ndarray:
        """(N,) int16 at 16 kHz → frames (T, M) float16."""
        return self.both(samples)[0]

    def both(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int16 at 16 kHz → frames (T, M) float16, and the samples that they were made of, of one loudness,
        ((T − 1) · HOP,) float16: those from the middle of the first frame to that of the last."""
        wave_N = levelled(samples)
        mel_TM = log_mel(wave_N, self.mels)
        spans_K2 = spoken(mel_TM, self.trim, self.pause) if self.trim else np.array([[0, len(mel_TM)]])
        wave_N = joined(np.pad(wave_N, (0, HOP)), spans_K2 * HOP)
        mel_TM = joined(mel_TM, spans_K2)
        wave_N = wave_N[: (len(mel_TM) - 1) * HOP]
        return ((mel_TM - self.mean) / self.std).astype(np.float16), wave_N.clip(-60, 60).astype(np.float16)

    def log_mel(self, frames_TM: np.ndarray) -> np.ndarray:
        """Frames → natural logarithm of amplitudes (T, M) float32."""
        return frames_TM.astype(np.float32) * self.std + self.mean

    def waveform(self, frames_TM: np.ndarray, rounds: int = 60) -> np.ndarray:
        """Frames (T, M) → (N,) int16 at 16 kHz, by Griffin-Lim."""
        frames_TM = frames_TM if len(frames_TM) > 1 else np.repeat(frames_TM, 2, 0)
        return whole(griffin_lim(amplitudes(torch.from_numpy(self.log_mel(frames_TM))), rounds).numpy())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``voice.json`` into `folder`."""
        about = {"rate": RATE, "hop": HOP, "window": WINDOW, "fft": FFT, "mels": self.mels, "trim": self.trim,
                 "pause": self.pause, "mean": [round(float(v), 5) for v in self.mean],
                 "std": [round(float(v), 5) for v in self.std]}
        write_json(Path(folder) / FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> VoiceCodec:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        path = Path(folder) / FILE
        try:
            about = json.loads(path.read_text("utf-8"))
            codec = cls(int(about["mels"]), float(about["trim"]), about["mean"], about["std"],
                        float(about.get("pause", 0.0)))
            if len(codec.mean) != codec.mels or len(codec.std) != codec.mels or about["hop"] != HOP:
                raise ValueError("sizes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(path)) from None
        return codec


# -- files -------------------------------------------------------------------------------------------------------------


def encoded(samples: np.ndarray, form: Format = "wav", rate: int = RATE) -> bytes:
    """(N,) int16 as the bytes of a file.

    Raises:
        UserError: soundfile is not installed, or its libsndfile does not write this form.
    """
    if form == "wav":
        from multihead.codec.audio import wav

        return wav(samples, rate)
    soundfile: Any = needed("soundfile")
    container, subtype = _FORMS[form]
    if not soundfile.check_format(container, subtype):
        raise UserError(tr(f"the installed libsndfile {soundfile.__libsndfile_version__} does not write {form}: ask "
                           "for wav or flac, or pip install -U soundfile",
                           f"已安装的 libsndfile {soundfile.__libsndfile_version__} 不能写 {form}："
                           "请改用 wav 或 flac，或运行 pip install -U soundfile"))
    with io.BytesIO() as out:
        soundfile.write(out, samples, rate, format=container, subtype=subtype)
        return out.getvalue()


__all__ = ["HOP", "KINDS", "Format", "VoiceCodec", "amplitudes", "encoded", "griffin_lim", "istft", "log_mel",
           "stft", "whole"]
