"""Sentences a second of translation, side by side with transformers' ``generate``, from the same weights.

A run of ``recipes/language/translation.yaml`` (``--run``, or one trained for a few minutes first), and its weights in
transformers' Pegasus class, which has the same block; both in float32. Sentences of Multi30k's validation set, one at a
time and 32 at a time, greedily and with 5 beams, at most 60 new tokens; and a file of 256, as each is used: ours sorts
by length and takes 64 at a time, as ``multihead predict`` does; ``generate`` takes 32 at a time as they come. Each side
runs in a process of its own, by default with two threads; they take turns; the figure is the median of the ratios of
neighbouring turns. All translations are compared.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _common import Aim, arguments, finish

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MULTIHEAD_DATA", ROOT.parent / "shared" / "data")) / "multi30k"
FILE = 256
CASES = [*((rows, beam) for rows in (1, 32) for beam in (1, 5)), (FILE, 5)]
TURN = {1: 4, 32: 64, FILE: FILE}
"""Sentences of one turn, by rows at a time."""
NEW = 60
TIMES = 3.0


def work(side: str, run: str, threads: int) -> None:
    """One side: reads ``[rows, beam, first]`` lines, answers ``[seconds, ids of each sentence]`` lines."""
    import torch

    from multihead.build import open_run

    torch.set_num_threads(threads)
    opened = open_run(run)
    model: Any = opened.model.float()
    with gzip.open(DATA / "val.en.gz", "rt", encoding="utf-8") as file:
        encoded = [opened.task.encode({"source": line.strip()})["ids"].tolist() for line in file]
    translate = theirs(model) if side == "peer" else ours(model)
    for line in sys.stdin:
        rows, beam, first = json.loads(line)
        chosen = [encoded[(first + i) % len(encoded)] for i in range(TURN[rows])]
        begin = time.perf_counter()
        order, size = list(range(len(chosen))), rows
        if rows == FILE and side == "peer":
            size = 32
        elif rows == FILE:
            order, size = sorted(order, key=lambda i: len(chosen[i])), 64
        found: list[list[int]] = [[]] * len(chosen)
        for start in range(0, len(order), size):
            some = order[start : start + size]
            for i, ids in zip(some, translate([chosen[i] for i in some], beam), strict=True):
                found[i] = ids
        print(json.dumps([time.perf_counter() - begin, found]), flush=True)


def ours(model: Any) -> Any:
    from multihead.generation.beam import beam_search
    from multihead.generation.fast import prepared
    from multihead.generation.loop import padded

    fast = prepared(model, "float32")
    return lambda given, beam: [h[0].ids for h in beam_search(fast, padded(given), model.eos, beam, max_tokens=NEW)]


def theirs(model: Any) -> Any:
    import torch

    from multihead.generation.loop import padded
    from tests.generation.pegasus import pegasus

    peer = pegasus(model)

    def translate(given: list[list[int]], beam: int) -> list[list[int]]:
        batch = padded(given)
        mask = torch.arange(batch["ids"].shape[1]) < batch["lengths"][:, None]
        rows = peer.generate(
            batch["ids"], attention_mask=mask.long(), num_beams=beam, max_new_tokens=NEW, do_sample=False
        )
        return [[t for t in row[1:] if t not in (model.eos, model.pad)] for row in rows.tolist()]

    return translate


class Side:
    """One side's process."""

    def __init__(self, name: str, run: str, threads: int) -> None:
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, "--side", name, run, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)

    def turn(self, rows: int, beam: int, first: int) -> tuple[float, list[list[int]]]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([rows, beam, first]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args} ended")
        seconds, found = json.loads(line)
        return seconds, found

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(run: str, minutes: float, threads: int) -> dict[tuple[int, int], dict[str, Any]]:
    """Rounds of all cases until the time is over, at least three."""
    sides = {name: Side(name, run, threads) for name in ("peer", "ours")}
    found: dict[tuple[int, int], dict[str, Any]] = {
        case: {"peer": [], "ours": [], "ratio": [], "same": 0, "sentences": 0, "differ": []} for case in CASES
    }
    for rows, beam in CASES:
        for side in sides.values():
            side.turn(rows, beam, 0)
    end, rounds = time.monotonic() + minutes * 60, 0
    while rounds < 3 or time.monotonic() < end:
        for rows, beam in CASES:
            first = rounds * TURN[rows]
            order = ("peer", "ours") if rounds % 2 == 0 else ("ours", "peer")
            got = {name: sides[name].turn(rows, beam, first) for name in order}
            case = found[rows, beam]
            for name in sides:
                case[name].append(got[name][0])
            case["ratio"].append(got["peer"][0] / got["ours"][0])
            pairs = list(zip(got["peer"][1], got["ours"][1], strict=True))
            case["same"] += sum(a == b for a, b in pairs)
            case["sentences"] += len(pairs)
            case["differ"] += [pair for pair in pairs if pair[0] != pair[1]][:3]
        rounds += 1
        print(f"round {rounds}, {max(0.0, end - time.monotonic()):.0f} s left", flush=True)
    for side in sides.values():
        side.close()
    return found


def trained(folder: str) -> str:
    """A model of the recipe's shape, trained just long enough that its sentences are sentences."""
    run = str(Path(folder) / "run")
    recipe = str(ROOT / "recipes/language/translation.yaml")
    command = [sys.executable, "-m", "multihead", "train", recipe, "--run", run]
    steps = ["train.minutes=null", "train.steps=250", "train.eval_every=250", "train.ema=null"]
    subprocess.run([*command, *steps], check=True, env={**os.environ, "MULTIHEAD_DATA": str(DATA.parent)})
    return run


def main() -> int:
    extra = [
        ("--run", {"metavar": "FOLDER", "help": "a run of recipes/language/translation.yaml"}),
        ("--threads", {"type": int, "default": 2, "metavar": "N", "help": "threads of each side; default 2"}),
    ]
    args = arguments(__doc__, minutes=4, extra=extra)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.run or trained(folder), args.minutes, args.threads)
    aims = []
    for (rows, beam), case in found.items():
        speed = {side: TURN[rows] / statistics.median(case[side]) for side in ("peer", "ours")}
        ratio = statistics.median(case["ratio"])
        case |= {"sentences_per_second": speed, "median_ratio": ratio}
        name = f"a file of {FILE}" if rows == FILE else f"{rows} at a time"
        aims.append(Aim(
            f"{name}, beam {beam}", speed["peer"], speed["ours"], "sentences/s",
            f"≥ {TIMES:g} ×: {ratio:.2f} ×", ratio >= TIMES,
        ))  # fmt: skip
    same, total = (sum(case[key] for case in found.values()) for key in ("same", "sentences"))
    aims.append(Aim("the same translation", total, same, "sentences", "all", same == total))
    cases = {f"{rows} rows, beam {beam}": case for (rows, beam), case in found.items()}
    return finish(args, aims, {"cases": cases, "new_tokens": NEW, "threads": args.threads})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        raise SystemExit(main())
