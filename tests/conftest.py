"""What every test shares: one thread, English messages, no network, and the way to the real data sets."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["MULTIHEAD_LANG"] = "en"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets (``MULTIHEAD_DATA``, else ../shared/data); skips the test where it is absent."""
    folder = Path(os.environ.get("MULTIHEAD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not here: {folder} does not exist; set MULTIHEAD_DATA to their folder")
    return folder
