"""Step 2, build: from a recipe and fitted codecs to a module; and a run folder, opened again as what it has become."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead import recipe as recipes
from multihead.data.store import Store
from multihead.errors import Problem, UserError, tr
from multihead.prepare import make_task
from multihead.recipe import Recipe
from multihead.run import RECIPE, RunFolder
from multihead.runtime import checkpoint, device, optim
from multihead.task import Task, find
from multihead.transformer import lora

Counts = dict[str, int]


def make_model(task: Task, recipe: Recipe) -> nn.Module:
    """The module with fresh weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return task.model(recipe.model)


def training_model(task: Task, recipe: Recipe, fresh: bool = True) -> tuple[nn.Module, Taken | None]:
    """The module as it is trained: fresh weights, those of `Task.origin` over them, LoRA beside them.

    Args:
        fresh: False where a checkpoint will be loaded into it anyway: then nothing is read from the origin.

    Returns:
        the module, and what it took from its origin; None where there is none.

    Raises:
        UserError: where the origin's weights do not fit.
    """
    model = make_model(task, recipe)
    taken = None
    if fresh and task.origin is not None:
        taken = take(model, task.origin, task.anew())
    if recipe.model.lora is not None:
        wish, places = recipe.model.lora, body(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            lora.adapt(getattr(model, places["trunk"]), wish.rank, wish.alpha, wish.dropout, wish.targets)
        lora.freeze(*(getattr(model, name) for name in places.values()))
    return model, taken


def training_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the recipe's ``train`` asks for, over the parameters of `model` that train."""
    s = recipe.train
    return optim.build(model, optimizer=s.optimizer, lr=s.lr, muon_lr=s.muon_lr, weight_decay=s.weight_decay,
                       betas=s.betas, batch_size=s.batch_size)  # fmt: skip


# -- weights to start from ---------------------------------------------------------------------------------------------


@dataclass
class Taken:
    """Parameters of each part that came from an origin, that are new, and that were left there."""

    path: str
    family: str
    taken: Counts = field(default_factory=lambda: defaultdict(int))
    new: Counts = field(default_factory=lambda: defaultdict(int))
    left: Counts = field(default_factory=lambda: defaultdict(int))
    unknown: Sequence[str] = ()
    """Tensors of the origin that no part of ours could hold."""
    fitted: list[str] = field(default_factory=list)
    """Tensors of another size that were made to fit, with both."""

    def __str__(self) -> str:
        def said(counts: Counts, comma: str) -> str:
            return comma.join(f"{name} {count:,}" for name, count in counts.items())

        en = f"weights from {self.path} ({self.family}): {said(self.taken, ', ')}"
        zh = f"取自 {self.path}（{self.family}）的权重：{said(self.taken, '、')}"
        for counts, english, chinese in ((self.new, "new", "新建"), (self.left, "not used", "未用")):
            if counts:
                en, zh = f"{en}; {english}: {said(counts, ', ')}", f"{zh}；{chinese}：{said(counts, '、')}"
        if self.fitted:
            en, zh = f"{en}; interpolated: {', '.join(self.fitted)}", f"{zh}；经插值：{'、'.join(self.fitted)}"
        if self.unknown:
            some = ", ".join(self.unknown[:3]) + (" …" if len(self.unknown) > 3 else "")
            en, zh = f"{en}; unknown: {some}", f"{zh}；不认识：{some}"
        return tr(en, zh)


def body(model: nn.Module) -> dict[str, str]:
    """What ``input`` and ``trunk`` of an origin are called in `model`: of an encoder–decoder, the side that reads."""
    for names in ({"input": "input", "trunk": "trunk"}, {"input": "source", "trunk": "encoder"}):
        if all(hasattr(model, name) for name in names.values()):
            return names
    raise UserError(tr(
        "the model of this task has no `input` and `trunk` (or `source` and `encoder`) to hold the weights of "
        "`model.from`",
        "这个任务的模型没有 `input` 与 `trunk`（或 `source` 与 `encoder`），无法放入 `model.from` 的权重"))


def take(model: nn.Module, origin: Any, new: Sequence[str] = ()) -> Taken:
    """Copy into `model` every tensor of the origin that has a place there.

    Input and trunk must fit whole; of the heads, what has the same name and shape is taken and the rest stays new, as
    does what begins with one of `new`.

    Raises:
        UserError: naming every tensor of input and trunk that is missing or of another shape; or where one side reads
            both ways and the other only backwards.
    """
    places, path = body(model), str(origin.path)
    _same_direction(getattr(model, places["trunk"]), origin)
    given = {}
    for name, tensor in origin.tensors().items():
        part, dot, rest = name.partition(".")
        given[f"{places.get(part, part)}{dot}{rest}"] = tensor
    fitted = _fit(getattr(model, places["input"]), places["input"], given)
    own, alias = checkpoint.aliases(model)
    _untie(own, alias, given, path)
    fits = {name: name in given and given[name].shape == value.shape and not name.startswith(tuple(new))
            for name, value in own.items()}
    inside = tuple(f"{name}." for name in places.values())
    problems = [Problem(_misfit(name, own[name], given.get(name)), path)
                for name, fit in fits.items() if not fit and name.startswith(inside)]
    if problems:
        raise UserError.many(problems)
    told = Taken(path, origin.family, unknown=getattr(origin, "unknown", ()), fitted=fitted)
    with torch.no_grad():
        for name, value in own.items():
            if fits[name]:
                value.copy_(given[name])
            (told.taken if fits[name] else told.new)[name.partition(".")[0]] += value.numel()
    for name, tensor in given.items():
        if not fits.get(name, name in alias):
            told.left[name.partition(".")[0]] += tensor.numel()
    return told


def _fit(entry: nn.Module, place: str, given: dict[str, torch.Tensor]) -> list[str]:
    """Where an input can read weights for another size (``fitted``, as `PatchInput`), put what it makes of them into
    `given`; what was changed, for a person."""
    made = getattr(entry, "fitted", None)
    told: list[str] = []
    if made is None:
        return told
    for name in [name for name in given if name.startswith(f"{place}.")]:
        old, given[name] = given[name], made(name.removeprefix(f"{place}."), given[name])
        if given[name].shape != old.shape:
            told.append(f"{name} {tuple(old.shape)} → {tuple(given[name].shape)}")
    return told


def _same_direction(trunk: Any, origin: Any) -> None:
    if bool(getattr(trunk, "causal", False)) == bool(origin.causal):
        return
    if origin.causal:
        raise UserError(tr(
            "these weights learned to look backwards only (a decoder), but this task reads texts in both directions; "
            "start from a run of fill-mask or text-classification, or from a BERT",
            "这些权重只学过向前文看（解码器），而该任务需要双向阅读；"
            "请从 fill-mask 或 text-classification 的训练结果或 BERT 类模型开始"), str(origin.path))
    raise UserError(tr(
        "these weights learned to look both ways (an encoder), but this task writes texts word by word and may only "
        "look backwards; start from a run of text-generation, or from a GPT-2, Llama or Qwen",
        "这些权重学的是双向阅读（编码器），而该任务逐词生成，只能看前文；"
        "请从 text-generation 的训练结果或 GPT-2、Llama、Qwen 类模型开始"), str(origin.path))


def _untie(own: Mapping[str, Any], alias: Mapping[str, str], given: dict[str, torch.Tensor], path: str) -> None:
    """See to weights that are one on one side and two on the other."""
    for name, owner in alias.items():
        if name in given and owner in given and not torch.equal(given[name], given[owner]):
            raise UserError(tr(
                f"{name} and {owner} are two weights there and one here; write `options: {{tied: false}}`",
                f"{name} 与 {owner} 在那里是两个权重，在这里是同一个；请写 `options: {{tied: false}}`"), path)
    head, table = "head.linear.weight", given.get("input.token.weight")
    if head in own and head not in given and table is not None and own[head].shape == table.shape:
        given[head] = table


def _misfit(name: str, own: torch.Tensor, given: torch.Tensor | None) -> str:
    shape = tuple(own.shape)
    if given is None:
        return tr(f"there is no {name} {shape} there, which this model needs; choose weights of its own kind",
                  f"那里没有该模型需要的 {name} {shape}；请选用同类模型的权重")
    return tr(f"{name} is {tuple(given.shape)} there and {shape} in this model; the two do not fit together",
              f"{name} 在那里是 {tuple(given.shape)}，在该模型中是 {shape}；两者不匹配")


def trainable(model: nn.Module) -> str:
    """How many parameters train of how many, for a person."""
    every = sum(p.numel() for p in model.parameters())
    live = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if live == every:
        return tr(f"{every:,} parameters", f"{every:,} 个参数")
    share = f"{100 * live / every:.2g}"
    return tr(f"{live:,} of {every:,} parameters train ({share} %)",
              f"{every:,} 个参数中训练 {live:,} 个（{share} %）")


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

    def __getattr__(self, name: str) -> Any:
        """What the task's model offers (`Task.offers`)."""
        task = self.__dict__.get("task")
        if task is not None and name in task.offers:
            return getattr(self.model, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

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
    return recipes.load(folder.file(RECIPE), find=find, settled=True)
