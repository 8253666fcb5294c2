"""Requests answered in one go, joined into batches: the first row waits a few milliseconds for others.

One thread a model does everything that touches the task, so that a task need not think of threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead.errors import Problem, UserError, tr
from multihead.generation.engine import Busy, Draining
from multihead.task import Answer, Example, Task

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Call:
    """One request: its rows, and the promise of their answers.

    Args:
        examples: the rows where they are encoded already.
        embed: vectors are wanted, not answers.
        rank: rows are requests of `Task.rank`, and scores are wanted.
    """

    rows: Sequence[Any]
    ask: dict[str, Any]
    future: Future[list[Any]] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    examples: list[Example] = field(default_factory=list)
    embed: bool = False
    rank: bool = False

    def __post_init__(self) -> None:
        keys = sorted(self.examples[0]) if self.examples else []
        self.key = json.dumps([self.embed, self.rank, keys, self.ask], sort_keys=True, default=repr)

    def settle(self, answers: list[Any] | None, error: BaseException | None = None) -> None:
        """Keep the promise, unless the caller has gone."""
        try:
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(answers or [])
        except InvalidStateError:
            pass


class Batcher:
    """Answers rows with a task and its model.

    Args:
        max_batch: rows of one batch.
        wait_ms: how long the first row of a batch waits for others.
        queue: requests that may wait.
        on_batch: called with the number of rows of every batch.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        max_batch: int = 32,
        wait_ms: float = 3,
        queue: int = 256,
        name: str = "batcher",
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.task, self.model, self.max_batch, self.wait, self.queue = task, model, max_batch, wait_ms / 1000, queue
        self.name, self.on_batch = name, on_batch
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._changed = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._working = 0
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    async def answer(self, rows: Sequence[dict[str, Any]], ask: dict[str, Any]) -> list[Answer]:
        """One answer a row. Cancelling the caller takes rows out that no batch has taken yet.

        Raises:
            UserError: rows that cannot be read, each with its place in ``where``: "input[3]".
            Busy, Draining: no work is taken now.
        """
        call = Call(rows, ask)
        self.submit(call)
        return await asyncio.wrap_future(call.future)

    async def embed(self, examples: list[Example]) -> list[np.ndarray]:
        """The vector of each encoded row, (D,) float32. Cancelling and errors: as ``answer``."""
        call = Call(examples, {}, examples=examples, embed=True)
        self.submit(call)
        return await asyncio.wrap_future(call.future)

    async def rank(self, requests: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Scores of each request's items (`Task.rank`). Cancelling and errors: as ``answer``."""
        call = Call(requests, {}, examples=list(requests), rank=True)
        self.submit(call)
        return await asyncio.wrap_future(call.future)

    def submit(self, call: Call) -> None:
        """Put `call` in the queue."""
        with self._changed:
            if self._draining:
                raise Draining
            if len(self._waiting) > self.queue or (self._working and len(self._waiting) >= self.queue):
                raise Busy
            self._waiting.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"multihead-{self.name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, seconds: float = 0.0) -> bool:
        """Take no more work; give what there is `seconds` to end; True where all of it did."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while (self._waiting or self._working) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            whole = not (self._waiting or self._working)
            self._closed = True
            while self._waiting:
                self._waiting.popleft().settle(None, Draining())
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(None if whole else seconds + 10)
        return whole

    # -- in the batcher's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while calls := self._gather():
            try:
                self._work(calls)
            except Exception as error:
                log.exception("%s: a batch failed", self.name)
                for call in calls:
                    call.settle(None, error)
            with self._changed:
                self._working = 0
                self._changed.notify_all()

    def _gather(self) -> list[Call]:
        """The calls of the next batch: of one wish, in their order; empty when the thread should end."""
        with self._changed:
            while True:
                self._waiting = deque(call for call in self._waiting if not call.future.done())
                if self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                left = first.since + self.wait - time.monotonic()
                alike = [call for call in self._waiting if call.key == first.key]
                if left <= 0 or self._draining or sum(len(call.rows) for call in alike) >= self.max_batch:
                    break
                self._changed.wait(left)
            taken: list[Call] = []
            size = 0
            for call in alike:
                if taken and size + len(call.rows) > self.max_batch:
                    break
                taken.append(call)
                size += len(call.rows)
            for call in taken:
                self._waiting.remove(call)
            self._working = len(taken)
            return taken

    def _work(self, calls: list[Call]) -> None:
        """Encode, answer and settle `calls`; one that fails does not take the others with it."""
        calls = [call for call in calls if self._encode(call)]
        if not calls:
            return
        if len(calls) > 1:
            try:
                found = self._predict([example for call in calls for example in call.examples], calls[0])
            except Exception:
                log.exception("%s: a batch of %d requests failed; each is answered alone", self.name, len(calls))
            else:
                for call in calls:
                    call.settle(found[: len(call.rows)])
                    found = found[len(call.rows) :]
                return
        for call in calls:
            try:
                answers: list[Any] = []
                while len(answers) < len(call.rows) and not call.future.done():
                    answers += self._predict(call.examples[len(answers) : len(answers) + self.max_batch], call)
                call.settle(answers)
            except Exception as error:
                call.settle(None, error)

    def _encode(self, call: Call) -> bool:
        problems = []
        for i, row in enumerate(call.rows if not call.examples else ()):
            try:
                call.examples.append(self.task.encode(row))
            except UserError as error:
                problems += [Problem(p.message, f"input[{i}]") for p in error.problems]
            except Exception as error:
                log.warning("%s: a row cannot be encoded", self.name, exc_info=True)
                kind = type(error).__name__
                problems.append(Problem(
                    tr(f"this row cannot be read ({kind})", f"无法读取这一行（{kind}）"), f"input[{i}]"
                ))
        if problems:
            call.settle(None, UserError.many(problems))
        return not problems

    def _predict(self, examples: list[Example], call: Call) -> list[Any]:
        """What `call` wants of `examples`: answers, vectors or scores."""
        if self.on_batch is not None:
            self.on_batch(len(examples))
        with torch.inference_mode():
            if call.rank:
                return self._counted(examples, self.task.rank(self.model, examples))
            batch = {
                key: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for key, value in self.task.collate(examples).items()
            }
            answers: list[Any] = []
            if call.embed:
                answers = list(self.task.embed(self.model, batch).float().cpu().numpy())
            else:
                answers = self.task.predict(self.model, batch, dict(call.ask))
        return self._counted(examples, answers)

    def _counted(self, examples: list[Example], answers: list[Any]) -> list[Any]:
        if len(answers) != len(examples):
            raise ValueError(f"{type(self.task).__name__} gave {len(answers)} answers to {len(examples)} rows")
        return answers
