"""A server as a process of its own, and waiting for what must come true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def until(true: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


class Process:
    """A server of its own process on a free port of the loopback."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.returned = folder / "returned"
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "serve_models.py"), str(self.returned), json.dumps(settings)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()[1]
        self.port = int(self.address.rsplit(":", 1)[1])

    def stop(self) -> tuple[int, str]:
        """SIGTERM, or its end where that has come: exit status and what it said."""
        self.process.terminate()
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said
