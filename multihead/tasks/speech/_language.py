"""A run of text-generation that helps a recogniser: copied into the recogniser's run, opened when it is first asked."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from multihead import recipe as recipes
from multihead.codec.text import TextCodec
from multihead.codec.transcript import PinyinCodec
from multihead.errors import UserError, tr
from multihead.generation.fusion import Fusion, TextScorer
from multihead.run import RECIPE, WEIGHTS, RunFolder
from multihead.runtime import checkpoint
from multihead.task import find

COPY = "language_model"
"""The copy's folder among the codecs of a run."""
MOST_WEIGHT = 10.0


class Language:
    """A trained run of text-generation.

    Raises:
        UserError: no such run, one of another task, or one that is not trained yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder.open(path)
        self.recipe = recipes.load(self.folder.file(RECIPE), find=find, settled=True)
        if self.recipe.task != "text-generation":
            raise UserError(tr(
                f"options.language_model is a run of {self.recipe.task}; it must be one of text-generation",
                f"options.language_model 是 {self.recipe.task} 的训练结果；应为 text-generation 的"), str(path))
        self.weights = self.folder.weights()

    @functools.cached_property
    def texts(self) -> TextScorer:
        """The model, ready to score texts."""
        task = find(self.recipe.task)(self.recipe.options, seed=self.recipe.seed)
        task.load(self.folder.file("codec"))
        model: Any = task.model(self.recipe.model)
        checkpoint.load_model(model, checkpoint.load_weights(self.weights), str(self.weights))
        return TextScorer(model.eval(), task.codec)  # type: ignore[attr-defined]

    def on(self, device: torch.device) -> Language:
        """The same, computing there."""
        if next(self.texts.model.parameters()).device != device:
            self.texts.model.to(device)
        return self

    def fusion(self, units: TextCodec | PinyinCodec, weight: float) -> Fusion:
        """What it adds to a search over the ids of `units`."""
        return Fusion(self.texts, writer(units), weight)

    def copy(self, folder: Path) -> None:
        """Write what scoring needs into `folder`, so that the run that holds it can be moved and served alone."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder.file(RECIPE), folder / RECIPE)
        shutil.copyfile(self.weights, folder / WEIGHTS)
        shutil.copytree(self.folder.file("codec"), folder / "codec", dirs_exist_ok=True)


def writer(units: TextCodec | PinyinCodec) -> Callable[[Sequence[int]], str]:
    """Ids → text, whose last word may not be complete."""
    if isinstance(units, PinyinCodec):
        return lambda ids: "".join(units.pieces(ids))
    return units.decode


def found(folder: Path, named: str | None) -> Language | None:
    """The language model of a run: its copy among the codecs in `folder`, else the one that the recipe names (a run
    may be given one after it was trained); None where there is none."""
    if (folder / COPY).is_dir():
        return Language(folder / COPY)
    return Language(named) if named else None
