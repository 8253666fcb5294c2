"""Servers to test: in this process, and as a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import serve_models as models
from serve_process import Process, until
from starlette.testclient import TestClient

from multihead.serve.app import ServeSettings, create_app

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


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests that only ask it things."""
    server = Process(tmp_path_factory.mktemp("serve"))
    yield server
    status, said = server.stop()
    assert (status, said) == (0, "")
