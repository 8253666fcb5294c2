"""Sentences spoken by espeak-ng (``apt install espeak-ng``), where there are too few recordings to learn from."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import numpy as np


def sentences(path: Path, column: int, shortest: int, longest: int, count: int) -> list[str]:
    """`count` different sentences, drawn from a column of a gzipped table, of so many characters."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = {line.rstrip("\n").split("\t")[column] for line in file}
    kept = sorted(text for text in texts if shortest <= len(text) <= longest)
    return [kept[k] for k in np.random.default_rng(0).permutation(len(kept))[:count].tolist()]


def spoken(texts: list[str], folder: Path, voice: str) -> list[str]:
    """A WAV file of each text in `folder`; their names."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("--espeak needs espeak-ng: apt install espeak-ng")
    names = [f"espeak-{i}.wav" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        subprocess.run(["espeak-ng", "-v", voice, "-w", str(folder / name), text], check=True)
    return names
