"""What a run keeps of training: checkpoints to go on from, the best weights, and a batch that could not be learned.

Every function is called by all processes of a crew at once: the first writes, the others lend what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multihead import build
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.run import WEIGHTS, RunFolder
from multihead.runtime import checkpoint, optim
from multihead.runtime.crew import Crew
from multihead.runtime.sharding import share
from multihead.stepping import Stepper, rows_of
from multihead.task import Task
from multihead.transformer import lora

MEMORY = "memory.json"


def latest(folder: RunFolder, crew: Crew) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None, and what was skipped; read through by the first process alone."""
    saved, skipped = checkpoint.latest(folder.path) if crew.first else (None, [])
    name = crew.tell(None if saved is None else saved.path.name)
    if not crew.first and name is not None:
        saved = checkpoint.opened(folder.file("checkpoints") / name)
    return saved, skipped


def restore(saved: checkpoint.Checkpoint, stepper: Stepper, ema: optim.EMA | None) -> None:
    """Weights, the optimizer's state and averages as they were saved, by however many processes."""
    meta = saved.meta
    checkpoint.load_model(stepper.model, saved.tensors("model"), str(saved.path))
    state = checkpoint.unflatten(saved.tensors("optimizer"), meta["optimizer"])
    parameters = [p for group in stepper.optimizer.param_groups for p in group["params"]]
    for index, held in state["state"].items():
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                held[name] = share(value, parameters[index])
    stepper.optimizer.load_state_dict(state)
    stepper.at_once = meta.get("at_once", stepper.at_once)
    if ema is not None:
        ema.load(saved.tensors("ema"), meta["ema_updates"])


def remember(folder: RunFolder, rows: int) -> None:
    """For the next start: no more than so many rows at once fit into memory. Any process may say so."""
    if rows:
        folder.write_json(MEMORY, {"rows_at_once": rows})


def heed_memory(folder: RunFolder, stepper: Stepper) -> None:
    """Take no more rows at once than an earlier start found to fit."""
    if folder.file(MEMORY).is_file():
        found: Any = folder.read_json(MEMORY)
        rows = int(found["rows_at_once"])
        stepper.at_once = min(rows, stepper.at_once or rows)


def save(
    folder: RunFolder, crew: Crew, step: int, stepper: Stepper, ema: optim.EMA | None, meta: Mapping[str, Any],
    keep: int = 2,
) -> None:
    """A checkpoint of `step`."""
    tensors, rest = checkpoint.flatten(stepper.optimizer.state_dict())
    groups = {"model": checkpoint.model_tensors(stepper.model), "optimizer": tensors}
    more = {"optimizer": rest, **meta, "world": crew.world}
    if stepper.at_once != stepper.settings.micro_batch:
        more["at_once"] = stepper.at_once
    if ema is not None:
        groups["ema"], more["ema_updates"] = ema.tensors(), ema.updates
    if crew.first:
        checkpoint.save(folder.path, step, groups, more, keep)
    else:
        checkpoint.hand_over(*groups.values())


def keep_weights(
    folder: RunFolder, crew: Crew, recipe: Recipe, task: Task, model: nn.Module, step: int, figures: Mapping[str, float]
) -> None:
    """The weights as the run's own, with their validation `figures` in the file's header."""
    metadata = {"task": recipe.task, "step": str(step), **{k: f"{v:.6g}" for k, v in figures.items()}}
    tensors = lora.merged(model, checkpoint.model_tensors(model))
    if not crew.first:
        checkpoint.hand_over(tensors, hashed=True)
        return
    checkpoint.save_weights(folder.file(WEIGHTS), tensors, metadata)
    if recipe.model.lora is not None:
        from multihead.runtime import adapter  # with all that reads others' weights and tokenizers

        adapter.save(folder.file(adapter.FOLDER), model, task.origin, recipe.model, build.body(model))


def refuse(folder: RunFolder, crew: Crew, stepper: Stepper, step: int, loss: float) -> UserError:
    """Of a loss or gradient that is no number: keep the batch, name the parameter, change nothing."""
    names = crew.gather(optim.first_bad(stepper.model))
    name = next((name for name in names if name is not None), None)
    if crew.first:
        indices, batch = rows_of(step - 1, stepper)
        checkpoint.save_weights(
            folder.file("bad_batch.safetensors"),
            {k: v.contiguous() for k, v in batch.items() if isinstance(v, torch.Tensor)},
            {"step": str(step - 1)},
        )
        folder.write_json(
            "bad_batch.json", {"step": step - 1, "rows": indices.tolist(), "loss": str(loss), "parameter": name}
        )
    return UserError(
        tr(
            f"step {step}: the loss is {loss}, the gradient of '{name}' not finite. The batch is kept in "
            "bad_batch.safetensors (its rows in bad_batch.json). A smaller train.lr, train.clip, or "
            "train.precision=float32 may help; the last checkpoint is whole",
            f"第 {step} 步：损失为 {loss}，'{name}' 的梯度不是有限数。"
            "该批次保存在 bad_batch.safetensors（行号在 bad_batch.json）。"
            "可以试试减小 train.lr、设置 train.clip，或用 train.precision=float32；上一个检查点完好",
        ),
        str(folder.path),
    )
