"""Mandarin sentences of two speakers: syllables and characters, beside transformers' Whisper class from nothing.

    python benchmarks/aishell.py [--minutes N] [--steps N] [--units pinyin|char] [--espeak N] [--alone] [--run DIR]
                                 [--cpu] [--json FILE]

Ours is recipes/speech/aishell.yaml on the 450 training recordings (32 minutes) for `--minutes` (60: preparing, training
and evaluating) or `--steps`; the weights are picked on the validation part, and the test part is answered once. The
texts of the parts do not overlap, the two speakers are the same: this says how well syllables of known voices are told
apart in unknown sentences, and nothing of new voices.

`--units char` writes characters instead of syllables with tones. `--espeak N` adds N sentences of tatoeba-cmn-eng's
training part as spoken by espeak-ng to what is learned from.

The peer is `WhisperForConditionalGeneration` from fresh weights, of the recipe's width, depths, heads and dropout, on
the same log-mel frames and units, with its own SpecAugment and positions for the longest recording, in a plain AdamW
loop (1e-3 with 5 % warm-up and a cosine to zero, decay 0.05, clipped at 1, batches of the recipe's size) for the time
that ours took; it answers greedily.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import _espeak
import numpy as np
import torch
from _common import Aim, arguments, finish
from torch import Tensor

from multihead.build import Run, open_run
from multihead.codec.transcript import toneless, words
from multihead.data.columns import Column
from multihead.data.rows import open_rows
from multihead.metrics.intervals import bootstrap
from multihead.metrics.speech import ErrorRates
from multihead.train import train

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "speech" / "aishell.yaml"
DATA = Path(os.environ["MULTIHEAD_DATA"]) / "aishell-2spk"
SENTENCES = DATA.parent / "tatoeba-cmn-eng" / "train.tsv.gz"
MOST, SHARE, RESAMPLES = 0.60, 0.85, 1000
PEER: dict[str, Any] = {"lr": 1e-3, "warmup": 0.05, "weight_decay": 0.05, "clip": 1.0}


def with_espeak(folder: Path, count: int) -> str:
    """A manifest of the training part and of sentences that espeak-ng speaks."""
    with tarfile.open(DATA / "train.tar") as archive:
        archive.extractall(folder, filter="data")
    with open(folder / "train.tsv", encoding="utf-8") as file:
        lines = [(row["file"], row["text"]) for row in csv.DictReader(file, delimiter="\t")]
    texts = _espeak.sentences(SENTENCES, 1, 5, 25, count)
    lines += zip(_espeak.spoken(texts, folder, "cmn"), texts, strict=True)
    with open(folder / "both.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("file", "text"), *lines])
    return str(folder / "both.tsv")


class Whisper:
    """transformers' class in a plain AdamW loop on the rows of a prepared run."""

    def __init__(self, run: Run, budget: float) -> None:
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        torch.manual_seed(0)
        task: Any = run.task
        self.run, self.budget, self.units, self.features = run, budget, task.units, task.codec.features()
        self.rows: dict[str, list[Any]] = {}
        for part in ("train", "test"):
            store = run.store(part)
            self.rows[part] = [store[i] for i in range(len(store))]
        longest = max(len(row["audio"]) for rows in self.rows.values() for row in rows)
        model, options = run.recipe.model, task.options
        self.frames = 2 * math.ceil(self.mel([np.zeros(longest, np.int16)]).shape[2] / 2)
        size = {"layers": 0, "attention_heads": model.num_heads, "ffn_dim": model.ff_size}
        layers = {"encoder": model.num_layers, "decoder": options.decoder_layers}
        shape = {f"{side}_{key}": layers[side] if key == "layers" else value
                 for side in layers for key, value in size.items()}  # fmt: skip
        self.model = WhisperForConditionalGeneration(WhisperConfig(
            vocab_size=self.units.vocab_size, num_mel_bins=options.mels, d_model=model.d_model, dropout=model.dropout,
            max_source_positions=self.frames // 2, max_target_positions=256, pad_token_id=0,
            bos_token_id=self.units.bos, eos_token_id=self.units.eos, decoder_start_token_id=self.units.bos,
            apply_spec_augment=True, mask_feature_prob=0.05, **shape))  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEER["lr"], weight_decay=PEER["weight_decay"])
        self.draw, self.step = np.random.default_rng(0), 0

    def mel(self, recordings: list[np.ndarray]) -> Tensor:
        """(B, mels, T) of (N,) int16 each, silence behind the shorter ones."""
        samples_BN = torch.zeros(len(recordings), max(map(len, recordings)), dtype=torch.int16)
        for row, held in zip(samples_BN, recordings, strict=True):
            row[: len(held)] = torch.from_numpy(np.array(held))
        return self.features(samples_BN, torch.tensor([len(held) for held in recordings])).mT

    def inputs(self, recordings: list[np.ndarray]) -> Tensor:
        x_BMT = self.mel(recordings)
        return torch.nn.functional.pad(x_BMT, (0, self.frames - x_BMT.shape[2]))

    def advance(self, done: float) -> None:
        """One step; `done`: the share of its time that has gone by."""
        rise = PEER["warmup"]
        rate = done / rise if done < rise else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - rise) / (1 - rise))))
        for group in self.optimizer.param_groups:
            group["lr"] = PEER["lr"] * max(rate, 1e-3)
        rows, size = self.rows["train"], self.run.recipe.train.batch_size
        chosen = [rows[i] for i in self.draw.integers(len(rows), size=size)]
        target = [torch.tensor([*row["target"], self.units.eos]) for row in chosen]
        labels = torch.nn.utils.rnn.pad_sequence(target, batch_first=True, padding_value=-100)
        self.model(input_features=self.inputs([row["audio"] for row in chosen]), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), PEER["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def fit(self, clock: Callable[[], float]) -> None:
        self.model.train()
        start = clock()
        while (spent := clock() - start) < self.budget:
            self.advance(spent / self.budget)

    @torch.no_grad()
    def answers(self) -> list[str]:
        """Of the test part."""
        self.model.eval()
        found = []
        for row in self.rows["test"]:
            ids = self.model.generate(input_features=self.inputs([row["audio"]]), max_length=100, do_sample=False)
            found.append(self.units.decode(i for i in ids[0].tolist() if i > self.units.eos))
        return found


def measured(texts: list[str], truths: list[str]) -> dict[str, tuple[float, float, float]]:
    """Error rates of words (syllables), of those without tones, and of characters, each with its interval."""

    def score(answers: Any, rows: Any, weights: np.ndarray | None = None) -> dict[str, Any]:
        bare = ErrorRates([toneless(a) for a in answers], [toneless(t) for t in rows], words).scores(weights)
        return {**ErrorRates(answers, rows, words).scores(weights), "toneless": bare["wer"]}

    return {name: tuple(value) for name, value in bootstrap(score, texts, truths, RESAMPLES).items()}  # type: ignore[misc]


def told(name: str, found: dict[str, tuple[float, float, float]]) -> None:
    said = (f"{key} {value:.3f} ({low:.3f} to {high:.3f})" for key, (value, low, high) in found.items())
    print(f"{name}: {', '.join(said)}", flush=True)


def main() -> int:
    args = arguments(__doc__, 60, [
        ("--steps", {"type": int, "metavar": "N", "help": "steps of ours, instead of what the time allows"}),
        ("--units", {"choices": ["pinyin", "char"], "default": "pinyin", "help": "what is written"}),
        ("--espeak", {"type": int, "default": 0, "metavar": "N", "help": "sentences of espeak-ng to learn from too"}),
        ("--alone", {"action": "store_true", "help": "without the peer"}),
        ("--run", {"type": Path, "help": "a run folder to go on with"}),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder, start = Path(temporary), args.clock()
        wish = [f"train.minutes={args.minutes * SHARE:g}"] if not args.steps else [f"train.steps={args.steps}"]
        wish += [f"options.units={args.units}", *(["train.threads=1"] if args.cpu else [])]
        if args.espeak:
            wish += [f"data.train={with_espeak(folder, args.espeak)}"]
        place = args.run or folder / "run"
        train(RECIPE, wish, run=place)
        run = open_run(place, "cpu")
        task: Any = run.task
        columns = [Column("audio", "audio", names=("file",)), Column("text", "text")]
        rows = [dict(row) for row in open_rows(str(DATA / "test.tar"), columns)]
        texts, truths = [a["text"] for a in run.predict(rows)], [task.text_of(row) for row in rows]
        spent = args.clock() - start
        ours = measured(texts, truths)
        told(f"ours, {spent / 60:.1f} minutes", ours)
        theirs = None
        if not args.alone:
            peer = Whisper(run, spent)
            print(f"parameters: ours {sum(p.numel() for p in run.model.parameters()):,}, "
                  f"peer {sum(p.numel() for p in peer.model.parameters()):,}", flush=True)
            peer.fit(args.clock)
            theirs = measured(peer.answers(), [task.text_of(row) for row in run.store("test").rows()])
            told(f"peer, {peer.step} steps", theirs)
    key = "toneless" if args.units == "pinyin" else "cer"
    what = {"toneless": "syllables without tones", "wer": "syllables", "cer": "characters"}
    name, value = f"aishell, {args.units}: errors of {what[key]}", ours[key][0]
    most = MOST if key == "toneless" else math.inf
    other = None if theirs is None else theirs[key][0]
    aims = [Aim(name, other, value, "share", f"≤ {MOST}, < peer" if key == "toneless" else "< peer",
                value <= most and (other is None or value < other)),
            Aim("time of ours", None, spent, "s", "within the budget", spent <= args.minutes * 60)]  # fmt: skip
    shown = list(itertools.islice(zip(truths, texts, strict=True), 20))
    return finish(args, aims, {"ours": ours, "peer": theirs, "shown": shown})


if __name__ == "__main__":
    raise SystemExit(main())
