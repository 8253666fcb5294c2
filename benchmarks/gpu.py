"""Training on one GPU: how much of what the card can do is reached, beside transformers and a plain torch loop.

    python benchmarks/gpu.py [--json FILE] [--minutes N] [--try]

A decoder of 124 million parameters (GPT-2's shape) on rows of 1,024 tokens, and a ViT-S/16 on pictures of 224 × 224.
Ours is the package's own `Trainer`, which reads its rows from a store; the peers (`GPT2LMHeadModel` and
`ViTForImageClassification`, and torch's own `nn.TransformerEncoder`) find theirs on the card. bfloat16 (autocast) and
AdamW on every side, by turns. What counts: the operations of the model's passes over those of a large matrix product on
this card, measured in the same run (aim: at least 0.50), and tokens or pictures a second beside the peers.

Without a GPU it says that it did not run, and exits with 0. --try makes steps of tiny models on the CPU, to see that it
runs; its figures mean nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import training_speed as speed
from _common import Aim, arguments, finish
from _pairs import Rounds, Work, timed
from torch import Tensor, nn

from multihead import prepare
from multihead import recipe as recipes
from multihead.run import RunFolder
from multihead.runtime.meter import measure
from multihead.task import find
from multihead.train import Trainer

VISION = Path(__file__).resolve().parent.parent / "recipes" / "vision" / "image-classification.yaml"
SHARE = 0.50
DECODER = speed.Shape(speed.DECODER, "124M", 768, 12, 12, 50304, 16, 1024)
SAME = ["model.dropout=0", "train.optimizer=adamw", "train.ema=null", "train.minutes=null", "train.precision=bf16"]
GPT2 = ["model.ngrams=[]", "model.norm=layernorm", "model.activation=gelu_tanh", "model.positions=learned",
        "model.bias=true"]  # fmt: skip
VIT = ["options.stem=linear", "options.operations=0", "options.flip=false", "options.shift=0", "model.conv_kernel=0",
       "model.activation=gelu", "model.positions=learned", "model.bias=true"]  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    d_model: int = 384
    layers: int = 12
    heads: int = 6
    size: int = 224
    patch: int = 16
    rows: int = 128
    classes: int = 2


# -- ours --------------------------------------------------------------------------------------------------------------


def decoder(shape: speed.Shape, folder: Path, place: str) -> Trainer:
    given = [*speed.data(shape, folder), *SAME, *GPT2, f"model.d_ff={4 * shape.d_model}", f"train.device={place}"]
    prepare.run_step(speed.RECIPES / "text-generation.yaml", given, str(folder / "run"))
    return speed.trainer(shape, RunFolder.open(str(folder / "run")), given)


def pictures(shape: Pictures, folder: Path, place: str) -> Trainer:
    """On grey noise in IDX files, two labels."""
    count, draw = 2 * shape.rows, np.random.default_rng(0)
    noise = draw.integers(256, size=(count, shape.size, shape.size), dtype=np.uint8)
    sides = b"".join(side.to_bytes(4, "big") for side in noise.shape)
    (folder / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + sides + noise.tobytes())
    labels = bytes(i % shape.classes for i in range(count))
    (folder / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + labels)
    given = [*SAME, *VIT, f"data.train={folder}/train-*", "data.split={valid: 0, test: 0}",
             f"options.size={shape.size}", f"options.patch={shape.patch}", f"model.d_model={shape.d_model}",
             f"model.num_layers={shape.layers}", f"model.num_heads={shape.heads}",
             f"train.batch_size={shape.rows}", f"train.device={place}"]  # fmt: skip
    prepare.run_step(VISION, given, str(folder / "run"))
    recipe, run = recipes.load(VISION, [*given, "train.threads=1"], find=find), RunFolder.open(str(folder / "run"))
    task = prepare.make_task(recipe, VISION.parent)
    task.load(run.file("codec"))
    return Trainer(recipe, task, run, progress=False)


# -- peers -------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """torch's own Transformer layers, of a shape: with a tied head over words, or over patches with their mean."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.words = isinstance(shape, speed.Shape)
        d = shape.d_model
        self.token = nn.Embedding(shape.vocab, d) if self.words else nn.Conv2d(1, d, shape.patch, shape.patch)
        length = shape.length if self.words else (shape.size // shape.patch) ** 2
        self.position = nn.Parameter(torch.randn(length, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, shape.heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, shape.vocab if self.words else shape.classes, bias=not self.words)
        if self.words:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.words:
            return self.head(self.layers(self.token(x).flatten(2).mT + self.position).mean(1))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.layers(self.token(x) + self.position, mask=mask, is_causal=True))


def plain_loss(model: Plain, shape: Any) -> Tensor:
    if model.words:
        ids = speed.drawn(shape, 1)
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    return F.cross_entropy(model(noise(shape)).float(), torch.randint(shape.classes, (shape.rows,)))


def noise(shape: Pictures) -> Tensor:
    return torch.rand(shape.rows, 1, shape.size, shape.size)


def transformers_loss(model: Any, shape: Any) -> Tensor:
    if isinstance(shape, speed.Shape):
        ids = speed.drawn(shape)
        return model(input_ids=ids, labels=ids).loss
    return model(pixel_values=noise(shape), labels=torch.randint(shape.classes, (shape.rows,))).loss


def transformers_model(shape: Any) -> nn.Module:
    import transformers

    if isinstance(shape, speed.Shape):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.d_model, n_layer=shape.layers,
            n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))  # fmt: skip
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=shape.d_model, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.d_model, image_size=shape.size, patch_size=shape.patch, num_channels=1,
        num_labels=shape.classes))  # fmt: skip


