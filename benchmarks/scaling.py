"""What grows with the work and what does not: time with the tokens of a step, memory not with the size of the data.

    python benchmarks/scaling.py [--part time|memory] [--json FILE] [--minutes N]

time: training steps of the recipe text-generation with AdamW on 2¹⁰, 2¹¹ … 2¹⁵ tokens at once, all sizes by turns; the
slope of log time over log tokens, by least squares over the medians. Below 1 a step has fixed costs, above 1 it gets
slower where it should not. With Muon, which is the recipe's own, the slope is printed and not aimed at: its matrix
products are as many in a step of few tokens as in one of many.

memory: the resident memory of a process that trains on a store of 1 GB and of one that trains on 10 GB, after as many
steps in the midst of an epoch. The stores are files with holes: their pages hold zeros and are read all the same, but
nothing is written. Resident memory counts the pages of data that were read as well as what the process itself holds.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "language" / "text-generation.yaml"
CONTEXT, POWERS = 128, range(10, 16)
SLOPE, OPTIMIZERS = (0.95, 1.1), ("adamw", "muon")
SIZES = {"1 GB": 10**9, "10 GB": 10**10}
WITHIN, STEPS, ROW = 0.05, 20, 250_000
PARTS = ("time", "memory")


def overrides(text: Path, **more: Any) -> list[str]:
    return [f"data.train={text}", "data.valid=null", "data.split={valid: 0, test: 0}", f"options.context={CONTEXT}",
            "train.minutes=null", *(f"train.{key}={value}" for key, value in more.items())]  # fmt: skip


def prepared(folder: Path) -> tuple[Path, Path]:
    """A text of 3,000 different characters drawn at random, and the run that was prepared of it."""
    from multihead import prepare

    letters, draw = [chr(0x4E00 + i) for i in range(3000)], random.Random(0)
    text, run = folder / "text.txt", folder / "run"
    text.write_text("".join(letters) + "".join(draw.choices(letters, k=1 << 17)) + "\n", "utf-8")
    prepare.run_step(RECIPE, overrides(text), run)
    return text, run


def trainer(text: Path, run: Path, **more: Any) -> Any:
    from multihead import prepare
    from multihead import recipe as recipes
    from multihead.run import RunFolder
    from multihead.task import find
    from multihead.train import Trainer

    resolved = recipes.load(RECIPE, overrides(text, threads=1, **more), find=find)
    task, folder = prepare.make_task(resolved, RECIPE.parent), RunFolder.open(str(run))
    task.load(folder.file("codec"))
    return Trainer(resolved, task, folder, progress=False)


# -- time --------------------------------------------------------------------------------------------------------------


def grow(args: Any) -> tuple[list[Any], dict[str, Any]]:
    """Milliseconds a step by its tokens, and the slope, for both optimizers."""
    from _common import Aim
    from _pairs import Rounds, stepper, timed

    with tempfile.TemporaryDirectory() as temporary:
        text, run = prepared(Path(temporary))
        sides = {f"{kind} {1 << p}": timed(stepper(trainer(text, run, batch_size=(1 << p) // CONTEXT, optimizer=kind)),
                                           args.clock) for kind in OPTIMIZERS for p in POWERS}  # fmt: skip
        found = Rounds(sides, args.minutes * 60, least=3 if args.full else 1)
    low, high = SLOPE
    aims, times = [], {}
    for kind in OPTIMIZERS:
        taken = {1 << p: found.seconds(f"{kind} {1 << p}") for p in POWERS}
        for tokens, seconds in taken.items():
            print(f"  {kind} {tokens:6} tokens: {seconds * 1e3:8.1f} ms, {seconds / tokens * 1e6:6.1f} µs a token")
        logs = [math.log(t) for t in taken], [math.log(s) for s in taken.values()]
        slope, times[kind] = statistics.linear_regression(*logs).slope, taken
        aimed = kind == OPTIMIZERS[0]
        aims.append(Aim(f"time of a step over its tokens, 2^{POWERS[0]} to 2^{POWERS[-1]}, {kind}", None, slope,
                        "slope of the logs", f"{low:g} to {high:g}" if aimed else "printed",
                        not aimed or low <= slope <= high))  # fmt: skip
    return aims, {"seconds_by_tokens": times}


# -- memory ------------------------------------------------------------------------------------------------------------


def sparse(folder: Path, size: int) -> None:
    """A store of `size` bytes of ids that takes next to no disk: its values are holes."""
    import numpy as np

    folder.mkdir(parents=True)
    total = size // 4
    rows = -(-total // ROW)
    with open(folder / "ids.bin", "wb") as values:
        values.truncate(4 * total)
    np.minimum(np.arange(rows + 1, dtype="<i8") * ROW, total).tofile(folder / "ids.offsets.bin")
    np.full(rows, 3 * ROW, dtype="<i8").tofile(folder / "bytes.bin")
    about = {"bytes": {"dtype": "<i8", "ragged": False, "trailing": [], "total": rows},
             "ids": {"dtype": "<i4", "ragged": True, "trailing": [], "total": total}}  # fmt: skip
    index = {"version": 1, "rows": rows, "keys": about, "raw_bytes": None}
    (folder / "index.json").write_text(json.dumps(index), "utf-8")


def resident(text: str, run: str) -> dict[str, int]:
    """In a process of its own: bytes resident after steps on the run's store, all of them and those of its own."""
    import torch
    from memory import resident as line

    torch.set_num_threads(1)
    one = trainer(Path(text), Path(run))
    for step in range(1000, 1000 + STEPS):
        one._update(step)
    return {"resident": line("VmRSS"), "own": line("RssAnon"), "rows": len(one.examples)}


def hold(args: Any) -> tuple[list[Any], dict[str, Any]]:
    """Resident memory with little data and with much."""
    from _common import Aim

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        text, run = prepared(Path(temporary))
        for name, size in SIZES.items():
            store = run / "data" / "train"
            store.rename(Path(temporary) / f"before {name}")
            sparse(store, size)
            done = subprocess.run([sys.executable, __file__, "--child", str(text), str(run)], capture_output=True,
                                  text=True, check=False)  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            seen = found[name]
            print(f"  {name}, {seen['rows']:,} windows: {seen['resident'] / 1e6:.1f} MB resident, of those its own "
                  f"{seen['own'] / 1e6:.1f}", flush=True)  # fmt: skip
    few, many = (found[name]["resident"] / 1e6 for name in SIZES)
    return [Aim("resident memory, 1 GB of data and 10 GB", few, many, "MB", f"within {WITHIN:.0%} of each other",
                abs(many / few - 1) <= WITHIN)], {"memory": found}  # fmt: skip


def main() -> int:
    if "--child" in sys.argv[1:2]:
        print(json.dumps(resident(*sys.argv[2:4])))
        return 0
    from _common import arguments, finish

    args = arguments(__doc__, 4, [("--part", {"choices": PARTS, "help": "only this part"})])
    aims, seen = [], {}
    for part, work in zip(PARTS, (grow, hold), strict=True):
        if args.part in (None, part):
            more, told = work(args)
            aims, seen = [*aims, *more], {**seen, **told}
    return finish(args, aims, seen)


if __name__ == "__main__":
    sys.exit(main())
