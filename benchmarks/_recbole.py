"""RecBole's SASRec on a log of one user a line, in a process and a Python of its own; prints what it found as JSON.

    PYTHON benchmarks/_recbole.py LOG.txt EPOCHS

Run by sequential_recommendation.py (`recbole`). RecBole 1.2.1 names types that numpy 2 has dropped: they are put back
here. Its settings are its own for this model (64 wide, 2 layers and heads, cross-entropy over all items, batches of
2,048 prefixes); each user's last item is held out for the test and the one before it for validation. Timed is
`Trainer.fit` without evaluations. What it learned is then asked for every user's validation item among all items that
the user had not yet, as ours is.
"""

# ruff: noqa: E402 (numpy is mended before RecBole is imported)

import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import numpy as np

for name, kind in (("bool8", np.bool_), ("float_", np.float64), ("unicode_", np.str_), ("complex_", np.complex128)):
    if not hasattr(np, name):
        setattr(np, name, kind)

import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

LENGTH, BATCH = 50, 256


def prepared(folder: str, users: list[list[str]], epochs: int) -> tuple:
    """RecBole's settings, data set and training batches of the users' items."""
    place = Path(folder, "log")
    place.mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"{u}\t{item}\t{at}" for u, items in enumerate(users) for at, item in enumerate(items)]
    (place / "log.inter").write_text("\n".join(lines) + "\n", "utf-8")
    config = Config(model="SASRec", dataset="log", config_dict={
        "data_path": folder, "checkpoint_dir": folder, "epochs": epochs, "train_batch_size": 2048, "seed": 2020,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": LENGTH, "loss_type": "CE",
        "train_neg_sample_args": None, "show_progress": False, "use_gpu": False, "state": "ERROR",
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    })  # fmt: skip
    init_seed(config["seed"], True)
    data = create_dataset(config)
    return config, data, data_preparation(config, data)[0]


def figures(model: torch.nn.Module, data: object, users: list[list[str]]) -> dict[str, float]:
    """NDCG@10 and HR@10 of each user's last item but one, ranked among all that the user had not yet."""
    model.eval()
    known = [[int(data.token2id(data.iid_field, item)) for item in items[:-1]] for items in users if len(items) > 2]
    ndcg = hit = 0.0
    for start in range(0, len(known), BATCH):
        rows = known[start : start + BATCH]
        history = torch.zeros(len(rows), LENGTH, dtype=torch.long)
        for to, row in zip(history, rows, strict=True):
            recent = torch.tensor(row[:-1][-LENGTH:])
            to[: len(recent)] = recent
        asked = Interaction({"item_id_list": history, "item_length": (history > 0).sum(1)})
        with torch.no_grad():
            scores = model.full_sort_predict(asked)
        scores[:, 0] = -math.inf  # no item
        for score, row in zip(scores, rows, strict=True):
            right = float(score[row[-1]])
            score[row[:-1]] = -math.inf
            place = int((score > right).sum())
            ndcg += 1 / math.log2(place + 2) if place < 10 else 0.0
            hit += place < 10
    return {"ndcg@10": ndcg / len(known), "hr@10": hit / len(known)}


def main() -> None:
    users = [line.split()[1:] for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        config, data, batches = prepared(folder, users, int(sys.argv[2]))
        model = SASRec(config, data)
        trainer = Trainer(config, model)
        began, worked = time.perf_counter(), time.process_time()
        trainer.fit(batches, saved=False, verbose=False)
        found = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked}
    print(json.dumps({"version": recbole.__version__, "batches": len(batches), **found, **figures(model, data, users)}))


if __name__ == "__main__":
    main()
