"""What training by a recipe will cost, said beforehand: operations, memory by what it is for, and whether it fits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from multihead import build, stepping
from multihead.data.loader import Loader
from multihead.data.store import Store
from multihead.errors import tr
from multihead.prepare import give_origin, make_task
from multihead.recipe import Recipe
from multihead.run import RunFolder, size_text
from multihead.runtime import device, machine
from multihead.runtime.cost import Cost, cost
from multihead.runtime.shadow import Shadow, Watch
from multihead.task import Task


def step_cost(task: Task, recipe: Recipe, store: Store, watch: Watch | None = None) -> Cost:
    """What the heaviest training step of the recipe costs, counted without allocating it; threads that may work side by
    side on it each have gradients of their own.

    Args:
        task: with its codecs and, where the recipe names weights to start from, its origin.
        store: the prepared rows of the training part.
        watch: how to count. Default: without numbers, or where somebody's own task cannot do without, as it runs.
    """
    settings, examples = recipe.train, task.examples(store, "train")
    where = device.choose_device(settings.device)
    lengths = task.length(examples)
    rows = Loader(examples, settings.batch_size, seed=recipe.seed, lengths=lengths).batch(
        heaviest(recipe, task, examples))  # fmt: skip
    size, rng = settings.micro_batch or len(rows), np.random.default_rng(recipe.seed)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [task.collate([task.augment(examples[int(i)], rng) for i in part]) for part in parts]
    counted = functools.partial(
        cost,
        functools.partial(_model, task, recipe),
        functools.partial(build.training_optimizer, recipe),
        task.loss,
        batches,
        precision=device.choose_precision(settings.precision, where),
        device=where,
        clip=settings.clip,
        ema=settings.ema,
    )
    if watch is not None:
        return counted(watch=watch)
    try:
        found = counted(watch=Shadow())
    except Exception:
        found = counted(watch=Watch())
    more = found.gradients * (max(count for _, count in stepping.ways(recipe, task, where)) - 1)
    return replace(found, gradients=found.gradients + more, peak=found.peak + more)


def heaviest(recipe: Recipe, task: Task, examples: Sequence[Any]) -> int:
    """The step of the first epoch whose batch holds the longest example, to which it is padded; 0 where all are alike.
    """
    lengths = task.length(examples)
    if lengths is None:
        return 0
    loader = Loader(examples, recipe.train.batch_size, seed=recipe.seed, lengths=lengths)
    return max(range(max(1, min(len(loader), recipe.train.steps))), key=lambda step: lengths[loader.batch(step)].max())


def _model(task: Task, recipe: Recipe) -> nn.Module:
    return build.training_model(task, recipe, fresh=False)[0]


def fits(found: Cost, free: int | None) -> bool | None:
    """Whether there is memory for it where `free` bytes are left; None where nobody can say."""
    return None if free is None else found.needed <= free


def words(found: Cost, unit: str, free: int | None) -> list[str]:
    """The cost as lines for a person.

    Args:
        unit: what the loss counts, as `Task.unit`.
        free: bytes that are left for it; None: unknown.
    """
    one = unit[:-1] if unit.endswith("s") else unit
    each = (tr("weights", "权重"), found.weights), (tr("gradients", "梯度"), found.gradients), (
        tr("optimizer", "优化器"), found.optimizer), (tr("moving average", "滑动平均"), found.average), (
        tr("activations", "激活值"), found.activations)  # fmt: skip
    said = [f"{name} {size_text(size)}" for name, size in each if size]
    flops, more = number(found.flops_per_unit), number(found.update_flops)
    count = f"{found.count:,}"
    lines = [
        tr(f"operations: {flops}FLOP a {one}, forward and back, of {count} {unit} in the largest step"
           + (f"; {more}FLOP a step for the optimizer" if found.update_flops else ""),
           f"计算量：每个 {one} 前向与反向共 {flops}FLOP，最大的一步有 {count} {unit}"
           + (f"；优化器每步 {more}FLOP" if found.update_flops else "")),
        tr(f"memory of that step: {', '.join(said)}; at most {size_text(found.peak)} of tensors at once",
           f"这一步的内存：{'，'.join(said)}；张量同时最多占 {size_text(found.peak)}"),
    ]  # fmt: skip
    needed = size_text(found.needed)
    if free is None:
        return [*lines, tr(f"training takes about {needed}", f"训练约需 {needed}")]
    left = size_text(free)
    if fits(found, free):
        return [*lines, tr(f"training takes about {needed}; {left} are free here: it fits",
                           f"训练约需 {needed}；本机可用 {left}：放得下")]
    return [*lines, tr(
        f"training takes about {needed}, and {left} are free here: it does not fit. A smaller train.micro_batch halves "
        "the activations at the same result; model.lora needs no optimizer state for the weights it leaves alone",
        f"训练约需 {needed}，而本机可用 {left}：放不下。减小 train.micro_batch 可以减少激活值而结果不变；"
        "model.lora 不动的权重不需要优化器状态")]  # fmt: skip


def number(value: float) -> str:
    """A count of operations for a person: ``"1.53 G"``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def show(folder: RunFolder, console: Any) -> None:
    """The step `build` for people: the parts of a prepared run's model, what training costs, and one batch as proof.

    Where there is no memory for it, nothing is built, and that is said.
    """
    from rich.table import Table

    recipe = build.read_resolved(folder)
    task = make_task(recipe, folder.path)
    task.load(folder.file("codec"))
    give_origin(recipe, task, folder)
    store = Store(folder.file("data/train"))
    found, free = step_cost(task, recipe, store), machine.free(device.choose_device(recipe.train.device))
    table = Table(title=tr("Model", "模型"))
    for head in (tr("part", "部分"), tr("parameters", "参数"), tr("memory", "内存")):
        table.add_column(head, justify="left" if not table.columns else "right")
    for name, count, size in [*found.parts, (tr("total", "合计"), found.parameters, sum(p[2] for p in found.parts))]:
        table.add_row(name, f"{count:,}", size_text(size))
    console.print(table)
    for line in words(found, task.unit, free):
        console.print(line, markup=False)
    if fits(found, free) is False:
        return
    model, taken = build.training_model(task, recipe)
    proof = build.prove(task, model, recipe, store)
    if taken is not None:
        console.print(f"{taken}\n{build.trainable(model)}", markup=False)
    shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in proof["batch"].items())
    loss, norm = f"{proof['loss']:.4f}", f"{proof['gradient_norm']:.4f}"
    console.print(tr(f"one batch ({shapes}): loss {loss}, gradient norm {norm}; every parameter is reached",
                     f"一个批次（{shapes}）：损失 {loss}，梯度范数 {norm}；梯度到达每个参数"), markup=False)
