"""What this machine can do, and what of it is used: device, number format, threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import locale
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import UserError, tr
from ..run import free_space, size_text
from . import machine

# oneDNN keeps the code of its last 1,024 products, and batches of texts hardly ever have the same lengths twice:
# hundreds of megabytes that nobody asks for again. A step makes some 25 kinds. Read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

# What each extra is for, and the modules by which we see that it is there.
Way = TypeVar("Way", bound=Hashable)

EXTRAS = {
    "data": ("pyarrow",),
    "vision": ("PIL", "av"),
    "recommend": ("faiss",),
    "speech": ("soundfile", "soxr", "av", "pypinyin", "cn2an", "jiwer"),
    "translation": ("sacrebleu",),
    "zh": ("jieba", "opencc"),
    "eval": ("jinja2",),
    "serve": ("fastapi", "uvicorn", "prometheus_client", "limits"),
    "log": ("tensorboard",),
    "demo": ("snownlp", "sklearn"),
}


# ---- device and number format --------------------------------------------------------------------------------------


def choose_device(wish: str = "auto", rank: int = 0) -> torch.device:
    """"auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". UserError where it is not there."""
    count = torch.cuda.device_count()
    if wish == "cpu" or (wish == "auto" and not count):
        return torch.device("cpu")
    if wish == "auto" or wish == "cuda":
        wish = f"cuda:{rank % max(count, 1)}"
    if not wish.removeprefix("cuda:").isdigit():
        raise UserError(tr(f"device: {wish!r} is none of auto, cpu, cuda, cuda:0.",
                           f"device：{wish!r} 不是 auto、cpu、cuda、cuda:0 之一。"))
    if int(wish[5:]) >= count:
        build = tr("this torch is built without CUDA", "当前 torch 不含 CUDA")
        seen = build if torch.version.cuda is None else tr(f"{count} GPUs are visible", f"可见的 GPU 有 {count} 个")
        raise UserError(tr(f"device {wish} was asked for, but {seen}. Use train.device=auto or train.device=cpu.",
                           f"要求使用 {wish}，但{seen}。请用 train.device=auto 或 train.device=cpu。"))
    return torch.device(wish)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets by their Linux names; of other systems only what torch itself reports."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return frozenset(flag for flag, name in known.items() if getattr(torch.cpu, name, lambda: False)())


@functools.cache
def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have instructions of their own there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """"auto", "float32" or "bf16" → the type in which matrix products are computed; weights stay float32."""
    if wish == "auto":
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    try:
        return {"float32": torch.float32, "bf16": torch.bfloat16}[wish]
    except KeyError:
        raise UserError(tr(f"precision: {wish!r} is none of auto, float32, bf16.",
                           f"precision：{wish!r} 不是 auto、float32、bf16 之一。")) from None


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """A context in which matrix products are computed in `precision`; does nothing for float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


