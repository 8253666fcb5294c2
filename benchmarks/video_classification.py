"""Labelling clips: does the model see motion, where no single frame tells the label?

    python benchmarks/video_classification.py [--clips FOLDER] [--json FILE] [--minutes N]

No small set of real actions is at hand, so clips are made: a real Fashion-MNIST picture moves in one of eight ways
(left, right, up, down, turning clockwise or counter-clockwise, growing, shrinking), 16 frames of 32 × 32 pixels,
encoded as MP4 (H.264) by PyAV. Every clip begins at a place, an angle and a size drawn from the same distributions
whatever its label, and all three are cyclic (what leaves on one side comes back on the other, what has grown to the
most begins at the least again), so that any one frame looks the same under all eight labels: chance is 0.125. Training
clips are made of Fashion-MNIST's training pictures, test clips of its test pictures, no picture twice.

What this is: a check that clips are read, sampled, cut into tubelets and learned from by their motion, on files that a
person could have given. What it is not: a measure of how well actions in real videos are told apart.

The model is recipes/vision/video-classification.yaml with small pictures, trained for `--minutes` (default 4, on one
thread) from the files on; the peer is the same recipe shown one frame of each clip, for as many steps. Both are
measured once on the test clips. Beside them: the first model shown clips that stand still at one of their frames, and
how fast clips are decoded, by processor time.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MULTIHEAD_DATA", str(Path("../shared/data").resolve()))

import numpy as np
import torch
from _common import Aim, arguments, finish

from multihead import evaluate
from multihead.codec.video import pyav, sampled
from multihead.data.store import Store
from multihead.data.video import ClipFile, read_clip
from multihead.train import train

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "vision" / "video-classification.yaml"
MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SIDE, FRAMES, RATE = 32, 16, 10
LEAST, MOST = 12.0, 24.0
"""Sides of the moving picture in pixels."""
TRAIN, TEST = 8_000, 1_000
AIM, CHANCE = 0.95, 0.20


# -- making clips ------------------------------------------------------------------------------------------------------


def pictures(name: str) -> np.ndarray:
    """Fashion-MNIST's pictures, (n, 28, 28) uint8."""
    path = Path(os.environ["MULTIHEAD_DATA"]) / "fashion-mnist" / f"{name}-images-idx3-ubyte.gz"
    if not path.is_file():
        raise SystemExit(f"no {path}: set MULTIHEAD_DATA to the folder that holds fashion-mnist")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)


