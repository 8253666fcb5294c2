"""Step 2, build: from a recipe and fitted codecs to a module; and a run folder, opened again as what it has become."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead import recipe as recipes
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.prepare import make_task
from multihead.recipe import Recipe
from multihead.run import RECIPE, RunFolder
from multihead.runtime import checkpoint, device, optim
from multihead.task import Task, find


def make_model(task: Task, recipe: Recipe) -> nn.Module:
    """The module with fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return task.model(recipe.model)


def sizes(model: nn.Module) -> list[tuple[str, int, int]]:
    """(name, parameters, bytes) of each part of the model; a shared weight counts where it stands first."""
    seen: set[int] = set()
    found = []
    for name, part in model.named_children():
        own = [p for p in part.parameters() if p.data_ptr() not in seen]
        seen.update(p.data_ptr() for p in own)
        found.append((name, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)))
    return found


def prove(task: Task, model: nn.Module, recipe: Recipe, store: Store) -> dict[str, Any]:
    """One batch through loss and gradient: shapes, the first loss, and that every parameter is reached.

    Raises:
        UserError: naming the parameters that no gradient reaches, or a loss that is not a number.
    """
    examples = task.examples(store, "train")
    rows = min(len(examples), recipe.train.micro_batch or recipe.train.batch_size)
    rng = np.random.default_rng(recipe.seed)
    batch = task.collate([task.augment(examples[i], rng) for i in range(rows)])
    loss = task.loss(model, batch)
    loss.total.backward()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    value = float(loss.total.detach()) / max(1, int(loss.count))
    if unreached or not math.isfinite(value):
        bad = optim.first_bad(model)
        raise UserError(
            tr(
                f"one batch does not train: loss {value}; no gradient reaches {unreached or bad}",
                f"一个批次无法训练：损失 {value}；梯度到不了 {unreached or bad}",
            ),
            recipe.task,
        )
    norm = float(optim.clip(model.parameters(), None, 1 / max(1, int(loss.count))))
    model.zero_grad(set_to_none=True)
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    return {"batch": shapes, "loss": value, "gradient_norm": norm}


class Run:
    """A trained run: its folder, recipe, task with codecs, and the model with its best weights."""

    def __init__(self, folder: RunFolder, where: str = "auto") -> None:
        self.folder = folder
        self.recipe = read_resolved(folder)
        self.device = device.choose_device(where if where != "auto" else self.recipe.train.device)
        self.task = make_task(self.recipe, folder.path)
        self.task.load(folder.file("codec"))

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        return self.recipe.name

    @functools.cached_property
    def model(self) -> nn.Module:
        """The module with the weights of ``model.safetensors``, in eval mode, on `device`."""
        weights = self.folder.weights()
        model = make_model(self.task, self.recipe)
        checkpoint.load_model(model, checkpoint.load_weights(weights), str(weights))
        return model.to(self.device).eval()

    def store(self, part: str) -> Store:
        """The encoded rows of "train", "valid" or "test"."""
        return Store(self.folder.file(f"data/{part}"))

    def evaluate(self, data: str | Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
        """Metrics with intervals on the held-out part, or on files of your own. As `evaluate.evaluate`."""
        from multihead.evaluate import evaluate

        return evaluate(self, data, **options)

    def predict(self, rows: Iterable[Any], **ask: Any) -> list[Any]:
        """An answer for every row (a text, or a dict of columns). See `predict.predict`."""
        from multihead.predict import predict

        return list(predict(self, rows, ask))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, task={self.recipe.task!r})"


def open_run(path: str | Path, where: str = "auto") -> Run:
    """A run folder that ``train`` has made.

    Args:
        where: the device, "auto", "cpu" or "cuda".

    Raises:
        UserError: where there is no run, or its weights are not there yet.
    """
    folder = RunFolder.open(path)
    folder.weights()
    return Run(folder, where)


def read_resolved(folder: RunFolder) -> Recipe:
    """The recipe as the run saved it, every default written out."""
    return recipes.load(folder.file(RECIPE), find=find)
