"""Where noise comes from: torch's own generator, or one of the calling thread.

Threads that work side by side would draw from torch's generator in whatever order they come. Each that has called
`seed` draws from its own instead, so that what it draws goes by the seed alone.
"""

from __future__ import annotations

import threading

import torch

_of_thread = threading.local()


def seed(value: int) -> None:
    """From here on the calling thread draws from a generator of its own, which begins with `value`."""
    if not hasattr(_of_thread, "generator"):
        _of_thread.generator = torch.Generator()
    _of_thread.generator.manual_seed(value)


def generator(device: torch.device) -> torch.Generator | None:
    """What random functions of torch are to be given as ``generator`` for tensors on `device`; None: torch's own."""
    return getattr(_of_thread, "generator", None) if device.type == "cpu" else None
