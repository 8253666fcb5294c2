"""Speech synthesis: is it understood by a recogniser that is not ours, how far is it from the voice, and how fast?

    python benchmarks/text_to_speech.py [--run DIR] [--json FILE] [--minutes N] [--keep DIR] [--espeak N]
                                        [--vocoder-only]

On the 35 validation prompts of asterisk-allison-en, pocketsphinx (``pip install pocketsphinx``: its wheel carries an
English model; its language is open, so telephone prompts are hard for it) writes down

  (a) the real recordings,
  (b) the real recordings through log-mel frames and Griffin-Lim alone: what the vocoder costs,
  (c) what recipes/speech/english-prompts.yaml, trained for `--minutes` on one thread, makes of their texts.

Word error rates stand with 95 % bootstrap intervals over the recordings; (b) and (c) also beside (a) on the same
resamples. Mel-cepstral distance is of free synthesis against the real recording: cepstra 1 to 13 of 80 log-mel bands,
mean over the best path of dynamic time warping. The real-time factor is the time of synthesis, one text after the
other, over the length of what was made. `--keep` writes ten samples of each kind as WAV files.

Ten minutes of speech are few. With `--espeak N` the model also learns N sentences of tatoeba-cmn-eng's training part
as spoken by espeak-ng (``apt install espeak-ng``), a second voice: they teach it to read, the prompts its own voice.
"""

from __future__ import annotations

import csv
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import _espeak
import numpy as np
from _common import Aim, arguments, finish

from multihead.build import Run, open_run
from multihead.codec.audio import decoded, wav
from multihead.codec.transcript import plain, words
from multihead.codec.voice import VoiceCodec, levelled, log_mel
from multihead.data.audio import from_uri
from multihead.data.columns import Column
from multihead.data.rows import open_rows
from multihead.metrics.spectra import distortion
from multihead.metrics.speech import ErrorRates
from multihead.train import train

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "speech" / "english-prompts.yaml"
DATA = Path(os.environ["MULTIHEAD_DATA"]) / "asterisk-allison-en"
SENTENCES = DATA.parent / "tatoeba-cmn-eng" / "train.tsv.gz"
VOICE, OTHER = "allison", "espeak"
RESAMPLES, SAMPLES = 2000, 10
VOCODER, SPEECH, FACTOR = 0.05, 0.30, 0.5
"""Aims: what (b) and (c) may lie above (a), and the real-time factor."""


def prompts() -> list[dict[str, Any]]:
    """The validation prompts: ``text`` and ``audio``."""
    path = DATA / "valid.tar"
    if not path.is_file():
        raise SystemExit(f"no {path}: set MULTIHEAD_DATA to the folder that holds asterisk-allison-en")
    columns = [Column("audio", "audio", names=("file",)), Column("text", "text")]
    return [dict(row) for row in open_rows([str(path)], columns)]


