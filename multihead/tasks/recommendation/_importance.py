"""How much each field matters to a model: what is lost when its values are dealt out anew among the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from multihead.codec.fields import FieldCodec
from multihead.metrics import clicks
from multihead.task import Example


def importance(
    codec: FieldCodec, examples: Sequence[Example], answer: Callable[[Sequence[Example]], np.ndarray]
) -> list[dict[str, Any]]:
    """[{"name", "loss": AUC lost}, …], the most first; of the same rows, dealt out in the same way for every field.

    Args:
        answer: rows → their probabilities.
    """
    clicked = np.array([example["label"] for example in examples]) > 0
    if clicked.all() or not clicked.any():
        return []
    whole = float(clicks.auc(answer(examples), clicked))
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    found = []
    for number, about in enumerate(codec.used):
        changed = [_with(codec, number, example, examples[other])
                   for example, other in zip(examples, order, strict=True)]  # fmt: skip
        found.append({"name": about.name, "loss": whole - float(clicks.auc(answer(changed), clicked))})
    return sorted(found, key=lambda one: -one["loss"])


def _with(codec: FieldCodec, number: int, example: Example, other: Example) -> Example:
    """The example with one field of another."""
    about = codec.used[number]
    if about.several:
        start, end = codec.starts[about.name], codec.starts[about.name] + len(about.counts)
        own, its = example["several"], other["several"]
        kept = own[(own < start) | (own >= end)]
        return {**example, "several": np.concatenate((kept, its[(its >= start) & (its < end)]))}
    key, place = ("quantity", number - len(codec.single) - len(codec.several)) if about.numeric else ("one", number)
    changed = example[key].copy()
    changed[place] = other[key][place]
    return {**example, key: changed}
