"""One step of the optimizer over the global batch: cut into micro-batches, dealt out, summed, and divided once.

Nothing here depends on how many processes there are but who works out which micro-batch: a row's noise goes by its
place in the global batch, a micro-batch's by its number. So N processes, or N threads of one, do what one does with N
micro-batches.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from multihead import build, evaluate
from multihead.data.loader import Loader, shares
from multihead.errors import UserError, tr
from multihead.recipe import Recipe
from multihead.runtime import device, optim, parallel
from multihead.runtime.crew import Crew
from multihead.runtime.side_by_side import Gradients, SideBySide
from multihead.task import Batch, Example, Task
from multihead.transformer import noise

Part = tuple[int, int, int]
"""A micro-batch: its number, its first row in the global batch, and the one behind its last."""
Way = tuple[int, int]
"""How a step is worked out on a CPU: cores that are taken, threads that work side by side."""


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


class Told:
    """Sums over micro-batches: of the loss, of what it counts, and of further losses."""

    def __init__(self) -> None:
        self.total, self.count, self.parts = 0.0, 0, dict[str, float]()

    def add(self, total: Any, count: Any, parts: Mapping[str, Any]) -> None:
        self.total, self.count = self.total + float(total), self.count + int(count)
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + float(value)


class TooMuch(UserError):
    """Memory did not suffice among several processes, or for a single row. `rows`: how many to try next; 0: none."""

    rows = 0


class Stepper:
    """The model with its optimizer, and how a step is taken.

    Attributes:
        at_once: rows of a micro-batch; None: a process's, or a thread's, whole share of a batch. Halved where they do
            not fit.
        way: cores that are taken, and threads that work out micro-batches side by side; with one they come one after
            the other.
    """

    def __init__(
        self, recipe: Recipe, task: Task, examples: Sequence[Example], crew: Crew, place: torch.device,
        precision: torch.dtype, say: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.settings, self.task, self.examples, self.crew = recipe, recipe.train, task, examples, crew
        self.device, self.precision, self.say = place, precision, say
        self.loader = Loader(examples, self.settings.batch_size, seed=recipe.seed, lengths=task.length(examples))
        self.at_once = self.settings.micro_batch
        self.way: Way = (torch.get_num_threads(), 1)
        self.side_by_side: SideBySide | None = None
        self.reading = threading.Lock()
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

    def work_in(self, way: Way) -> None:
        """Take so many cores, and cut batches for so many threads side by side."""
        cores, count = way
        torch.set_num_threads(cores)
        if way != self.way:
            self.side_by_side = SideBySide(count, max(1, cores // count)) if count > 1 else None
            self.way = way

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
        at_once = self.at_once or (-(-len(indices) // self.way[1]) if self.side_by_side else None)
        mine = shares(len(indices), at_once, self.crew.rank, self.crew.world)
        told = Told()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            if self.side_by_side:
                self._together(self.side_by_side, step, indices, mine, told)
            else:
                for part in mine:
                    with self.engine.talking(last=part == mine[-1]):
                        loss, counted, more = self._loss(step, indices, part)
                        loss.backward()
                    told.add(loss.detach(), counted, more)
        except (RuntimeError, MemoryError) as error:
            rows = max(stop - start for _, start, stop in mine)
            if not out_of_memory(error):
                raise
            if self.crew.world > 1 or (rows == 1 and not self.side_by_side):
                raise self._too_much(rows, error) from None
            return None
        self.engine.reduce()
        return told.total, told.count, told.parts

    def _loss(self, step: int, indices: np.ndarray, part: Part, sow: Callable[[int], object] = torch.manual_seed,
              ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        micro, start, stop = part
        with self.reading:  # tasks need not know that there are threads
            batch = self.batch(step, indices[start:stop], start)
        device.seed_step(self.recipe.seed, step, micro, sow=sow)
        with device.autocast(self.device, self.precision):
            return self.engine.asked(batch)

    def _together(self, threads: SideBySide, step: int, indices: np.ndarray, mine: list[Part], told: Told) -> None:
        def work(own: Sequence[Part]) -> tuple[Gradients, Told]:
            found, said = Gradients(self.model), Told()
            for part in own:
                loss, counted, more = self._loss(step, indices, part, noise.seed)
                found.add(loss)
                said.add(loss.detach(), counted, more)
            return found, said

        for found, said in threads.each(work, mine):
            found.give()
            told.add(said.total, said.count, said.parts)

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
        rows = self.at_once or -(-self.loader.batch_size // self.way[1])
        self.at_once = -(-rows // 2)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:  # of each thread
            self.work_in((self.way[0], 1))
            self.say(tr("out of memory with one row a thread; from here on one after the other: the gradients are the "
                        "same. train.side_by_side=1 begins so",
                        "每个线程一次只算一行仍内存不足；此后依次计算，梯度不变。"
                        "可用 train.side_by_side=1 直接这样开始"))
            return
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


def ways(recipe: Recipe, task: Task, place: torch.device, crew: Crew | None = None) -> list[Way]:
    """How steps may be worked out on a CPU: cores to use, and threads that work side by side on parts of a batch."""
    s, crew = recipe.train, crew or Crew()
    if place.type != "cpu" or crew.world > 1:
        own = max(1, device.cores() // crew.local_world)
        return [(s.threads if isinstance(s.threads, int) else own, 1)]
    counts = [s.threads] if isinstance(s.threads, int) else device.candidates()
    if isinstance(s.side_by_side, int):
        return list(dict.fromkeys((max(n, s.side_by_side), s.side_by_side) for n in counts))
    if isinstance(s.threads, int) or s.micro_batch is not None or not task.rows_apart:
        return [(n, 1) for n in counts]
    return [*((n, 1) for n in counts), *((n, n) for n in counts if 1 < n <= s.batch_size)]


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