class Listener:
    """pocketsphinx with the English model of its wheel."""

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise SystemExit("this needs pocketsphinx: pip install pocketsphinx") from None
        self.decoder = Decoder(samprate=16000, loglevel="FATAL")

    def text(self, samples: np.ndarray) -> str:
        """What it hears in (N,) int16 at 16 kHz, a fifth of a second of silence around it."""
        quiet = np.zeros(3200, np.int16)
        self.decoder.start_utt()
        self.decoder.process_raw(np.concatenate((quiet, samples, quiet)).tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr if found else ""


def rates(listener: Listener, sounds: list[np.ndarray], texts: list[str]) -> tuple[ErrorRates, list[str]]:
    heard = [listener.text(samples) for samples in sounds]
    return ErrorRates([plain(one) for one in heard], [plain(text) for text in texts], words), heard


def interval(rate: ErrorRates, beside: ErrorRates, weights: np.ndarray) -> dict[str, float]:
    """Word error rate with its interval, and the interval of what it lies above `beside`."""
    drawn, other = rate.scores(weights)["wer"], beside.scores(weights)["wer"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    under, over = np.quantile(drawn - other, [0.025, 0.975])
    return {"wer": rate.scores()["wer"], "low": float(low), "high": float(high),
            "above": rate.scores()["wer"] - beside.scores()["wer"], "above_low": float(under),
            "above_high": float(over)}


def manifests(folder: Path, count: int) -> list[str]:
    """Prompts and espeak-ng's sentences with a column of voices; what the recipe then reads."""
    for part in ("train", "valid"):
        with tarfile.open(DATA / f"{part}.tar") as archive:
            archive.extractall(folder, filter="data")
        with open(folder / f"{part}.tsv", encoding="utf-8") as file:
            lines = [(row["file"], row["text"], VOICE) for row in csv.DictReader(file, delimiter="\t")]
        if part == "train":
            texts = _espeak.sentences(SENTENCES, 0, 12, 60, count)
            names = _espeak.spoken(texts, folder, "en-us")
            lines += [(name, text, OTHER) for name, text in zip(names, texts, strict=True)]
        with open(folder / f"{part}-voices.tsv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("file", "text", "speaker"), *lines])
    return [f"data.{part}={folder / f'{part}-voices.tsv'}" for part in ("train", "valid")]


def spoken(run: Run, texts: list[str]) -> tuple[list[np.ndarray], float]:
    """A run's speech of each text, and its real-time factor."""
    rows = [{"text": text, **({"speaker": VOICE} if VOICE in run.task.voices else {})} for text in texts]
    run.predict(rows[:1])
    start, sounds = time.perf_counter(), []
    for row in rows:
        sounds.append(decoded(from_uri(run.predict([row])[0]["audio"]))[0])
    return sounds, (time.perf_counter() - start) / (sum(map(len, sounds)) / 16000)


def main() -> int:
    args = arguments(__doc__, 30, [("--run", {"type": Path}), ("--keep", {"type": Path}),
                                   ("--vocoder-only", {"action": "store_true"}),
                                   ("--espeak", {"type": int, "default": 0, "metavar": "N"})])
    rows, listener = prompts(), Listener()
    texts = [row["text"] for row in rows]
    codec = VoiceCodec.fit((row["audio"] for row in rows[:1]), trim=0)
    sounds = {"real": [decoded(from_uri(row["audio"]))[0] for row in rows]}
    # The codec's own mean and deviation cancel out: any recording's will do.
    sounds["vocoded"] = [codec.waveform(codec.frames(samples).astype(np.float32)) for samples in sounds["real"]]
    factor = None
    if not args.vocoder_only:
        with tempfile.TemporaryDirectory() as folder:
            place = args.run or Path(folder) / "run"
            if args.run is None:
                more = manifests(Path(folder), args.espeak) if args.espeak else []
                train(RECIPE, [f"train.minutes={args.minutes}", "train.threads=1", *more], run=place)
            sounds["ours"], factor = spoken(open_run(place, "cpu"), texts)
    found = {name: rates(listener, held, texts) for name, held in sounds.items()}
    weights = np.random.default_rng(0).multinomial(len(rows), [1 / len(rows)] * len(rows), RESAMPLES)
    wer = {name: interval(rate, found["real"][0], weights) for name, (rate, _) in found.items()}
    for name, held in wer.items():
        print(f"{name}: WER {held['wer']:.4f} ({held['low']:.4f} to {held['high']:.4f}); above the real recordings' "
              f"{held['above']:+.4f} ({held['above_low']:+.4f} to {held['above_high']:+.4f})")
    mels = {name: [log_mel(levelled(samples), 80) for samples in held] for name, held in sounds.items()}
    distance = {name: float(np.mean([distortion(a, b) for a, b in zip(held, mels["real"], strict=True)]))
                for name, held in mels.items()}
    print("mel-cepstral distance to the real recordings:", {name: round(value, 2) for name, value in distance.items()})
    for i in range(min(SAMPLES, len(rows))) if args.keep else ():
        args.keep.mkdir(parents=True, exist_ok=True)
        for name, held in sounds.items():
            (args.keep / f"{i:02d}-{name}.wav").write_bytes(wav(held[i]))
    base, aims = wer["real"]["wer"], []
    for name, told, most in (("vocoded", "(b) through mel and Griffin-Lim", VOCODER), ("ours", "(c) ours", SPEECH)):
        if name in wer:
            value = wer[name]["wer"]
            aims.append(Aim(f"WER of pocketsphinx, {told}; peer: (a) real", base, value, "share", f"≤ (a) + {most}",
                            value <= base + most))
    if factor is not None:
        aims.append(Aim("time of synthesis over length", None, factor, "×", f"≤ {FACTOR}", factor <= FACTOR))
    said = [{"text": text, **{name: one[1][i] for name, one in found.items()}} for i, text in enumerate(texts)]
    return finish(args, aims, {"wer": wer, "mel_cepstral_distance": distance, "heard": said})


if __name__ == "__main__":
    raise SystemExit(main())
