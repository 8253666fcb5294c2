"""Answers that hold pictures or sound, put into files."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from multihead.data.files import os_error

ENDINGS = {"image/png": ".png", "audio/wav": ".wav"}


def written(answer: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """An answer whose data URIs were put into `folder`, which tells their places instead: ``<name>.wav`` of one,
    ``<name>-1.png``, ``<name>-2.png`` … of a list. UserError where they cannot be written."""

    def put(uri: str, stem: str) -> str:
        kind, _, body = uri.partition(";base64,")
        place = folder / f"{stem}{ENDINGS[kind.removeprefix('data:')]}"
        place.write_bytes(base64.b64decode(body))
        return str(place)

    found = dict(answer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in answer.items():
            if isinstance(value, str) and value.startswith("data:"):
                found[key] = put(value, name)
            elif isinstance(value, list) and value and all(str(one).startswith("data:") for one in value):
                found[key] = [put(uri, f"{name}-{i}") for i, uri in enumerate(value, 1)]
    except OSError as error:
        raise os_error(str(folder), error) from None
    return found
