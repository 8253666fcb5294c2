"""What a run's log says of the machine: the share of its ceiling that is reached, and the energy that is spent.

The ceiling is what a large matrix product reaches here, measured once a machine, thread count and number format. Energy
is read where the machine counts it; where it does not, it is an estimate, and the log calls it one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..run import replacing
from . import machine
from .device import cores

BUDGET = 0.3  # seconds for a ceiling that is not known yet
SIZE = 1024
GPU_SIZE = 8192
CORE_WATTS = 8.0
"""What a busy core draws, its share of the package included: from 3 W (large servers) to 15 W (desktops)."""
GPU_WATTS = 300.0
RAPL = Path("/sys/class/powercap")


# -- the ceiling -------------------------------------------------------------------------------------------------------


def ceiling(device: torch.device, precision: torch.dtype, store: Path | None = None, least: float = 0.0) -> float:
    """Operations a second of a large matrix product there, with torch's present number of threads.

    Args:
        store: the file in which what was measured is kept; default: ``multihead/ceiling.json`` in the user's cache.
        least: what has been reached already. A measurement that says less was disturbed, and is made anew.
    """
    store = _cache() / "ceiling.json" if store is None else store
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{machine.processor()}, {cores()} cores"
    key = f"{where}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}"
    known = _known(store)
    if known.get(key, 0.0) > least:
        return known[key]
    found = max(measure(device, precision), least)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run a third of a second
        store.parent.mkdir(parents=True, exist_ok=True)
        with replacing(store) as part:
            part.write_text(json.dumps({**known, key: found}, indent=1), "utf-8")
    return found


def _known(store: Path) -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # none yet, or torn, or something else
        return {key: float(value) for key, value in json.loads(store.read_text("utf-8")).items()}
    return {}


def measure(device: torch.device, precision: torch.dtype, budget: float = BUDGET) -> float:
    """The best of the products made within `budget` seconds, operations a second.

    On a CPU by the time that its threads have worked, not by the clock: a neighbour must not lower it.
    """
    size = GPU_SIZE if device.type == "cuda" else SIZE
    a, b = (torch.ones(size, size, dtype=precision, device=device) for _ in range(2))
    threads = torch.get_num_threads()

    def taken() -> float:
        before, start = time.process_time(), time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter() - start
        return min(time.perf_counter() - start, (time.process_time() - before) / threads)

    taken()
    end, times = time.perf_counter() + budget, [taken()]
    while time.perf_counter() < end:
        times.append(taken())
    return 2 * size**3 / min(times)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multihead"


# -- energy ------------------------------------------------------------------------------------------------------------


class Energy:
    """Joules spent since it was made, by the machine's own counters where they can be read.

    Attributes:
        measured: False where `joules` is an estimate.
    """

    def __init__(self, device: torch.device, folder: Path = RAPL) -> None:
        self.device, self._spent = device, 0.0
        self._counters = self._rapl(folder) if device.type == "cpu" else []
        self._gpu = _nvml(device) if device.type == "cuda" else None
        self.measured = bool(self._counters) or self._gpu is not None
        self._last = self._read()

    def joules(self) -> float:
        """RAPL counts the whole package, so do others' processes; the estimate counts this process's own time."""
        now = self._read()
        ranges = [most for _, most in self._counters] or [0.0]
        for most, before, after in zip(ranges, self._last, now, strict=True):
            self._spent += after - before if after >= before else after - before + most  # the counter began anew
        self._last = now
        return self._spent

    def _read(self) -> list[float]:
        if self._counters:
            return [int(file.read_text()) / 1e6 for file, _ in self._counters]
        if self._gpu is not None:
            return [self._gpu() / 1e3]
        if self.device.type == "cuda":
            return [time.perf_counter() * GPU_WATTS]
        return [time.process_time() * CORE_WATTS]

    @staticmethod
    def _rapl(folder: Path) -> list[tuple[Path, float]]:
        """Counters of whole packages (``intel-rapl:0``; AMD's have the same name), and where they begin anew, J."""
        found = []
        with contextlib.suppress(OSError, ValueError):
            for place in sorted(folder.glob("intel-rapl:*")):
                if place.name.count(":") == 1:
                    int((place / "energy_uj").read_text())  # since 2020 only root may
                    found.append((place / "energy_uj", int((place / "max_energy_range_uj").read_text()) / 1e6))
            return found
        return []


def _nvml(device: torch.device) -> Callable[[], float] | None:
    """Millijoules of a GPU since its driver was loaded; None where nobody counts them."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return None


class Meter:
    """What the log is told of the machine.

    Args:
        flops: operations of the forward and backward passes of one token, row …
        entries: what an earlier part of the run has logged: its energy counts on.
        step: the step that this part begins at.
        world: how many processes share the work.
    """

    def __init__(self, device: torch.device, precision: torch.dtype, flops: float, entries: Iterable[Mapping[str, Any]],
                 step: int = 0, world: int = 1) -> None:
        self.flops, self.world, self.where = flops, world, (device, precision)
        self.ceiling = ceiling(*self.where) * world
        self.energy = Energy(device)
        self.name = "joules" if self.energy.measured else "joules_estimated"
        told = [entry[self.name] for entry in entries if self.name in entry and entry.get("step", 0) <= step]
        self.spent = told[-1] if told else 0.0

    def read(self, units_per_s: float) -> dict[str, float]:
        """``share_of_ceiling`` (0 … 1), and ``joules`` of the run so far, or ``joules_estimated``."""
        reached = self.flops * units_per_s
        if reached > self.ceiling:
            self.ceiling = ceiling(*self.where, least=reached / self.world) * self.world
        return {"share_of_ceiling": round(reached / self.ceiling, 4),
                self.name: round(self.spent + self.energy.joules(), 1)}  # fmt: skip
