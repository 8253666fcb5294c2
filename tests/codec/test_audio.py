"""Recordings of every form come out as the same tone, spectrograms are librosa's, and what is hostile is refused
cheaply."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from multihead.codec import audio
from multihead.codec.audio import LogMel, decoded, filter_bank, mel_spectrogram, wav
from multihead.errors import UserError

sf = pytest.importorskip("soundfile")
FORMS = [("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "MS_ADPCM")]
FORMS += [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]


def tone(rate: int, seconds: float = 1.0, hertz: float = 440) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def pitch(samples: np.ndarray) -> float:
    inner = samples[2000:14000].astype(float)
    return float(np.abs(np.fft.rfft(inner * np.hanning(12000))).argmax() * 16000 / 12000)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_every_form_gives_the_tone_at_16_khz(form, subtype, rate):
    if subtype == "OPUS" and rate == 44100:
        pytest.skip("Opus knows no 44.1 kHz")
    file = io.BytesIO()
    sf.write(file, np.stack([tone(rate), tone(rate)], 1), rate, format=form, subtype=subtype)
    samples, found = decoded(file.getvalue())
    assert found == rate and abs(len(samples) - 16000) < 1200 and samples.dtype == np.int16
    assert abs(pitch(samples) - 440) < 3 and 14000 < np.abs(samples[4000:12000]).max() < 19000


@pytest.mark.parametrize(("form", "kind"), [("mp4", "aac"), ("webm", "libopus"), ("adts", "aac")])
def test_what_soundfile_cannot_read_pyav_does(form, kind):
    samples, rate = decoded(by_av(form, kind))
    assert rate == 48000 and abs(len(samples) - 16000) < 1200 and abs(pitch(samples) - 440) < 3


def by_av(form: str, kind: str, video: bool = False) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        stream = out.add_stream(kind, rate=48000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone(48000).astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        pictures = out.add_stream("mpeg4", rate=5) if video else None
        if pictures is not None:
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
            for packet in pictures.encode(av.VideoFrame(32, 32, "yuv420p")):
                out.mux(packet)
            out.mux(pictures.encode(None))
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def test_spectrograms_are_librosas():
    librosa = pytest.importorskip("librosa", reason="the extra [dev] is not installed")
    wave = np.random.default_rng(0).normal(0, 0.1, 20000).astype(np.float32)
    for mels in (40, 80):
        bank = filter_bank(mels)
        assert np.abs(bank - librosa.filters.mel(sr=16000, n_fft=512, n_mels=mels)).max() < 1e-7
        ours = mel_spectrogram(torch.from_numpy(wave)[None], torch.from_numpy(bank))[0].numpy()
        theirs = librosa.feature.melspectrogram(y=wave, sr=16000, n_fft=512, hop_length=160, win_length=400,
                                                n_mels=mels)  # fmt: skip
        np.testing.assert_allclose(ours, theirs.T, rtol=1e-4, atol=1e-6)


def test_frames_do_not_depend_on_loudness_nor_on_the_batch():
    wave = (np.random.default_rng(0).normal(0, 2000, 5000)).astype(np.int16)
    mel = LogMel(40, np.zeros(40), np.ones(40))
    alone = mel(torch.from_numpy(wave)[None], torch.tensor([5000]))[0]
    batch = torch.zeros(2, 9000, dtype=torch.int16)
    batch[0, :5000], batch[1] = torch.from_numpy(wave), 7
    both = mel(batch, torch.tensor([5000, 9000]))[0]
    assert len(alone) == 5000 // 160 + 1
    torch.testing.assert_close(both[: len(alone)], alone, atol=1e-4, rtol=1e-4)
    assert not both[len(alone) :].any()
    torch.testing.assert_close(mel(torch.from_numpy(wave * 4)[None], torch.tensor([5000]))[0], alone, atol=1e-3, rtol=0)


def header(frames: int, rate: int = 16000, data: bytes = b"", form: int = 1, bits: int = 16) -> bytes:
    size = frames * bits // 8
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", (36 + size) & 0xFFFFFFFF, b"WAVE", b"fmt ", 16, form, 1, rate,
                       rate * bits // 8, bits // 8, bits, b"data", size & 0xFFFFFFFF) + data  # fmt: skip


HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello", "no recording"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
    "no samples": (header(0), "0 samples"),
    "one sample": (header(1, data=b"\1\0"), "1 samples"),
    "not a number": (header(4000, data=np.full(4000, np.nan, "<f4").tobytes(), form=3, bits=32), "no numbers"),
    "not scaled": (header(4000, data=np.full(4000, 3e4, "<f4").tobytes(), form=3, bits=32), "30,000"),
    "rate": (header(4000, rate=7, data=bytes(8000)), "7 samples a second"),
    "cut header": (header(4000)[:30], "cannot be decoded"),
    "noise after magic": (b"fLaC" + bytes(range(256)) * 8, "cannot be decoded"),
    "noise in mp4": (b"\0\0\0\x18ftypM4A " + bytes(range(256)) * 8, "cannot be decoded"),
    "noise in webm": (b"\x1aE\xdf\xa3" + bytes(range(256)) * 8, "cannot be decoded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_recording_is_refused(name):
    raw, said = HOSTILE[name]
    with pytest.raises(UserError, match=said):
        decoded(raw)


def test_a_video_is_refused():
    with pytest.raises(UserError, match="video"):
        decoded(by_av("mp4", "aac", video=True))


def test_a_header_that_claims_too_much_gives_what_is_there_and_one_of_ten_hours_is_refused():
    content = np.rint(tone(16000) * 32767).astype("<i2").tobytes()
    for claim in (1 << 20, 0x7FFFFFFF, 0):
        raw = header(0, data=content)
        raw = raw[:40] + struct.pack("<I", claim) + raw[44:]
        try:
            samples, _ = decoded(raw)
        except UserError as error:  # nothing claimed, nothing there
            assert claim == 0 and "0 samples" in str(error)
        else:
            assert len(samples) == 16000
    silence = io.BytesIO()
    sf.write(silence, np.zeros(8000 * 60, np.int16), 8000, format="FLAC")
    raw = silence.getvalue()  # bits 28 to 63 of the eight bytes at 18 are the number of samples (RFC 9639, section 8.2)
    about = struct.unpack(">Q", raw[18:26])[0] >> 36 << 36
    raw = raw[:18] + struct.pack(">Q", about | 8000 * 36000) + raw[26:]
    tracemalloc.start()
    with pytest.raises(UserError, match="36,000 seconds"):
        decoded(raw)
    with pytest.raises(UserError, match="at most 2"):
        decoded(wav(np.zeros(16000 * 3, np.int16)), longest=2)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_noise_is_as_loud_as_asked_and_speed_is_speed():
    rng = np.random.default_rng(0)
    wave = np.rint(tone(16000) * 20000).astype(np.int16)
    hiss = audio.noisy(wave, 20, rng).astype(float) - wave
    assert 10 * np.log10((wave.astype(float) ** 2).mean() / (hiss**2).mean()) == pytest.approx(20, abs=0.3)
    faster = audio.resampled(wave, 1.1)
    assert len(faster) == 14545 and abs(pitch(np.pad(faster, (0, 2000))) - 484) < 4


def test_spec_augment_hides_rectangles():
    spans = torch.tensor([[[0, 4, 1, 3], [2, 3, 0, 8]]])
    hidden = audio.spec_augment(torch.ones(1, 6, 8), spans)[0] == 0
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[:4, 1:3], expected[2:3, :] = True, True
    assert torch.equal(hidden, expected)
