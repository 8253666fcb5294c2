"""Speeds compared by turns: every side takes a step in each round, and a ratio is the median over the rounds.

    peers = Apart(make, plan)                       # in a process of its own, with its allocator as it comes
    sides = {"ours": timed(step, args.clock), **peers.sides}
    found = Rounds(sides, seconds=60, threads=(1, 2))
    found.seconds("ours"), found.ratio("peer", "ours")
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from multihead.runtime import device
from multihead.train import Trainer

Work = Callable[[], object]
Side = Callable[[int], float]
"""Threads → seconds that a step took with them."""


def timed(work: Work, clock: Callable[[], float] = time.perf_counter) -> Side:
    """`work` as a side."""
    return partial(_timed, work, clock)


def _timed(work: Work, clock: Callable[[], float], threads: int) -> float:
    torch.set_num_threads(threads)
    start = clock()
    work()
    return clock() - start


def stepper(one: Trainer) -> Work:
    """A step of `one` at each call, its moving average of the weights included; with several threads in the way that is
    faster, as the loop itself chooses: all at every operation, or side by side."""
    steps = itertools.count()

    def step() -> None:
        one._update(next(steps))
        if one.ema is not None:
            one.ema.update()

    go = one.stepper.work_in
    ways = {n: device.choose([(n, 1), (n, n)] if n > 1 and one.task.rows_apart else [(n, 1)], go, step)
            for n in {1, device.cores()}}  # fmt: skip

    def work() -> None:
        go(ways[torch.get_num_threads()])
        step()

    return work


class Apart:
    """Peers in a process of their own, with the allocator as it comes (ours has it keep what was freed).

    Args:
        make: called there with `arguments`: the peers by name. An attribute ``parameters`` of a peer is kept here.
        clock: `time.perf_counter` or `time.process_time`.
    """

    def __init__(self, make: Callable[..., Mapping[str, Any]], *arguments: Any,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_apart, args=(theirs, make, arguments, clock), daemon=True)
        self.process.start()
        self.parameters: dict[str, int] = self.pipe.recv()

    @property
    def sides(self) -> dict[str, Side]:
        return {name: partial(self._ask, name) for name in self.parameters}

    def _ask(self, name: str, threads: int) -> float:
        self.pipe.send((name, threads))
        return float(self.pipe.recv())

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _apart(pipe: Any, make: Callable[..., Mapping[str, Any]], arguments: tuple, clock: Callable[[], float]) -> None:
    peers = make(*arguments)
    pipe.send({name: int(getattr(peer, "parameters", 0)) for name, peer in peers.items()})
    with suppress(EOFError):  # the other side is through
        while True:
            name, threads = pipe.recv()
            pipe.send(_timed(peers[name], clock, threads))


class Rounds:
    """What each side took, round after round, for about `seconds` and at least `least` rounds; after a warm-up."""

    def __init__(self, sides: Mapping[str, Side], seconds: float, threads: Iterable[int] = (1,),
                 least: int = 3) -> None:
        self.times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in sides for n in sorted({*threads})}
        for side in sides.values():
            side(1)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, self.times.values())) < least:
            for (name, count), taken in self.times.items():
                taken.append(sides[name](count))

    def best(self, name: str) -> list[float]:
        """Of each round, at the number of threads that is faster for it."""
        return min((taken for (side, _), taken in self.times.items() if side == name), key=statistics.median)

    def seconds(self, name: str) -> float:
        return statistics.median(self.best(name))

    def ratio(self, peer: str, ours: str) -> float:
        """How many times as fast as `peer` `ours` is: the median over rounds."""
        return statistics.median(a / b for a, b in zip(self.best(peer), self.best(ours), strict=True))
