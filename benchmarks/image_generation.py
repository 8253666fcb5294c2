"""Drawing pictures of a label: ours against a DDPM U-Net of `diffusers`, looked at by a classifier that knows neither.

    python benchmarks/image_generation.py [--json FILE] [--minutes N] [--picture FILE] [--run DIR] [--no-peer]

Fashion-MNIST. Ours is the package's own `Trainer` with recipes/vision/image-generation.yaml; the peer is `UNet2DModel`
with the label as class embedding (32, 64, 64 channels, attention on the lowest level), learned as in Ho et al. 2020
(1,000 noise levels, linear betas, AdamW 2e-4, batch 128, moving average 0.999 of the weights), drawn by 50 steps of
DDIM. They train by turns of a minute, each for the same time on the clock (`--minutes`, by default 40 each, so that a
run takes twice that); preparing and evaluating is ours to pay for.

Then each draws 1,000 pictures, 100 a label, as it comes (ours with the recipe's guidance). The judge is a network of
two convolutions trained here on the real training pictures alone; its share of right labels on the real test part is
printed first. Agreement: the share of drawn pictures to which it gives the label asked for. Fréchet distance: between
the judge's last 128 values for the drawn pictures and for the real test part; its floor is that of 1,000 real training
pictures. `--picture` keeps 20 of ours with their nearest training pictures, so that copying would be seen.

--run: score a run that is there instead of training one. --no-peer: ours alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both sides: busy-waiting threads suffer from any neighbour
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import numpy as np
import torch
import torch.nn.functional as F
from _common import Aim, arguments, finish
from torch import Tensor, nn

from multihead import prepare
from multihead.build import open_run
from multihead.data.store import Store
from multihead.metrics.frechet import frechet
from multihead.runtime.log import Log
from multihead.tasks.vision import _drawn as drawn
from multihead.train import Trainer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "vision" / "image-generation.yaml"
COUNT, TURN, SHOWN = 1000, 60.0, 20
JUDGE, AGREE = 0.90, 0.95
JUDGE_EPOCHS = 4


# -- the judge ---------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Two convolutions and two linear maps: pictures (B, 1, 28, 28) → logits (B, 10), and the 128 values before."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                  nn.Dropout(0.25), nn.Linear(64 * 49, 128), nn.ReLU())  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features

    @torch.no_grad()
    def look(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, 1, 28, 28) → features (n, 128), labels (n,)."""
        self.eval()
        found = [self(part.float() / 255) for part in torch.from_numpy(np.array(pictures)).split(500)]
        return torch.cat([f for _, f in found]).double().numpy(), torch.cat([g.argmax(1) for g, _ in found]).numpy()


