"""The small network from frames to waveforms against Griffin-Lim, on English prompts that it did not learn from.

It learns alone, from the 255 training recordings of one speaker, for so many minutes; then the 35 validation recordings
go through frames and back: by 60 rounds of Griffin-Lim, by the network, and by both. Printed: mel-cepstral distance to
the real recordings (dB, frame by frame along the best path) with a bootstrap interval of the difference, and the
real-time factor. The network would be the default where it is nearer.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _common import Aim, arguments, finish
from text_to_speech import DATA

BATCH, RATE_OF_LEARNING = 16, 1e-3


def recordings(part: str) -> list[np.ndarray]:
    """(N,) int16 at 16 kHz each."""
    from multihead.codec.audio import decoded
    from multihead.data.audio import from_uri
    from multihead.data.rows import open_rows
    from multihead.tasks.speech.text_to_speech import TextToSpeech

    return [decoded(from_uri(row["audio"]))[0] for row in open_rows(str(DATA / f"{part}.tar"), TextToSpeech.columns)]


def learned(codec: Any, sounds: list[np.ndarray], minutes: float, width: int) -> tuple[Any, int]:
    """A vocoder after so many minutes, the mean of its last weights, and its steps."""
    import torch

    from multihead.tasks.speech._vocoder import Vocoder, segment

    torch.manual_seed(0)
    made = Vocoder(torch.from_numpy(codec.mean), torch.from_numpy(codec.std), width)
    kept = torch.optim.swa_utils.AveragedModel(made, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer, rng = torch.optim.AdamW(made.parameters(), RATE_OF_LEARNING, betas=(0.8, 0.99)), np.random.default_rng(0)
    pairs = [tuple(torch.from_numpy(x) for x in codec.both(sound)) for sound in sounds]
    end, start, step = time.perf_counter() + 60 * minutes, time.perf_counter(), 0
    while (now := time.perf_counter()) < end:
        left = (end - now) / (end - start)
        for group in optimizer.param_groups:
            group["lr"] = RATE_OF_LEARNING * min(1.0, (step + 1) / 50, 4 * left)
        chosen = [pairs[i] for i in rng.integers(len(pairs), size=BATCH)]
        frames = torch.tensor([len(mel) for mel, _ in chosen])
        mel, wave = (torch.nn.utils.rnn.pad_sequence([pair[i] for pair in chosen], batch_first=True) for i in (0, 1))
        place = torch.from_numpy(rng.random(BATCH, dtype=np.float32))
        loss = made.errors(*segment(mel, wave, frames, place)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        kept.update_parameters(made)
        step += 1
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    return kept.module.eval(), step


def main() -> int:
    args = arguments(__doc__, 8, [("--width", {"type": int, "default": 192}),
                                  ("--rounds", {"type": int, "default": 8, "help": "of Griffin-Lim behind it"})])
    import torch

    from multihead.codec.audio import RATE
    from multihead.codec.voice import VoiceCodec, encoded, griffin_lim, levelled, log_mel, whole
    from multihead.data.audio import to_uri
    from multihead.metrics.spectra import distortion

    torch.set_num_threads(1)
    sounds = {part: recordings(part) for part in ("train", "valid")}
    codec = VoiceCodec.fit((to_uri(encoded(sound))[0] for sound in sounds["train"]), 80, 40.0)
    made, steps = learned(codec, sounds["train"], args.minutes, args.width)

    def both(frames: np.ndarray, rounds: int) -> np.ndarray:
        x_1TM = torch.from_numpy(frames)[None]
        if not rounds:
            return whole(made(x_1TM)[0].numpy())
        spectra_FT = made.spectra(x_1TM)[0]
        return whole(griffin_lim(spectra_FT.abs(), rounds, spectra_FT=spectra_FT).numpy())

    ways = {"griffin-lim": codec.waveform, "network": lambda f: both(f, 0),
            f"network, {args.rounds} rounds": lambda f: both(f, args.rounds)}
    found: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name, way in ways.items():
            off, seconds, length = [], 0.0, 0
            for sound in sounds["valid"]:
                frames, wave = codec.both(sound)
                start = time.perf_counter()
                again = way(frames.astype(np.float32))
                seconds, length = seconds + time.perf_counter() - start, length + len(again)
                off.append(distortion(log_mel(levelled(again), 80), log_mel(wave.astype(np.float32), 80)))
            found[name] = {"mcd": off, "factor": seconds / (length / RATE)}
    rng, base = np.random.default_rng(0), np.array(found["griffin-lim"]["mcd"])
    aims = []
    for name, row in found.items():
        gap = np.array(row["mcd"]) - base
        low, high = np.quantile(gap[rng.integers(len(gap), size=(2000, len(gap)))].mean(1), (0.025, 0.975))
        shown = f"{np.mean(row['mcd']):.2f} dB ({low:+.2f} to {high:+.2f}), {row['factor']:.3f} of real time"
        aims.append(Aim(name, None, shown, "", "nearer than griffin-lim", name == "griffin-lim" or bool(high < 0)))
    print(f"{steps} steps")
    return finish(args, aims, {"steps": steps, "found": found})


if __name__ == "__main__":
    raise SystemExit(main())