def frames(picture: np.ndarray, motion: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The frames of a clip, each (SIDE, SIDE) uint8. Of place, angle and size, all drawn, one changes steadily."""
    from PIL import Image

    place, angle, size = rng.random(2) * SIDE, rng.random() * 360, rng.random()
    speed, turn, growth = (rng.uniform(*span) for span in ((0.8, 1.6), (12, 24), (0.03, 0.06)))
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}.get(motion, (0, 0))
    turn *= {"clockwise": -1, "counter-clockwise": 1}.get(motion, 0)
    growth *= {"growing": 1, "shrinking": -1}.get(motion, 0)
    source = Image.fromarray(picture)
    for i in range(FRAMES):
        side = LEAST * (MOST / LEAST) ** ((size + growth * i) % 1.0)
        turned = source.rotate(angle + turn * i, Image.Resampling.BICUBIC, expand=True)
        small = turned.resize([max(1, round(side * length / 28)) for length in turned.size], Image.Resampling.BILINEAR)
        frame = np.zeros((SIDE, SIDE), np.uint16)
        at = np.floor(place + np.array(step) * speed * i).astype(int)
        rows, columns = ((at[axis] + np.arange(small.size[1 - axis]) - small.size[1 - axis] // 2) % SIDE
                         for axis in (0, 1))  # fmt: skip
        np.add.at(frame, np.ix_(rows, columns), np.asarray(small, np.uint16))
        yield np.minimum(frame, 255).astype(np.uint8)


def encode(path: Path, clip: Iterator[np.ndarray], rate: int = RATE) -> None:
    """Grey frames as an MP4."""
    av = pyav()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = None
        for frame in clip:
            if stream is None:
                stream = container.add_stream("h264", rate=rate, options={"crf": "18", "preset": "veryfast"})
                stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frame.shape, "yuv420p", 1
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        if stream is not None:
            container.mux(stream.encode())


def make(folder: Path, name: str, count: int, seed: int) -> None:
    """`count` clips of as many pictures: folder/<motion>/<number>.mp4."""
    source = pictures(name)
    for i, which in enumerate(np.random.default_rng(seed).permutation(len(source))[:count].tolist()):
        motion = MOTIONS[i % len(MOTIONS)]
        encode(folder / motion / f"{which}.mp4", frames(source[which], motion, np.random.default_rng([seed, which])))


# -- measuring ---------------------------------------------------------------------------------------------------------


def accuracy(task: Any, model: Any, store: Store, still: bool = False) -> float:
    """Share of clips labelled rightly; `still`: each shown standing still at its middle frame."""
    right = 0
    for start in range(0, len(store), 100):
        examples = [store[i] for i in range(start, min(start + 100, len(store)))]
        if still:
            examples = [{**e, "video": np.repeat(e["video"][[len(e["video"]) // 2]], len(e["video"]), 0)}
                        for e in examples]  # fmt: skip
        answers = evaluate.answers(task, model, examples, batch_size=100)
        right += sum(a["label"] == task.labels.names[int(e["label"])] for a, e in zip(answers, examples, strict=True))
    return right / len(store)


def decoding(folder: Path, test: Path) -> dict[str, float]:
    """Clips a second of processor time, from file to sampled frames: the small ones, and one of 640 × 360 for five
    seconds."""
    small = [read_clip(path)[0] for path in sorted(test.rglob("*.mp4"))[:400]]
    start = time.process_time()
    for clip in small:
        sampled(clip, 8)
    found = {"small": len(small) / (time.process_time() - start)}
    y, x = np.mgrid[:360, :640]
    noise = np.random.default_rng(0).integers(0, 40, (360, 640), dtype=np.uint8)
    encode(folder / "large.mp4", ((((x + 4 * i) ^ (y - 2 * i)) % 200).astype(np.uint8) + noise for i in range(150)), 30)
    large, fault = read_clip(folder / "large.mp4")
    assert isinstance(large, ClipFile) and not fault
    start = time.process_time()
    sampled(large, 8, 224)
    found["large"] = 1 / (time.process_time() - start)
    return found


def run(clips: Path, runs: Path, name: str, overrides: list[str]) -> Any:
    """The recipe trained on the clips."""
    data = [f"name={name}", f"data.train={clips / 'train'}", f"data.test={clips / 'test'}",
            "data.split={valid: 0.05}", "options.size=32", "options.patch=8", "options.flip=false",
            "options.operations=0", "options.label_smoothing=0", "options.jitter=1", "model.d_model=96",
            "model.num_layers=4", "train.threads=1", "train.device=cpu"]  # fmt: skip
    return train(RECIPE, [*data, *overrides], run=runs / name, restart=True, progress=False)


def main() -> int:
    extra = [("--clips", {"type": Path, "metavar": "FOLDER", "help": "where clips are made, or lie already"})]
    args = arguments(__doc__, 4.0, extra)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place, begun = args.clips or Path(temporary) / "clips", time.perf_counter()
        for part, source, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
            if not (place / part).is_dir():
                make(place / part, source, count, seed=0)
        print(f"clips: {time.perf_counter() - begun:.0f} s to make", flush=True)
        speed = decoding(Path(temporary), place / "test")
        print(f"decoding, by processor time: {speed['small']:.0f} clips/s of 32 × 32, 16 frames; "
              f"{speed['large']:.2f} clips/s of 640 × 360, 150 frames", flush=True)
        start = time.perf_counter()
        ours = run(place, Path(temporary), "moving", [f"train.minutes={args.minutes}"])
        spent = time.perf_counter() - start
        steps = max(int(path.name.removeprefix("step-")) for path in ours.folder.file("checkpoints").glob("step-*"))
        test = Store(ours.folder.file("data/test"))
        found, frozen = accuracy(ours.task, ours.model, test), accuracy(ours.task, ours.model, test, still=True)
        print(f"clips: {found:.4f} of {len(test)} after {steps} steps and {spent:.0f} s; standing still {frozen:.4f}",
              flush=True)  # fmt: skip
        single = run(place, Path(temporary), "still", ["options.frames=1", "options.tubelet=1", f"train.steps={steps}"])
        alone = accuracy(single.task, single.model, Store(single.folder.file("data/test")))
        print(f"one frame: {alone:.4f} after {steps} steps", flush=True)
    aims = [
        Aim("clips of moving pictures: test accuracy", alone, found, "share", f"ours ≥ {AIM}", found >= AIM),
        Aim("the same model on one frame", None, alone, "share", f"≤ {CHANCE} (chance 0.125)", alone <= CHANCE),
        Aim("clips decoded, 32 × 32, 16 frames", None, speed["small"], "clips/s", "printed", True),
        Aim("clips decoded, 640 × 360, 150 frames", None, speed["large"], "clips/s", "printed", True),
    ]
    return finish(args, aims, {"standing_still": frozen, "steps": steps, "seconds": spent, "clips": [TRAIN, TEST]})


if __name__ == "__main__":
    sys.exit(main())
