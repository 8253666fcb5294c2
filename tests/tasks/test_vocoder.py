"""The small network from frames to waveforms: what it is judged by, that it learns, and that a run speaks with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from multihead.codec import voice
from multihead.codec.audio import RATE, decoded
from multihead.codec.voice import HOP, VoiceCodec, griffin_lim, log_mel, stft
from multihead.data.audio import from_uri
from multihead.tasks.speech._vocoder import SEGMENT, Vocoder, apart, segment
from multihead.train import train
from tests.codec.test_voice import convergence, sung
from tests.tasks.test_text_to_speech import rows


def test_samples_are_those_that_the_frames_were_made_of() -> None:
    samples = np.pad((sung() * 32767).astype(np.int16), 40 * HOP)
    for trim, pause in ((0.0, 0.0), (40.0, 0.0), (40.0, 0.1)):
        codec = VoiceCodec(40, trim, np.zeros(40), np.ones(40), pause)
        frames, wave = codec.both(samples)
        assert np.array_equal(frames, codec.frames(samples)) and len(wave) == (len(frames) - 1) * HOP
        again = log_mel(wave.astype(np.float32), 40)
        assert again.shape == frames.shape
        if not pause:  # where a pause is cut, two edges meet
            assert np.abs(again - frames)[4:-4].mean() < 0.02


def test_the_loss_is_nothing_for_the_real_waveform_and_does_not_hear_phases() -> None:
    x = torch.from_numpy(sung())[None]
    assert float(apart(x, x, 1024, 256)) < 1e-3
    assert float(apart(-x, x, 1024, 256)) < 1e-3 < 0.1 < float(apart(0.5 * x, x, 1024, 256))


def test_griffin_lim_from_the_true_phases_is_there_at_once() -> None:
    true = stft(torch.from_numpy(sung())[None])[0]
    assert convergence(griffin_lim(true.abs(), 1, spectra_FT=true), true.abs()) < 1e-3


def test_segments_are_the_same_moment_of_frames_and_samples() -> None:
    mel = torch.arange(60.0)[None, :, None].expand(2, -1, 3)
    wave = (torch.arange(59 * HOP) / HOP)[None].expand(2, -1)
    frames = torch.tensor([60, 55])
    for place in (0.0, 0.5, 1.0):
        x, y = segment(mel, wave, frames, torch.tensor([place, place]))
        assert x.shape == (2, SEGMENT, 3) and y.shape == (2, (SEGMENT - 1) * HOP)
        assert torch.equal(x[:, 0, 0], y[:, 0]) and (x[:, -1, 0] <= frames - 1).all()


def test_it_begins_with_the_bands_of_the_frames_and_learns() -> None:
    torch.manual_seed(0)
    codec = VoiceCodec(40, 0.0, np.full(40, -3.0), np.full(40, 2.0))
    frames, wave = (torch.from_numpy(x)[None] for x in codec.both((sung() * 32767).astype(np.int16)))
    made = Vocoder(torch.from_numpy(codec.mean), torch.from_numpy(codec.std), 48)
    size = made.spectra(frames)[0].abs().detach()
    bands = (voice.bank(40) @ size).clamp(min=voice.QUIET).log().T
    assert (bands - torch.from_numpy(codec.log_mel(frames[0].numpy()))).abs().median() < 1.0
    assert made(frames).shape == wave.shape
    optimizer, before = torch.optim.AdamW(made.parameters(), 2e-3), float(made.errors(frames, wave).detach())
    rng = np.random.default_rng(0)
    for _ in range(50):
        place = torch.tensor([rng.random()], dtype=torch.float32)
        loss = made.errors(*segment(frames, wave, torch.tensor([frames.shape[1]]), place)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(made.errors(frames, wave).detach()) < 0.75 * before


@pytest.mark.parametrize("rounds", [0, 4])
def test_a_run_speaks_with_it(tmp_path: Path, rounds: int) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)), "utf-8")
    recipe = {"task": "text-to-speech", "name": "tones", "data": {"train": str(tmp_path / "rows.jsonl")},
              "options": {"mels": 20, "text_layers": 1, "samples": 1, "vocoder": "neural", "vocoder_width": 16,
                          "vocoder_rounds": rounds},
              "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
              "train": {"steps": 2, "batch_size": 4, "threads": 1}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run = train(tmp_path / "r.yaml", run=tmp_path / "run", progress=False)
    one, two = (run.predict(["abc"], speed=0.5)[0] for _ in range(2))
    sound, rate = decoded(from_uri(one["audio"]))
    assert one == two and rate == RATE and len(sound) > HOP and np.abs(sound).max() > 0
    metrics = run.evaluate(part="valid", progress=False)["metrics"]
    assert metrics["loss"]["value"] > metrics["frames"]["value"] + metrics["durations"]["value"]
