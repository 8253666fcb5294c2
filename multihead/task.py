"""What a task is: the five steps as methods. One file, one task.

A task file defines one subclass of `Task` in a file named after the task: ``tasks/language/text_classification.py`` is
``text-classification``. ``find`` looks there first, then among installed packages (entry-point group
``multihead.tasks``), and takes ``./mine.py`` for a file of the user's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from multihead.data.rows import Column
from multihead.errors import UserError, nearest, tr

Example = dict[str, np.ndarray]
Batch = dict[str, Tensor]
Answer = dict[str, Any]
TASKS = Path(__file__).parent / "tasks"


@dataclass
class Loss:
    """A sum and a count, never a mean: the loop divides once, over all micro-batches and ranks."""

    total: Tensor
    """Sum over the counted things (tokens, rows), a scalar with a gradient."""
    count: int | Tensor
    """How many things were summed."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Further sums to log, each divided by the same count."""


class Options(BaseModel):
    """A task's own knobs: the recipe's ``options:`` section. Subclass it inside the task file."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class Task:
    """One thing that can be learned. A plain object; what ``fit`` learns of the data is kept on it and saved."""

    field: ClassVar[str] = ""
    """language, vision, recommendation or speech."""
    title: ClassVar[tuple[str, str]] = ("", "")
    """What it does, in English and Chinese, for ``multihead tasks``."""
    columns: ClassVar[tuple[Column, ...]] = ()
    """What a row holds; those marked ``target`` are learned, the others are inputs."""
    events: tuple[Column, ...] = ()
    """Where a line of the data is no row but an event (somebody's click), what an event holds; see ``gather``."""
    Options: ClassVar[type[Options]] = Options
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    """Values this task prefers in the sections ``data``, ``model``, ``train``; the recipe overrides them."""
    metric: ClassVar[tuple[str, str]] = ("loss", "min")
    """The figure that picks the best weights and stops early, and whether less ("min") or more ("max") is better."""
    unit: ClassVar[str] = "rows"
    """What ``Loss.count`` counts: rows, tokens …"""
    emits: ClassVar[bool] = False
    """True where the model has ``start`` and ``step`` and is served token by token."""
    embeds: ClassVar[bool] = False
    """True where ``embed`` turns rows into vectors; served at ``/v1/embeddings``."""
    retrieves: ClassVar[bool] = False
    """True where ``predict`` answers ``{"items": [{"id", "score"}, …]}`` out of the catalogue ``codec``, and takes the
    wish ``k``; served at ``/v1/recommend``."""
    ranks: ClassVar[bool] = False
    """True where ``rank`` scores items that a retriever found; served behind it."""
    offers: ClassVar[tuple[str, ...]] = ()
    """Methods of the model that an opened run offers as its own: ``multihead.load(run).embed_user(ids)``."""
    draws: ClassVar[bool] = False
    """True where an answer holds ``pictures``, PNG data URIs; served at ``/v1/images/generations``."""
    speaks: ClassVar[bool] = False
    """True where an answer holds ``audio``, a WAV data URI; served at ``/v1/audio/speech``."""
    voices: Sequence[str] = ()
    """Where it speaks, in which voices; one without a name (``""``) where the data names none."""
    asks: ClassVar[tuple[str, ...]] = ()
    """Options that a caller of ``predict`` may give, served beside the input."""

    origin: Any = None
    """The weights to start from, a `multihead.weights.Origin`: set before ``fit`` where the recipe says ``model.from``,
    and never where a trained run is opened. ``fit`` takes its codec (``origin.codec()``) instead of fitting one."""

    def __init__(self, options: Any = None, seed: int = 0) -> None:
        self.options: Any = options if options is not None else self.Options()
        self.seed = seed

    def inputs(self) -> list[Column]:
        """The columns an answer is made from."""
        return [column for column in self.columns if not column.target]

    def identity(self) -> Sequence[str]:
        """The columns in which two rows that are copies of each other agree. Default: those of ``inputs``."""
        return [column.name for column in self.inputs()]

    # -- prepare ------------------------------------------------------------------------------------------------------

    def gather(self, sources: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """What is in the files → rows of each part, before anything is dealt out. Default: a line is a row.

        Where lines are ``events``, rows are made of several of them (a user's history), and a part may be cut out of
        each (everybody's last click), which dealing whole rows out cannot do. What it gives stands where
        `multihead.data.rows.Rows` stands and may be read as often; parts that it makes are dealt out as they are.

        Args:
            sources: part → rows of its files.
            data: the recipe's ``data:`` section.
        """
        return dict(sources)

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        """Learn codecs from the training rows (read as often as needed; never all in memory)."""

    def check(self, row: dict[str, Any], part: str) -> None:
        """Raise UserError where a row cannot serve in `part` ("train", "valid", "test") though ``encode`` takes it: one
        that can be answered and measured, but has nothing to learn from."""

    def encode(self, row: dict[str, Any]) -> Example:
        """One raw row → arrays, ragged on their first axis: the only road from raw to numbers.

        A row without its target (at serving time) is encoded without it.
        """
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is stored of a raw row beside its encoding, for metrics and reports. Default: all of it."""
        return row

    def examples(self, store: Any, part: str) -> Sequence[Example]:
        """What one training example is. Default: one row. Language modelling cuts windows from the stream instead.

        Args:
            store: a `multihead.data.store.Store` of encoded rows.
            part: "train", "valid" or "test".
        """
        return store

    def describe(self, store: Any) -> dict[str, Any]:
        """What the data report says of one part beyond rows and lengths (classes, tokens …)."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the codecs into `folder`: JSON and safetensors only."""

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""

    # -- build --------------------------------------------------------------------------------------------------------

    def model(self, config: Any) -> nn.Module:
        """The module, with ``.trunk`` (or ``.encoder`` and ``.decoder``); `config` is a `TransformerConfig`."""
        raise NotImplementedError(f"{type(self).__name__}.model")

    def anew(self) -> Sequence[str]:
        """Beginnings of the names of weights that start fresh although `origin` has them: they mean something else."""
        return ()

    # -- train --------------------------------------------------------------------------------------------------------

    @property
    def rows_apart(self) -> bool:
        """Whether a row's loss is the same whatever other rows are worked out with it. Where not, a batch is cut into
        parts only where the recipe asks for it."""
        return True

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Crop, mask, noise; training loader only."""
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples → tensors. Default: each key padded with zeros to the longest, ``<key>_lengths`` where ragged."""
        return pad(examples)

    def length(self, store: Any) -> np.ndarray | None:
        """Length of each example, for batches of like lengths; None where all are alike."""
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum and count of the loss over one (micro-)batch."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """One JSON-able answer a row. `ask` holds what the caller wants beyond the defaults."""
        raise NotImplementedError(f"{type(self).__name__}.predict")

    def score(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Metrics of answers against the rows they answer."""
        raise NotImplementedError(f"{type(self).__name__}.score")

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the report shows beyond numbers: {"confusion": {...}, "mistakes": [...], "samples": [...]}."""
        return {}

    def explain(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
        """Figures of the report that ask the model more than its answers: {"importance": [{"name", "loss"}, …]}."""
        return {}

    # -- serve --------------------------------------------------------------------------------------------------------

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """One vector of length 1 a row, (B, D), by which rows can be compared; where ``embeds`` is true."""
        raise NotImplementedError(f"{type(self).__name__}.embed")

    def item_vectors(self, model: nn.Module) -> Tensor:
        """One vector an item of the catalogue, (I, D), by which items can be compared; where ``retrieves`` is true."""
        raise NotImplementedError(f"{type(self).__name__}.item_vectors")

    def catalogue(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Called before serving where ``ranks`` is true: what the retriever may find, ``{"id", "title", feature: […]}``
        each, so that it can be encoded ahead."""

    def context(self) -> list[Column]:
        """What ``rank`` reads beside the user and the item (the hour, the device …)."""
        return []

    def rank(self, model: nn.Module, requests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Scores of each request's items, in their order, higher being better; what is unknown is no fault.

        Args:
            requests: ``{"user": id or None, "history": ids or None, "context": {…}, "items": ids}``.
        """
        raise NotImplementedError(f"{type(self).__name__}.rank")

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as an input that a person can try. Default: its input columns."""
        return {column.name: row[column.name] for column in self.inputs() if column.name in row}

    def request(self, body: Any) -> dict[str, Any]:
        """One input of ``/v1/predict`` → one row. Default: the object itself, or a bare value as the first column."""
        if isinstance(body, dict):
            return body
        return {self.columns[0].name: body}

    def response(self, answer: Answer) -> Any:
        """An answer → what is sent back."""
        return answer


def check_room(option: str, length: int, config: Any) -> None:
    """A `UserError` where ``options.<option>`` asks for a longer sequence than the model holds.

    Args:
        config: the `TransformerConfig`.
    """
    most = config.max_length
    if length > most:
        raise UserError(tr(f"options.{option} is {length}, beyond model.max_length {most}",
                           f"options.{option} 是 {length}，超过了 model.max_length {most}"))


def pad(examples: Sequence[Example]) -> Batch:
    """Each key padded with zeros to the longest: scalars (B,), arrays (B, longest, …) and ``<key>_lengths`` (B,)."""
    batch: Batch = {}
    for key in examples[0]:
        arrays = [example[key] for example in examples]
        if arrays[0].ndim == 0:
            batch[key] = torch.from_numpy(np.stack(arrays))
            continue
        lengths = np.array([len(a) for a in arrays])
        out = np.zeros((len(arrays), max(int(lengths.max()), 1), *arrays[0].shape[1:]), dtype=arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        batch[key] = torch.from_numpy(out)
        batch[f"{key}_lengths"] = torch.from_numpy(lengths)
    return batch


def names() -> dict[str, tuple[str, Path]]:
    """Built-in tasks: name → (field, file). The folder is the registry."""
    return {
        path.stem.replace("_", "-"): (path.parent.name, path)
        for path in sorted(TASKS.glob("*/*.py"))
        if not path.stem.startswith("_")
    }


def find(name: str, base: Path | None = None) -> type[Task]:
    """The class of the task `name`: built in, from an installed package, or in a file (``./mine.py``).

    Args:
        base: the folder a file's path is relative to (the recipe's own).
    """
    if name.endswith(".py"):
        path = (base or Path()) / name
        if not path.is_file():
            raise UserError(tr(f"no task file {path}", f"没有任务文件 {path}"))
        return _from_file(path.resolve())
    built_in = names()
    if name in built_in:
        field_name, path = built_in[name]
        return _only_task(importlib.import_module(f"multihead.tasks.{field_name}.{path.stem}"), str(path))
    installed = {point.name: point for point in metadata.entry_points(group="multihead.tasks")}
    if name in installed:
        return installed[name].load()
    known = sorted([*built_in, *installed])
    raise UserError(
        tr(
            f"no task is called '{name}'{nearest(name, known)}; there are: {', '.join(known)}; "
            "a task of your own is named by its file, ./mine.py",
            f"没有名为 '{name}' 的任务{nearest(name, known)}；现有：{'、'.join(known)}；"
            "自己的任务用文件名表示，如 ./mine.py",
        )
    )


def _from_file(path: Path) -> type[Task]:
    module_name = f"multihead_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(tr(f"{path} is not a Python file", f"{path} 不是 Python 文件"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            tr(f"the task file does not load: {error!r}", f"任务文件无法载入：{error!r}"), str(path)
        ) from error
    return _only_task(module, str(path))


def _only_task(module: Any, where: str) -> type[Task]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(
            tr(
                f"a task file defines exactly one subclass of Task; this one has {len(found)}",
                f"一个任务文件应当只定义一个 Task 的子类；这里有 {len(found)} 个",
            ),
            where,
        )
    return found[0]