# -- a case ------------------------------------------------------------------------------------------------------------


def case(name: str, shape: Any, make: Callable[[Any, Path, str], Trainer], units: int, unit: str, place: str,
         args: Any) -> tuple[list[Aim], dict[str, Any]]:  # fmt: skip
    def clock() -> float:
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as temporary:
        ours = make(shape, Path(temporary), place)
        numbers = iter(range(1 << 30))
        works: dict[str, Work] = {
            "ours": lambda: ours._update(next(numbers)),
            "transformers": speed.Peer(transformers_model(shape), shape, transformers_loss, torch.bfloat16, place),
            "plain torch": speed.Peer(Plain(shape), shape, plain_loss, torch.bfloat16, place),
        }
        found = Rounds({side: timed(work, clock) for side, work in works.items()}, args.minutes * 30)
        ceiling = measure(torch.device(place), torch.bfloat16, budget=1.0)
        share = speed.share_of_ceiling(ours, found.seconds("ours"), ceiling)
    rates = {side: units / found.seconds(side) for side in works}
    print(f"{name}: {', '.join(f'{side} {rate:,.0f}' for side, rate in rates.items())} {unit}/s; ours {share:.0%} of "
          f"{ceiling / 1e12:.1f} TFLOP/s", flush=True)  # fmt: skip
    aims = [Aim(f"{name}: share of the measured ceiling", None, share, "share", f"≥ {SHARE}", share >= SHARE)]
    aims += [Aim(f"{name}, beside {side}", rates[side], rates["ours"], f"{unit}/s", "ours ≥ peer",
                 found.ratio(side, "ours") >= 1) for side in ("transformers", "plain torch")]  # fmt: skip
    return aims, {"rates": rates, "share_of_ceiling": share, "ceiling": ceiling}


def main() -> int:
    args = arguments(__doc__, 4, [("--try", {"action": "store_true", "dest": "tiny", "help": "tiny, on the CPU"})])
    if not torch.cuda.is_available() and not args.tiny:
        print("not run: torch finds no GPU here")
        return 0
    words, images, place = DECODER, Pictures(), "cuda"
    if args.tiny:
        words = replace(words, d_model=32, layers=1, heads=2, vocab=300, rows=4, length=32)
        images, place = Pictures(32, 1, 2, 32, 16, 4), "cpu"
    aims, seen = case("decoder of 124M", words, decoder, words.tokens, "tokens", place, args)
    more, seen_too = case("ViT-S/16", images, pictures, images.rows, "pictures", place, args)
    where = torch.cuda.get_device_name() if place == "cuda" else "cpu"
    return finish(args, [*aims, *more], {"card": where, "decoder": seen, "pictures": seen_too})


if __name__ == "__main__":
    sys.exit(main())
