"""A run folder without training, for the steps after it: a task whose right answers can be written down by hand.

`Parity` answers "even" or "odd" by the number of characters of a text, so every score is known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead.data.columns import Column, Row
from multihead.data.store import Store, StoreWriter
from multihead.errors import UserError
from multihead.prepare import describe
from multihead.recipe import Data, Evaluate
from multihead.run import RECIPE, WEIGHTS, RunFolder
from multihead.task import Answer, Batch, Example, Task

HOSTILE = """<script>alert(1)</script><img src="http://x.example/z" onerror="alert(2)">'"&</style></svg>{{7*7}}"""
LABELS = ["even", "odd"]


class Parity(Task):
    """Is the number of characters even or odd? The answer echoes what the model was shown."""

    field = "language"
    title = ("tell whether the length of a text is even or odd", "判断文本长度的奇偶")
    columns = (Column("text", names=("review",)), Column("label", "label", target=True))
    metric = ("accuracy", "max")

    def encode(self, row: dict[str, Any]) -> Example:
        example = {"ids": np.array([ord(c) for c in row["text"]], dtype=np.int32)}
        if "label" in row:
            if row["label"] not in LABELS:
                raise UserError(f"label {row['label']!r} was never seen in training")
            example["label"] = np.array(LABELS.index(row["label"]), dtype=np.int64)
        return example

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("ids")

    def describe(self, store: Store) -> dict[str, Any]:
        counts = np.bincount(store.stream("label"), minlength=2)
        return {"classes": dict(zip(LABELS, counts.tolist(), strict=True)), "tokens": int(store.lengths("ids").sum())}

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        assert not torch.is_grad_enabled()
        assert not model.training
        return [
            {
                "label": LABELS[int(n) % 2],
                "echo": "".join(chr(c) for c in ids[:n].tolist()),
                "ask": ask,
                "size": len(batch["ids"]),
            }
            for ids, n in zip(batch["ids"], batch["ids_lengths"], strict=True)
        ]

    def score(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        right = [a["label"] == row["label"] for a, row in zip(answers, rows, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        matrix = np.zeros((2, 2), dtype=int)
        for answer, row in zip(answers, rows, strict=True):
            matrix[LABELS.index(row["label"]), LABELS.index(answer["label"])] += 1
        wrong = [
            {"text": row["text"], "truth": row["label"], "answer": a["label"], "score": 0.9, "where": row.where}  # type: ignore[attr-defined]
            for a, row in zip(answers, rows, strict=True)
            if a["label"] != row["label"]
        ]
        return {
            "confusion": {"labels": LABELS, "matrix": matrix.tolist()},
            "classes": [{"label": x, "precision": 0.5, "recall": 0.25, "f1": 0.75, "support": 40} for x in LABELS],
            "calibration": {"confidence": [0.6, 0.9], "accuracy": [0.5, 0.95], "count": [10, 30]},
            "mistakes": wrong,
        }


def rows_of(count: int, wrong: Sequence[int] = (), hostile: bool = False) -> list[Row]:
    """Rows of scrambled lengths; those in `wrong` are labelled against the truth."""
    lengths = np.random.default_rng(0).permutation(count) + 1
    rows = []
    for i, n in enumerate(lengths.tolist()):
        text = HOSTILE if hostile and i == 0 else (f"{i}房" * n)[:n]
        label = LABELS[(len(text) + (i in wrong)) % 2]
        rows.append(Row({"text": text, "label": label}, where=f"reviews.csv:{i + 2}"))
    return rows


def make_run(folder: Path, parts: dict[str, list[Row]], task: Task | None = None, **settings: Any) -> Any:
    """What `multihead.build.open_run` gives, over a folder with prepared `parts`, a log and a data report."""
    run_folder = RunFolder.create(folder)
    task = task or Parity()
    report: dict[str, Any] = {"guess": {}, "parts": {}, "duplicates": {"copies": 3, "leaks": 2, "dropped": True}}
    for part, rows in parts.items():
        with StoreWriter(folder / "data" / part) as writer:
            for row in rows:
                writer.add(task.encode(row), row if part != "train" else None)
        report["parts"][part] = describe(task, Store(folder / "data" / part))
    report["guess"] = {
        "train": {"files": [{"file": "<b>.csv", "format": "csv", "encoding": "gb18030", "mapping": {"text": "评论"}}]}
    }
    report["rejected"] = {"count": 1, "examples": [{"where": "reviews.csv:812", "message": "<i>nothing</i> there"}]}
    run_folder.write_json("data/report.json", report)
    run_folder.write_atomic(RECIPE, "task: parity\nname: </pre><script>\n")
    run_folder.write_atomic(WEIGHTS, b"weights")
    log: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 50)]
    log += [{"step": step, "valid": {"loss": 0.5, "accuracy": step / 50}} for step in (10, 20, 30)]
    run_folder.write_atomic("log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    recipe = SimpleNamespace(
        task="parity",
        name="reviews <1>",
        seed=0,
        data=Data(train="x.csv"),
        evaluate=Evaluate.model_validate({"bootstrap": 50, **settings}),
    )
    return SimpleNamespace(
        folder=run_folder,
        path=folder,
        recipe=recipe,
        task=task,
        model=nn.Linear(2, 2).eval(),
        device=torch.device("cpu"),
    )
