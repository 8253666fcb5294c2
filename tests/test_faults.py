"""The short form of benchmarks/faults.py: a few kills, broken checkpoints, a full disk, signals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork are not there on Windows")
def test_a_run_survives_kills_broken_files_and_a_full_disk(tmp_path: Path) -> None:
    figures = tmp_path / "faults.json"
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--minutes", "3", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text("utf-8"))
    assert found["kills"]["made"] >= 1 and found["kills"]["resumed"] == found["kills"]["made"]
