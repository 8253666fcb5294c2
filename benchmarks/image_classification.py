"""Recognizing pictures: ours against transformers' ViT class, by turns in one run.

    python benchmarks/image_classification.py [--part throughput|fashion-mnist|cifar10] [--json FILE] [--minutes N]
                                              [--alone] [--steps N]

The peer is `ViTForImageClassification` of the recipe's width, depth, heads, patch and batch in a plain AdamW loop
(1e-3 with 5 % warm-up and a cosine to zero, decay 0.05 on matrices, clipped at 1), float32 as is its default, on the
same pictures, normalized alike, mirrored and shifted as ours are and without further noise. Ours is the package's own
`Trainer` with the shipped recipe.

throughput: training steps of both in turn, the peer in a process of its own; what counts is the median ratio over the
rounds, at the number of threads that is faster for each. First as each comes (ours in bfloat16 where the processor has
instructions for it, with the convolutions in front, its noise and Muon), then at one precision: ours with a linear
patch embedding and AdamW, as the peer has. Blocks are of one shape: those of the recipe without their convolutions.

fashion-mnist, cifar10: both train by turns of a minute, each for the same time on the clock (`--minutes`, by default
40 and 60 minutes each, so that a run takes twice that), then answer the test part once. Validation is printed on the
way and is part of ours' time alone, for its recipe asks for it. Nothing was chosen on the test part. `--alone`: without
the peer. `--steps`: so many instead of what the time allows, which is then only measured.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both sides: busy-waiting threads suffer from any neighbour
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import numpy as np
import torch
from _common import Aim, arguments, finish
from _pairs import Apart, Rounds, stepper, timed
from torch import Tensor

from multihead import evaluate, prepare
from multihead import recipe as recipes
from multihead.data.store import Store
from multihead.run import RunFolder
from multihead.runtime import device
from multihead.runtime.log import Log
from multihead.task import find
from multihead.train import Trainer

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "vision"
FULL = {"throughput": 3.0, "fashion-mnist": 40.0, "cifar10": 60.0}
AIMS = {"fashion-mnist": 0.935, "cifar10": 0.72}
DEFAULT_RATIO, SAME_RATIO = 2.0, 1.15
TURN = 60.0
PEER: dict[str, Any] = {"lr": 1e-3, "warmup": 0.05, "weight_decay": 0.05, "betas": (0.9, 0.999), "clip": 1.0}


@dataclass
class Plan:
    """All that the peer must know: its shape, its pictures (N, C, S, S) and their labels, and how they are treated."""

    shape: dict[str, Any]
    images: np.ndarray
    labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    shift: int

    @classmethod
    def of(cls, trainer: Trainer) -> Plan:
        task: Any = trainer.task
        rows: Any = trainer.examples
        model, codec = trainer.recipe.model, task.codec
        shape = {
            "hidden_size": model.d_model, "num_hidden_layers": model.num_layers, "intermediate_size": model.ff_size,
            "num_attention_heads": model.num_heads, "image_size": codec.size, "patch_size": task.options.patch,
            "num_channels": codec.channels, "num_labels": len(task.labels), "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        images = np.array(rows.stream("image")).reshape(-1, *_shape(codec))
        return cls(shape, images, np.array(rows.stream("label")), codec.mean, codec.std,
                   trainer.settings.batch_size, round(task.options.shift * codec.size))


class Peer:
    """transformers' ViT class in a plain AdamW loop on the same rows."""

    def __init__(self, plan: Plan, precision: torch.dtype = torch.float32) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        self.plan, self.precision = plan, precision
        self.model = ViTForImageClassification(ViTConfig(**plan.shape)).train()
        groups = [{"params": [p for p in self.model.parameters() if (p.dim() >= 2) is matrices], "weight_decay": decay}
                  for matrices, decay in ((True, PEER["weight_decay"]), (False, 0.0))]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=PEER["lr"], betas=PEER["betas"])
        self.images, self.labels = torch.from_numpy(plan.images), torch.from_numpy(plan.labels)
        self.draw, self.step = np.random.default_rng(0), 0

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def normal(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.plan.mean, self.plan.std))
        return (images.float() / 255 - mean) / std

    def __call__(self) -> None:
        self.advance()

    def advance(self, done: float = 0.5) -> None:
        """One step; `done`: the share of its time that has gone by."""
        rate = min(1.0, done / PEER["warmup"]) if done < PEER["warmup"] else (
            0.5 * (1 + math.cos(math.pi * min(1.0, (done - PEER["warmup"]) / (1 - PEER["warmup"])))))
        for group in self.optimizer.param_groups:
            group["lr"] = PEER["lr"] * max(rate, 1e-3)
        rows = self.draw.integers(len(self.images), size=self.plan.batch)
        x = self.normal(self.images[rows])
        if self.draw.random() < 0.5:  # a whole batch at a time, which costs it least
            x = x.flip(-1)
        moved = self.draw.integers(-self.plan.shift, self.plan.shift + 1, size=2).tolist()
        x = torch.roll(x, moved, (-2, -1))
        with torch.autocast("cpu", self.precision) if self.precision != torch.float32 else nullcontext():
            loss = self.model(pixel_values=x, labels=self.labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), PEER["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def accuracy(self, store: Store) -> float:
        images = torch.from_numpy(np.array(store.stream("image"))).view(-1, *self.images.shape[1:])
        labels = torch.from_numpy(np.array(store.stream("label")))
        self.model.eval()
        guesses = [self.model(pixel_values=self.normal(part)).logits.argmax(-1) for part in images.split(256)]
        self.model.train()
        return float((torch.cat(guesses) == labels).float().mean())


def _shape(codec: Any) -> tuple[int, int, int]:
    return codec.channels, codec.size, codec.size


# -- speed -------------------------------------------------------------------------------------------------------------


def throughput(args: Any) -> int:
    """Training speed: default against default, and at one precision."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "run")
        prepare.run_step(RECIPES / "fashion-mnist.yaml", ["train.minutes=null"], folder)
        ours = {"ours": trainer("fashion-mnist", folder, SHAPE),
                **{f"ours, {kind}": trainer("fashion-mnist", folder, [f"train.precision={kind}", *SHAPE, *PLAIN])
                   for kind in PRECISIONS}}  # fmt: skip
        first = ours["ours"]
        plan = Plan.of(first)
        apart = Apart(both, plan, clock=args.clock)
        sides = {**{name: timed(stepper(one), args.clock) for name, one in ours.items()}, **apart.sides}
        rounds = Rounds(sides, args.minutes * 60, {1, device.cores()})
        found = {name: first.settings.batch_size / rounds.seconds(name) for name in sides}
        size = sum(p.numel() for p in first.model.parameters())
    for name, rate in found.items():
        print(f"{name:16} {rate:8.1f} pictures/s")
    print(f"parameters: ours {size:,}, peer {apart.parameters['peer, float32']:,}")
    aims = [_speed("as each comes", found["peer, float32"], found["ours"],
                   rounds.ratio("peer, float32", "ours"), DEFAULT_RATIO)]  # fmt: skip
    aims += [_speed(kind, found[f"peer, {kind}"], found[f"ours, {kind}"],
                    rounds.ratio(f"peer, {kind}", f"ours, {kind}"), SAME_RATIO) for kind in PRECISIONS]  # fmt: skip
    return finish(args, aims, {"pictures_per_s": found, "recipe": first.recipe.plain(), "peer_settings": PEER})


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ["model.conv_kernel=0", "train.batch_size=128"]
PLAIN = ["options.stem=linear", "train.optimizer=adamw"]


def _speed(name: str, peer: float, ours: float, ratio: float, least: float) -> Aim:
    print(f"{name}: {ratio:.2f} ×")
    return Aim(f"training, {name}", peer, ours, "pictures/s", f"ratio ≥ {least:g}: {ratio:.2f}", ratio >= least)


def both(plan: Plan) -> dict[str, Peer]:
    """The peer at either precision, in the process apart."""
    return {f"peer, {kind}": Peer(plan, precision) for kind, precision in PRECISIONS.items()}


def trainer(recipe: str, run: str, overrides: Sequence[str]) -> Trainer:
    """A trainer of a shipped recipe on data that was prepared in the folder `run`."""
    path, folder = RECIPES / f"{recipe}.yaml", RunFolder.open(run)
    resolved = recipes.load(path, ["train.minutes=null", "train.threads=1", *overrides], find=find)
    task = prepare.make_task(resolved, path.parent)
    task.load(folder.file("codec"))
    return Trainer(resolved, task, folder, progress=False)


# -- accuracy in a given time ------------------------------------------------------------------------------------------


def accuracy(args: Any, part: str) -> int:
    """Test accuracy of both after the same time."""
    budget, clock = args.minutes * 60, args.clock
    with tempfile.TemporaryDirectory() as temporary:
        start = clock()
        place, overrides = Path(temporary) / "run", [f"train.minutes={args.minutes * 0.95:.3f}"]
        if args.steps:
            overrides = ["train.minutes=null", f"train.steps={args.steps}"]
        with prepare.begin(RECIPES / f"{part}.yaml", overrides, place, False) as (run, recipe, task, _):
            ours = Trainer(recipe, task, run, progress=False)
            spent = {"ours": clock() - start, "peer": 0.0}  # preparing is ours to pay for
            peer = None if args.alone else Peer(Plan.of(ours))
            threads, together = ours.stepper.way
            print(f"ours: {ours.steps} steps, {threads} threads, {together} side by side, prepared in "
                  f"{spent['ours']:.0f} s", flush=True)
            with Log(run.file("log.jsonl"), 0) as log:
                curve = compete(ours, peer, log, spent, budget, clock)
            test = Store(run.file("data/test"))
            peers = None if peer is None else peer.accuracy(test)
            with ours.ema.swapped() if ours.ema is not None else nullcontext():
                found = evaluate.score_part(task, ours.model, test, batch_size=128)
        steps = {"ours": ours.step, "peer": 0 if peer is None else peer.step}
    print(f"test: ours {found['accuracy']:.4f} after {ours.step} steps")
    minutes = f"{args.minutes:g} minutes"
    aims = [
        Aim(f"{part}: test accuracy, {minutes}", None, found["accuracy"], "share", f"≥ {AIMS[part]}",
            found["accuracy"] >= AIMS[part]),
        Aim(f"{part}: time of ours", budget, spent["ours"], "s", "within the budget", spent["ours"] <= budget * 1.01),
    ]  # fmt: skip
    if peers is not None:
        print(f"test: peer {peers:.4f} after {steps['peer']} steps")
        aims.append(Aim(f"{part}: beside the peer, {minutes}", peers, found["accuracy"], "share", "ours > peer",
                        found["accuracy"] > peers))  # fmt: skip
    return finish(args, aims, {"curve": curve, "test": found, "steps": steps, "recipe": recipe.plain()})


def compete(ours: Trainer, peer: Peer | None, log: Log, spent: dict[str, float], budget: float,
            clock: Callable[[], float]) -> list[dict[str, float]]:
    """Turns of a minute until ours is through and the peer has had the budget; validation accuracy on the way."""
    assert ours.valid is not None
    curve, every = [], max(1, ours.steps // 10)
    while ours.step < ours.steps or (peer is not None and spent["peer"] < budget):
        ours.stepper.work_in(ours.stepper.way)
        start = clock()
        while ours.step < ours.steps and clock() - start < TURN:
            ours._one(log)
            if ours.step % every == 0 or ours.step == ours.steps:
                ours._evaluate(log)
                spent["ours"] += clock() - start
                curve.append({"seconds": spent["ours"], "step": ours.step, "accuracy": ours.best["value"]})
                print(f"  ours {spent['ours'] / 60:5.1f} min  best validation {ours.best['value']:.4f}", flush=True)
                start = clock()
        spent["ours"] += clock() - start
        start = clock()
        while peer is not None and spent["peer"] + clock() - start < budget and clock() - start < TURN:
            peer.advance((spent["peer"] + clock() - start) / budget)
        spent["peer"] += clock() - start
    if peer is not None:
        seen = peer.accuracy(Store(ours.valid.folder))  # type: ignore[attr-defined]
        print(f"  peer {spent['peer'] / 60:5.1f} min  validation {seen:.4f}", flush=True)
    return curve


def main() -> int:
    parser: Any = [("--part", {"choices": list(FULL), "default": "throughput", "help": "what to measure"}),
                   ("--alone", {"action": "store_true", "help": "without the peer"}),
                   ("--steps", {"type": int, "metavar": "N", "help": "steps of ours, instead of what the time allows"})]
    part = next((b for a, b in itertools.pairwise(sys.argv) if a == "--part"), "throughput")
    args = arguments(__doc__, FULL.get(part, 1.0), parser)
    return throughput(args) if args.part == "throughput" else accuracy(args, args.part)


if __name__ == "__main__":
    sys.exit(main())
