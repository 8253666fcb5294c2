"""click-through-rate against gradient-boosted trees (LightGBM) and logistic regression (scikit-learn), in one run.

    pip install lightgbm
    python benchmarks/click_through_rate.py [movielens-1m movielens-100k criteo] [--json FILE] [--minutes N]

Every set is cut at random, 8:1:1, with a fixed seed; all three learn from the same training rows, choose on the same
validation rows and are measured on the same test rows. LightGBM reads categories natively and stops early on the
validation rows, best of three sizes; logistic regression reads them one-hot, numbers binned by quantiles and by their
logarithm, best of four strengths and two smallest counts. Ours is the shipped recipe. Aims: on MovieLens (rating ≥ 4)
AUC no less than both; on Criteo no less than logistic regression's and within LightGBM's 95 % interval.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Aim, arguments, finish

DATA = Path(os.environ.get("MULTIHEAD_DATA", "../shared/data"))
RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "recommendation"
SETS = ("movielens-1m", "movielens-100k", "criteo")
PARTS = ("train", "valid", "test")
SEED = 7
RESAMPLES = 1000
Row = dict[str, Any]


# -- data --------------------------------------------------------------------------------------------------------------


def lines(path: str) -> list[str]:
    with gzip.open(DATA / path, "rb") as file:
        return file.read().decode("latin-1").splitlines()


def split(rows: Sequence[str]) -> dict[str, list[str]]:
    order = np.random.default_rng(SEED).permutation(len(rows))
    a, b = int(0.8 * len(rows)), int(0.9 * len(rows))
    return {part: [rows[i] for i in at] for part, at in zip(PARTS, np.split(order, [a, b]), strict=True)}


def year(title: str) -> float:
    found = title.strip()[-5:-1]
    return float(found) if found.isdigit() else float("nan")


def movielens_1m() -> tuple[dict[str, list[str]], Callable[[str], tuple[Row, int]]]:
    users = {u: rest for u, *rest in (line.split("::") for line in lines("movielens-1m-sample/users.dat.gz"))}
    films = {i: rest for i, *rest in (line.split("::") for line in lines("movielens-1m-sample/movies.dat.gz"))}

    def read(line: str) -> tuple[Row, int]:
        user, item, rating, when = line.split("::")
        (gender, age, work, code), (title, genres) = users[user], films[item]
        row: Row = {"user": user, "item": item, "time": float(when), "gender": gender, "age": float(age),
                    "occupation": work, "zip": code, "year": year(title), "genres": genres.split("|")}
        return row, int(float(rating) >= 4)

    return split(lines("movielens-1m-sample/ratings.dat.gz")), read


def movielens_100k() -> tuple[dict[str, list[str]], Callable[[str], tuple[Row, int]]]:
    users = {u: rest for u, *rest in (line.split("|") for line in lines("movielens-100k/u.user.gz"))}
    films = {i: rest for i, *rest in (line.split("|") for line in lines("movielens-100k/u.item.gz"))}

    def read(line: str) -> tuple[Row, int]:
        user, item, rating, when = line.split("\t")
        (age, gender, work, code), film = users[user], films[item]
        genres = [str(i) for i, flag in enumerate(film[4:]) if flag == "1"]
        row: Row = {"user": user, "item": item, "time": float(when), "gender": gender, "age": float(age),
                    "occupation": work, "zip": code, "year": year(film[0]), "genres": genres}
        return row, int(float(rating) >= 4)

    return split(lines("movielens-100k/u.data.gz")), read


def criteo() -> tuple[dict[str, list[str]], Callable[[str], tuple[Row, int]]]:
    def read(line: str) -> tuple[Row, int]:
        cells = line.split("\t")
        row: Row = {f"I{i}": float(cell) if cell else float("nan") for i, cell in enumerate(cells[1:14], 1)}
        return row | {f"C{i}": cell for i, cell in enumerate(cells[14:], 1)}, int(cells[0])

    return split(lines("criteo-10k/train.txt.gz")), read


RECIPE = {"movielens-1m": "click-through-rate", "movielens-100k": "movielens-100k-ctr", "criteo": "criteo"}
LOAD = {"movielens-1m": movielens_1m, "movielens-100k": movielens_100k, "criteo": criteo}


# -- peers -------------------------------------------------------------------------------------------------------------


def logistic(rows: dict[str, list[Row]], y: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Probabilities of the test rows, and what validation chose."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    numbers = [name for name, value in rows["train"][0].items() if isinstance(value, float)]
    held = {name: np.array([row[name] for row in rows["train"]]) for name in numbers}
    edges = {name: np.unique(np.nanquantile(v, np.linspace(0, 1, 17)[1:-1])) for name, v in held.items()}
    logs = {name: np.sign(v) * np.log1p(np.abs(v)) for name, v in held.items()}
    scale = {name: (np.nanmean(v), np.nanstd(v) or 1.0) for name, v in logs.items()}
    counts: dict[str, int] = {}

    def features(row: Row) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in row.items():
            if isinstance(value, list):
                found |= {f"{name}={one}": 1.0 for one in value}
            elif not isinstance(value, float):
                found[f"{name}={value}"] = 1.0
            elif np.isnan(value):
                found[f"{name} missing"] = 1.0
            else:
                found[f"{name} in {np.searchsorted(edges[name], value)}"] = 1.0
                found[f"{name} log"] = (np.sign(value) * np.log1p(abs(value)) - scale[name][0]) / scale[name][1]
        return found

    made = {part: [features(row) for row in rows[part]] for part in PARTS}
    for one in made["train"]:
        for name in one:
            counts[name] = counts.get(name, 0) + 1
    best: tuple[float, np.ndarray, str] = (-1.0, np.zeros(0), "")
    for least in (1, 3):
        kept = {p: [{n if counts.get(n, 0) >= least else n.split("=")[0] + " rare": v for n, v in one.items()}
                    for one in made[p]] for p in PARTS}  # fmt: skip
        vectors = DictVectorizer()
        x = {"train": vectors.fit_transform(kept["train"])}
        x |= {part: vectors.transform(kept[part]) for part in PARTS[1:]}
        for strength in (0.03, 0.1, 0.3, 1.0):
            model = LogisticRegression(C=strength, max_iter=200).fit(x["train"], y["train"])
            found = auc(model.predict_proba(x["valid"])[:, 1], y["valid"])
            if found > best[0]:
                said = f"C {strength:g}, at least {least}, valid {found:.4f}"
                best = (found, model.predict_proba(x["test"])[:, 1], said)
    return best[1], best[2]


def trees(rows: dict[str, list[Row]], y: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Probabilities of the test rows, and what validation chose."""
    import lightgbm

    first = rows["train"][0]
    names = [name for name, value in first.items() if not isinstance(value, list)]
    categories = [name for name in names if not isinstance(first[name], float)]
    codes = {name: {v: i for i, v in enumerate(sorted({row[name] for row in rows["train"]}))} for name in categories}
    flags = [(name, v) for name, value in first.items() if isinstance(value, list)
             for v in sorted({one for row in rows["train"] for one in row[name]})]  # fmt: skip

    def vector(row: Row) -> list[float]:
        plain = [float(codes[n].get(row[n], np.nan)) if n in codes else row[n] for n in names]
        return plain + [float(v in row[n]) for n, v in flags]

    x = {part: np.array([vector(row) for row in rows[part]]) for part in PARTS}
    at = [names.index(name) for name in categories]
    train = lightgbm.Dataset(x["train"], y["train"], categorical_feature=at, params={"verbose": -1})
    valid = lightgbm.Dataset(x["valid"], y["valid"], reference=train, categorical_feature=at)
    best: tuple[float, np.ndarray, str] = (-1.0, np.zeros(0), "")
    for leaves, rate in ((15, 0.05), (31, 0.05), (63, 0.05)):
        settings = {"objective": "binary", "metric": "auc", "num_leaves": leaves, "learning_rate": rate, "verbose": -1,
                    "num_threads": 1, "seed": 0, "feature_pre_filter": False}
        model = lightgbm.train(settings, train, 2000, [valid],
                               callbacks=[lightgbm.early_stopping(50, verbose=False)])
        found = model.best_score["valid_0"]["auc"]
        if found > best[0]:
            said = f"{leaves} leaves, {model.best_iteration} trees, valid {found:.4f}"
            best = (found, np.asarray(model.predict(x["test"], num_iteration=model.best_iteration)), said)
    return best[1], best[2]


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(name: str, parts: dict[str, list[str]], minutes: float | None) -> tuple[np.ndarray, str]:
    """Probabilities of the test rows by the shipped recipe, and its figures on the validation rows."""
    from multihead.train import train

    with tempfile.TemporaryDirectory() as folder:
        for part, rows in parts.items():
            Path(folder, f"{part}.dat").write_text("\n".join(rows) + "\n", "latin-1")
        files = [f"data.{part}={folder}/{part}.dat" for part in PARTS]
        limits = [] if minutes is None else [f"train.minutes={minutes}"]
        run = train(RECIPES / f"{RECIPE[name]}.yaml", [*files, *limits], run=f"{folder}/run", progress=False)
        valid = run.evaluate(part="valid", progress=False)["metrics"]["auc"]["value"]
        run.evaluate(part="test", progress=False)
        told = [json.loads(line) for line in Path(folder, "run", "predictions.jsonl").read_text("utf-8").splitlines()]
    return np.array([one["answer"]["p"] for one in told]), f"valid {valid:.4f}"


