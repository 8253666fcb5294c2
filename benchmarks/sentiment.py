"""Sentiment of Chinese reviews with no weights from elsewhere: ours with and without our own pretraining, and TF-IDF.

    python benchmarks/sentiment.py [--json FILE] [--minutes N] [--seeds N] [--out FOLDER]

Hotel reviews (ChnSentiCorp) and food-delivery reviews (waimai 10k) of $MULTIHEAD_DATA, by the recipes as they ship:
recipes/language/text-classification-pretraining.yaml, which reads the training texts of both and no label, then
hotel.yaml and waimai.yaml with as many seeds as asked for, each from the pretrained weights and from fresh ones, the
same number of steps; the recipe's own figure is that of the weights it starts from. The peer is scikit-learn's logistic
regression on tf-idf of 1 to 3 characters, its strength chosen on the validation rows.

All figures are of the test rows, which nothing was chosen on. Intervals are of 95 %: of an accuracy over the rows; of a
difference over rows drawn in pairs and, where there are several, over seeds. With --out the runs are kept, and the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import yaml
from _common import Aim, arguments, finish

from multihead.data.rows import open_rows
from multihead.demo import tfidf
from multihead.recipe import load
from multihead.task import find
from multihead.train import train

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "language"
PRETRAINING = RECIPES / "text-classification-pretraining.yaml"
SETS = ("hotel", "waimai")
TARGET = 0.91
DRAWS = 10_000


def interval(right: np.ndarray, other: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean of `right` (seeds, rows), or of it less `other` (seeds, rows), with its 95 % bootstrap interval.

    Rows are drawn in pairs; seeds, where there are several, each side's by themselves.
    """
    rng, sides = np.random.default_rng(0), [right] if other is None else [right, other]
    rows, figures = right.shape[1], np.zeros(DRAWS)
    for i in range(DRAWS):
        drawn = rng.integers(rows, size=rows)
        means = [side[rng.integers(len(side), size=len(side))].mean(0)[drawn].mean() for side in sides]
        figures[i] = means[0] - (means[1] if other is not None else 0.0)
    value = float(right.mean() - (0.0 if other is None else other.mean()))
    low, high = np.quantile(figures, (0.025, 0.975))
    return value, float(low), float(high)


def shown(figures: tuple[float, float, float], sign: str = "") -> str:
    return f"{figures[0]:{sign}.3f} ({figures[1]:{sign}.3f} … {figures[2]:{sign}.3f})"


class Bench:
    """The runs of one benchmark, in a folder."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = folder, scale
        self.sizes: list[str] = []

    def run(self, recipe: Path, name: str, *overrides: str) -> tuple[Any, float]:
        """A trained run and the seconds its training took."""
        steps = max(1, round(load(recipe, overrides, find=find).train.steps * self.scale))
        began = time.perf_counter()
        made = train(recipe, [*overrides, f"train.steps={steps}"], self.folder / name, progress=False)
        return made, time.perf_counter() - began

    def pretrained(self) -> float:
        """Seconds of the pretraining, whose sizes the fresh runs take too."""
        run, seconds = self.run(PRETRAINING, "pretrained")
        model = run.recipe.plain()["model"]
        self.sizes = [f"model.{key}={json.dumps(value)}" for key, value in model.items() if value is not None]
        self.sizes.append(f"options.vocab_size={run.recipe.options.vocab_size}")
        return seconds

    def right(self, which: str, seed: int, pretrained: bool) -> tuple[np.ndarray, Any, float]:
        """Which test rows a run has right, the run, and its training seconds."""
        start = [f"model.from={json.dumps(str(self.folder / 'pretrained'))}"]
        if not pretrained:  # the same sizes
            start = ["model.from=null", *self.sizes]
        name = f"{which}-{'pretrained' if pretrained else 'fresh'}-{seed}"
        run, seconds = self.run(RECIPES / f"{which}.yaml", name, *start, f"seed={seed}")
        rows = list(run.store("test").rows())
        given = [answer["label"] for answer in run.predict([row["text"] for row in rows])]
        return np.array([a == row["label"] for a, row in zip(given, rows, strict=True)]), run, seconds


def texts(run: Any) -> dict[str, list[tuple[str, str]]]:
    """Text and label of each row of a run's parts."""
    rows = {part: run.store(part).rows() for part in ("valid", "test")}
    rows["train"] = open_rows(run.recipe.data.train, run.task.columns)
    return {part: [(row["text"], row["label"]) for row in some] for part, some in rows.items()}


def compare(bench: Bench, which: str, seeds: int) -> tuple[list[Aim], dict[str, Any]]:
    """All runs on one set of reviews; its lines of the table."""
    right: dict[bool, np.ndarray] = {}
    spent: dict[bool, float] = {}
    for pretrained in (True, False):
        found = [bench.right(which, seed, pretrained) for seed in range(seeds)]
        right[pretrained] = np.stack([one[0] for one in found])
        spent[pretrained] = found[0][2]
        run = found[0][1]
        print(which, "pretrained" if pretrained else "fresh", *(f"{one[0].mean():.4f}" for one in found), flush=True)
    parts = texts(run)
    peer = np.array([a == b for a, (_, b) in zip(tfidf(parts), parts["test"], strict=True)])[None]
    shipped = right["from" in yaml.safe_load((RECIPES / f"{which}.yaml").read_text("utf-8"))["model"]]
    ours, mean = interval(shipped[:1]), interval(right[True])
    ahead, helps = interval(shipped[:1], peer), interval(right[True], right[False])
    aims = [
        Aim(f"{which}: accuracy of the recipe", float(peer.mean()), shown(ours), "of test rows", f"ours ≥ {TARGET}",
            ours[0] >= TARGET),
        Aim(f"{which}: ahead of TF-IDF", None, shown(ahead, "+"), "of test rows", "> 0", ahead[0] > 0),
        Aim(f"{which}: pretrained, mean of {seeds}", f"{right[False].mean():.3f} fresh", shown(mean), "of test rows",
            "none", True),
        Aim(f"{which}: pretraining helps by", None, shown(helps, "+"), "of test rows", "> 0", helps[0] > 0),
    ]  # fmt: skip
    told = {"rows": right[True].shape[1], "tfidf": interval(peer), "recipe": ours, "pretrained": mean,
            "fresh": interval(right[False]), "ahead_of_tfidf": ahead, "pretraining_helps": helps,
            "each_seed": {str(k): v.mean(1).tolist() for k, v in right.items()}, "seconds": spent[True]}  # fmt: skip
    return aims, told


def main() -> int:
    extra = (
        ("--seeds", {"type": int, "default": 3, "metavar": "N", "help": "runs on each side; default 3"}),
        ("--out", {"type": Path, "metavar": "FOLDER", "help": "keep the runs here"}),
        ("--sets", {"nargs": "+", "choices": SETS, "default": list(SETS)}),
    )
    args = arguments(__doc__, minutes=60, extra=extra)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.out or Path(folder), min(1.0, args.minutes / 60))
        told: dict[str, Any] = {"pretraining_seconds": round(bench.pretrained(), 1)}
        aims: list[Aim] = []
        for which in args.sets:
            lines, told[which] = compare(bench, which, args.seeds)
            aims += lines
    return finish(args, aims, told)


if __name__ == "__main__":
    raise SystemExit(main())
