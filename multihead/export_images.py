"""Weights out, for pictures: config.json, model.safetensors and preprocessor_config.json of a ViT or DeiT."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from multihead.build import Run
from multihead.codec.image import ImageCodec, decoded
from multihead.codec.processor import FILE, write_processor
from multihead.data.images import from_uri
from multihead.data.store import INDEX
from multihead.proving import Proof, numbered, transformers
from multihead.run import write_json
from multihead.runtime import checkpoint
from multihead.transformer.config import TransformerConfig
from multihead.weights.out import choose, class_name, outward

TASKS = ("image-classification",)


def write(run: Run, folder: Path) -> str:
    """Every file of the folder; the name of the class that loads it."""
    task, codec, options = run.recipe.task, _codec(run), run.task.options
    config = TransformerConfig(**{f.name: getattr(run.recipe.model, f.name) for f in fields(TransformerConfig)})
    shaping = {**options.model_dump(), "size": codec.size, "channels": codec.channels}
    family, processor = choose(config, task, options=shaping), write_processor(codec)
    tensors, shape = outward(family, config, task, run.model.state_dict(), False, shaping)
    shape |= {"dtype": "float32", **numbered(run.task.labels.names)}  # type: ignore[attr-defined]
    write_json(folder / "config.json", shape)
    write_json(folder / FILE, processor)
    checkpoint.save_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    return class_name(family, task)


def prove(run: Run, folder: Path, name: str, count: int) -> Proof:
    """Run both on held-out pictures: on the same values, and from the file through the folder's own processor.
    UserError where the logits differ."""
    library, codec, proof = transformers(), _codec(run), Proof(agree=0)
    theirs = getattr(library, name).from_pretrained(folder, local_files_only=True).eval()
    processor = library.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    ours, mean, std = run.model.cpu().float(), *(torch.tensor(v)[:, None, None] for v in (codec.mean, codec.std))
    for image in itertools.islice(_pictures(run), count):
        values = torch.tensor(codec.array(image))[None].float() / 255
        seen = processor(codec.plain(image), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            left, right, whole = ours((values - mean) / std), *(theirs(x).logits for x in ((values - mean) / std, seen))
        proof.add(left, right)
        proof.agree = (proof.agree or 0) + int(left.argmax() == whole.argmax())
        proof.pixels = max(proof.pixels, float((seen * std + mean - values).abs().mean() * 255))
    proof.judge()
    return proof


def _codec(run: Run) -> ImageCodec:
    codec: ImageCodec = run.task.codec  # type: ignore[attr-defined]
    return codec


def _pictures(run: Run) -> Iterator[Any]:
    """Held-out pictures of the run, evenly spread; then coloured noise, for a run without data."""
    for part in ("test", "valid"):
        if (run.path / "data" / part / INDEX).is_file():
            store = run.store(part)
            for i in range(0, len(store), max(1, len(store) // 100)):
                yield decoded(from_uri(store.row(i)["image"]))
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    while True:
        yield Image.fromarray(torch.randint(256, (60, 80, 3), dtype=torch.uint8, generator=random).numpy())
