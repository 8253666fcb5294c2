"""Mel → waveform, and waveforms as files: against librosa, known signals and decoders."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from multihead.codec import voice
from multihead.codec.audio import RATE, decoded
from multihead.codec.voice import HOP, VoiceCodec, amplitudes, encoded, griffin_lim, istft, levelled, log_mel, stft


def sung(seconds: float = 1.0) -> np.ndarray:
    """A gliding voice-like sound: eight harmonics of 110 to 180 Hz, in two bursts; float32, from −1 to 1."""
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(110 + 70 * t / seconds) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 9))
    return (0.1 * wave * (np.sin(2 * np.pi * 2 * t / seconds) ** 2 > 0.1)).astype(np.float32)


def test_frames_are_those_of_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    theirs = librosa.feature.melspectrogram(y=sung(), sr=RATE, n_fft=voice.FFT, hop_length=HOP,
                                            win_length=voice.WINDOW, n_mels=80, power=1.0, pad_mode="constant")
    expected = np.log(np.maximum(theirs, voice.QUIET)).T
    np.testing.assert_allclose(log_mel(sung(), 80), expected, atol=1e-4)


def test_the_transform_goes_there_and_back() -> None:
    x = torch.from_numpy(sung())[None]
    torch.testing.assert_close(istft(stft(x), x.shape[1]), x, atol=1e-5, rtol=0)


def convergence(wave: torch.Tensor, wanted_FT: torch.Tensor) -> float:
    """Spectral convergence (Sturmel & Daudet 2011): how far the amplitudes of a waveform are from the wanted ones."""
    return float((stft(wave[None])[0].abs() - wanted_FT).norm() / wanted_FT.norm())


def test_griffin_lim_finds_a_waveform_of_these_amplitudes_and_momentum_finds_it_faster() -> None:
    wanted = stft(torch.from_numpy(sung())[None])[0].abs()
    first, plain, fast = (griffin_lim(wanted, rounds, momentum) for rounds, momentum in ((0, 0), (40, 0), (40, 0.99)))
    assert convergence(first, wanted) > 0.5
    assert convergence(fast, wanted) < 0.8 * convergence(plain, wanted) < 0.2
    assert torch.equal(fast, griffin_lim(wanted, 40, 0.99))


def test_amplitudes_have_the_bands_they_were_made_of() -> None:
    mel = torch.from_numpy(log_mel(sung(), 80))
    found = amplitudes(mel)
    assert (found >= 0).all()
    again = (voice.bank(80) @ found).clamp(min=voice.QUIET).log().T
    assert (again - mel).abs().mean() < 0.02


def test_a_recording_survives_frames_and_griffin_lim() -> None:
    samples = (sung() * 32767).astype(np.int16)
    codec = VoiceCodec(80, 0.0, np.full(80, -3.0), np.full(80, 2.0))
    frames = codec.frames(samples)
    again = codec.waveform(frames.astype(np.float32))
    assert abs(len(again) - len(samples)) <= HOP
    real, made = log_mel(levelled(samples), 80), log_mel(levelled(again), 80)
    assert np.abs(real[: len(made)] - made)[real[: len(made)] > -4].mean() < 0.3  # natural logarithms: 2.6 dB


def test_loudness_and_silence_around_do_not_matter() -> None:
    samples = (sung() * 32767).astype(np.int16)
    codec = VoiceCodec(40, 40.0, np.zeros(40), np.ones(40))
    one, other = codec.frames(np.pad(samples, 8 * HOP)), codec.frames(np.pad(samples // 2, 30 * HOP))
    assert abs(len(one) - len(other)) <= 1
    assert abs(float(one.max()) - float(other.max())) < 0.3
    assert np.isfinite(codec.frames(np.zeros(800, np.int16))).all()
    assert np.isfinite(codec.waveform(np.zeros((1, 40), np.float32))).all()


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "opus"])
def test_every_form_is_read_back(form: voice.Format) -> None:
    pytest.importorskip("soundfile")
    samples = (sung() * 32767).astype(np.int16)
    raw = encoded(samples, form)
    again, rate = decoded(raw)
    assert abs(len(again) - len(samples)) <= 0.1 * RATE and rate in (RATE, 48000)
    if form in ("wav", "flac"):
        assert np.array_equal(again, samples)
    else:
        assert len(raw) < len(samples)  # a quarter of the samples' bytes at most
        real, made = (np.abs(np.fft.rfft(x[: len(samples)], 2 * RATE)) for x in (samples.astype(float), again))
        assert np.corrcoef(real[:4000], made[:4000])[0, 1] > 0.95


def test_a_codec_comes_back(tmp_path: object) -> None:
    uri = "data:audio/wav;base64," + base64.b64encode(encoded((sung() * 32767).astype(np.int16))).decode()
    codec = VoiceCodec.fit([uri], 40)
    codec.save(str(tmp_path))
    again = VoiceCodec.load(str(tmp_path))
    assert np.array_equal(codec.encode(uri), again.encode(uri))
    frames = codec.encode(uri).astype(np.float64)
    assert np.abs(frames.mean(0)).max() < 0.01 and np.abs(frames.std(0) - 1).max() < 0.02
