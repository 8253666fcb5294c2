"""Recordings → samples at 16 kHz → log-mel spectrograms. The only road from a recording's file to numbers, in training
and in serving.

Decoding is guarded: the container is chosen by the file's first bytes, what a header claims is believed only to refuse,
samples are read, mixed to one channel and resampled block by block, and reading ends at a limit. Needs soundfile, soxr
and, for M4A and WebM, av (the extra ``speech``), imported when the first recording is decoded.

Legend: N samples, T frames, M mel bands, F frequencies, B recordings of a batch.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multihead.data.audio import HEAD, from_uri, kind_of, no_audio
from multihead.errors import UserError, tr
from multihead.run import write_json

FILE = "audio.json"
RATE = 16000
"""Samples a second of everything that is decoded."""
HOP, WINDOW, FFT = 160, 400, 512
"""A frame every 10 ms, each of 25 ms."""
SHORTEST = 0.02
LONGEST = 1800.0
"""Seconds: recordings outside are refused."""
LOUDEST = 4.0
FLOOR = math.log(1e8)
"""80 dB below the loudest of a recording nothing is told apart."""
_BLOCK = 1 << 16
_DEMUXER = {"audio/mp4": "mov", "audio/webm": "matroska", "audio/mpeg": "mp3", "audio/aac": "aac", "audio/ogg": "ogg",
            "audio/wav": "wav"}
_RATES = (2000, 768_000)


def _needed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(tr(f"recordings need {name}: pip install 'multihead[speech]'",
                           f"处理录音需要 {name}：pip install 'multihead[speech]'")) from None


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoded(raw: bytes, longest: float = LONGEST) -> tuple[np.ndarray, int]:
    """A recording's file as (N,) int16 at `RATE`, one channel, and the rate it had.

    Raises:
        UserError: no recording, a video, damaged, silent files of no samples, not finite, shorter than `SHORTEST` or
            longer than `longest` seconds.
    """
    kind = kind_of(raw[:HEAD])
    if not kind:
        raise UserError(no_audio(raw[:HEAD]))
    if kind not in ("audio/mp4", "audio/webm", "audio/aac"):
        try:
            return _samples(_by_soundfile(raw, longest), longest)
        except _Unreadable as error:
            if kind not in _DEMUXER:
                raise _damaged(error) from None
    try:
        return _samples(_by_av(raw, _DEMUXER[kind], longest), longest)
    except _Unreadable as error:
        raise _damaged(error) from None


class _Unreadable(Exception):
    """A library could not decode this file."""


def _damaged(error: BaseException) -> UserError:
    said = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(tr(f"the recording cannot be decoded ({said}); save it anew or remove it",
                        f"录音无法解码（{said}）；请重新保存或删除"))


def _too_long(seconds: float, longest: float) -> UserError:
    return UserError(tr(f"the recording is {seconds:,.0f} seconds or more; at most {longest:,.0f} are read: cut it",
                        f"录音长 {seconds:,.0f} 秒以上；最多读取 {longest:,.0f} 秒：请剪短"))


def _checked_rate(rate: int, channels: int) -> int:
    if not _RATES[0] <= rate <= _RATES[1] or not 1 <= channels <= 64:
        raise UserError(tr(f"its header says {rate:,} samples a second and {channels} channels; read are "
                           f"{_RATES[0]:,} to {_RATES[1]:,} and 1 to 64",
                           f"文件头写着每秒 {rate:,} 个采样、{channels} 个声道；可读取的是 {_RATES[0]:,} 到 "
                           f"{_RATES[1]:,}、1 到 64 个声道"))
    return rate


def _by_soundfile(raw: bytes, longest: float) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks (n,) float32 of the mean over channels, and the rate."""
    soundfile = _needed("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            rate = _checked_rate(file.samplerate, file.channels)
            if file.frames > longest * rate and file.frames < 1 << 62:
                raise _too_long(file.frames / rate, longest)
            while len(block := file.read(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True)):
                yield block.mean(1) if block.shape[1] > 1 else block[:, 0], rate
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # a decoder may raise anything on bytes made to break it
        raise _Unreadable(str(error)) from None


def _by_av(raw: bytes, demuxer: str, longest: float) -> Iterator[tuple[np.ndarray, int]]:
    """As `_by_soundfile`, by FFmpeg. The demuxer is named: one that opens other files or addresses is never tried."""
    av = _needed("av")
    av.logging.set_level(av.logging.PANIC)
    try:
        with av.open(io.BytesIO(raw), format=demuxer, options={"protocol_whitelist": ""}) as file:
            pictures = [s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if pictures:
                raise UserError(tr("this is a video; save its sound as a recording (ffmpeg -i it.mp4 -vn sound.m4a)",
                                   "这是视频；请把声音另存为录音（ffmpeg -i it.mp4 -vn sound.m4a）"))
            if not file.streams.audio:
                raise UserError(tr("there is no sound in this file", "这个文件里没有声音"))
            stream = file.streams.audio[0]
            rate = _checked_rate(stream.rate or 0, stream.channels or 0)
            if file.duration and file.duration / av.time_base > longest:
                raise _too_long(file.duration / av.time_base, longest)
            mixed = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in file.decode(stream):
                for part in mixed.resample(frame):
                    yield part.to_ndarray()[0], rate
            for part in mixed.resample(None):
                yield part.to_ndarray()[0], rate
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise _Unreadable(str(error)) from None


def _samples(blocks: Iterator[tuple[np.ndarray, int]], longest: float) -> tuple[np.ndarray, int]:
    soxr = _needed("soxr")
    found: list[np.ndarray] = []
    stream, rate, held, read = None, RATE, 0, 0
    for block, rate in blocks:
        read += len(block)
        peak = float(np.abs(block).max(initial=0.0))
        if not math.isfinite(peak):
            raise UserError(tr("the recording holds samples that are no numbers (NaN or infinite): save it anew",
                               "录音里有不是数的采样（NaN 或无穷）：请重新保存"))
        if peak > LOUDEST:
            raise UserError(tr(f"the recording holds samples of {peak:,.0f}; those of a float file lie between −1 and "
                               "1: scale them", f"录音里有 {peak:,.0f} 这样的采样；"
                               "浮点文件的采样应在 −1 到 1 之间：请缩放"))
        if rate != RATE:
            stream = stream or soxr.ResampleStream(rate, RATE, 1, dtype="float32")
            block = stream.resample_chunk(np.ascontiguousarray(block))
        found.append(_whole(block))
        held += len(block)
        if held > longest * RATE:
            raise _too_long(held / RATE, longest)
    if stream is not None:
        found.append(_whole(stream.resample_chunk(np.zeros(0, np.float32), last=True)))
    if read < SHORTEST * rate:
        raise UserError(tr(f"the recording holds {read} samples ({1000 * read / rate:.1f} ms); {SHORTEST:g} s are the "
                           "least", f"录音只有 {read} 个采样（{1000 * read / rate:.1f} 毫秒）；至少要 {SHORTEST:g} 秒"))
    return np.concatenate(found), rate


def resampling(rate: int) -> Callable[[np.ndarray, bool], np.ndarray]:
    """A function that takes the next samples (n,) int16 of a stream at `rate`, and whether they are its last, and gives
    those at `RATE` that follow from them."""
    if rate == RATE:
        return lambda samples, last: samples
    stream = _needed("soxr").ResampleStream(rate, RATE, 1, dtype="int16")
    return lambda samples, last: stream.resample_chunk(samples, last=last)


def _whole(samples: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """(N,) int16 as the bytes of a WAV file."""
    import wave

    with io.BytesIO() as out:
        with wave.open(out, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.astype("<i2").tobytes())
        return out.getvalue()


# -- spectrograms ------------------------------------------------------------------------------------------------------


def mel_of(hertz: np.ndarray | float) -> np.ndarray:
    """Hertz on Slaney's mel scale (Auditory Toolbox, 1998): straight to 1 kHz, logarithmic above."""
    f = np.asarray(hertz, dtype=np.float64)
    return np.where(f < 1000, f * 3 / 200, 15 + 27 * np.log(np.maximum(f, 1e-9) / 1000) / math.log(6.4))


def hertz_of(mel: np.ndarray) -> np.ndarray:
    """The inverse of `mel_of`."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


@functools.cache
def filter_bank(mels: int, low: float = 0.0, high: float = RATE / 2, rate: int = RATE, fft: int = FFT) -> np.ndarray:
    """Triangles of one area over the frequencies of an FFT, spread evenly on the mel scale: (M, F) float32."""
    edges = hertz_of(np.linspace(mel_of(low), mel_of(high), mels + 2))
    frequency = np.linspace(0, rate / 2, fft // 2 + 1)
    rising = (frequency - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequency) / np.diff(edges)[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return weights.astype(np.float32)


def frames_of(samples: Any) -> Any:
    """How many frames so many samples have (a number, an array or a tensor)."""
    return samples // HOP + 1


def mel_spectrogram(x_BN: Tensor, bank_MF: Tensor) -> Tensor:
    """Samples (B, N) from −1 to 1 → power in each mel band (B, T, M); silence stands before and after."""
    window = torch.hann_window(WINDOW, device=x_BN.device)
    wave_BFT = torch.stft(x_BN, FFT, HOP, WINDOW, window, center=True, pad_mode="constant", return_complex=True)
    return (bank_MF @ (wave_BFT.real.square() + wave_BFT.imag.square())).mT


class LogMel(nn.Module):
    """int16 samples (B, N) with lengths (B,) → normalized log-mel frames (B, T, M), 0 behind each end.

    Of each recording the loudest band counts as 0 dB, what is 80 dB below as silence, and its mean is taken off, so
    that neither loudness nor a quiet background matters; then each band has mean 0 and deviation 1 over the training
    part.
    """

    bank_MF: Tensor
    mean_M: Tensor
    std_M: Tensor

    def __init__(self, mels: int, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        for name, values in (("bank_MF", filter_bank(mels)), ("mean_M", list(mean)), ("std_M", list(std))):
            self.register_buffer(name, torch.as_tensor(np.asarray(values, np.float32)), persistent=False)

    def frames(self, lengths_B: Tensor) -> Tensor:
        """How many frames each recording has."""
        return frames_of(lengths_B)

    def forward(self, samples_BN: Tensor, lengths_B: Tensor) -> Tensor:
        with torch.autocast(samples_BN.device.type, enabled=False), torch.no_grad():
            x_BTM = (mel_spectrogram(samples_BN.float() / 32768, self.bank_MF) + 1e-10).log()
            real_BT1 = (torch.arange(x_BTM.shape[1], device=x_BTM.device) < frames_of(lengths_B)[:, None])[..., None]
            loudest_B11 = x_BTM.masked_fill(~real_BT1, -math.inf).amax((1, 2), keepdim=True)
            x_BTM = x_BTM.maximum(loudest_B11 - FLOOR) * real_BT1
            mean_B11 = x_BTM.sum((1, 2), keepdim=True) / (real_BT1.sum((1, 2), keepdim=True) * x_BTM.shape[2])
            return (x_BTM - mean_B11 - self.mean_M) / self.std_M * real_BT1


class WhisperMel(nn.Module):
    """int16 samples (B, N) with lengths (B,) → log-mel frames (B, T, M) as Whisper hears them (Radford et al. 2022,
    section 2.2): of `window` samples, whatever is there, silence behind it; 80 dB below the loudest is silence too.
    """

    bank_MF: Tensor

    def __init__(self, mels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("bank_MF", torch.from_numpy(filter_bank(mels, fft=WINDOW)), persistent=False)

    def frames(self, lengths_B: Tensor) -> Tensor:
        """How many frames each recording has."""
        return torch.full_like(lengths_B, self.window // HOP)

    def forward(self, samples_BN: Tensor, lengths_B: Tensor) -> Tensor:
        with torch.autocast(samples_BN.device.type, enabled=False), torch.no_grad():
            x_BN = nn.functional.pad(samples_BN.float() / 32768, (0, self.window - samples_BN.shape[1]))
            hann = torch.hann_window(WINDOW, device=x_BN.device)
            wave_BFT = torch.stft(x_BN, WINDOW, HOP, window=hann, pad_mode="reflect", return_complex=True)[..., :-1]
            power_BMT = self.bank_MF @ (wave_BFT.real.square() + wave_BFT.imag.square())
            x_BMT = power_BMT.clamp(min=1e-10).log10()
            x_BMT = x_BMT.maximum(x_BMT.amax((1, 2), keepdim=True) - 8)
            return (x_BMT.mT + 4) / 4


class AudioCodec:
    """Recordings (data URIs) → (N,) int16 at `RATE`; mean and deviation of each mel band, for `LogMel`.

    Args:
        window: samples that are always heard at once, for `WhisperMel`; 0: `LogMel`.
    """

    def __init__(self, mels: int, mean: Iterable[float], std: Iterable[float], window: int = 0) -> None:
        self.mels, self.mean, self.std = mels, [float(v) for v in mean], [float(v) for v in std]
        self.window = window

    @classmethod
    def whisper(cls, mels: int, window: int) -> AudioCodec:
        """That of weights of Whisper, which needs nothing of the data."""
        return cls(mels, np.zeros(mels), np.ones(mels), window)

    @classmethod
    def fit(cls, recordings: Iterable[str], mels: int = 80, most: float = 3600.0) -> AudioCodec:
        """Learn mean and deviation of each band from at most `most` seconds. Damaged recordings are passed over.

        Raises:
            UserError: no recording that can be decoded.
        """
        plain = LogMel(mels, np.zeros(mels), np.ones(mels))
        total, squares, count, seconds = np.zeros(mels), np.zeros(mels), 0, 0.0
        fault: UserError | None = None
        for recording in recordings:
            try:
                samples, _ = decoded(from_uri(recording))
            except UserError as error:
                fault = fault or error
                continue
            samples = samples[: 60 * RATE]
            x_TM = plain(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))[0].double().numpy()
            total, squares, count = total + x_TM.sum(0), squares + (x_TM**2).sum(0), count + len(x_TM)
            seconds += len(samples) / RATE
            if seconds > most:
                break
        if not count:
            raise fault or UserError(tr("there is no recording in the training data", "训练数据里没有录音"))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-2))
        return cls(mels, np.round(mean, 5), np.round(std, 5))

    def encode(self, recording: str, longest: float = LONGEST) -> tuple[np.ndarray, int]:
        """A data URI → (N,) int16 and the rate it had. UserError as `decoded`."""
        return decoded(from_uri(recording), longest)

    def features(self) -> LogMel | WhisperMel:
        """The module from samples to frames."""
        return WhisperMel(self.mels, self.window) if self.window else LogMel(self.mels, self.mean, self.std)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``audio.json`` into `folder`."""
        about = {"rate": RATE, "hop": HOP, "window": WINDOW, "fft": FFT, "mels": self.mels, "mean": self.mean,
                 "std": self.std, "whole": self.window}
        write_json(Path(folder) / FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AudioCodec:
        """Read what ``save`` wrote. UserError where it is missing or broken."""
        path = Path(folder) / FILE
        try:
            about = json.loads(path.read_text("utf-8"))
            codec = cls(int(about["mels"]), about["mean"], about["std"], int(about.get("whole", 0)))
            if len(codec.mean) != codec.mels or len(codec.std) != codec.mels or about["rate"] != RATE:
                raise ValueError("sizes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(path)) from None
        return codec


# -- noise on recordings, in training ----------------------------------------------------------------------------------


def resampled(samples: np.ndarray, speed: float) -> np.ndarray:
    """Played `speed` times as fast, pitch and all (Ko et al. 2015): (N,) → (N / speed,), by straight lines between
    samples, which for speech at 16 kHz is near enough."""
    count = max(1, int(len(samples) / speed))
    return np.interp(np.arange(count) * speed, np.arange(len(samples)), samples).astype(np.int16)


def noisy(samples: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """With noise `decibels` below the recording's own power; its colour between white and brown by chance."""
    colour = rng.uniform(0, 0.95)
    white = rng.standard_normal(len(samples)).astype(np.float32)
    # An echo of one sample colours it enough, at a fraction of the cost of a recursive filter.
    noise = white + colour * np.roll(white, 1)
    power = float(np.mean(samples.astype(np.float32) ** 2))
    scale = math.sqrt(power / 10 ** (decibels / 10) / float(np.mean(noise**2)))
    return np.clip(samples + scale * noise, -32768, 32767).astype(np.int16)


def spec_augment(x_BTM: Tensor, spans: Tensor) -> Tensor:
    """Bands and stretches of time set to 0 (SpecAugment, Park et al. 2019, section 2; without time warping).

    Args:
        spans: (B, S, 4) int: first and last+1 frame, first and last+1 band of each rectangle.
    """
    T, M = x_BTM.shape[1:]
    frame_T, band_M = torch.arange(T, device=x_BTM.device), torch.arange(M, device=x_BTM.device)
    a, b, c, d = spans.to(x_BTM.device)[..., None].unbind(2)
    hit_BST, hit_BSM = (frame_T >= a) & (frame_T < b), (band_M >= c) & (band_M < d)
    hit_BTM = (hit_BST[..., None] & hit_BSM[:, :, None, :]).any(1)
    return x_BTM.masked_fill(hit_BTM, 0.0)


__all__ = ["HOP", "LONGEST", "RATE", "AudioCodec", "LogMel", "WhisperMel", "decoded", "filter_bank", "frames_of",
           "mel_spectrogram", "noisy", "resampled", "resampling", "spec_augment", "wav"]
