"""BLEU on Multi30k, English to German, side by side with transformers' Marian class of the same size.

Ours is ``multihead train recipes/language/translation.yaml``, with the time as its budget. The peer is a
`MarianMTModel` of the same width, layers, heads and vocabulary, on the same prepared pairs in batches of the same size,
with the same dropout and label smoothing, trained by torch's AdamW with linear warm-up and decay for the same
wall-clock; it translates by its own ``generate``. Both train at once, one thread each, so that whatever else the
machine does slows both; then each translates test_2016_flickr with 5 beams. BLEU and chrF are sacrebleu's on the texts
as they are.

    --lr       the peer's peak learning rate
    --tune     choose it first: the best of 0.0005, 0.001, 0.002 and 0.004 on the validation set, 3 minutes each
    --run      where ours is kept; default: a folder that goes again
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _common import Aim, arguments, finish

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/language/translation.yaml"
AIM, BEAM, WARMUP = 39.0, 5, 0.06
RATES = (0.0005, 0.001, 0.002, 0.004)


# -- the peer ----------------------------------------------------------------------------------------------------------


def marian(run: Any) -> Any:
    """A `MarianMTModel` of the size of the run's model."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    m, codec = run.recipe.model, run.task.codec
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(
        vocab_size=codec.vocab_size, max_position_embeddings=m.max_length, d_model=m.d_model,
        encoder_layers=m.num_layers, decoder_layers=m.num_layers, encoder_ffn_dim=m.ff_size, decoder_ffn_dim=m.ff_size,
        encoder_attention_heads=m.num_heads, decoder_attention_heads=m.num_heads, activation_function="relu",
        dropout=m.dropout, attention_dropout=m.dropout, activation_dropout=m.dropout, scale_embedding=True,
        init_std=m.d_model**-0.5, pad_token_id=codec.pad, eos_token_id=codec.eos, bos_token_id=codec.bos,
        decoder_start_token_id=codec.bos, forced_eos_token_id=None,
    ))  # fmt: skip
    return model


def train_peer(run: Any, minutes: float, lr: float) -> tuple[Any, dict[str, Any]]:
    """The peer after so many minutes of training, evaluation not counted."""
    import torch
    import torch.nn.functional as F

    from multihead.data.loader import Loader
    from multihead.data.store import Store
    from multihead.runtime import device

    torch.set_num_threads(1)
    model, store, pad = marian(run).train(), Store(run.folder.file("data/train")), run.task.codec.pad
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    loader = Loader(store, run.recipe.train.batch_size, seed=run.recipe.seed, lengths=run.task.length(store))
    precision = device.choose_precision("auto", torch.device("cpu"))
    begin, step, tokens, done = time.monotonic(), 0, 0, 0.0
    while done < 1:
        scale = min(1.0, done / WARMUP + 0.001) * min(1.0, (1 - done) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        batch = run.task.collate([store[int(i)] for i in loader.batch(step)])
        target, mask = batch["target"].long(), batch["ids"] != pad
        with device.autocast(torch.device("cpu"), precision):
            logits = model(
                input_ids=batch["ids"].long(), attention_mask=mask.long(), decoder_input_ids=target[:, :-1]
            ).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), target[:, 1:].flatten(), ignore_index=pad,
            label_smoothing=run.task.options.label_smoothing,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + int((target[:, 1:] != pad).sum())
        done = (time.monotonic() - begin) / 60 / minutes
        if step % 100 == 0:
            print(f"peer: step {step}, loss {float(loss.detach()):.3f}, {done:.0%}", flush=True)
    return model.eval(), {"steps": step, "tokens": tokens, "loss": float(loss.detach())}


def translate_peer(run: Any, model: Any, part: str) -> list[str]:
    """The peer's translations of a part, by its own ``generate``."""
    import torch

    from multihead.data.loader import sequential
    from multihead.data.store import Store

    store, pad = Store(run.folder.file(f"data/{part}")), run.task.codec.pad
    found = [""] * len(store)
    for index in sequential(len(store), 64, run.task.length(store)):
        ids = run.task.collate([store[int(i)] for i in index])["ids"].long()
        with torch.inference_mode():
            rows = model.generate(
                ids, attention_mask=(ids != pad).long(), num_beams=BEAM, max_new_tokens=ids.shape[1] + 40,
                do_sample=False, bad_words_ids=[[pad]],
            )  # fmt: skip
        for i, row in zip(index, rows.tolist(), strict=True):
            found[int(i)] = run.task.target_codec.decode(row[1:])
    return found


