"""The processes that train one run together, as ``torchrun`` starts them; one process alone is a crew too.

Numbers travel by one all-reduce a step, answers and decisions as JSON, and every wait that may be long goes through the
store where the processes met, which has no time limit. The first process (rank 0) decides what only one can: it
prepares, scores, logs and writes.

Where one fails, all end, and each knows why: the first to fail leaves its cause in the store, a thread beside the work
of every process looks there every few seconds and says in the same place that this process lives. So neither a process
that was killed nor a machine that is gone leaves the others waiting for more than a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from ..errors import UserError, tr

BEAT, SILENT, GRACE = 5.0, 30.0, 10.0
"""Seconds between two signs of life; without one after which a process counts as gone; that a process which is told to
end has for it. With three beats between (heard late, looked for late, told late) under a minute."""
LONG = timedelta(days=20)
MEETING = timedelta(minutes=10)
STUCK = timedelta(minutes=30)  # a collective that waits for a process which lives but does nothing


class Lost(UserError):
    """Another process of the crew failed; the message names it and its cause."""


class Crew:
    """One process alone: what there is to agree on, it agrees on with itself.

    Attributes:
        rank, world: this process's number, of how many.
        local_rank, local_world: the same among those on this machine.
    """

    rank, world, local_rank, local_world = 0, 1, 0, 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Before anything but `tell` and `meet`: gradients and sums are to travel between these devices."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """The values added up over all processes."""
        return list(values)

    def tell(self, value: Any) -> Any:
        """What the first process says, to all: anything JSON holds. The others wait for it as long as it takes."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each process says, in order, to all: anything JSON holds."""
        return [value]

    def meet(self) -> None:
        """Wait until every process is here, as long as it takes."""


class Many(Crew):
    """One of several processes. See `crew`."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        import torch.distributed as dist

        self.rank, self.world, self.host = rank, world, store
        self.store = dist.PrefixStore("crew", store.clone())  # whoever waits on a connection has it to himself
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        self._told = 0

    def connect(self, device: torch.device) -> None:
        import torch.distributed as dist

        self.device, backend = device, "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = dist.PrefixStore("group", self.host)
        dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.world, timeout=STUCK)

    def sums(self, values: Sequence[float]) -> list[float]:
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def tell(self, value: Any) -> Any:
        self._told += 1
        key = f"told/{self._told}"
        if self.first:
            self.store.set(key, json.dumps(value))
        else:
            self.store.wait([key], LONG)
        return json.loads(self.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(raw)], device=self.device))
        longest = max(int(size) for size in sizes)
        found = [raw.new_empty(longest) for _ in sizes]
        dist.all_gather(found, torch.nn.functional.pad(raw, (0, longest - len(raw))))
        texts = [piece[: int(size)].cpu().numpy() for piece, size in zip(found, sizes, strict=True)]
        return [json.loads(np.ascontiguousarray(text).tobytes()) for text in texts]

    def meet(self) -> None:
        self._told += 1
        key = f"met/{self._told}"
        if self.store.add(key, 1) == self.world:
            self.store.set(f"{key}/all", "yes")
        self.store.wait([f"{key}/all"], LONG)


def started_together() -> bool:
    """Whether ``torchrun`` (or what sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def crew() -> Iterator[Crew]:
    """The crew that this process is one of, while the block lasts. Where the block fails, all processes end.

    Raises:
        Lost: where another process failed.
    """
    if not started_together():
        yield Crew()
        return
    import torch.distributed as dist

    store, rank, world = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    watch = Watch(store.clone(), rank, world)
    watch.start()
    whole = True
    try:
        yield Many(rank, world, store)
    except BaseException as error:
        whole = type(error).__name__ == "Stopped"  # by a signal, all at the same step: nothing failed
        if not whole:
            watch.failed(error)
        raise
    finally:
        watch.stop()
        if whole and dist.is_initialized():
            dist.destroy_process_group()


# ---- one failure ends all ------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Beside the work of one process: signs of life in the store, and an eye on the others' and on what failed."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._heard: tuple[bytes, float] = (b"", time.monotonic())

    def run(self) -> None:
        beats = 0
        while not self.ending.is_set():
            beats += 1
            try:
                with self._lock:
                    self.store.set(f"alive/{self.rank}", str(beats))
                    self._listen()
                    cause = self._cause()
            except Exception as error:  # the store is a socket: when its host is gone, any call may fail
                cause = tr(f"the place where the processes met is gone ({error})", f"各进程的会合点已不可达（{error}）")
            if cause and not self.ending.wait(GRACE):
                print(ended(self.rank, cause), file=sys.stderr, flush=True)
                os._exit(1)
            self.ending.wait(BEAT)

    def stop(self) -> None:
        """This process has done its part; nobody waits for signs of its life any more."""
        self.ending.set()
        with contextlib.suppress(Exception), self._lock:
            self.store.set(f"alive/{self.rank}", "left")

    def failed(self, error: BaseException) -> None:
        """Leave the cause where all find it; or, where another failed before, say that this one ends for it."""
        own = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        cause = None
        with contextlib.suppress(Exception):
            # Whoever failed first may still be about to say why; and torchrun soon ends those who only look on.
            for wait in (0.1,) * 30 if _broken_talk(error) else ():
                with self._lock:
                    cause = self._cause()
                if cause is not None:
                    break
                time.sleep(wait)
            with self._lock:
                cause = cause or self._cause()
                if cause is None:
                    self.store.set("failure", json.dumps([self.rank, own]))
        _record(error if cause is None else Lost(cause))
        if cause is not None:
            raise Lost(ended(self.rank, cause)) from None
        if _broken_talk(error):
            raise Lost(tr(
                f"process {self.rank} lost the others: one was killed (for want of memory?) or its machine is gone "
                f"({error})", f"进程 {self.rank} 与其他进程失去联系："
                f"其中之一被杀死（内存不足？）或其机器已断开（{error}）")) from None

    def _cause(self) -> str | None:
        if not self.store.check(["failure"]):
            return None
        rank, said = json.loads(self.store.get("failure"))
        return None if rank == self.rank else tr(f"process {rank} failed: {said}", f"进程 {rank} 失败：{said}")

    def _listen(self) -> None:
        """Say so where the next process gave no sign of life for too long. Each listens to one, of however many."""
        other = (self.rank + 1) % self.world
        key, now = f"alive/{other}", time.monotonic()
        beat = self.store.get(key) if self.store.check([key]) else b""
        if beat != self._heard[0]:
            self._heard = (beat, now)
        quiet = round(now - self._heard[1])
        if beat not in (b"", b"left") and quiet > SILENT and not self.store.check(["failure"]):
            self.store.set("failure", json.dumps([other, tr(
                f"no sign of life for {quiet} s (killed, or its machine is gone)",
                f"{quiet} 秒没有响应（被杀死，或其机器已断开）")]))


def ended(rank: int, cause: str) -> str:
    return tr(f"process {rank} ends with it: {cause}", f"进程 {rank} 随之结束：{cause}")


def _broken_talk(error: BaseException) -> bool:
    """Whether talk between processes failed, which is what the others see of one that died."""
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out", "timeout", "distributed")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _record(error: BaseException) -> None:
    """Into the file where torchrun looks for the cause of a failure, to name it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
