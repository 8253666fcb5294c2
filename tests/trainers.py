"""Trainers of a recipe for tests, and one that is stopped on its way."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.run import RunFolder
from multihead.train import Trainer


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
