"""Step 3, train: the one loop. It knows no task; what differs between tasks is behind `Task.loss` and `Task.score`.

Every step is a pure function of the weights, the optimizer's state and the step's number: the rows come from
``Loader.batch(step)``, the noise from ``seed_step``. So a run that was killed and resumed ends with the same bits as
one that was not (in float32 with as many threads). Started by ``torchrun``, several processes run this loop side by
side and agree at every step; see `stepping` for what they share.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead import build, evaluate, keeping, validating
from multihead import prepare as preparing
from multihead.build import Run
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.run import RunFolder
from multihead.runtime import device, optim
from multihead.runtime.crew import Crew, crew
from multihead.runtime.flops import forward_flops
from multihead.runtime.log import Log, Progress, read_log, resume_command
from multihead.runtime.meter import Meter
from multihead.stepping import Outcome, Stepper, TooMuch, ways
from multihead.task import Batch, Task


class Stopped(Exception):
    """A signal ended the run early; everything is saved. ``code`` is the exit status to leave with."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def train(
    path: str | Path,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> Run:
    """Prepare, build and train what a recipe describes; the same call resumes where an earlier one was stopped.

    Args:
        path: the recipe.
        overrides: ``key=value`` texts that win over it.
        run: the run folder; None for ``runs/<name>``.
        restart: remove what an earlier run left there.
        progress: show it on stderr.

    Raises:
        UserError: for anything a person can put right.
        Stopped: after SIGTERM or SIGINT, once a checkpoint is written.
    """
    with crew() as all_of_us:
        begun = _begin(all_of_us, path, overrides, run, restart)
        with begun as (folder, recipe, task), _signals() as caught:
            Trainer(recipe, task, folder, caught, progress, all_of_us).fit()
    return Run(folder)


@contextlib.contextmanager
def _begin(
    crew: Crew, path: str | Path, overrides: Sequence[str], run: str | Path | None, restart: bool
) -> Iterator[tuple[RunFolder, Recipe, Task]]:
    """The prepared run: the first process prepares and holds it, the others wait and open it."""
    if crew.first:
        with preparing.begin(path, overrides, run, restart) as (folder, recipe, task, _):
            crew.tell(str(folder.path.absolute()))
            yield folder, recipe, task
            crew.meet()
        return
    folder = RunFolder(crew.tell(None))
    if not folder.exists():
        raise UserError(tr(
            "the run folder of the first process is not to be seen from here; put it on a disk that all machines share",
            "在本机看不到第一个进程的训练文件夹；请放在所有机器共享的磁盘上"), str(folder.path))
    recipe = build.read_resolved(folder)
    task = preparing.make_task(recipe, folder.path)
    preparing.give_origin(recipe, task, folder)
    task.load(folder.file("codec"))
    yield folder, recipe, task
    crew.meet()