def seed_step(seed: int, step: int, micro: int = 0, rank: int = 0, sow: Callable[[int], object] = torch.manual_seed,
              ) -> None:
    """Sets torch's generators as a pure function of the four numbers, so that resuming needs no saved state.

    Args:
        sow: what sets them; `multihead.transformer.noise.seed`: those of the calling thread.
    """
    value = 0
    for part in (seed, step, micro, rank):
        # The mixing step of SplitMix64 (Steele, Lea & Flood 2014): neighbouring steps get unrelated streams.
        value = (value + part + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    sow(value)


# ---- cores and threads ---------------------------------------------------------------------------------------------


def cores() -> int:
    """CPU cores this process may use: its affinity and its cgroup's quota, not what the machine has."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(count, math.ceil(quota)) if quota else count)


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of CPU time that control groups (version 2 or 1) allow, the tightest up the tree; None: no limit."""
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root if not controllers else root / "cpu"
        below = top / name.lstrip("/")
        for folder in (below, *(p for p in below.parents if p == top or top in p.parents)):
            limits += _limit(folder)
    return min(limits, default=None)


def _limit(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{kind}_us").read_text().strip() for kind in ("quota", "period"))
        return [int(quota) / int(period)] if quota not in ("max", "-1") else []
    except (OSError, ValueError):
        return []


def candidates(count: int | None = None) -> list[int]:
    """1, 2, 4 … up to all cores."""
    count = cores() if count is None else count
    return sorted({1, count, *(2**k for k in range(1, count.bit_length()) if 2**k <= count)})


def choose_threads(work: Callable[[], object], tries: Sequence[int] | None = None, budget: float = 2.0) -> int:
    """Sets torch to the number of threads with which `work` runs fastest here and now, and returns it; fewer win within
    5 %. As `choose`."""
    return choose(candidates() if tries is None else sorted(set(tries)), torch.set_num_threads, work, budget)


def choose(ways: Sequence[Way], go: Callable[[Way], object], work: Callable[[], object], budget: float = 2.0) -> Way:
    """The way in which `work` runs fastest here and now; earlier ones win within 5 %. It is the one that is gone.

    Runs `work` in each way in turn, round after round, for about `budget` seconds, and compares medians. Worth
    measuring: where cores are shared with others, threads that wait busily for each other can make a step ten times
    slower than one thread alone.

    Args:
        go: takes a way.
    """
    times: dict[Way, list[float]] = {way: [] for way in ways}
    if len(ways) > 1:
        end = time.perf_counter() + budget
        go(ways[0])
        work()
        while min(map(len, times.values())) == 0 or (time.perf_counter() < end and len(times[ways[0]]) < 50):
            for way in ways:
                if time.perf_counter() > end and times[way]:
                    break
                go(way)
                start = time.perf_counter()
                work()
                times[way].append(time.perf_counter() - start)
    best = fastest(times)
    go(best)
    return best


def fastest(times: Mapping[Way, Sequence[float]]) -> Way:
    """The first key whose median time is within 5 % of the best."""
    medians = {way: statistics.median(seen) for way, seen in times.items() if seen}
    return next((way for way, seen in medians.items() if seen <= 1.05 * min(medians.values())), next(iter(times)))


def keep_memory() -> None:
    """Has the C library keep what tensors free for those of the next step, instead of handing it back to the system.

    A step frees and takes the same sizes over and over, and each page that comes anew costs a fault: 2 to 13 % of a
    small Vision Transformer's step. Only glibc is asked; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, TypeError, OSError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        # In this order: the threshold of mmap, of trimming the heap's top, and what the heap grows by at least.
        for parameter, value in ((-3, 256 << 20), (-1, (1 << 31) - 1), (-2, 64 << 20)):
            mallopt(parameter, value)


# ---- doctor --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line of `multihead doctor`: what was looked at, what was found, and what to do where something lacks."""

    name: str
    value: str
    advice: str = ""


def doctor(folder: str | Path = ".") -> list[Finding]:
    """What this machine can do for a run in `folder`."""
    device = choose_device("auto")
    one = torch.randn(512, 512)
    threads = choose_threads(lambda: one @ one, budget=0.5)
    free = free_space(Path(folder))
    found = [
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        Finding("torch", torch.__version__),
        Finding(tr("device", "设备"), _device_text(device)),
        Finding(tr("cores", "可用核心"), tr(f"{cores()} of {os.cpu_count()}", f"{cores()}（共 {os.cpu_count()}）")),
        Finding(tr("threads", "线程数"), tr(f"{threads} (fastest now)", f"{threads}（此刻最快）")),
        Finding("bf16", tr("yes: used by default", "支持，默认使用") if fast_bf16(device) else
                tr("no: float32 is used", "不支持，使用 float32")),
        Finding(tr("memory", "内存"), _memory_text()),
        Finding(tr("disk", "磁盘"), tr(f"{size_text(free)} free", f"剩余 {size_text(free)}"),
                tr("free some space before training", "训练前请先腾出空间") if free < 2e9 else ""),
    ]  # fmt: skip
    for extra, modules in EXTRAS.items():
        lacking = [name for name in modules if importlib.util.find_spec(name) is None]
        if lacking:
            value = tr(f"missing: {', '.join(lacking)}", f"缺少：{'、'.join(lacking)}")
            found.append(Finding(f"[{extra}]", value, f"pip install 'multihead[{extra}]'"))
        else:
            found.append(Finding(f"[{extra}]", tr("installed", "已安装")))
    data = os.environ.get("MULTIHEAD_DATA", "")
    absent = tr("no such folder", "没有这个文件夹") if data and not Path(data).is_dir() else ""
    found.append(Finding("MULTIHEAD_DATA", data or tr("not set", "未设置"), absent))
    unset = tr("not set: by the locale", "未设置：按系统语言")
    found.append(Finding("MULTIHEAD_LANG", os.environ.get("MULTIHEAD_LANG") or unset))
    encoding = locale.getpreferredencoding(False)
    advice = "" if encoding.lower().replace("-", "") == "utf8" else "export PYTHONUTF8=1"
    found.append(Finding(tr("text encoding", "文本编码"), encoding, advice))
    return found


def _device_text(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return ", ".join(
        f"{torch.cuda.get_device_name(i)} ({size_text(torch.cuda.get_device_properties(i).total_memory)})"
        for i in range(torch.cuda.device_count())
    )


def _memory_text() -> str:
    cpu = torch.device("cpu")
    free, whole = machine.free(cpu), machine.memory(cpu)
    if free is None or whole is None:
        return tr("unknown", "未知")
    return tr(f"{size_text(free)} free of {size_text(whole)}", f"{size_text(whole)}，可用 {size_text(free)}")


def versions() -> dict[str, str]:
    """Versions of what a result depends on, for reports: python, torch, multihead, system."""
    try:
        own = importlib.metadata.version("multihead")
    except importlib.metadata.PackageNotFoundError:
        own = "source"
    system = platform.platform()
    return {"python": platform.python_version(), "torch": torch.__version__, "multihead": own, "system": system}
