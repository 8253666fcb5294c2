"""Validation while a run trains: its rows dealt out to the crew, the answers gathered, scored by the first process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from multihead import evaluate
from multihead.data.loader import sequential
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.runtime.crew import Crew
from multihead.task import Answer, Example, Task


def scores(
    task: Task, model: nn.Module, examples: Sequence[Example], crew: Crew, batch_size: int,
    tick: Callable[[], None] = lambda: None, **more: Any,
) -> dict[str, float]:
    """The task's metrics of `model` over `examples`, the same on every process.

    Each answers the batches that one process would make, in turn. Where answers hold what JSON does not, the first
    answers them all: the others wait.

    Args:
        model: must be whole on every process (`parallel.Engine.whole`).
        tick: called after each batch.
        more: `evaluate.answers`' device and precision.
    """
    lengths = evaluate.lengths_of(task, examples)
    batches = list(sequential(len(examples), batch_size, lengths))

    def answered(chosen: Sequence[np.ndarray]) -> list[Answer]:
        rows = np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64)
        own = None if lengths is None else np.asarray(lengths)[rows]
        return evaluate.answers(
            task, model, _Some(examples, rows), batch_size, lengths=own, tick=lambda n: tick(), **more
        )

    replies: list[Answer] | None
    if crew.world == 1:
        replies = evaluate.answers(task, model, examples, batch_size, tick=lambda n: tick(), **more)
    else:
        mine = answered(batches[crew.rank :: crew.world])
        crew.meet()
        if crew.sums([not _plain(mine)])[0]:
            replies = evaluate.answers(task, model, examples, batch_size, tick=lambda n: tick(), **more) if crew.first \
                else None
        else:
            replies = _in_order(crew.gather(mine), batches, len(examples))
    found = evaluate.numbers(task.score(replies, evaluate.raw_rows(examples))) if crew.first and replies is not None \
        else None
    return crew.tell(found)


class _Some(Sequence[Example]):
    """Some of the examples, by their numbers."""

    def __init__(self, examples: Sequence[Example], rows: np.ndarray) -> None:
        self.examples, self.rows = examples, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.examples[int(self.rows[i])]


def _in_order(parts: Sequence[list[Answer]], batches: Sequence[np.ndarray], count: int) -> list[Answer]:
    """Every process's answers, put where their rows stand."""
    found: list[Any] = [None] * count
    for rank, replies in enumerate(parts):
        rows = np.concatenate([*batches[rank :: len(parts)], np.empty(0, np.int64)]).astype(np.int64)
        for row, reply in zip(rows, replies, strict=True):
            found[int(row)] = reply
    return found


def _plain(value: Any) -> bool:
    """Whether JSON gives back exactly this."""
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(type(key) is str and _plain(inner) for key, inner in value.items())
    return value is None or type(value) in (str, int, float, bool)


def metric(task: Task, recipe: Recipe, found: dict[str, float]) -> tuple[str, str]:
    """The metric by which weights are kept, and whether less ("min") or more ("max") of it is better."""
    name, better = task.metric
    wanted = recipe.train.early_stop.metric if recipe.train.early_stop else None
    if wanted is None or wanted == name:
        return name, better
    if wanted not in found:
        raise UserError(
            tr(
                f"train.early_stop.metric is '{wanted}'; this task reports: {', '.join(found)}",
                f"train.early_stop.metric 是 '{wanted}'；此任务给出的指标有：{'、'.join(found)}",
            )
        )
    return wanted, "min" if any(word in wanted for word in ("loss", "error", "perplexity", "bits", "rate")) else "max"
