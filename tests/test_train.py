"""The loop: stops on what is no number, saves on a signal, keeps the best weights, and logs every step once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import multihead as mh
from multihead import build
from multihead.errors import UserError
from multihead.runtime import checkpoint
from multihead.runtime.log import read_log
from multihead.train import train
from tests.trainers import fit_until, poem, trainer


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return poem(tmp_path, 1, steps=12, batch_size=4, eval_every=4, save_every=3)


def weights(folder: Path, step: int = 12) -> bytes:
    return (folder / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()


def test_the_package_is_called_as_people_call_it(recipe_path: Path, tmp_path: Path) -> None:
    run = mh.train(recipe_path, run=tmp_path / "run", progress=False)
    again = mh.load(tmp_path / "run")
    assert isinstance(again, mh.Run) and again.name == run.name == "poem"
    assert again.predict(["床前"], max_tokens=3, temperature=0) == run.predict(["床前"], max_tokens=3, temperature=0)


def test_the_loss_falls_and_every_step_is_logged_once(recipe_path: Path, tmp_path: Path) -> None:
    train(recipe_path, ["train.steps=40"], run=tmp_path / "run", progress=False)
    lines = list(read_log(tmp_path / "run/log.jsonl"))
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 41))
    valid = [line["valid"]["loss"] for line in lines if "valid" in line]
    assert len(valid) == 10 and valid[-1] < 0.7 * valid[0]
    assert lines[0]["loss"] == pytest.approx(math.log(50), rel=0.6)  # close to guessing at the start


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_parameter(recipe_path: Path, tmp_path: Path) -> None:
    sick = trainer(recipe_path, tmp_path / "run")
    name, parameter = next((n, p) for n, p in sick.model.named_parameters() if n.endswith("attention.qkv.weight"))
    parameter.register_hook(lambda gradient: gradient * float("nan") if sick.step == 5 else gradient)
    with pytest.raises(UserError, match=f"step 6.*'{name}'"):
        sick.fit()
    assert (tmp_path / "run/bad_batch.safetensors").is_file()
    assert json.loads((tmp_path / "run/bad_batch.json").read_text())["parameter"] == name
    kept, skipped = checkpoint.latest(tmp_path / "run")
    assert kept is not None and kept.step == 3 and not skipped
    assert all(value.isfinite().all() for value in kept.tensors("model").values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_line_goes_on(recipe_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "multihead", "train", str(recipe_path), "--run", str(tmp_path / "run"),
               "train.steps=100000", "train.eval_every=100000", "train.save_every=100000"]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"MULTIHEAD_LANG": "en"}
    )
    log = tmp_path / "run/log.jsonl"
    for _ in range(600):
        if log.is_file() and len(log.read_text().splitlines()) > 5:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"multihead train {recipe_path}" in told and "Traceback" not in told
    saved, _ = checkpoint.latest(tmp_path / "run")
    assert saved is not None and saved.step == list(read_log(log))[-1]["step"]


def test_resuming_with_average_and_muon_is_exact(recipe_path: Path, tmp_path: Path) -> None:
    wishes = ["train.ema=0.9", "train.optimizer=muon", "model.dropout=0.2"]
    train(recipe_path, wishes, run=tmp_path / "whole", progress=False)
    cut = trainer(recipe_path, tmp_path / "cut", *wishes)
    fit_until(cut, 7)
    train(recipe_path, wishes, run=tmp_path / "cut", progress=False)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert [e["step"] for e in read_log(tmp_path / "cut/log.jsonl")] == [
        e["step"] for e in read_log(tmp_path / "whole/log.jsonl")
    ]


def test_micro_batches_change_nothing(recipe_path: Path, tmp_path: Path) -> None:
    wishes = ["train.batch_size=8", "train.optimizer=adamw"]
    train(recipe_path, wishes, run=tmp_path / "whole", progress=False)
    train(recipe_path, [*wishes, "train.micro_batch=2"], run=tmp_path / "parts", progress=False)
    a, b = (
        checkpoint.load_weights(tmp_path / w / "checkpoints/step-00000012/model.safetensors")
        for w in ("whole", "parts")
    )
    losses = [[e["loss"] for e in read_log(tmp_path / w / "log.jsonl") if "loss" in e] for w in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_early_stop_keeps_the_best_and_stays_stopped(recipe_path: Path, tmp_path: Path) -> None:
    wishes = [
        "train.steps=400",
        "train.eval_every=1",
        "train.lr=0.5",
        "train.muon_lr=0.5",
        "train.early_stop.patience=3",
        "train.clip=null",
    ]
    run = train(recipe_path, wishes, run=tmp_path / "run", progress=False)
    valid = [e for e in read_log(tmp_path / "run/log.jsonl") if "valid" in e]
    best = min(valid, key=lambda e: e["valid"]["loss"])
    assert len(valid) < 400 and valid[-1]["step"] == best["step"] + 3
    found = run.evaluate(part="valid", progress=False)["metrics"]["loss"]["value"]
    assert found == pytest.approx(best["valid"]["loss"], rel=1e-5)
    train(recipe_path, wishes, run=tmp_path / "run", progress=False)
    assert len([e for e in read_log(tmp_path / "run/log.jsonl") if "valid" in e]) == len(valid)


def test_minutes_set_the_steps(recipe_path: Path, tmp_path: Path) -> None:
    timed = trainer(recipe_path, tmp_path / "run", "train.minutes=0.01", "train.steps=100000")
    assert 1 <= timed.steps < 100000
    timed.fit()
    assert trainer_state(tmp_path / "run")["steps"] == timed.steps


def trainer_state(folder: Path) -> dict[str, Any]:
    saved, _ = checkpoint.latest(folder)
    assert saved is not None
    return saved.meta


def test_without_validation_rows_the_last_weights_are_kept(recipe_path: Path, tmp_path: Path) -> None:
    run = train(recipe_path, ["data.split.valid=0"], run=tmp_path / "run", progress=False)
    kept = checkpoint.load_weights(run.path / "model.safetensors")
    last = checkpoint.load_weights(run.path / "checkpoints/step-00000012/model.safetensors")
    assert all(torch.equal(kept[name], last[name]) for name in last)


def test_bf16_learns_what_float32_learns(recipe_path: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "bf16"):
        train(recipe_path, [f"train.precision={precision}", "train.steps=60"], run=tmp_path / precision, progress=False)
        found[precision] = [e["valid"]["loss"] for e in read_log(tmp_path / precision / "log.jsonl") if "valid" in e][
            -1
        ]
    assert found["bf16"] == pytest.approx(found["float32"], rel=0.05)


def test_the_model_is_the_same_for_the_same_seed(recipe_path: Path, tmp_path: Path) -> None:
    one = trainer(recipe_path, tmp_path / "run")
    other = build.make_model(one.task, one.recipe)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.parameters(), strict=True))
