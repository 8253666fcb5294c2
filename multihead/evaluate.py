"""Step 4, evaluate: a model's answers to rows it was not trained on, and what they are worth.

`score_part` is the part that training shares: answers in batches of like length, back in the order of the rows, scored
by the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead.data.loader import sequential
from multihead.data.store import Store
from multihead.task import Answer, Example, Task

EVALUATE: dict[str, Any] = {"evaluate": True}


def answers(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int = 64,
    ask: Mapping[str, Any] = EVALUATE,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype = "float32",
    tick: Any = None,
) -> list[Answer]:
    """The answer to every example, in the order of the examples.

    Batches hold examples of like length; the model is put into eval mode for the time of it and back after.

    Args:
        ask: what `Task.predict` is asked for.
        precision: "float32", or "bf16" for autocast.
        tick: called with the number of rows of each batch once it is answered (progress).
    """
    found: list[Answer | None] = [None] * len(examples)
    training = model.training
    model.eval()
    try:
        # Not inference_mode: training goes on with this module, and a table it builds and keeps now must stay usable there.
        with torch.no_grad(), autocast(device, precision):
            for index in sequential(len(examples), batch_size, _lengths(task, examples)):
                batch = to_device(task.collate([examples[int(i)] for i in index]), device)
                replies = task.predict(model, batch, dict(ask))
                if len(replies) != len(index):
                    raise ValueError(f"{type(task).__name__}.predict gave {len(replies)} answers to {len(index)} rows")
                for i, reply in zip(index, replies, strict=True):
                    found[int(i)] = reply
                if tick is not None:
                    tick(len(index))
    finally:
        model.train(training)
    return [reply for reply in found if reply is not None]


def score_part(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    rows: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype = "float32",
) -> dict[str, float]:
    """The task's metrics of `model` over `examples`, as plain floats. Used by validation during training.

    Args:
        rows: the raw rows the examples came from, one each; taken from the store where `examples` is one, and empty
            where an example is not a row (windows of a stream).
    """
    replies = answers(task, model, examples, batch_size, device=device, precision=precision)
    return numbers(task.score(replies, raw_rows(examples) if rows is None else rows))  # type: ignore[arg-type]


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as plain floats, whatever kind of number the task returned."""
    return {name: float(value) for name, value in scores.items()}


def raw_rows(examples: Sequence[Example]) -> Sequence[dict[str, Any]]:
    """The raw row of each example: read from the store as asked for, or empty where an example is not a stored row."""
    if isinstance(examples, Store):
        return StoreRows(examples)
    return [{} for _ in range(len(examples))]


class StoreRows(Sequence[dict[str, Any]]):
    """The raw rows of a store as a sequence that reads them when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: Any) -> Any:
        return [self.store.row(j) for j in range(*i.indices(len(self)))] if isinstance(i, slice) else self.store.row(i)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.store.rows()


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def autocast(device: torch.device | str, precision: str | torch.dtype) -> AbstractContextManager[Any]:
    """bf16 autocast on `device` where `precision` says so, else nothing."""
    if precision in ("bf16", torch.bfloat16):
        return torch.autocast(torch.device(device).type, torch.bfloat16)
    return nullcontext()


def _lengths(task: Task, examples: Sequence[Example]) -> np.ndarray | None:
    lengths = task.length(examples) if isinstance(examples, Store) else None
    return lengths if lengths is not None and len(lengths) == len(examples) else None
