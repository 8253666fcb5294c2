"""The next item, leave-one-out, ranked over the whole catalogue: ours beside popularity and item-kNN, in one run.

    python benchmarks/sequential_recommendation.py [beauty|movielens|scale] [--json FILE] [--minutes N] [--run FOLDER]
    python benchmarks/sequential_recommendation.py recbole --python PEER [--steps 300] [--cpu] [--json FILE]

Each user's last item is the test, the one before it validation, all else training; what a user had already is not
ranked. All three sides rank the same test rows of one prepared store by the same code (`multihead.metrics.ranking`).

- popularity: how often an item was chosen in training.
- item-kNN: the cosine of two items' training users, summed over the history (Sarwar et al. 2001). How many neighbours
  of an item count, and how many of the last items of a history, is chosen on validation.
- ours: recipes/recommendation/amazon-beauty.yaml or movielens-1m.yaml through the package, its weights chosen on
  validation, measured once on the test part. Time is training time as the run's log has it, evaluations in it excluded,
  and beside it the whole command with prepare and evaluate.

Intervals are 95 % bootstrap intervals over users. Published for Beauty: SASRec NDCG@10 0.0318 and HR@10 0.0605, TIGER
0.0384 and 0.0648 (Rajput et al. 2023, table 1); for MovieLens-1M's full sequences: SASRec 0.1259 and 0.2392, gSASRec
0.1726 and 0.3003 (asash/gSASRec-pytorch), where the log here lacks each user's last two or three actions.

`scale` learns nothing: it prepares a csv log of ten million interactions (Beauty's, repeated by new users, some items
exchanged by chance) in a process of its own, whose time, processor time and memory it prints, and times the figures of
6,040 users over 3,416 items.

`recbole` asks how long ours takes to do as well as RecBole 1.2.1's SASRec (its own settings: 64 wide, 2 layers,
cross-entropy) after two epochs on Beauty, NDCG@10 of the validation items among all. RecBole runs in a Python of its
own (`python -m venv V; V/bin/pip install recbole==1.2.1`, with torch), one thread each. Of RecBole the training alone
is timed; of ours the whole command with preparation and evaluation, the recipe's settings in so many steps.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from _common import Aim, arguments, finish

from multihead.data.store import Store
from multihead.metrics import ranking
from multihead.runtime.log import read_log
from multihead.train import train

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "recommendation"
SETS: dict[str, dict[str, Any]] = {
    "beauty": {"recipe": "amazon-beauty.yaml", "ndcg": 0.035, "hr": 0.062, "minutes": 30.0},
    "movielens": {"recipe": "movielens-1m.yaml", "ndcg": 0.16, "hr": 0.28, "minutes": 60.0},
}
NEIGHBOURS = (20, 100, 500)
LAST = (1, 5, 1000)
BATCH = 256
RESAMPLES = 1000
Places = tuple[np.ndarray, np.ndarray, np.ndarray]


def rows(store: Store) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Batches of histories and of the items that came next (−1: never seen in training)."""
    for start in range(0, len(store), BATCH):
        chosen = [store[i] for i in range(start, min(len(store), start + BATCH))]
        yield [np.array(row["history"]) for row in chosen], np.array([int(row["item"]) for row in chosen])


def placed(store: Store, score: Any) -> Places:
    """Where the right items stand by ``score(histories) -> (B, I)``, seen items left out."""
    parts = []
    for histories, target in rows(store):
        scores = score(histories)
        for row, history in zip(scores, histories, strict=True):
            row[torch.from_numpy(history).long()] = float("-inf")
        higher, tied, candidates = ranking.places(scores, torch.from_numpy(target).clamp(min=0))
        parts.append((higher.numpy(), np.where(target >= 0, tied.numpy(), 0), candidates.numpy()))
    return tuple(np.concatenate(three) for three in zip(*parts, strict=True))  # type: ignore[return-value]


def neighbours(store: Store, items: int) -> torch.Tensor:
    """(I, I) cosine of the training users of two items, 0 on the diagonal."""
    together = torch.zeros(items, items)
    for user in range(len(store)):
        row = store[user]
        held = torch.from_numpy(np.unique(np.append(row["history"], row["item"]))).long()
        together[held[:, None], held[None]] += 1
    size = together.diagonal().clamp(min=1).sqrt()
    cosine = together / size[:, None] / size[None]
    cosine.fill_diagonal_(0)
    return cosine


