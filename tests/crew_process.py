"""One process of a crew without torchrun: ``python -m tests.crew_process RANK WORLD JOBS``, several runs one after the
other, so that torch is imported once.

JOBS is a JSON file: ``[{"port": …, "recipe": path, "run": folder, "overrides": […]}, …]``. A job
with "at" gets a signal after so many steps, SIGTERM or its "signal"; one with "alone" is for the first process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from multihead.train import Stopped, Trainer, train


def main(rank: int, world: int, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(job["port"])}  # fmt: skip
        if job.get("alone"):
            if rank:
                continue
            os.environ["WORLD_SIZE"] = "1"
        stop_at(job.get("at") if rank == world - 1 or job.get("alone") else None, job.get("signal", signal.SIGTERM))
        try:
            train(job["recipe"], job["overrides"], run=job["run"], progress=False)
            assert "at" not in job
        except Stopped:
            assert "at" in job


def stop_at(step: int | None, number: int, before: Any = Trainer._one) -> None:
    """Let this process hear a signal during that step."""

    def one(self: Trainer, log: Any) -> None:
        if step is not None and self.step == step - 1:
            os.kill(os.getpid(), number)
        before(self, log)

    Trainer._one = one  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text("utf-8")))
