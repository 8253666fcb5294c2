"""What a run says while it trains: ``log.jsonl`` for programs, TensorBoard where asked, a progress line for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, TextIO

from ..errors import UserError, tr
from ..run import replacing, writing


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The whole entries of a log, in order. A last line torn by a crash is left out; no file, no entries."""
    path = Path(path)
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


class Log:
    """Appends one JSON object a line to `path`; on resuming, drops what was logged after `step` first.

    So no step ever stands there twice, whatever was killed where. With `tensorboard` (a folder) numbers go there too;
    UserError where the package is missing.
    """

    def __init__(self, path: str | Path, step: int = 0, tensorboard: str | Path | None = None) -> None:
        self.path = Path(path)
        self._keep_up_to(step)
        with writing(self.path):
            self._file: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _board(Path(tensorboard), step) if tensorboard else None

    def _keep_up_to(self, step: int) -> None:
        if not self.path.is_file():
            return
        entries = [entry for entry in read_log(self.path) if entry.get("step", 0) <= step]
        with replacing(self.path) as part:
            part.write_text("".join(_line(entry) for entry in entries), encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Appends ``{"step": step, **values}`` and hands it to the system. Numbers also go to TensorBoard."""
        with writing(self.path):
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed; what a full disk refused was said then
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _line(entry: Mapping[str, Any]) -> str:
    """One line of JSON. NaN and infinity become null: JSON has neither, and other readers would refuse the line."""
    tidy = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(tidy, ensure_ascii=False) + "\n"


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(tr("train.tensorboard needs the package tensorboard: pip install 'multihead[log]'.",
                           "train.tensorboard 需要 tensorboard 包：pip install 'multihead[log]'。")) from None
    return SummaryWriter(str(folder), purge_step=step + 1)


# ---- progress ------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time for a person: ``"42 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``, in the person's language."""
    whole = max(0, round(seconds))
    if whole < 60:
        return tr(f"{whole} s", f"{whole} 秒")
    if whole < 3600:
        return tr(f"{whole // 60} min {whole % 60:02d} s", f"{whole // 60} 分 {whole % 60:02d} 秒")
    return tr(f"{whole // 3600} h {whole % 3600 // 60:02d} min", f"{whole // 3600} 小时 {whole % 3600 // 60:02d} 分")


def number(value: float) -> str:
    """A measured value in at most five places: ``"1.8764"``, ``"12345"``, ``"3.2e-05"``."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 10000 else f"{value:.0f}"


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The command line that goes on where this process stops: the one it was started with, quoted for a shell."""
    arguments = list(sys.argv if argv is None else argv)
    name = Path(arguments[0]).name
    if name in ("__main__.py", "-m"):
        start = ["python", "-m", "multihead"]
    else:
        start = ["multihead"] if Path(name).stem == "multihead" else ["python", arguments[0]]
    if "TORCHELASTIC_RUN_ID" in os.environ and start[-1] == "multihead":
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        several = [f"--nnodes={machines}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500"] if machines > 1 else []
        # torchrun takes options for its own.
        dashes = ["--"] if any(word.startswith("-") for word in arguments[1:]) else []
        each = f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"
        start = ["torchrun", *several, each, "-m", *dashes, "multihead"]
    return shlex.join([*start, *arguments[1:]])


class Progress:
    """Shows step, loss, speed and time left on `stream` (default: stderr).

    On a terminal a bar that is redrawn; elsewhere one plain line every `every` seconds. `unit` names the items that
    `advance` counts beside steps (tokens, rows). A context manager; `say` prints a line of its own beside the bar.
    """

    def __init__(self, steps: int, start: int = 0, unit: str = "", every: float = 10.0, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.steps, self.step, self.unit = steps, start, unit
        self.stream, self._clock = stream or sys.stderr, clock
        self._bar: Any = None
        self._every = 0.2 if self.stream.isatty() else every
        self._items, self._shown, self._fresh = 0.0, clock(), False
        self._values: Mapping[str, SupportsFloat] = {}
        # (time, step, items) of the last 20 seconds, so that the speed forgets a slow start.
        self._seen = deque([(self._shown, start, 0.0)])

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=Console(file=self.stream), auto_refresh=False)
            self._bar.add_task("", total=self.steps, completed=self.step)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fresh:
            self._show()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, step: int, items: float = 0, **values: SupportsFloat) -> None:
        """Says that `step` steps are done, the last over `items` units. `values` (tensors too) are read when shown."""
        now = self._clock()
        self.step, self._values, self._fresh = step, values, True
        self._items += items
        self._seen.append((now, step, self._items))
        while len(self._seen) > 2 and now - self._seen[1][0] > 20:
            self._seen.popleft()
        if now - self._shown >= self._every:
            self._show()

    def say(self, message: str) -> None:
        """Prints a line of its own."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self.stream, flush=True)

    def interrupted(self, command: str | None = None) -> None:
        """Says that the run stopped early, and the exact command with which it goes on."""
        if self._fresh:
            self._show()
        command = command or resume_command()
        self.say(tr(f"Stopped after step {self.step} of {self.steps}; everything is saved. To go on:\n  {command}",
                    f"已在第 {self.step}/{self.steps} 步停下，进度已保存。继续训练请运行：\n  {command}"))

    def speed(self) -> tuple[float, float]:
        """Steps and items a second over about the last 20 seconds; zeros before the first step."""
        (t0, s0, n0), (t1, s1, n1) = self._seen[0], self._seen[-1]
        return ((s1 - s0) / (t1 - t0), (n1 - n0) / (t1 - t0)) if t1 > t0 else (0.0, 0.0)

    def text(self) -> str:
        """The present line: ``step 40/200 · loss 2.1034 · 9,120 tokens/s · 1 min 05 s left``."""
        steps, items = self.speed()
        parts = [tr(f"step {self.step}/{self.steps}", f"第 {self.step}/{self.steps} 步")]
        parts += [f"{name} {number(float(value))}" for name, value in self._values.items()]
        if steps > 0:
            rate = f"{items:,.0f} {self.unit}" if self.unit and items else tr(f"{steps:.3g} steps", f"{steps:.3g} 步")
            left = duration((self.steps - self.step) / steps)
            parts += [tr(f"{rate}/s", f"{rate}/秒"), tr(f"{left} left", f"还需 {left}")]
        return " · ".join(parts)

    def _show(self) -> None:
        self._shown, self._fresh = self._clock(), False
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.step, description=self.text(), refresh=True)
        else:
            print(self.text(), file=self.stream, flush=True)
