"""One step of the optimizer over the global batch: cut into micro-batches, dealt out, summed, and divided once.

Nothing here depends on how many processes there are but who works out which micro-batch: a row's noise goes by its
place in the global batch, a micro-batch's by its number. So N processes do what one does with N micro-batches.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from multihead import build, evaluate
from multihead.data.loader import Loader, shares
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.runtime import device, optim, parallel
from multihead.runtime.crew import Crew
from multihead.task import Batch, Example, Task


class Outcome(NamedTuple):
    """What a step came to, over all processes."""

    loss: float
    norm: float
    """Of the whole gradient, before it was clipped."""
    counted: int
    parts: dict[str, float]
    lr: float
    signalled: bool
    """Whether a signal asked any process to stop."""


class TooMuch(UserError):
    """Memory did not suffice among several processes, or for a single row. `rows`: how many to try next; 0: none."""

    rows = 0


class Stepper:
    """The model with its optimizer, and how a step is taken.

    Attributes:
        at_once: rows of a micro-batch; None: a process's whole share of a batch. Halved where they do not fit.
    """

    def __init__(
        self, recipe: Recipe, task: Task, examples: Sequence[Example], crew: Crew, place: torch.device,
        precision: torch.dtype, say: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.settings, self.task, self.examples, self.crew = recipe, recipe.train, task, examples, crew
        self.device, self.precision, self.say = place, precision, say
        self.loader = Loader(examples, self.settings.batch_size, seed=recipe.seed, lengths=task.length(examples))
        self.at_once = self.settings.micro_batch
        shares(self.loader.batch_size, self.at_once, crew.rank, crew.world)  # refuses before anything is built

    def build(self, fresh: bool) -> build.Taken | None:
        """Make model, engine and optimizer anew.

        Args:
            fresh: False where a checkpoint will be loaded into them.
        """
        s = self.settings
        model, taken = build.training_model(self.task, self.recipe, fresh=fresh)
        if s.recompute:
            parallel.recompute(model)
        lora = self.recipe.model.lora is not None
        self.engine = parallel.engine(
            model.train(), self.task.loss, self.crew, self.device, self.precision, s.parallel, fixed=lora
        )
        self.model: nn.Module = model
        self.optimizer = build.training_optimizer(self.recipe, model)
        return taken

    def update(self, step: int, steps: int, signalled: bool = False) -> Outcome:
        """Step number `step` (from 0) of `steps`."""
        while (summed := self._gradients(step)) is None:
            self._halve()
        own, parts = summed[:2], summed[2]
        names = sorted(parts)
        total, count, waved, *more = self.crew.sums([*own, signalled, *(parts[name] for name in names)])
        parts |= dict(zip(names, more, strict=True))
        s, many = self.settings, max(1, int(count))
        norm = float(optim.clip(self.model.parameters(), s.clip, self.engine.scale / many))
        warmup = int(s.warmup * steps) if s.warmup < 1 else int(s.warmup)
        scale = optim.lr_scale(step, steps=steps, warmup=warmup, decay=s.decay, floor=s.min_lr)
        optim.set_lr(self.optimizer, scale)
        if math.isfinite(norm):
            self.optimizer.step()
        parts = {name: value / many for name, value in parts.items()}
        return Outcome(total / many, norm, int(count), parts, s.lr * scale, bool(waved))

    def _gradients(self, step: int) -> tuple[float, int, dict[str, float]] | None:
        """This process's sums of loss, count and further losses, gradients of which the model then holds; None where
        memory did not suffice and fewer rows at once may do."""
        indices = self.loader.batch(step)
        mine = shares(len(indices), self.at_once, self.crew.rank, self.crew.world)
        total, count, parts = 0.0, 0, dict[str, float]()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for micro, start, stop in mine:
                batch = self.batch(step, indices[start:stop], start)
                device.seed_step(self.recipe.seed, step, micro)
                with self.engine.talking(last=micro == mine[-1][0]):
                    with device.autocast(self.device, self.precision):
                        told, counted, more = self.engine.asked(batch)
                    told.backward()
                total, count = total + float(told.detach()), count + int(counted)
                for name, value in more.items():
                    parts[name] = parts.get(name, 0.0) + float(value)
        except (RuntimeError, MemoryError) as error:
            rows = max(stop - start for _, start, stop in mine)
            if not out_of_memory(error):
                raise
            if self.crew.world > 1 or rows == 1:
                raise self._too_much(rows, error) from None
            return None
        self.engine.reduce()
        return total, count, parts

    def batch(self, step: int, indices: np.ndarray, first: int) -> Batch:
        """Rows of the data as the model reads them, noise included; `first`: where in the whole batch they begin."""
        examples = [
            self.task.augment(self.examples[int(i)], np.random.default_rng([self.recipe.seed, step, first + n]))
            for n, i in enumerate(indices)
        ]
        return evaluate.to_device(self.task.collate(examples), self.device)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _halve(self) -> None:
        """Half as many rows at once from here on. What was summed of the step is dropped, and it begins anew."""
        rows = self.at_once or self.loader.batch_size
        self.at_once = -(-rows // 2)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = -(-self.loader.batch_size // self.at_once)
        self.say(tr(
            f"out of memory with {rows} rows at once; from here on {self.at_once}, {parts} times a step: the gradients "
            f"are the same. train.micro_batch={self.at_once} begins so",
            f"一次计算 {rows} 行时内存不足；此后一次 {self.at_once} 行，每步 {parts} 次，梯度不变。"
            f"可用 train.micro_batch={self.at_once} 直接这样开始"))

    def _too_much(self, rows: int, error: BaseException) -> TooMuch:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if rows == 1:
            return TooMuch(tr(
                f"out of memory with a single row at once ({said}); a smaller model, shorter rows, "
                "train.recompute=true or, on several GPUs, train.parallel=fsdp need less",
                f"一次只计算一行仍内存不足（{said}）；"
                "可减小模型、缩短数据行、设 train.recompute=true，或在多块 GPU 上设 train.parallel=fsdp"))
        fewer = -(-rows // 2)
        told = TooMuch(tr(
            f"out of memory with {rows} rows at once ({said}). Several processes cannot begin a step anew; the next "
            f"start takes {fewer} and goes on from the last checkpoint: run the same command again (torchrun does so "
            "itself with --max-restarts)",
            f"一次计算 {rows} 行时内存不足（{said}）。多个进程无法重新开始一步；下次启动将一次计算 {fewer} 行，"
            "并从最近的检查点继续：请再次运行同一条命令（torchrun 加 --max-restarts 会自动重启）"))
        told.rows = fewer
        return told


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")
    return any(word in str(error).lower() for word in words)


def rows_of(step: int, stepper: Stepper) -> tuple[np.ndarray, dict[str, Any]]:
    """All rows of the global batch of `step`, by their numbers and as the model would read them at once."""
    indices = stepper.loader.batch(step)
    return indices, stepper.batch(step, indices, 0)
