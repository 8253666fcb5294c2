"""What every script in this folder shares: its arguments, the line that names the machine, the table, the exit code.

    args = arguments(__doc__, minutes=5)
    aims = [Aim("tokens a second, batch 1", peer=27.6, ours=61.2, unit="tokens/s", aim="ours ≥ 2 × peer", holds=True)]
    raise SystemExit(finish(args, aims, {"settings": {...}}))
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Aim:
    """One line of the table: what was aimed at, what the peer does, what ours does."""

    name: str
    peer: float | str | None
    ours: float | str | None
    unit: str
    aim: str
    holds: bool


Options = Sequence[tuple[str, dict[str, Any]]]


def arguments(about: str | None, minutes: float, extra: Options = ()) -> argparse.Namespace:
    """``--json FILE``, ``--minutes N`` (default `minutes`: the budget at which the aims are meant), ``--cpu`` (which
    also sets ``args.clock``), and `extra`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--minutes", type=float, default=minutes, metavar="N", help=f"time budget; default {minutes:g}")
    parser.add_argument("--cpu", action="store_true", help="one core, and processor time for the clock's: where "
                        "others use the machine too (only in comparisons of training)")  # fmt: skip
    for name, options in extra:
        parser.add_argument(name, **options)
    args = parser.parse_args()
    if args.cpu and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    args.clock = time.process_time if args.cpu else time.perf_counter
    args.full = args.minutes >= minutes
    if not args.full:
        print(f"A smaller budget than the {minutes:g} minutes the aims are meant at: {args.minutes:g}.", flush=True)
    return args


def machine(packages: Sequence[str] = ("torch", "transformers")) -> dict[str, Any]:
    """Processor, cores, flags that matter for speed, versions, date."""
    model, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return {
        "processor": model, "cores": cores, "flags": found, "python": platform.python_version(), **versions,
        "date": datetime.date.today().isoformat(),
    }


def finish(args: argparse.Namespace, aims: Sequence[Aim], more: dict[str, Any] | None = None) -> int:
    """Print machine and table, write the JSON file, and return the exit code: 0 only where every aim holds."""
    where = machine()
    said = (f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in where.items())
    print("\n" + ", ".join(said))
    head = ("", "peer", "ours", "unit", "aim", "holds")
    rows = [(a.name, _text(a.peer), _text(a.ours), a.unit, a.aim, "yes" if a.holds else "NO") for a in aims]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.json:
        result = {"machine": where, "minutes": args.minutes, "processor_time": args.cpu,
                  "aims": [asdict(a) for a in aims], **(more or {})}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(a.holds for a in aims) else 1


def _text(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"
