"""Several processes train one run: the same losses as one, checkpoints for any number, and one failure ends all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multihead.runtime import checkpoint
from multihead.runtime.log import read_log
from multihead.train import train

TEXT = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\nThe quick brown fox jumps over the lazy dog.\n"
ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"steps": 4, "batch_size": 8, "micro_batch": 4, "eval_every": 2, "save_every": 2, "log_every": 1, "threads": 1,
         "precision": "float32", "optimizer": "adamw"}  # fmt: skip


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def written(folder: Path, name: str, rows: str, **values: Any) -> Path:
    (folder / f"{name}.jsonl").write_text(rows, "utf-8")
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1}
    recipe = {"name": name, "data": {"train": f"{name}.jsonl"}, "model": shape, "train": PLAIN} | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    return path


def recipes(folder: Path) -> dict[str, Path]:
    """A decoder; an encoder–decoder; a classifier, whose table has sparse gradients."""
    words = [f"{TEXT[i % 20 : i % 20 + 9]}{i}" for i in range(60)]
    poem = written(folder, "poem", TEXT * 60, task="text-generation", data={"train": "poem.txt"},
                   options={"tokenizer": "char", "context": 16})  # fmt: skip
    (folder / "poem.txt").write_text(TEXT * 60, "utf-8")
    pairs = "".join(json.dumps({"source": w, "target": w[::-1]}) + "\n" for w in words)
    marked = "".join(json.dumps({"text": w, "label": "ab"[i % 2]}) + "\n" for i, w in enumerate(words))
    return {
        "poem": poem,
        # Hardly trained, it writes texts nearly as likely as others, which a last bit may tell apart; here it does not.
        "pairs": written(folder, "pairs", pairs, task="translation", seed=1),
        "marked": written(folder, "marked", marked, task="text-classification"),
    }


def start(jobs: Path, **more: str) -> list[subprocess.Popen[str]]:
    env = os.environ | {"MULTIHEAD_LANG": "en"} | more
    command = [sys.executable, "-m", "tests.crew_process"]
    return [
        subprocess.Popen([*command, str(rank), "2", str(jobs)], cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE)
        for rank in range(2)
    ]


def losses(folder: Path) -> list[float]:
    """Every loss of training, every gradient's norm, and every validation score, in order."""
    entries = list(read_log(folder / "log.jsonl"))
    found = [entry[key] for entry in entries for key in ("loss", "grad_norm") if key in entry]
    return found + [value for entry in entries for value in entry.get("valid", {}).values()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All that two processes are asked to train, in one go."""
    folder = tmp_path_factory.mktemp("crew")
    paths = recipes(folder)
    jobs: list[dict[str, Any]] = []

    def job(name: str, run: str, *overrides: str, **more: Any) -> None:
        jobs.append({"port": port(), "recipe": str(paths[name]), "run": str(folder / run),
                     "overrides": [f"name={name}", *overrides], **more})  # fmt: skip

    for run in ("poem-ddp", "pairs-fsdp", "marked-ddp", "marked-fsdp"):
        name, how = run.split("-")
        job(name, run, f"train.parallel={how}")
    more = ("train.optimizer=muon", "train.ema=0.9", "train.recompute=true")
    job("poem", "muon", "train.parallel=fsdp", "train.micro_batch=2", *more)
    job("poem", "cut", "train.parallel=fsdp", "train.ema=0.9", at=1)
    job("poem", "cut", "train.ema=0.9", at=3, alone=True)
    job("poem", "cut", "train.parallel=ddp", "train.ema=0.9")
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    both = start(folder / "jobs.json")
    try:
        told = [process.communicate(timeout=280)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(told)[-4000:]
    yield folder


@pytest.mark.parametrize("name", ["poem", "pairs", "marked"])
def test_two_processes_learn_what_one_learns(ran: Path, tmp_path: Path, name: str) -> None:
    """Dropout included: one process with two micro-batches draws the noise that two draw."""
    train(ran / f"{name}.yaml", run=tmp_path / "one", progress=False)
    one = losses(tmp_path / "one")
    assert len(one) >= 10
    for run in ran.glob(f"{name}-*"):
        assert losses(run) == pytest.approx(one, rel=1e-5, abs=1e-5), run.name
        same_weights(run, tmp_path / "one", 1e-4)


def same_weights(run: Path, other: Path, far: float) -> None:
    weights = checkpoint.load_weights(run / "model.safetensors")
    for key, value in checkpoint.load_weights(other / "model.safetensors").items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=far, msg=f"{run.name} {key}")


def test_muon_averages_and_recompute_on_shares_of_the_weights(ran: Path, tmp_path: Path) -> None:
    wishes = ["train.optimizer=muon", "train.ema=0.9", "train.micro_batch=2"]
    train(ran / "poem.yaml", wishes, run=tmp_path / "one", progress=False)
    # Muon's iterations run in bfloat16 where the processor has it, and make much of a last bit.
    assert losses(ran / "muon") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-3)


def test_two_then_one_then_two_processes_end_as_one_does(ran: Path, tmp_path: Path) -> None:
    """Saved by shares, gone on with whole, saved, and gone on with by copies; weights, optimizer and averages."""
    train(ran / "poem.yaml", ["train.ema=0.9"], run=tmp_path / "one", progress=False)
    assert [e["step"] for e in read_log(ran / "cut/log.jsonl")] == [1, 2, 2, 3, 4, 4]
    assert losses(ran / "cut") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=1e-5)
    same_weights(ran / "cut", tmp_path / "one", 1e-4)
    saved = [checkpoint.latest(folder)[0] for folder in (ran / "cut", tmp_path / "one")]
    for group in ("model", "optimizer", "ema"):
        two, one = (kept.tensors(group) for kept in saved if kept is not None)
        assert {k: v.shape for k, v in two.items()} == {k: v.shape for k, v in one.items()}
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=f"{group} {key}")


# -- failures ----------------------------------------------------------------------------------------------------------

FAULTY = """
import os
from multihead.tasks.language import text_generation

class Faulty(text_generation.TextGeneration):
    def augment(self, example, rng):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the disk of this process is on fire")
        return example
"""


def test_one_process_that_fails_ends_all_and_torchrun_names_the_cause(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "poem.txt").write_text(TEXT * 60, "utf-8")
    recipe = written(tmp_path, "poem", "", task="./faulty.py", data={"train": "poem.txt"},
                     options={"tokenizer": "char", "context": 16})  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "multihead", "train",
               str(recipe)]  # fmt: skip
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
                           env=os.environ | {"MULTIHEAD_LANG": "en", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert ended.returncode != 0
    assert "RuntimeError: the disk of this process is on fire" in ended.stderr.partition("Root Cause")[2]
    log = tmp_path / "runs/poem/log.jsonl"
    assert not list(read_log(log))


def test_one_process_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    jobs = [{"port": port(), "recipe": str(recipes(tmp_path)["poem"]), "run": str(tmp_path / "run"), "at": 2,
             "overrides": [], "signal": signal.SIGKILL}]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    both = start(tmp_path / "jobs.json")
    try:
        assert both[1].wait(timeout=200) == -signal.SIGKILL
        began = time.monotonic()
        _, told = both[0].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
    assert both[0].returncode not in (0, None)
    assert "process 0 lost the others: one was killed" in told and time.monotonic() - began < 60
