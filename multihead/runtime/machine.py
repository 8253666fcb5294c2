"""What this machine is: its processor, and the memory that it has and that is free."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name, as the system gives it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def memory(device: torch.device) -> int | None:
    """Bytes that the GPU, or the machine, has; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken, of the GPU, of the machine or of its control group; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    old = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for most, used in (("memory.max", "memory.current"), old):
        with contextlib.suppress(OSError, ValueError):
            limit, now = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (most, used))
            found.append(max(0, limit - now))
    return min(found, default=None)
