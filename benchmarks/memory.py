"""How much memory training takes, as ``multihead build`` foretells it and as it is measured.

    python benchmarks/memory.py [NAME …] [--json FILE] [--minutes N]

Of each recipe, at its true size: what `multihead.costing.step_cost` says before anything is trained, and by how much
the resident memory of a process of its own grew at its peak while it made real steps, the heaviest batch among them.
What had been resident once torch was imported is not counted; all that came after is: the package's own modules, the
code of torch's kernels that was read in, data, tensors, what the allocator lost. The aim: within 15 % of each other.

The recipes are those below; MULTIHEAD_DATA names the folder with their data. Those without data there are left out and
named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAMES = {
    "language": ("tinyshakespeare", "waimai", "tatoeba-en-zh", "fill-mask-passages"),
    "vision": ("fashion-mnist", "cifar10", "emoji"),
    "recommendation": ("movielens-1m", "amazon-beauty", "movielens-100k-ctr", "movielens-latest-small"),
    "speech": ("aishell", "mandarin-syllables", "english-prompts"),
}
STEPS = 3
WITHIN = 0.15


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, VmHWM (its peak), RssAnon, RssFile."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def measure(recipe: str, run: str) -> dict[str, Any]:
    """In a process of its own: bytes that steps of the prepared run take beyond those that torch's import takes."""
    import torch

    base = {key: resident(key) for key in ("VmRSS", "RssAnon", "RssFile")}
    from multihead import costing, prepare
    from multihead import recipe as recipes
    from multihead.run import RunFolder
    from multihead.task import find
    from multihead.train import Trainer

    torch.set_num_threads(1)
    resolved = recipes.load(recipe, ["train.minutes=null", "train.threads=1"], find=find)
    task, folder = prepare.make_task(resolved, Path(recipe).parent), RunFolder.open(run)
    task.load(folder.file("codec"))
    trainer = Trainer(resolved, task, folder, progress=False)
    before, steps = resident("VmRSS"), list(range(STEPS))
    steps[1:1] = [costing.heaviest(resolved, task, trainer.examples)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is to be that of the steps
    for step in steps:
        trainer._update(step)
        if trainer.ema is not None:
            trainer.ema.update()
    return {"peak": resident("VmHWM") - base["VmRSS"], "before": before - base["VmRSS"],
            **{key: resident(key) - base[key] for key in ("RssAnon", "RssFile")}}  # fmt: skip


def foretell(recipe: str, run: str) -> dict[str, Any]:
    """In a process of its own: what ``build`` says of it."""
    from dataclasses import asdict

    from multihead import costing, prepare
    from multihead import recipe as recipes
    from multihead.data.store import Store
    from multihead.run import RunFolder
    from multihead.task import find

    resolved = recipes.load(recipe, ["train.minutes=null", "train.threads=1"], find=find)
    task, folder = prepare.make_task(resolved, Path(recipe).parent), RunFolder.open(run)
    task.load(folder.file("codec"))
    start = time.perf_counter()
    found = costing.step_cost(task, resolved, Store(folder.file("data/train")))
    return {**asdict(found), "needed": found.needed, "seconds": time.perf_counter() - start}


def child(part: str, recipe: Path, run: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--part", part, str(recipe), str(run)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe.stem}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    if "--part" in sys.argv[1:2]:
        print(json.dumps({"measure": measure, "foretell": foretell}[sys.argv[2]](*sys.argv[3:])))
        return 0
    from _common import Aim, arguments, finish

    args = arguments(__doc__, 12, [("names", {"nargs": "*", "help": "recipes; default: all"}),
                                   ("--keep", {"type": Path, "help": "where prepared data is kept, and looked for"})])
    from multihead import prepare
    from multihead.errors import UserError

    places = {name: field for field, names in NAMES.items() for name in names}
    aims, found, absent, start = [], {}, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.names or places:
            if time.perf_counter() - start > args.minutes * 60 and not args.names:
                absent.append(f"{name} (no time left)")
                continue
            recipe, run = RECIPES / places[name] / f"{name}.yaml", (args.keep or Path(temporary)) / name
            try:
                prepare.run_step(recipe, ["train.minutes=null"], run)
            except UserError as error:
                absent.append(f"{name} ({error})")
                continue
            told, seen = child("foretell", recipe, run), child("measure", recipe, run)
            found[name] = {"foretold": told, "measured": seen}
            off = told["needed"] / seen["peak"] - 1
            print(f"{name:24} foretold {told['needed'] / 1e6:7.1f} MB (tensors {told['peak'] / 1e6:.1f}) in "
                  f"{told['seconds']:4.1f} s, measured {seen['peak'] / 1e6:7.1f} MB ({off:+.1%})  "
                  f"before the first step {seen['before'] / 1e6:.0f}, code {seen['RssFile'] / 1e6:.0f}", flush=True)
            aims.append(Aim(f"{places[name]}: {name}", round(seen["peak"] / 1e6, 1), round(told["needed"] / 1e6, 1),
                            "MB", f"within {WITHIN:.0%} of the measured peak", abs(off) <= WITHIN))
    for line in absent:
        print(f"left out: {line}")
    return finish(args, aims, {"recipes": found, "left_out": absent})


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
