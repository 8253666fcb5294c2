"""The demo's accuracy beside TF-IDF with logistic regression and SnowNLP's own classifier, on the same held-out rows.

    python benchmarks/demo.py [--json FILE] [--minutes N]

Runs ``multihead demo --no-serve`` in a folder of its own. Exits 0 only where ours is at least as accurate as TF-IDF.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from _common import Aim, arguments, finish

from multihead.demo import demo


def main() -> int:
    args = arguments(__doc__, minutes=4)
    with tempfile.TemporaryDirectory() as folder:
        found = demo(args.minutes, folder, serve=False)
    del found["report"]
    ours, tfidf, snownlp = found["sides"]
    aims = [
        Aim("accuracy, peer TF-IDF + logistic regression", tfidf["accuracy"], ours["accuracy"], "of test rows",
            "ours ≥ peer", ours["accuracy"] >= tfidf["accuracy"]),
        Aim("accuracy, peer SnowNLP (trained on the test rows)", snownlp["accuracy"], ours["accuracy"], "of test rows",
            "none", True),
        Aim("all five steps and the comparison", None, found["seconds"], "seconds", "none", True),
    ]  # fmt: skip
    return finish(args, aims, found)


if __name__ == "__main__":
    raise SystemExit(main())
