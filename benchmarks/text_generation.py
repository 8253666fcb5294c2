"""Language modelling of tiny Shakespeare by characters: ours against transformers' GPT-2 class, by turns in one run.

    python benchmarks/text_generation.py [--json FILE] [--minutes N]

First 90 % of the characters for training, last 10 % for validation (over all of them, each character predicted once).
The peer is `GPT2LMHeadModel` in a plain AdamW loop with the well-known small CPU settings (4 layers, 4 heads, width
128, context 64, batch 12, 2,000 steps, 1e-3 → 1e-4), float32 as is its default. Ours is the package's own `Trainer`
with recipes/language/tinyshakespeare.yaml; a short timing sets its steps (``train.minutes``) to what fits into the time
that the peer is expected to need, and at most those of the recipe.

The two take turns of a few seconds, so that whatever else the machine does hits both. Time is training time; the
evaluations between turns are not counted, for either, and a time to a loss is that of the first evaluation at or below
it. Each side uses the number of threads that is faster for it. There is no test part here: all settings, the peer's
published ones too, were chosen on these 10 %.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both sides: busy-waiting threads suffer from any neighbour

import torch
import torch.nn.functional as F
from _common import Aim, arguments, finish
from torch import Tensor

from multihead import evaluate, prepare
from multihead.runtime.device import cores
from multihead.runtime.log import Log
from multihead.train import Trainer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "language" / "tinyshakespeare.yaml"
DATA = Path(os.environ.get("MULTIHEAD_DATA", "../shared/data")) / "tinyshakespeare" / "input.txt"
TARGET, SHARE, FINAL = 1.88, 0.25, 1.65
TURNS = 40  # expected turns of each side, at full budget
FULL_MINUTES = 10.0
PEER: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64}
PEER_TRAIN: dict[str, Any] = {"steps": 2000, "batch": 12, "lr": 1e-3, "min_lr": 1e-4, "warmup": 100,
                              "betas": (0.9, 0.99), "weight_decay": 0.1, "clip": 1.0}  # fmt: skip


class Side(Protocol):
    """What takes turns: a step of training, and the mean validation loss in nats a character."""

    threads: int

    @property
    def done(self) -> bool: ...

    def advance(self) -> None: ...

    def validate(self) -> float: ...


class Peer:
    """transformers' GPT-2 class in a plain AdamW loop."""

    def __init__(self, train: str, valid: str, steps: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        names = {c: i for i, c in enumerate(sorted(set(train + valid)))}
        self.train, self.valid = (torch.tensor([names[c] for c in text]) for text in (train, valid))
        config = GPT2Config(vocab_size=len(names), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
                            bos_token_id=None, eos_token_id=None, **PEER)  # fmt: skip
        self.model = GPT2LMHeadModel(config)
        groups = [{"params": [p for p in self.model.parameters() if (p.dim() >= 2) is matrices], "weight_decay": decay}
                  for matrices, decay in ((True, PEER_TRAIN["weight_decay"]), (False, 0.0))]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=PEER_TRAIN["lr"], betas=PEER_TRAIN["betas"])
        self.context, self.steps, self.step, self.threads = PEER["n_positions"], steps, 0, 1

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def _rate(self) -> float:
        peak, least, warmup = PEER_TRAIN["lr"], PEER_TRAIN["min_lr"], min(PEER_TRAIN["warmup"], self.steps // 10)
        if self.step < warmup:
            return peak * (self.step + 1) / (warmup + 1)
        share = (self.step - warmup) / max(1, self.steps - warmup)
        return least + 0.5 * (1 + math.cos(math.pi * min(1.0, share))) * (peak - least)

    def advance(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        starts = torch.randint(len(self.train) - self.context, (PEER_TRAIN["batch"], 1))
        window = self.train[starts + torch.arange(self.context + 1)]
        logits = self.model(input_ids=window[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), PEER_TRAIN["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def validate(self) -> float:
        self.model.eval()
        ids, context = self.valid, self.context
        whole = (len(ids) - 1) // context * context
        inputs = [*ids[:whole].view(-1, context).split(64), ids[None, whole:-1]]
        targets = [*ids[1 : whole + 1].view(-1, context).split(64), ids[None, whole + 1 :]]
        total = sum(self._sum(x, y) for x, y in zip(inputs, targets, strict=True) if y.numel())
        self.model.train()
        return total / (len(ids) - 1)

    def _sum(self, inputs: Tensor, targets: Tensor) -> float:
        logits = self.model(input_ids=inputs).logits
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


class Ours:
    """The package's own loop, one step at a time."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.log, self.threads = trainer, log, trainer.threads

    @property
    def done(self) -> bool:
        return self.trainer.step >= self.trainer.steps

    def advance(self) -> None:
        self.trainer._one(self.log)

    def validate(self) -> float:
        t = self.trainer
        assert t.valid is not None
        return evaluate.score_part(t.task, t.model, t.valid, device=t.device, precision=t.precision)["loss"]


@dataclass
class Course:
    """Training time in seconds, and the losses measured on the way: (seconds, loss)."""

    seconds: float = 0.0
    losses: list[tuple[float, float]] = field(default_factory=list)

    def reached(self, target: float) -> float | None:
        return next((seconds for seconds, loss in self.losses if loss <= target), None)


def turn(side: Side, course: Course, seconds: float, look: bool) -> None:
    """Train `side` for about `seconds`, then validate it where `look` says so, or where its training is over."""
    torch.set_num_threads(side.threads)
    start = time.perf_counter()
    while not side.done and time.perf_counter() - start < seconds:
        side.advance()
    course.seconds += time.perf_counter() - start
    if look or side.done:
        course.losses.append((round(course.seconds, 3), side.validate()))


def fastest_threads(work: Callable[[], None]) -> tuple[int, float]:
    """The number of threads at which `work` is faster, and its seconds: medians, tried in turn."""
    times: dict[int, list[float]] = {1: [], cores(): []}
    work()
    for _ in range(4):
        for threads, taken in times.items():
            torch.set_num_threads(threads)
            for _ in range(5):
                start = time.perf_counter()
                work()
                taken.append(time.perf_counter() - start)
    middle = {threads: statistics.median(taken) for threads, taken in times.items()}
    chosen = min(middle, key=lambda n: middle[n])
    return chosen, middle[chosen]


def main() -> int:
    args = arguments(__doc__, FULL_MINUTES)
    text = DATA.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    steps = max(20, round(PEER_TRAIN["steps"] * min(1.0, args.minutes / FULL_MINUTES)))
    threads, each = fastest_threads(Peer(text[:cut], text[cut:], 10**6).advance)
    expected = each * steps
    peer = Peer(text[:cut], text[cut:], steps)
    peer.threads = threads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [f"train.minutes={expected / 60:.4f}"]
        for part, piece in (("train", text[:cut]), ("valid", text[cut:])):
            (folder / f"{part}.txt").write_text(piece, encoding="utf-8", newline="\n")
            overrides.append(f"data.{part}={folder / part}.txt")
        with prepare.begin(RECIPE, overrides, folder / "run", False) as (run, recipe, task, _):
            trainer = Trainer(recipe, task, run, progress=False)
            with Log(run.file("log.jsonl"), 0) as log:
                ours = Ours(trainer, log)
                print(f"peer: {steps} steps, {threads} threads, about {expected:.0f} s. ours: {trainer.steps} steps, "
                      f"{ours.threads} threads, {str(trainer.precision).removeprefix('torch.')}", flush=True)
                courses = compete(peer, ours, expected, max(8, round(TURNS * steps / PEER_TRAIN["steps"])))
    return report(args, *courses, peer_steps=steps, our_steps=trainer.steps, threads=[threads, ours.threads],
                  recipe=recipe.plain())


def compete(peer: Peer, ours: Ours, expected: float, turns: int) -> tuple[Course, Course]:
    """`turns` turns of an expected time, until the peer is through; ours stops at the peer's time. Both are validated
    after every turn at the start and towards the end, where a loss is expected to be reached, and after every fourth
    between."""
    a, b, now, seconds = Course(), Course(), 0, expected / turns
    while not peer.done:
        now += 1
        look = now <= turns // 4 or now >= turns * 3 // 4 or now % 4 == 0
        turn(peer, a, seconds, look)
        if not ours.done:
            turn(ours, b, min(seconds, a.seconds - b.seconds), look or peer.done)
        if not (look or peer.done):
            continue
        lines = (f"{name} {c.seconds:6.1f} s {c.losses[-1][1]:.4f}" for name, c in (("peer", a), ("ours", b)))
        print("  " + "    ".join(lines), flush=True)
    return a, b


def report(args: Any, peer: Course, ours: Course, **more: Any) -> int:
    """The table, the JSON file, the exit code."""
    end = peer.losses[-1][1]
    reached = peer.reached(TARGET)
    its_time = peer.seconds if reached is None else reached
    if reached is None:
        print(f"The peer ended at {end:.4f}, above {TARGET}: its whole time stands for its time to {TARGET}.")
    if ours.seconds < peer.seconds:
        print(f"Ours was through after {ours.seconds:.1f} s of the peer's {peer.seconds:.1f} s; its last loss counts.")
    our_time = ours.reached(TARGET)
    final = ours.losses[-1][1]
    share = math.inf if our_time is None else our_time / its_time
    aims = [
        Aim(f"training time to loss {TARGET}", its_time, our_time, "s", f"ours ≤ {SHARE} × peer", share <= SHARE),
        Aim("loss after the peer's whole time", end, final, "nats/char", f"ours ≤ {FINAL}", final <= FINAL),
    ]
    print(f"ours / peer in time to {TARGET}: {share:.3f}")
    more |= {"peer": peer.losses, "ours": ours.losses, "time_ratio": share, "peer_reached": reached is not None,
             "peer_settings": {**PEER, **PEER_TRAIN}}  # fmt: skip
    return finish(args, aims, more)


if __name__ == "__main__":
    sys.exit(main())
