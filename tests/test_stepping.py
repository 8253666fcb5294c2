"""A step where memory is short: fewer rows at once, blocks worked out twice, and the same gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multihead.data.loader import shares
from multihead.errors import UserError
from multihead.runtime import checkpoint
from multihead.train import Trainer
from tests.trainers import poem, trainer


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return poem(tmp_path, 3, steps=4, batch_size=8, eval_every=2)


def short_of_memory(one: Trainer, most: int, error: Exception) -> list[str]:
    """Let `one` fail wherever more than `most` rows are computed at once; what it says is collected."""
    told: list[str] = []
    asked = one.stepper.engine.asked.ask

    def ask(model: Any, batch: Any) -> Any:
        loss = asked(model, batch)
        if len(batch["ids"]) > most:
            raise error
        return loss

    one.stepper.engine.asked.ask = ask
    one.stepper.say = told.append
    return told


def gradients(one: Trainer, step: int = 0) -> dict[str, Tensor]:
    one._update(step)
    return {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_rows_and_keeps_the_gradients(
    recipe_path: Path, tmp_path: Path, error: Exception
) -> None:
    short, plenty = trainer(recipe_path, tmp_path / "short"), trainer(recipe_path, tmp_path / "plenty")
    told = short_of_memory(short, 2, error)
    found = gradients(short)
    for name, expected in gradients(plenty).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)
    assert short.stepper.at_once == 2 and len(told) == 2
    assert "out of memory with 4 rows at once; from here on 2, 4 times a step" in told[-1]
    gradients(short, 1)
    assert len(told) == 2, "it is not tried again with every step"


def test_what_memory_taught_is_kept_in_the_checkpoint(recipe_path: Path, tmp_path: Path) -> None:
    short = trainer(recipe_path, tmp_path / "run")
    short_of_memory(short, 4, ERRORS[0])
    short.fit()
    saved, _ = checkpoint.latest(tmp_path / "run")
    assert saved is not None and saved.meta["at_once"] == 4


def test_one_row_that_does_not_fit_is_a_persons_business(recipe_path: Path, tmp_path: Path) -> None:
    short = trainer(recipe_path, tmp_path / "run")
    short_of_memory(short, 0, ERRORS[0])
    with pytest.raises(UserError, match=r"out of memory with a single row at once.*recompute"):
        short.fit()


def test_several_processes_take_fewer_rows_at_the_next_start(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = trainer(recipe_path, tmp_path / "run")
    short_of_memory(short, 6, ERRORS[0])
    with monkeypatch.context() as one_of_two:  # as far as memory is concerned
        one_of_two.setattr(short.crew, "world", 2)
        one_of_two.setattr("multihead.stepping.shares", lambda *more: shares(more[0]))
        with pytest.raises(UserError, match=r"out of memory with 8 rows.*the next start takes 4"):
            short.fit()
    again = Trainer(short.recipe, short.task, short.folder, progress=False)
    told = short_of_memory(again, 6, ERRORS[0])
    again.fit()
    assert again.stepper.at_once == 4 and not told


def test_other_errors_are_not_taken_for_want_of_memory(recipe_path: Path, tmp_path: Path) -> None:
    sick = trainer(recipe_path, tmp_path / "run")
    short_of_memory(sick, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sick._update(0)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that are kept for the backward pass."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def same_bits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_recompute_draws_the_same_noise_in_each_of_several_threads(recipe_path: Path, tmp_path: Path) -> None:
    wishes = ["model.dropout=0.3", "train.micro_batch=4"]  # of 8
    plain = trainer(recipe_path, tmp_path / "plain", *wishes)
    twice = trainer(recipe_path, tmp_path / "twice", *wishes, "train.side_by_side=2", "train.recompute=true")
    same_bits(gradients(plain), gradients(twice))


def test_threads_side_by_side_are_the_last_thing_to_spare(recipe_path: Path, tmp_path: Path) -> None:
    one = trainer(recipe_path, tmp_path / "run", "train.side_by_side=2", "train.batch_size=4")
    asked, threads = one.stepper.engine.asked.ask, set[str]()

    def ask(model: Any, batch: Any) -> Any:
        threads.add(threading.current_thread().name)
        if len(batch["ids"]) > 1 or one.stepper.side_by_side:
            raise ERRORS[0]
        return asked(model, batch)

    told: list[str] = []
    one.stepper.engine.asked.ask, one.stepper.say = ask, told.append
    one._update(0)
    assert one.stepper.at_once == 1 and one.stepper.way[1] == 1 and len(threads) > 1
    assert "from here on 1, 4 times" in told[0] and "one after the other" in told[1]


def test_recompute_keeps_less_and_changes_no_bit(recipe_path: Path, tmp_path: Path) -> None:
    """Dropout draws the same noise the second time."""
    wishes = ["model.dropout=0.3", "model.num_layers=6"]
    plain = trainer(recipe_path, tmp_path / "plain", *wishes)
    twice = trainer(recipe_path, tmp_path / "twice", *wishes, "train.recompute=true")
    same_bits(gradients(plain), gradients(twice))
    batch = plain._batch(0, plain.stepper.loader.batch(0), 0)
    sizes = []
    for one in (plain, twice):
        with counted() as kept:
            one.task.loss(one.model, batch)
        sizes.append(kept[0])
    assert sizes[1] < 0.4 * sizes[0]