def knn(cosine: torch.Tensor, keep: int, last: int) -> Any:
    """Scores by the `keep` nearest neighbours of each of the `last` items of a history."""
    best = cosine.topk(min(keep, cosine.shape[1]), dim=1)

    def score(histories: list[np.ndarray]) -> torch.Tensor:
        found = torch.zeros(len(histories), len(cosine))
        for row, history in zip(found, histories, strict=True):
            recent = torch.from_numpy(history[-last:]).long()
            row.index_add_(0, best.indices[recent].flatten(), best.values[recent].flatten())
        return found

    return score


def figures(place: Places) -> dict[str, np.ndarray]:
    """NDCG@10 and HR@10 of each row."""
    return {"ndcg@10": ranking.ndcg(*place[:2], 10), "hr@10": ranking.hit(*place[:2], 10)}


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def baselines(run: Any) -> dict[str, dict[str, np.ndarray]]:
    """Figures of popularity and of item-kNN on the test part."""
    codec, valid, test = run.task.codec, run.store("valid"), run.store("test")
    counts = torch.from_numpy(codec.counts).float()
    found = {"popularity": figures(placed(test, lambda histories: counts.repeat(len(histories), 1)))}
    cosine = neighbours(run.store("train"), len(codec))
    tried = {(keep, last): float(figures(placed(valid, knn(cosine, keep, last)))["ndcg@10"].mean())
             for keep in NEIGHBOURS for last in LAST}  # fmt: skip
    keep, last = max(tried, key=lambda pair: tried[pair])
    print(f"item-kNN: {keep} neighbours of the last {last} items, NDCG@10 {tried[keep, last]:.4f} on validation")
    found["item-kNN"] = figures(placed(test, knn(cosine, keep, last)))
    return found


def large_log(path: Path, lines: int, seed: int = 0) -> None:
    """A csv of about `lines` interactions of users, items and times, not sorted by user."""
    rng, folder = np.random.default_rng(seed), Path(os.environ.get("MULTIHEAD_DATA", "../shared/data"))
    held = gzip.decompress((folder / "amazon-beauty" / "Beauty.txt.gz").read_bytes()).decode().splitlines()
    users, items = zip(*[(int(u), i) for line in held for u, *rest in [line.split()] for i in rest], strict=True)
    user, item, size = np.array(users), np.array(items, dtype=np.int64), len(users)
    with open(path, "w", encoding="utf-8") as file:
        file.write("user_id,item_id,timestamp\n")
        for turn in range(-(-lines // size)):
            chosen = np.where(rng.random(size) < 0.1, rng.integers(1, item.max() + 1, size=size), item)
            order = rng.permutation(size)
            rows = zip((user + turn * 100_000)[order], chosen[order], order + 1_500_000_000, strict=True)
            file.writelines(f"u{u},B{i:08d},{t}\n" for u, i, t in rows)


def scale(args: Any) -> int:
    """Time and memory of ten million interactions, and the time of the figures."""
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(6040, 3416)).astype(np.float32), rng.integers(3416, size=6040)
    began = time.perf_counter()
    place = ranking.places(scores, target)
    for k in (5, 10, 50):
        ranking.ndcg(*place[:2], k), ranking.hit(*place[:2], k), ranking.sampled(*place, k)
    ranking.reciprocal_rank(*place[:2])
    ranked = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as work:
        log, recipe = Path(work) / "log.csv", Path(work) / "large.yaml"
        large_log(log, 10_000_000)
        recipe.write_text(f"task: sequential-recommendation\ndata: {{train: {log}}}\n", "utf-8")
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "multihead", "prepare", str(recipe), "--run", f"{work}/run"], check=True)
        spent = (time.perf_counter() - began) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    memory, worked = used.ru_maxrss / 2**20, (used.ru_utime + used.ru_stime) / 60
    return finish(args, [
        Aim("prepare 10 million interactions", None, spent, "minutes", "≤ 5", spent <= 5),
        Aim("its processor time", None, worked, "minutes", "≤ 5", worked <= 5),
        Aim("its memory", None, memory, "GiB", "≤ 4", memory <= 4),
        Aim("figures of 6,040 users over 3,416 items", None, ranked, "s", "≤ 5", ranked <= 5),
    ])


