"""Servers to test: in this process, and as a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
import serve_models as models
from starlette.testclient import TestClient

from multihead.serve.app import ServeSettings, create_app

HERE = Path(__file__).parent
Client = Callable[..., TestClient]


@pytest.fixture
def client() -> Iterator[Client]:
    """Makes clients of applications of their own: ``client(names=("mood",), max_rows=3)``."""
    opened = []

    def make(names: tuple[str, ...] = ("writer", "mood"), max_length: int = 1024, **settings: Any) -> TestClient:
        app = create_app(models.served(names, max_length), ServeSettings(**settings))
        client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
        opened.append(client)
        return client.__enter__()

    yield make
    for one in opened:
        for hosted in one.app.state.models.values():  # type: ignore[attr-defined]
            until(lambda h=hosted: h.engine is None or h.engine.active == h.engine.waiting == 0)
        one.__exit__(None, None, None)


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


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests that only ask it things."""
    server = Process(tmp_path_factory.mktemp("serve"))
    yield server
    status, said = server.stop()
    assert (status, said) == (0, "")