class Trainer:
    """One run's training: model, optimizer, data, and where it stands; in each process of a crew alike."""

    def __init__(
        self, recipe: Recipe, task: Task, folder: RunFolder, caught: list[int] | None = None, progress: bool = True,
        crew: Crew | None = None,
    ) -> None:
        self.recipe, self.settings, self.task, self.folder = recipe, recipe.train, task, folder
        self.caught = [] if caught is None else caught
        self.crew = Crew() if crew is None else crew
        self.device = device.choose_device(recipe.train.device, self.crew.local_rank)
        self.precision = device.choose_precision(recipe.train.precision, self.device)
        self.crew.connect(self.device)
        device.keep_memory()
        self.examples = task.examples(Store(folder.file("data/train")), "train")
        self.valid = task.examples(Store(folder.file("data/valid")), "valid") if self._has("valid") else None
        self.stepper = Stepper(recipe, task, self.examples, self.crew, self.device, self.precision, self._say)
        self.bar: Progress | None = None
        self.saved, self.skipped = keeping.latest(folder, self.crew)
        self.steps = self._scale()
        self.taken = self.stepper.build(fresh=self.saved is None)
        self.ema = optim.EMA(self.model, self.settings.ema) if self.settings.ema else None
        self.step = 0
        self.best: dict[str, Any] = {"value": None, "step": 0, "stale": 0}
        self.done = self.signalled = False
        self.seconds = 0.0
        self.meter: Meter | None = None
        if progress and self.crew.first:
            self.bar = Progress(self.steps, unit=task.unit)

    @property
    def model(self) -> nn.Module:
        return self.stepper.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.stepper.optimizer

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _has(self, part: str) -> bool:
        return self.folder.file(f"data/{part}").is_dir() and len(Store(self.folder.file(f"data/{part}"))) > 0

    def _scale(self) -> int:
        """Take the way in which steps are worked out, and say how many there are: what the checkpoint says, else by a
        short measurement."""
        s, meta = self.settings, self.saved.meta if self.saved is not None else None
        open_to = ways(self.recipe, self.task, self.device, self.crew)
        if meta is not None:
            same = meta.get("world", 1) == self.crew.world
            way = (meta["threads"], meta.get("side_by_side", 1)) if same else open_to[-1]
            self.stepper.work_in(way)
            return meta["steps"]
        self.stepper.work_in(open_to[0])
        if not s.steps or (s.minutes is None and len(open_to) == 1):
            return s.steps
        self.stepper.build(fresh=True)  # thrown away after the measurement
        step = iter(range(1 << 30))

        def work() -> None:
            self.stepper.update(next(step), s.steps)

        device.choose(open_to, self.stepper.work_in, work)
        return s.steps if s.minutes is None else self._steps_in(s.minutes, work)

    def _steps_in(self, minutes: float, work: Callable[[], None]) -> int:
        """So many steps take about `minutes`, but for a twentieth that is left for evaluations and checkpoints."""
        times: list[float] = []
        enough = min(20.0, max(2.0, minutes * 60 * 0.01))  # a busy machine is not judged by one quiet moment
        while self.crew.tell(len(times) < 5 or sum(times) < enough):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        usual = statistics.fmean(sorted(times)[: max(3, len(times) * 9 // 10)])
        return self.crew.tell(max(1, min(self.settings.steps, int(minutes * 60 * 0.95 / usual))))

    def _resume(self) -> None:
        if self.saved is not None:
            keeping.restore(self.saved, self.stepper, self.ema)
            meta = self.saved.meta
            self.step, self.best, self.done, self.seconds = self.saved.step, meta["best"], meta["done"], meta["seconds"]
        keeping.heed_memory(self.folder, self.stepper)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end, or until a signal; evaluates, logs and saves on the way."""
        self._resume()
        for message in self.skipped:
            self._say(message)
        if self.done:
            self._say(
                tr(
                    f"already trained: {self.step} steps. `multihead evaluate {self.folder.path}` tells how good it is",
                    f"已经训练完成，共 {self.step} 步。用 `multihead evaluate {self.folder.path}` 查看效果",
                )
            )
            return
        self._announce()
        every, save = self._every()
        board = self.folder.file("tensorboard") if self.settings.tensorboard and self.crew.first else None
        place = self.folder.file("log.jsonl") if self.crew.first else os.devnull
        self.meter = self._meter() if self.steps else None
        with Log(place, self.step, board) as log, self.bar or contextlib.nullcontext():
            try:
                self._before(log)
                while self.step < self.steps and not self.done:
                    self._one(log)
                    last = self.step == self.steps
                    if self.valid is not None and (self.step % every == 0 or last):
                        self._evaluate(log)
                    if last or self.done:
                        self._finish()
                    if self.step % save == 0 or self.done:
                        self._save()
                    self._heed()
            except _Interrupted as interrupted:
                self._save()
                if self.bar is not None:
                    self.bar.interrupted(resume_command())
                raise Stopped(interrupted.number) from None
            except TooMuch as error:
                keeping.remember(self.folder, error.rows)
                raise

    def _before(self, log: Log) -> None:
        """What is to be known before the first step; and all there is to do where no step is asked for."""
        if not self.steps:
            if self.valid is not None:
                self._evaluate(log)
            self._finish()
            self._save()
        elif self.valid is not None and self.settings.early_stop is not None and self.settings.early_stop.metric:
            few, rows = range(min(8, len(self.valid))), evaluate.raw_rows(self.valid)
            with self.stepper.engine.whole():
                replies = evaluate.answers(self.task, self.model, [self.valid[i] for i in few], device=self.device)
            found = evaluate.numbers(self.task.score(replies, [rows[i] for i in few]))
            validating.metric(self.task, self.recipe, found)

    def _one(self, log: Log) -> None:
        started = time.perf_counter()
        loss, norm, count, parts, lr, self.signalled = self._update(self.step)
        self.step += 1
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise keeping.refuse(self.folder, self.crew, self.stepper, self.step, loss)
        if self.ema is not None:
            self.ema.update()
        self.seconds += time.perf_counter() - started
        if self.bar is not None:
            self.bar.advance(self.step, count, loss=loss)
        if self.step % self.settings.log_every == 0 or self.step in (1, self.steps):
            rate = round(count / max(1e-9, time.perf_counter() - started), 1)
            log.write(
                self.step,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                seconds=round(self.seconds, 3),
                **{f"{self.task.unit}_per_s": rate},
                **(self.meter.read(rate) if self.meter is not None else {}),
                **parts,
            )

    def _meter(self) -> Meter | None:
        """Tells the log what share of this machine's ceiling is reached, and at what energy. A gradient takes as many
        operations as the forward pass for what is passed back, and again for the weights that train."""
        counts: list[int] = []
        try:
            indices = self.stepper.loader.batch(self.step)
            batch = self._batch(self.step, indices[: self.stepper.at_once or -(-len(indices) // self.crew.world)], 0)
            with self.stepper.engine.whole(), device.autocast(self.device, self.precision):
                flops = forward_flops(lambda: counts.append(int(self.task.loss(self.model, batch).count)))
        except (RuntimeError, MemoryError):  # of memory, most likely: the step itself knows what to do then
            return None
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        trained = sum(size for size, live in sizes if live) / max(1, sum(size for size, _ in sizes))
        entries = read_log(self.folder.file("log.jsonl"))
        per_unit = flops * (2 + trained) / max(1, counts[0])
        return Meter(self.device, self.precision, per_unit, entries, self.step, self.crew.world)

    def _update(self, step: int) -> Outcome:
        return self.stepper.update(step, self.steps, bool(self.caught))

    def _batch(self, step: int, indices: np.ndarray, first: int) -> Batch:
        return self.stepper.batch(step, indices, first)

    # -- evaluating, saving, stopping ---------------------------------------------------------------------------------

    def _every(self) -> tuple[int, int]:
        every = self.settings.eval_every or max(1, self.steps // 10)
        return every, self.settings.save_every or every

    def _evaluate(self, log: Log) -> None:
        """Validation scores; the weights are kept where the task's metric has never been better."""
        assert self.valid is not None
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            with self.stepper.engine.whole():
                scores = validating.scores(
                    self.task,
                    self.model,
                    self.valid,
                    self.crew,
                    self.recipe.evaluate.batch_size,
                    tick=self._heed if self.crew.world == 1 else lambda: None,
                    device=self.device,
                    precision=self.precision,
                )
            name, better = validating.metric(self.task, self.recipe, scores)
            value, best = scores[name], self.best["value"]
            improved = best is None or (value < best if better == "min" else value > best)
            self.best = (
                {"value": value, "step": self.step, "stale": 0}
                if improved
                else {**self.best, "stale": self.best["stale"] + 1}
            )
            log.write(self.step, valid=scores, seconds=round(self.seconds, 3), best=improved)
            if improved:
                self._keep_weights({name: value})
        shown = " · ".join(f"{k} {v:.4f}" for k, v in scores.items())
        self._say(
            tr(f"step {self.step}: validation {shown}", f"第 {self.step} 步：验证 {shown}") + (" *" if improved else "")
        )
        stop = self.settings.early_stop
        if stop is not None and self.best["stale"] >= stop.patience:
            self.done = True
            self._say(
                tr(
                    f"no better {name} for {stop.patience} evaluations; the weights of step {self.best['step']} stay",
                    f"{name} 连续 {stop.patience} 次评估没有改善；保留第 {self.best['step']} 步的权重",
                )
            )

    def _keep_weights(self, figures: dict[str, float]) -> None:
        keeping.keep_weights(self.folder, self.crew, self.recipe, self.task, self.model, self.step, figures)

    def _finish(self) -> None:
        self.done = True
        if self.valid is None:
            with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
                self._keep_weights({})

    def _save(self) -> None:
        meta = {
            "best": self.best,
            "done": self.done,
            "steps": self.steps,
            "threads": self.stepper.way[0],
            "side_by_side": self.stepper.way[1],
            "seconds": self.seconds,
            "precision": str(self.precision).removeprefix("torch."),
        }
        keeping.save(self.folder, self.crew, self.step, self.stepper, self.ema, meta, self.settings.keep)

    def _heed(self) -> None:
        """Stop where a signal asked to: one process at once, several at the step at which all have heard of it."""
        if self.caught if self.crew.world == 1 else self.signalled:
            raise _Interrupted(self.caught[0] if self.caught else signal.SIGTERM)

    def _announce(self) -> None:
        if self.taken is not None:
            self._say(str(self.taken))
        parameters = build.trainable(self.model)
        number = str(self.precision).removeprefix("torch.")
        threads, together = self.stepper.way
        where = tr(f"{threads} threads", f"{threads} 线程") if self.device.type == "cpu" else str(self.device)
        if together > 1:
            where += tr(" side by side", "（各算一部分）")
        if self.crew.world > 1:
            how, many = self.stepper.engine.name, self.crew.world
            where = tr(f"{many} processes ({how}) with {where} each", f"{many} 个进程（{how}），各 {where}")
        resumed = tr(f", resumed at step {self.step}", f"，从第 {self.step} 步继续") if self.step else ""
        self._say(
            tr(
                f"{self.folder.path}: {self.recipe.task}, {parameters}, {len(self.examples):,} examples, "
                f"{self.steps} steps, {where}, {number}{resumed}",
                f"{self.folder.path}：{self.recipe.task}，{parameters}，{len(self.examples):,} 个样本，"
                f"{self.steps} 步，{where}，{number}{resumed}",
            )
        )

    def _say(self, message: str) -> None:
        if self.bar is not None:
            self.bar.say(message)


class _Interrupted(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM instead of dying of them; the loop looks. A second SIGINT ends at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Callable(types.ModuleType):
    """``multihead.train`` names this file and, for people, the call ``multihead.train("reviews.yaml")``: it is both."""

    def __call__(self, *args: Any, **options: Any) -> Run:
        return train(*args, **options)


sys.modules[__name__].__class__ = _Callable