def against_recbole(args: Any) -> int:
    """Time to what RecBole's SASRec reaches in two epochs."""
    if args.python is None:
        print("skipped: --python names no Python that has RecBole 1.2.1 (pip install recbole==1.2.1, beside torch)")
        return 0
    torch.set_num_threads(1)
    held = Path(os.environ.get("MULTIHEAD_DATA", "../shared/data"), "amazon-beauty", "Beauty.txt.gz")
    with tempfile.TemporaryDirectory() as work:
        log = Path(work, "Beauty.txt")
        log.write_bytes(gzip.decompress(held.read_bytes()))
        began = args.clock()
        steps = [f"train.steps={args.steps}", f"train.eval_every={args.steps}", "train.minutes=null", "train.threads=1"]
        run = train(RECIPES / SETS["beauty"]["recipe"], steps, run=Path(work, "run"), progress=False)
        ours = [e["valid"] for e in read_log(run.folder.file("log.jsonl")) if "valid" in e][-1]
        spent = args.clock() - began
        told = "NDCG@10 {ndcg@10:.4f}, HR@10 {hr@10:.4f}"
        print(f"ours, {args.steps} steps: {told.format(**ours)}; {spent:.0f} s", flush=True)
        words = [str(args.python), str(Path(__file__).with_name("_recbole.py")), str(log), "2"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=work).stdout
        peer = json.loads(said.splitlines()[-1])
    longer = peer["processor_seconds" if args.cpu else "seconds"]
    print(f"RecBole {peer['version']}, 2 epochs: {told.format(**peer)}; {longer:.0f} s")
    as_good = ours["ndcg@10"] >= peer["ndcg@10"]
    return finish(args, [
        Aim("NDCG@10, validation, all items", peer["ndcg@10"], ours["ndcg@10"], "", "ours ≥ peer", as_good),
        Aim("time to it", longer, spent, "s", "ours ≤ peer / 10", as_good and spent <= longer / 10),
    ], {"data": "recbole", "peer": peer, "ours": ours, "steps": args.steps})


def main() -> int:
    extra = [("data", {"nargs": "?", "choices": [*sorted(SETS), "recbole", "scale"], "default": "beauty"}),
             ("--run", {"type": Path, "metavar": "FOLDER", "help": "keep the run there, or measure one that is there"}),
             ("--python", {"type": Path, "help": "of recbole: a Python that has RecBole"}),
             ("--steps", {"type": int, "default": 300, "help": "of recbole: how many ours takes"})]
    args = arguments(__doc__, minutes=25, extra=extra)  # type: ignore[arg-type]
    if args.data in ("scale", "recbole"):
        return scale(args) if args.data == "scale" else against_recbole(args)
    chosen = SETS[args.data]
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        folder = args.run or Path(work) / "run"
        minutes = args.minutes * (1 if args.data == "beauty" else 2)
        run = train(RECIPES / chosen["recipe"], [f"train.minutes={minutes:g}"], run=folder)
        report = run.evaluate(part="test")
        spent = (time.perf_counter() - began) / 60
        trained = max((e.get("seconds", 0.0) for e in read_log(run.folder.file("log.jsonl"))), default=0.0) / 60
        table = baselines(run)
    aims, sides = [], {}
    for name, rows_of in table.items():
        sides[name] = {k: (float(v.mean()), *interval(v)) for k, v in rows_of.items()}
        print(name, {k: f"{m:.4f} ({low:.4f} – {high:.4f})" for k, (m, low, high) in sides[name].items()})
    metrics = report["metrics"]
    print("ours", {k: f"{m['value']:.4f} ({m['low']:.4f} – {m['high']:.4f})" for k, m in metrics.items() if m["low"]})
    for key, least in (("ndcg@10", chosen["ndcg"]), ("hr@10", chosen["hr"])):
        ours, best = metrics[key]["value"], max(side[key][0] for side in sides.values())
        aims.append(Aim(f"{key}, all items", best, ours, "", f"ours ≥ {least}, and above both baselines",
                        ours >= least and ours > best))
    aims.append(Aim("training", None, trained, "minutes", f"≤ {chosen['minutes']:g}", trained <= chosen["minutes"]))
    aims.append(Aim("whole command", None, spent, "minutes", f"≤ {chosen['minutes']:g}", spent <= chosen["minutes"]))
    return finish(args, aims, {"data": args.data, "sides": sides, "ours": metrics})


if __name__ == "__main__":
    raise SystemExit(main())
