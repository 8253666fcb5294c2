"""How long a person waits for an answer of the command itself: help, an import, a small run's prediction.

    python benchmarks/startup.py [--json FILE] [--minutes N]

Each line is a process of its own, all of them in turn, again and again for `--minutes`; what counts is the median. Of
`import multihead` with all that training needs, the time of `import torch` alone is taken off, pair by pair. The run
that predicts is trained here: 2 steps of a text-classification of 60 rows.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Aim, arguments, finish

RECIPE = """task: text-classification
data: {train: reviews.csv}
options: {max_tokens: 16}
model: {d_model: 32, num_layers: 1, num_heads: 2, ngrams: []}
train: {steps: 2, batch_size: 8, threads: 1}
evaluate: {bootstrap: 0}
"""
AIMS = {"help": 0.3, "predict": 3.0, "import": 0.1}
LEAST = 5
ALL = "import multihead; multihead.train, multihead.load, multihead.Task, multihead.Transformer"


def seconds(command: list[str], folder: Path, by_cpu: bool) -> float:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime if by_cpu else taken


def main() -> int:
    args = arguments(__doc__, 2)
    program = shutil.which("multihead", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise SystemExit("the command multihead is not installed beside this Python: pip install -e .")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = "".join(f"这是第{i}条评论,{'好' if i % 2 else '坏'}\n" for i in range(60))
        (folder / "reviews.csv").write_text("text,label\n" + rows, "utf-8")
        (folder / "r.yaml").write_text(RECIPE, "utf-8")
        subprocess.run([program, "train", "r.yaml"], cwd=folder, check=True, capture_output=True)
        commands = {
            "help": [program, "--help"],
            "predict": [program, "predict", "runs/r", "房间很干净"],
            "torch": [sys.executable, "-c", "import torch"],
            "all": [sys.executable, "-c", f"import torch; {ALL}"],
        }
        for command in commands.values():
            seconds(command, folder, args.cpu)  # reads the files in
        times: dict[str, list[float]] = {name: [] for name in commands}
        end = time.perf_counter() + 60 * args.minutes
        while min(map(len, times.values())) < (LEAST if args.full else 1) or time.perf_counter() < end:
            for name, command in commands.items():
                times[name].append(seconds(command, folder, args.cpu))
    times["import"] = [ours - torchs for ours, torchs in zip(times["all"], times["torch"], strict=True)]
    found = {name: statistics.median(taken) for name, taken in times.items()}
    said: dict[str, Any] = {"help": "multihead --help", "predict": "multihead predict, a small run",
                            "import": "import of multihead beyond torch's own"}  # fmt: skip
    aims = [Aim(said[name], found["torch"] if name == "import" else None, found[name], "s", f"≤ {most:g} s",
                found[name] <= most) for name, most in AIMS.items()]  # fmt: skip
    return finish(args, aims, {"median_s": found, "repeats": len(times["help"]), "by": "cpu" if args.cpu else "clock"})


if __name__ == "__main__":
    sys.exit(main())
