"""Recall of retrieval, split by time: ours beside popularity, item-kNN and matrix factorisation (ALS), in one run.

    python benchmarks/two_tower_retrieval.py [movielens-1m|movielens-latest-small] [--json FILE] [--minutes N]
        [--run FOLDER]

Two moments part the log: 80 % of the ratings are for training, the next 10 % validation, the last 10 % the test. Every
rating of the test period is asked for, from all that its user rated before it; what was rated already is not ranked,
all else of the file of films is, those that nobody rated too. All sides rank the same rows by the same code
(`multihead.metrics.ranking`), have learned from the training part alone, and are chosen on validation:

- popularity: how often an item was chosen in training.
- item-kNN: the cosine of two items' training users, summed over the history; how many neighbours of an item count, and
  how many of the last items of a history.
- ALS: implicit matrix factorisation (Hu et al. 2008; the library `implicit`), each row's user folded in from the
  history; width, weight of what was chosen, and regularisation.
- ours: recipes/recommendation/two-tower-retrieval.yaml or movielens-latest-small.yaml, its weights chosen on
  validation.

Figures are means over the rows; intervals are 95 % bootstrap intervals over users, whose rows are not independent.
Cold items are those that training never saw: chance is 50 of all candidates. `index` is the recall of an index of faiss
against exact search over 100,000 made-up vectors around 1,000 centres.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from _common import Aim, arguments, finish
from scipy import sparse
from sequential_recommendation import Places, knn, neighbours, placed

from multihead.data.store import Store
from multihead.metrics import ranking
from multihead.runtime.log import read_log
from multihead.tasks.recommendation import _nearest
from multihead.train import train

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "recommendation"
SETS = {"movielens-1m": "two-tower-retrieval.yaml", "movielens-latest-small": "movielens-latest-small.yaml"}
K = 50
NEIGHBOURS, LAST = (20, 100, 500, 5000), (1, 5, 20, 1000)
FACTORS, ALPHAS, PENALTIES = (8, 16, 32, 64), (1.0, 10.0), (1.0, 10.0, 100.0)
RESAMPLES = 2000
Hits = np.ndarray


def hits(place: Places) -> Hits:
    """Whether the right item is among the first K of each row."""
    return ranking.hit(*place[:2], K)


def interval(values: np.ndarray, users: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over rows, and its 95 % bootstrap interval over users."""
    _, owner = np.unique(users, return_inverse=True)
    total, count = np.bincount(owner, values), np.bincount(owner)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(total), size=(RESAMPLES, len(total)))
    low, high = np.quantile(total[drawn].sum(1) / count[drawn].sum(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def matrix(store: Store, items: int) -> sparse.csr_matrix:
    """Users × items of the training part, 1 where one chose the other."""
    held = [np.unique(np.append(row["history"], row["item"])) for row in store]
    return rows_of(held, items)


def rows_of(held: list[np.ndarray], items: int) -> sparse.csr_matrix:
    """Rows of ones at the numbers held."""
    indptr = np.concatenate(([0], np.cumsum([len(one) for one in held])))
    indices = np.concatenate([*held, np.zeros(0, np.int64)]).astype(np.int32)
    return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(len(held), items))


def als(seen: sparse.csr_matrix, factors: int, alpha: float, penalty: float) -> Any:
    """Scores by factors learned of `seen`, each history's user folded in."""
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(factors=factors, alpha=alpha, regularization=penalty, iterations=15,
                                    num_threads=1, random_state=0)
    model.fit(seen, show_progress=False)
    table = torch.from_numpy(np.asarray(model.item_factors))

    def score(histories: list[np.ndarray]) -> torch.Tensor:
        found = rows_of([np.unique(one) for one in histories], seen.shape[1])
        users = model.recalculate_user(np.arange(len(histories)), found)
        return torch.from_numpy(np.asarray(users, dtype=np.float32)) @ table.T

    return score


def peers(run: Any) -> dict[str, Hits]:
    """Hits of every peer on the test part, each with the settings that are best on validation."""
    codec, valid, test = run.task.codec, run.store("valid"), run.store("test")
    counts = torch.from_numpy(codec.counts).float()
    found = {"popularity": hits(placed(test, lambda histories: counts.repeat(len(histories), 1)))}
    cosine = neighbours(run.store("train"), len(codec))
    tried = {(keep, last): float(hits(placed(valid, knn(cosine, keep, last))).mean())
             for keep in NEIGHBOURS for last in LAST}  # fmt: skip
    keep, last = max(tried, key=lambda pair: tried[pair])
    told = f"recall {tried[keep, last]:.4f} on validation"
    print(f"item-kNN: {keep} neighbours of the last {last} items, {told}", flush=True)
    found["item-kNN"] = hits(placed(test, knn(cosine, keep, last)))
    seen = matrix(run.store("train"), len(codec))
    tested = {}
    for wish in itertools.product(FACTORS, ALPHAS, PENALTIES):
        tested[wish] = float(hits(placed(valid, als(seen, *wish))).mean())
    best = max(tested, key=lambda wish: tested[wish])
    told = f"recall {tested[best]:.4f} on validation"
    print(f"ALS: {best[0]} wide, alpha {best[1]:g}, regularisation {best[2]:g}, {told}", flush=True)
    found["ALS"] = hits(placed(test, als(seen, *best)))
    return found


def ours(run: Any, store: Store) -> Places:
    """Where the right items stand by our model."""
    from multihead.evaluate import answers

    with torch.inference_mode():
        told = answers(run.task, run.model, store, 256, lengths=store.lengths("history"))
    place = np.array([(a["rank"] or 1, a["tied"], a["candidates"]) for a in told], dtype=np.int64)
    return place[:, 0] - 1, place[:, 1], place[:, 2]


def index_recall(items: int = 100_000, width: int = 64, queries: int = 500) -> tuple[float, float, float]:
    """Recall at 50 of an index of faiss, and milliseconds a query, its and exact search's."""
    torch.manual_seed(0)
    centres = torch.randn(1000, width)
    near = [centres[torch.randint(1000, (n,))] + 0.7 * torch.randn(n, width) for n in (items, queries)]
    vectors, asked = (torch.nn.functional.normalize(one, dim=1) for one in near)
    index = _nearest.Index(vectors)
    exact = asked @ vectors.T
    began = time.perf_counter()
    for one in asked[:100]:
        (one @ vectors.T).topk(K)
    middle = time.perf_counter()
    for one in asked[:100]:
        index.search(one[None], K)
    end = time.perf_counter()
    return float(_nearest.recall(index, exact, asked, K).mean()), (end - middle) * 10, (middle - began) * 10


def main() -> int:
    extra = [("data", {"nargs": "?", "choices": sorted(SETS), "default": "movielens-1m"}),
             ("--run", {"type": Path, "metavar": "FOLDER", "help": "keep the run there, or measure one that is there"})]
    args = arguments(__doc__, minutes=6, extra=extra)  # type: ignore[arg-type]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        run = train(RECIPES / SETS[args.data], [f"train.minutes={args.minutes:g}"], run=args.run or Path(work) / "run")
        store = run.store("test")
        place = ours(run, store)
        spent = (time.perf_counter() - began) / 60
        trained = max((e.get("seconds", 0.0) for e in read_log(run.folder.file("log.jsonl"))), default=0.0) / 60
        users = np.array([store.row(i)["user"] for i in range(len(store))])
        own, sides = hits(place), peers(run)
        cold = np.array([int(store[i]["item"]) >= run.task.items.met for i in range(len(store))])
    print(f"{len(store):,} ratings of {len(np.unique(users)):,} users in the test, {int(cold.sum()):,} of items that "
          f"training never saw; {int(place[2].mean()):,} candidates")
    print(f"{trained:.1f} minutes of training, {spent:.1f} with preparing and answering")
    aims, figures = [], {"two-tower": interval(own, users)}
    for name, side in sides.items():
        figures[name] = interval(side, users)
        gain = interval(own - side, users)
        print(f"two-tower − {name}: {gain[0]:+.4f} ({gain[1]:+.4f} – {gain[2]:+.4f})")
        pair = figures[name][0], figures["two-tower"][0]
        aims.append(Aim(f"recall@{K}, {name}", *pair, "", "ours > peer", gain[0] > 0))
    for name, (value, low, high) in figures.items():
        print(f"{name}: recall@{K} {value:.4f} ({low:.4f} – {high:.4f})")
    if cold.any():
        chance, (value, low, high) = K / float(place[2][cold].mean()), interval(own[cold], users[cold])
        print(f"cold items: recall@{K} {value:.4f} ({low:.4f} – {high:.4f}), chance {chance:.4f}")
        aims.append(Aim(f"recall@{K} of cold items, against chance", chance, value, "", "ours ≥ 5 × chance",
                        value >= 5 * chance))
        figures["cold"] = (value, low, high)
    found, fast, slow = index_recall()
    print(f"faiss over 100,000 × 64: recall@{K} {found:.4f}; {fast:.2f} ms a query, exact {slow:.2f} ms")
    aims.append(Aim(f"recall@{K} of the index against exact", 1.0, found, "", "≥ 0.95", found >= 0.95))
    return finish(args, aims, {"data": args.data, "figures": figures, "index": [found, fast, slow]})


if __name__ == "__main__":
    sys.exit(main())
