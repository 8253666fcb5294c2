"""Step 3, train: the one loop. It knows no task; what differs between tasks is behind `Task.loss` and `Task.score`.

Every step is a pure function of the weights, the optimizer's state and the step's number: the rows come from
``Loader.batch(step)``, the noise from ``seed_step``. So a run that was killed and resumed ends with the same bits as
one that was not (in float32 with as many threads).
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead import build, evaluate
from multihead import prepare as preparing
from multihead.build import Run
from multihead.data.loader import Loader
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.run import WEIGHTS, RunFolder
from multihead.runtime import adapter, checkpoint, device, optim
from multihead.runtime.log import Log, Progress, resume_command
from multihead.task import Batch, Task
from multihead.transformer import lora


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
    with preparing.begin(path, overrides, run, restart) as (folder, recipe, task, _), _signals() as caught:
        Trainer(recipe, task, folder, caught, progress).fit()
    return Run(folder)


class Trainer:
    """One run's training: model, optimizer, loader, and where it stands."""

    def __init__(
        self, recipe: Recipe, task: Task, folder: RunFolder, caught: list[int] | None = None, progress: bool = True
    ) -> None:
        self.recipe, self.settings, self.task, self.folder = recipe, recipe.train, task, folder
        self.caught = [] if caught is None else caught
        self.device = device.choose_device(recipe.train.device)
        device.keep_memory()
        self.precision = device.choose_precision(recipe.train.precision, self.device)
        self.examples = task.examples(Store(folder.file("data/train")), "train")
        self.valid = task.examples(Store(folder.file("data/valid")), "valid") if self._has("valid") else None
        self.loader = self._loader()
        self.saved, self.skipped = checkpoint.latest(folder.path)
        self.steps, self.threads = self._scale()
        self.model, self.optimizer = self._fresh()
        self.ema = optim.EMA(self.model, self.settings.ema) if self.settings.ema else None
        self.step = 0
        self.best: dict[str, Any] = {"value": None, "step": 0, "stale": 0}
        self.done = False
        self.seconds = 0.0
        self.bar = Progress(self.steps, unit=task.unit) if progress else None

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _has(self, part: str) -> bool:
        return self.folder.file(f"data/{part}").is_dir() and len(Store(self.folder.file(f"data/{part}"))) > 0

    def _loader(self) -> Loader:
        lengths = self.task.length(self.examples)
        return Loader(self.examples, self.settings.batch_size, seed=self.recipe.seed, lengths=lengths)

    def _fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        made, self.taken = build.training_model(self.task, self.recipe, fresh=self.saved is None)
        model = made.to(self.device).train()
        s = self.settings
        return model, optim.build(
            model,
            optimizer=s.optimizer,
            lr=s.lr,
            muon_lr=s.muon_lr,
            weight_decay=s.weight_decay,
            betas=s.betas,
            batch_size=s.batch_size,
        )

    def _scale(self) -> tuple[int, int]:
        """Steps of the whole run and threads to use: what the checkpoint says, else by a short measurement."""
        s = self.settings
        if self.saved is not None:
            torch.set_num_threads(self.saved.meta["threads"])
            return self.saved.meta["steps"], self.saved.meta["threads"]
        if isinstance(s.threads, int):
            torch.set_num_threads(s.threads)
        if not s.steps or (s.minutes is None and (isinstance(s.threads, int) or self.device.type != "cpu")):
            return s.steps, torch.get_num_threads()
        self.model, self.optimizer = self._fresh()  # thrown away after the measurement
        step = iter(range(1 << 30))

        def work() -> None:
            self._update(next(step))

        threads = s.threads if isinstance(s.threads, int) else device.choose_threads(work)
        steps = s.steps
        if s.minutes is not None:
            times: list[float] = []
            enough = min(20.0, max(2.0, s.minutes * 60 * 0.01))  # a busy machine is not judged by one quiet moment
            while len(times) < 5 or sum(times) < enough:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            # A twentieth of the time is left for evaluations and checkpoints.
            usual = statistics.fmean(sorted(times)[: max(3, len(times) * 9 // 10)])
            steps = max(1, min(steps, int(s.minutes * 60 * 0.95 / usual)))
        return steps, threads

    def _resume(self) -> None:
        if self.saved is None:
            return
        checkpoint.load_model(self.model, self.saved.tensors("model"), str(self.saved.path))
        meta = self.saved.meta
        self.optimizer.load_state_dict(checkpoint.unflatten(self.saved.tensors("optimizer"), meta["optimizer"]))
        if self.ema is not None:
            self.ema.load(self.saved.tensors("ema"), meta["ema_updates"])
        self.step, self.best, self.done, self.seconds = self.saved.step, meta["best"], meta["done"], meta["seconds"]

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
        board = self.folder.file("tensorboard") if self.settings.tensorboard else None
        with Log(self.folder.file("log.jsonl"), self.step, board) as log, self.bar or contextlib.nullcontext():
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

    def _before(self, log: Log) -> None:
        """What is to be known before the first step; and all there is to do where no step is asked for."""
        if not self.steps:
            if self.valid is not None:
                self._evaluate(log)
            self._finish()
            self._save()
        elif self.valid is not None and self.settings.early_stop is not None and self.settings.early_stop.metric:
            few, rows = range(min(8, len(self.valid))), evaluate.raw_rows(self.valid)
            replies = evaluate.answers(self.task, self.model, [self.valid[i] for i in few], device=self.device)
            self._metric(evaluate.numbers(self.task.score(replies, [rows[i] for i in few])))

    def _one(self, log: Log) -> None:
        started = time.perf_counter()
        loss, norm, count, parts, lr = self._update(self.step)
        self.step += 1
        if not math.isfinite(norm) or not math.isfinite(loss):
            self._refuse(loss)
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
                **parts,
            )

    def _update(self, step: int) -> tuple[float, float, int, dict[str, float], float]:
        """One step of the optimizer: loss, gradient norm, count, further losses, learning rate."""
        s = self.settings
        indices = self.loader.batch(step)
        size = s.micro_batch or len(indices)
        total, count, parts = 0.0, 0, dict[str, float]()
        self.optimizer.zero_grad(set_to_none=True)
        for micro, start in enumerate(range(0, len(indices), size)):
            batch = self._batch(step, indices[start : start + size], start)
            device.seed_step(self.recipe.seed, step, micro)
            with device.autocast(self.device, self.precision):
                loss = self.task.loss(self.model, batch)
            loss.total.backward()
            total, count = total + float(loss.total.detach()), count + int(loss.count)
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value.detach())
        norm = float(optim.clip(self.model.parameters(), s.clip, 1 / max(1, count)))
        warmup = int(s.warmup * self._total) if s.warmup < 1 else int(s.warmup)
        scale = optim.lr_scale(step, steps=self._total, warmup=warmup, decay=s.decay, floor=s.min_lr)
        optim.set_lr(self.optimizer, scale)
        if math.isfinite(norm):
            self.optimizer.step()
        return total / max(1, count), norm, count, {k: v / max(1, count) for k, v in parts.items()}, s.lr * scale

    @property
    def _total(self) -> int:
        return getattr(self, "steps", self.settings.steps)

    def _batch(self, step: int, indices: np.ndarray, first: int) -> Batch:
        examples = [
            self.task.augment(self.examples[int(i)], np.random.default_rng([self.recipe.seed, step, first + n]))
            for n, i in enumerate(indices)
        ]
        return evaluate.to_device(self.task.collate(examples), self.device)

    # -- evaluating, saving, stopping ---------------------------------------------------------------------------------

    def _every(self) -> tuple[int, int]:
        every = self.settings.eval_every or max(1, self.steps // 10)
        return every, self.settings.save_every or every

    def _evaluate(self, log: Log) -> None:
        """Validation scores; the weights are kept where the task's metric has never been better."""
        assert self.valid is not None
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            replies = evaluate.answers(
                self.task,
                self.model,
                self.valid,
                self.recipe.evaluate.batch_size,
                device=self.device,
                precision=self.precision,
                tick=lambda rows: self._heed(),
            )
            scores = evaluate.numbers(self.task.score(replies, evaluate.raw_rows(self.valid)))
            name, better = self._metric(scores)
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

    def _metric(self, scores: dict[str, float]) -> tuple[str, str]:
        name, better = self.task.metric
        wanted = self.settings.early_stop.metric if self.settings.early_stop else None
        if wanted is None or wanted == name:
            return name, better
        if wanted not in scores:
            raise UserError(
                tr(
                    f"train.early_stop.metric is '{wanted}'; this task reports: {', '.join(scores)}",
                    f"train.early_stop.metric 是 '{wanted}'；此任务给出的指标有：{'、'.join(scores)}",
                )
            )
        return wanted, "min" if any(
            word in wanted for word in ("loss", "error", "perplexity", "bits", "rate")
        ) else "max"

    def _keep_weights(self, figures: dict[str, float]) -> None:
        metadata = {"task": self.recipe.task, "step": str(self.step), **{k: f"{v:.6g}" for k, v in figures.items()}}
        tensors = lora.merged(self.model, checkpoint.model_tensors(self.model))
        checkpoint.save_weights(self.folder.file(WEIGHTS), tensors, metadata)
        if self.recipe.model.lora is not None:
            config, places = self.recipe.model, build.body(self.model)
            adapter.save(self.folder.file(adapter.FOLDER), self.model, self.task.origin, config, places)

    def _finish(self) -> None:
        self.done = True
        if self.valid is None:
            with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
                self._keep_weights({})

    def _save(self) -> None:
        tensors, rest = checkpoint.flatten(self.optimizer.state_dict())
        groups = {"model": checkpoint.model_tensors(self.model), "optimizer": tensors}
        meta = {
            "optimizer": rest,
            "best": self.best,
            "done": self.done,
            "steps": self.steps,
            "threads": self.threads,
            "seconds": self.seconds,
            "precision": str(self.precision).removeprefix("torch."),
        }
        if self.ema is not None:
            groups["ema"], meta["ema_updates"] = self.ema.tensors(), self.ema.updates
        checkpoint.save(self.folder.path, self.step, groups, meta, self.settings.keep)

    def _heed(self) -> None:
        if self.caught:
            raise _Interrupted(self.caught[0])

    def _refuse(self, loss: float) -> None:
        """A loss or gradient that is no number: keep the batch, name the parameter, change nothing."""
        name = optim.first_bad(self.model)
        step = self.step - 1
        indices = self.loader.batch(step)
        batch = self._batch(step, indices, 0)
        checkpoint.save_weights(
            self.folder.file("bad_batch.safetensors"),
            {k: v.contiguous() for k, v in batch.items()},
            {"step": str(step)},
        )
        self.folder.write_json(
            "bad_batch.json", {"step": step, "rows": indices.tolist(), "loss": str(loss), "parameter": name}
        )
        raise UserError(
            tr(
                f"step {self.step}: the loss is {loss}, the gradient of '{name}' not finite. The batch is kept in "
                "bad_batch.safetensors (its rows in bad_batch.json). A smaller train.lr, train.clip, or "
                "train.precision=float32 may help; the last checkpoint is whole",
                f"第 {self.step} 步：损失为 {loss}，'{name}' 的梯度不是有限数。"
                "该批次保存在 bad_batch.safetensors（行号在 bad_batch.json）。"
                "可以试试减小 train.lr、设置 train.clip，或用 train.precision=float32；上一个检查点完好",
            ),
            str(self.folder.path),
        )

    def _announce(self) -> None:
        if self.taken is not None:
            self._say(str(self.taken))
        parameters = build.trainable(self.model)
        number = str(self.precision).removeprefix("torch.")
        where = tr(f"{self.threads} threads", f"{self.threads} 线程") if self.device.type == "cpu" else str(self.device)
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
