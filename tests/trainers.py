"""Trainers of a recipe for tests, and one that is stopped on its way."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.run import RunFolder
from multihead.train import Trainer

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\nThe quick brown fox jumps over the lazy dog.\n"


def poem(folder: Path, layers: int, **train: Any) -> Path:
    """A recipe in `folder` that learns a poem: so many blocks, with these settings of ``train``."""
    (folder / "poem.txt").write_text(POEM * 60, "utf-8")
    values: dict[str, Any] = {
        "task": "text-generation",
        "name": "poem",
        "data": {"train": "poem.txt"},
        "options": {"tokenizer": "char", "context": 16},
        "model": {"d_model": 16, "num_layers": layers, "num_heads": 2},
        "train": {"log_every": 1, "threads": 1, "precision": "float32", **train},
    }
    (folder / "poem.yaml").write_text(yaml.safe_dump(values), "utf-8")
    return folder / "poem.yaml"


def trainer(path: Path, where: Path, *overrides: str) -> Trainer:
    """The trainer of a recipe whose data was just prepared in the folder `where`."""
    recipe = recipes.load(path, overrides, find=task.find)
    made = prepare.make_task(recipe, path.parent)
    folder = RunFolder.create(where)
    prepare.prepare(recipe, made, folder)
    return Trainer(recipe, made, folder, progress=False)


def fit_until(one: Trainer, last: int) -> None:
    """Train, and have SIGTERM come behind the step `last`."""
    step = one._one

    def stopped(log: Any) -> None:
        step(log)
        if one.step == last:
            one.caught.append(signal.SIGTERM)

    one._one = stopped  # type: ignore[method-assign]
    with pytest.raises(Exception, match="SIGTERM"):
        one.fit()