def peer(folder: str, minutes: float, lr: float, part: str, out: str) -> None:
    """The peer's process: trains, translates `part`, writes what it found to `out`."""
    from multihead.build import Run
    from multihead.run import RunFolder

    run = Run(RunFolder.open(folder), "cpu")
    model, about = train_peer(run, minutes, lr)
    begin = time.monotonic()
    texts = translate_peer(run, model, part)
    about |= {"lr": lr, "minutes": minutes, "decoding_seconds": time.monotonic() - begin, "texts": texts}
    about["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    Path(out).write_text(json.dumps(about, ensure_ascii=False), "utf-8")


# -- both --------------------------------------------------------------------------------------------------------------


def multihead(*words: str) -> list[str]:
    return [sys.executable, "-m", "multihead", *words]


def peer_command(folder: Path, minutes: float, lr: float, part: str, out: Path) -> list[str]:
    return [sys.executable, __file__, "--side", str(folder), str(minutes), str(lr), part, str(out)]


def settings(minutes: float) -> list[str]:
    return [f"train.minutes={minutes}", "train.steps=1000000", "train.eval_every=null", "train.threads=1"]


def scores(run: Any, part: str, texts: Sequence[str]) -> dict[str, float]:
    from multihead.metrics.translation import TranslationScores

    return TranslationScores(texts, [row["target"] for row in run.store(part).rows()]).scores()


def tune(folder: Path, quiet: dict[str, str]) -> float:
    """The peer's learning rate, by its BLEU on the validation set."""
    from multihead.build import Run
    from multihead.run import RunFolder

    run, found = Run(RunFolder.open(folder), "cpu"), {}
    for lr in RATES:
        out = folder.parent / f"peer-{lr}.json"
        subprocess.run(peer_command(folder, 3, lr, "valid", out), check=True, env=quiet)
        found[lr] = scores(run, "valid", json.loads(out.read_text("utf-8"))["texts"])["bleu"]
        print(f"peer, learning rate {lr}: BLEU {found[lr]:.2f} on the validation set", flush=True)
    return max(found, key=lambda lr: found[lr])


def differences(run: Any, ours: Sequence[str], theirs: Sequence[str], resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of ours minus theirs in BLEU, the sentences resampled in pairs."""
    import numpy as np

    from multihead.metrics.translation import TranslationScores

    references = [row["target"] for row in run.store("test").rows()]
    n = len(references)
    rng = np.random.default_rng(0)
    weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])
    a, b = (TranslationScores(texts, references).scores(weights)["bleu"] for texts in (ours, theirs))
    low, high = np.quantile(a - b, (0.025, 0.975))
    return float(low), float(high)


def compare(folder: Path, minutes: float, lr: float | None) -> tuple[list[Aim], dict[str, Any]]:
    from multihead.build import open_run

    data = os.environ.get("MULTIHEAD_DATA", str(ROOT.parent / "shared" / "data"))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "MULTIHEAD_DATA": data,
             "PYTHONPATH": path}  # fmt: skip
    common = [str(RECIPE), "--run", str(folder), *settings(minutes)]
    subprocess.run(multihead("prepare", *common), check=True, env=quiet)
    lr = tune(folder, quiet) if lr is None else lr
    out = folder.parent / "peer.json"
    begin = time.monotonic()
    other = subprocess.Popen(peer_command(folder, minutes, lr, "test", out), env=quiet)
    subprocess.run(multihead("train", *common), check=True, env=quiet)
    wall = (time.monotonic() - begin) / 60
    subprocess.run(multihead("evaluate", str(folder)), check=True, env=quiet)
    if other.wait():
        raise SystemExit("the peer failed")
    run, theirs = open_run(folder), json.loads(out.read_text("utf-8"))
    measured = json.loads((folder / "metrics.json").read_text("utf-8"))["metrics"]
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["answer"]["text"] for line in lines]
    peers = scores(run, "test", theirs["texts"])
    low, high = differences(run, texts, theirs["texts"])
    bleu = measured["bleu"]
    within = f"BLEU ≥ {AIM:g} ({bleu['low']:.1f} to {bleu['high']:.1f})"
    ahead = bleu["value"] - peers["bleu"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    aims = [
        Aim("test_2016_flickr", peers["bleu"], bleu["value"], "BLEU", within, bleu["value"] >= AIM),
        Aim("ours above Marian", None, ahead, "BLEU", f"> 0 ({low:+.1f} to {high:+.1f})", low > 0),
        Aim("chrF", peers["chrf"], measured["chrf"]["value"], "chrF", "–", True),
        Aim("wall-clock of training", theirs["minutes"], wall, "minutes", "≤ 60", wall <= 60),
    ]
    theirs.pop("texts")
    steps = max(entry["step"] for entry in log)
    return aims, {"peer": {**theirs, **peers}, "ours": {"steps": steps, **measured}, "difference": [low, high]}


def main() -> int:
    extra = [
        ("--lr", {"type": float, "default": 0.002, "help": "the peer's peak learning rate"}),
        ("--tune", {"action": "store_true", "help": "choose it on the validation set first"}),
        ("--run", {"type": Path, "metavar": "FOLDER", "help": "keep our run there"}),
    ]
    args = arguments(__doc__, minutes=55, extra=extra)
    with tempfile.TemporaryDirectory() as folder:
        aims, more = compare(args.run or Path(folder) / "run", args.minutes, None if args.tune else args.lr)
    return finish(args, aims, more)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        peer(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), sys.argv[5], sys.argv[6])
    else:
        raise SystemExit(main())