def taught(pictures: np.ndarray, labels: np.ndarray) -> Judge:
    """A judge trained on real pictures."""
    torch.manual_seed(1)
    judge, rng = Judge().train(), np.random.default_rng(1)
    images, names = torch.from_numpy(np.array(pictures)), torch.from_numpy(np.array(labels))
    total = JUDGE_EPOCHS * (len(images) // 128)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(total):
        rows = torch.from_numpy(rng.integers(len(images), size=128))
        F.cross_entropy(judge(images[rows].float() / 255)[0], names[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return judge


# -- the peer ----------------------------------------------------------------------------------------------------------


class Peer:
    """A U-Net of `diffusers` that learns as DDPM does."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        torch.manual_seed(0)
        self.model = UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), num_class_embeds=10, norm_num_groups=8,
        ).train()  # fmt: skip
        self.levels = DDPMScheduler(1000)
        self.images, self.labels = torch.from_numpy(np.array(pictures)), torch.from_numpy(np.array(labels))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4)
        self.mean = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.draw, self.step = np.random.default_rng(0), 0

    def advance(self) -> None:
        """One step."""
        rows = torch.from_numpy(self.draw.integers(len(self.images), size=128))
        data = self.images[rows].float() / 127.5 - 1
        noise, at = torch.randn_like(data), torch.randint(1000, (128,))
        guess = self.model(self.levels.add_noise(data, noise, at), at, class_labels=self.labels[rows]).sample
        F.mse_loss(guess, noise).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weight = max(0.001, 1 / self.step)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.values()), list(self.model.parameters()), weight)

    @torch.no_grad()
    def pictures(self, labels: np.ndarray) -> np.ndarray:
        """One picture a label, uint8 (n, 1, 28, 28), with the averaged weights."""
        from diffusers import DDIMScheduler

        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.mean[name])
        self.model.eval()
        torch.manual_seed(0)
        found = []
        for part in torch.from_numpy(labels).split(100):
            scheduler: Any = DDIMScheduler(1000)
            x = torch.randn(len(part), 1, 28, 28)
            scheduler.set_timesteps(50)
            for at in scheduler.timesteps:
                x = scheduler.step(self.model(x, at, class_labels=part).sample, at, x).prev_sample
            found.append(drawn.bytes_of(x))
        return np.concatenate(found)


# -- the comparison ----------------------------------------------------------------------------------------------------


def compete(ours: Trainer, peer: Peer | None, log: Log, spent: dict[str, float], budget: float,
            clock: Callable[[], float]) -> None:
    """Turns of a minute until ours is through and the peer has had the budget."""
    every = ours._every()[0]
    while ours.step < ours.steps or (peer is not None and spent["peer"] < budget):
        start = clock()
        torch.set_num_threads(ours.threads)
        while ours.step < ours.steps and clock() - start < TURN:
            ours._one(log)
            if ours.step % every == 0 or ours.step == ours.steps:
                ours._evaluate(log)
                print(f"  ours {ours.step:6d} steps  best validation loss {ours.best['value']:.4f}", flush=True)
        spent["ours"] += clock() - start
        start = clock()
        while peer is not None and spent["peer"] + clock() - start < budget and (
            clock() - start < TURN
        ):
            peer.advance()
        spent["peer"] += clock() - start
    ours._finish()


def scored(judge: Judge, pictures: np.ndarray, labels: np.ndarray, real: np.ndarray) -> dict[str, float]:
    features, seen = judge.look(pictures)
    return {"agreement": float((seen == labels).mean()), "frechet": frechet(features, real)}


def asked(task: Any) -> tuple[np.ndarray, dict[str, Tensor]]:
    """100 of each label, as numbers and as the task's batch."""
    labels = np.repeat(np.arange(10), COUNT // 10)
    return labels, {"label": torch.from_numpy(labels)}


def shown(pictures: np.ndarray, learned: np.ndarray, file: Path) -> float:
    """Keep pictures, each beside its nearest training pictures; the median distance to the nearest."""
    some = pictures[:: len(pictures) // SHOWN][:SHOWN]
    which, far = drawn.nearest(some, learned, drawn.NEAR)
    lines = [np.concatenate([one, *learned[near]], axis=2) for one, near in zip(some, which, strict=True)]
    halves = [np.concatenate(lines[start : start + SHOWN // 2], axis=1) for start in (0, SHOWN // 2)]
    sheet = drawn.to_image(np.concatenate([halves[0], np.full_like(halves[0][:, :, :14], 255), halves[1]], axis=2))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((3 * sheet.width, 3 * sheet.height), 0).save(file)
    print(f"{SHOWN} pictures and their nearest of training in {file}; the nearest is {np.median(far[:, 0]):.3f} away")
    return float(np.median(far[:, 0]))


def main() -> int:
    args = arguments(__doc__, 40, [
        ("--run", {"type": Path, "metavar": "DIR", "help": "score this run"}),
        ("--no-peer", {"action": "store_true", "help": "ours alone"}),
        ("--picture", {"type": Path, "metavar": "FILE", "help": "20 pictures and their nearest neighbours, a PNG"}),
    ])  # fmt: skip
    with ExitStack() as stack, torch.random.fork_rng():
        return measured(args, stack)


def measured(args: Any, stack: ExitStack) -> int:
    budget, spent, clock = args.minutes * 60, {"ours": 0.0, "peer": 0.0}, args.clock
    if args.run:
        run = open_run(args.run)
        folder, task, recipe = run.folder, run.task, run.recipe
    else:
        start = clock()
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        overrides = [f"train.minutes={args.minutes * 0.95:.3f}"]
        folder, recipe, task, _ = stack.enter_context(prepare.begin(RECIPE, overrides, place, False))
        trainer = Trainer(recipe, task, folder, progress=False)
        spent["ours"] = clock() - start
        print(f"ours: {trainer.steps} steps, {trainer.threads} threads, prepared in {spent['ours']:.0f} s", flush=True)
    train, test = Store(folder.file("data/train")), Store(folder.file("data/test"))
    learned, labels_of = drawn.pictures_of(train), np.array(train.stream("label"))
    peer = None if args.no_peer else Peer(learned, labels_of)
    if args.run:
        model = run.model
        while peer is not None and spent["peer"] < budget:
            start = clock()
            peer.advance()
            spent["peer"] += clock() - start
    else:
        with Log(folder.file("log.jsonl"), 0) as log:
            compete(trainer, peer, log, spent, budget, clock)
        model = trainer.model.eval()
        if trainer.ema is not None:
            trainer.ema._swap()
    judge = taught(learned, labels_of)
    real, guesses = judge.look(drawn.pictures_of(test))
    right = float((guesses == np.array(test.stream("label"))).mean())
    print(f"judge: {right:.4f} of the real test part right", flush=True)
    labels, batch = asked(task)
    start = time.perf_counter()
    with torch.inference_mode():
        pictures = task.draw(model, batch, range(COUNT), task._drawing({}))  # type: ignore[attr-defined]
    took = time.perf_counter() - start
    print(f"ours: {COUNT} pictures in {took:.1f} s", flush=True)
    ours = scored(judge, pictures, labels, real)
    floor = frechet(judge.look(learned[np.linspace(0, len(learned) - 1, COUNT).astype(int)])[0], real)
    theirs = scored(judge, peer.pictures(labels), labels, real) if peer is not None else None
    more = {"ours": ours, "peer": theirs, "floor": floor, "judge": right, "draw_seconds": took, "spent": spent,
            "recipe": recipe.plain(), "steps": {"peer": peer.step if peer else None}}
    if args.picture:
        more["nearest"] = shown(pictures, learned, args.picture)
    other: Any = theirs or {"agreement": None, "frechet": None}
    aims = [
        Aim("judge, on the real test part", None, right, "share", f"≥ {JUDGE}", right >= JUDGE),
        Aim("judge agrees with the label", other["agreement"], ours["agreement"], "share", f"≥ {AGREE}",
            ours["agreement"] >= AGREE),
        Aim(f"Fréchet distance (floor {floor:.2f})", other["frechet"], ours["frechet"], "", "ours < peer",
            theirs is None or ours["frechet"] < theirs["frechet"]),
    ]  # fmt: skip
    if not args.run:
        holds = spent["ours"] <= budget * 1.01
        aims.append(Aim("time of ours", budget, spent["ours"], "s", "within the budget", holds))
    return finish(args, aims, more)


if __name__ == "__main__":
    sys.exit(main())