def auc(p: np.ndarray, y: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, p))


def measured(p: np.ndarray, y: np.ndarray, users: np.ndarray | None) -> dict[str, Any]:
    """AUC with its 95 % interval, log loss, calibration error, and AUC within users."""
    from multihead.metrics import clicks

    rng = np.random.default_rng(0)
    drawn = np.concatenate([
        clicks.auc(p, y, np.stack([np.bincount(rng.integers(len(y), size=len(y)), minlength=len(y))
                                   for _ in range(100)]).astype(float))
        for _ in range(RESAMPLES // 100)
    ])  # fmt: skip
    low, high = np.quantile(drawn, (0.025, 0.975))
    found = {"auc": auc(p, y), "low": float(low), "high": float(high), "log_loss": float(clicks.log_loss(p, y)),
             "calibration_error": float(clicks.calibration_error(p, y))}
    if users is not None:
        found["gauc"] = float(clicks.grouped_auc(p, y, users))
    return found


def compare(name: str, minutes: float | None) -> tuple[list[Aim], dict[str, Any]]:
    parts, read = LOAD[name]()
    both = {part: [read(line) for line in parts[part]] for part in PARTS}
    rows = {part: [row for row, _ in both[part]] for part in PARTS}
    y = {part: np.array([label for _, label in both[part]]) for part in PARTS}
    users = np.array([int(row["user"]) for row in rows["test"]]) if "user" in rows["test"][0] else None
    print(f"{name}: {' + '.join(str(len(y[p])) for p in PARTS)} rows, {y['train'].mean():.1%} clicks", flush=True)
    found: dict[str, Any] = {}
    ways: dict[str, Callable[[], tuple[np.ndarray, str]]] = {
        "logistic regression": lambda: logistic(rows, y), "LightGBM": lambda: trees(rows, y),
        "ours": lambda: ours(name, parts, minutes)}  # fmt: skip
    for who, way in ways.items():
        began = time.perf_counter()
        p, said = way()
        one = found[who] = measured(p, y["test"], users) | {"chosen": said, "seconds": time.perf_counter() - began}
        gauc = f", within users {one['gauc']:.4f}" if "gauc" in one else ""
        print(f"  {who:20} AUC {one['auc']:.4f} ({one['low']:.4f} – {one['high']:.4f}){gauc}, log loss "
              f"{one['log_loss']:.4f}, calibration error {one['calibration_error']:.4f}; {said}; "
              f"{one['seconds']:.0f} s", flush=True)  # fmt: skip
    mine, lr, gbm = found["ours"], found["logistic regression"], found["LightGBM"]
    aims = [Aim(f"{name}: AUC, logistic regression", lr["auc"], mine["auc"], "AUC", "ours ≥ peer",
                mine["auc"] >= lr["auc"])]  # fmt: skip
    if name == "criteo":
        aims.append(Aim(f"{name}: AUC, LightGBM", gbm["auc"], mine["auc"], "AUC",
                        f"ours ≥ {gbm['low']:.4f}, its interval", mine["auc"] >= gbm["low"]))
    else:
        aims.append(Aim(f"{name}: AUC, LightGBM", gbm["auc"], mine["auc"], "AUC", "ours ≥ peer",
                        mine["auc"] >= gbm["auc"]))
    return aims, found


def main() -> int:
    sets = ("sets", {"nargs": "*", "metavar": "SET", "help": f"of {', '.join(SETS)}; default: all"})
    args = arguments(__doc__, minutes=30, extra=[sets])
    chosen = args.sets or SETS
    aims, figures = [], {}
    for name in chosen:
        more, figures[name] = compare(name, None if args.full else args.minutes / len(chosen))
        aims += more
    return finish(args, aims, {"sets": figures})


if __name__ == "__main__":
    raise SystemExit(main())
