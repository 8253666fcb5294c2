"""Where noise comes from: torch's own generator, or one of the calling thread.

Threads that work side by side would draw from torch's generator in whatever order they come. Each that has called
`seed` draws from its own instead, so that what it draws goes by the seed alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

_of_thread = threading.local()


def seed(value: int) -> None:
    """From here on the calling thread draws from a generator of its own, which begins with `value`."""
    if not hasattr(_of_thread, "generator"):
        _of_thread.generator = torch.Generator()
    _of_thread.generator.manual_seed(value)


def twice() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around something that is worked out a second time, as `torch.utils.checkpoint` wants its ``context_fn``: what a
    thread drew from its own generator the first time it draws again. (Of torch's own the checkpoint takes care.)"""
    held: list[torch.Tensor] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        if hasattr(_of_thread, "generator"):
            held.append(_of_thread.generator.get_state())
        yield

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        if not held:
            yield
            return
        now = _of_thread.generator.get_state()
        _of_thread.generator.set_state(held[0])
        try:
            yield
        finally:
            _of_thread.generator.set_state(now)

    return first(), again()


def generator(device: torch.device) -> torch.Generator | None:
    """What random functions of torch are to be given as ``generator`` for tensors on `device`; None: torch's own."""
    return getattr(_of_thread, "generator", None) if device.type == "cpu" else None
