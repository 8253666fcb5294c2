"""Small untrained models to serve: texts written, labels given, gaps filled. Run as a script, it serves them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multihead.codec.audio import AudioCodec
from multihead.codec.text import TextCodec
from multihead.data.rows import Column
from multihead.errors import UserError
from multihead.serve.app import Served, ServeSettings, create_app, run
from multihead.task import Answer, Batch, Example, Task
from multihead.tasks.language.fill_mask import FillMask
from multihead.tasks.language.text_classification import TextClassification
from multihead.tasks.language.text_generation import LanguageModel, TextGeneration
from multihead.tasks.recommendation.sequential_recommendation import SequentialRecommendation
from multihead.tasks.speech.speech_recognition import SpeechRecognition
from multihead.transformer.config import TransformerConfig

LINES = [
    "The room was clean and the staff were kind.",
    "房间很干净，服务员也很热情，下次还会再来。",
    "早餐一般，位置不错，离地铁站很近。",
]
LABELS = ("bad", "good", "<b>so so</b>")


def ears(decoder_layers: int, chunk: int) -> Served:
    """Hears, untrained, what is said in at most two seconds at once."""
    torch.manual_seed(0)
    options = SpeechRecognition.Options(mels=16, channels=4, decoder_layers=decoder_layers, max_seconds=2, chunk=chunk)
    task = SpeechRecognition(options)
    task.codec = AudioCodec(16, np.zeros(16), np.ones(16))
    task.units = TextCodec.fit(["hello there 你好"], "char", 100)
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    torch.nn.init.normal_(model.ctc.weight, std=3)  # so that something is heard
    return Served("ears", task, model)


class Mood(Task):
    """The mean of the characters' vectors, as three scores."""

    field = "language"
    title = ("mood of a review", "评论的情绪")
    columns = (
        Column("text", "text"),
        Column("stars", "number", required=False),
        Column("label", "label", target=True),
    )

    def encode(self, row: dict[str, Any]) -> Example:
        if row["text"] == "unreadable":
            raise UserError("this text is unreadable")
        if row["text"] == "crash":
            raise ZeroDivisionError("secret detail")
        points = np.array([ord(c) % 500 + 1 for c in row["text"]], dtype=np.int64)
        return {"ids": points, "stars": np.array(row.get("stars", 0), dtype=np.float64)}

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        if (batch["ids"] == ord("☠") % 500 + 1).any():
            raise RuntimeError("secret detail")
        scores = model(batch["ids"]).softmax(-1)
        return [
            {"label": LABELS[int(row.argmax())], "scores": dict(zip(LABELS, row.tolist(), strict=True))}
            for row in scores
        ]


class Mean(nn.Module):
    """ids (B, T), 0 for padding → logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(501, 3)

    def forward(self, ids_BT: Tensor) -> Tensor:
        real_BT1 = (ids_BT > 0)[..., None]
        return (self.table(ids_BT) * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


def writer(max_length: int = 1024) -> tuple[TextGeneration, LanguageModel]:
    """A language model of random weights."""
    task = TextGeneration()
    task.codec = TextCodec.fit(LINES * 3, vocab_size=320)
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=max_length)
    return task, LanguageModel(config, task.codec.vocab_size).eval()


def labeller() -> tuple[TextClassification, nn.Module]:
    """A text classifier of random weights."""
    task = TextClassification()
    task.fit([{"text": line, "label": str(i % 2)} for i, line in enumerate(LINES)])
    torch.manual_seed(2)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=2, ngrams=(2, 3), ngram_buckets=64)
    return task, task.model(config).eval()


def filler() -> tuple[FillMask, nn.Module]:
    """A model of random weights that fills gaps, and reads 16 characters at once."""
    task = FillMask(FillMask.Options(context=16))
    task.fit([{"text": line} for line in LINES])
    torch.manual_seed(3)
    config = TransformerConfig(d_model=32, num_layers=2, num_heads=2, max_length=16)
    return task, task.model(config).eval()


def eye(folder: Path) -> tuple[Any, nn.Module, Path]:
    """A classifier of pictures of random weights, and a picture's file in `folder`. Needs pillow."""
    from PIL import Image

    from multihead.data.images import read_file
    from multihead.tasks.vision.image_classification import ImageClassification

    task, files = ImageClassification(), [folder / "a.png", folder / "b.png"]
    for value, file in zip((40, 200), files, strict=True):
        Image.new("L", (16, 12), value).save(file)
    task.fit([{"image": read_file(file)[0], "label": file.stem} for file in files])
    torch.manual_seed(4)
    return task, task.model(TransformerConfig(d_model=32, num_layers=1, num_heads=2)).eval(), files[0]


FILMS = [{"history": [f"i{n}"] * (30 - n), "item": f"i{n}"} for n in range(30)]
"""What a retriever learns its catalogue from: i0, the most popular, to i29."""


def finder(**options: Any) -> tuple[SequentialRecommendation, nn.Module]:
    """A retriever of random weights that knows the items i0 … i29 by titles, and the users a, b and c."""
    task = SequentialRecommendation(SequentialRecommendation.Options(max_items=8, **options))
    task.fit(FILMS)
    task.codec.titles = {name: {"title": f"<b>Film</b> {name[1:]}"} for name in task.codec.names}
    task.known = {user: {"history": [f"i{n}" for n in held]} for user, held in [("a", [1, 2]), ("b", [3]), ("c", [])]}
    torch.manual_seed(5)
    config = TransformerConfig(d_model=16, num_layers=1, num_heads=2, max_length=8)
    return task, task.model(config).eval()


class Taste(Task):
    """A ranker by closed form: an item's number by a user's sign and the hour, so that every list can be foretold."""

    field = "recommendation"
    title = ("whether somebody clicks", "是否会点击")
    columns = (Column("user", "id", required=False), Column("item", "id", required=False),
               Column("hour", "number", required=False), Column("label", "label", target=True))
    ranks = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def context(self) -> list[Column]:
        return [Column("hour", "number", required=False), Column("device", "text", required=False)]

    def catalogue(self, items: Sequence[Any]) -> None:
        self.told = list(items)

    def rank(self, model: nn.Module, requests: Sequence[Any]) -> list[list[float]]:
        if any(request["context"].get("device") == "broken" for request in requests):
            raise UserError("context.device: this device is broken")
        return [[taste(request["user"], item, request["context"].get("hour", 0)) for item in request["items"]]
                for request in requests]  # fmt: skip


def taste(user: str | None, item: str, hour: float = 0) -> float:
    """What `Taste` gives: users in the first half of the alphabet like late numbers, others early ones."""
    number = int(item[1:]) + hour
    return (number if (user or "z") < "m" else -number) / 64


def served(names: Sequence[str] = ("writer", "mood"), max_length: int = 1024) -> list[Served]:
    """The models called `names`."""
    torch.manual_seed(1)
    known = {
        "writer": lambda: Served("writer", *writer(max_length), examples=LINES[:1]),
        "labeller": lambda: Served("labeller", *labeller()),
        "filler": lambda: Served("filler", *filler(), examples=["房间很<mask>净"]),
        "finder": lambda: Served("finder", *finder(), examples=[{"history": ["i4", "i7"]}]),
        "taste": lambda: Served("taste", Taste(), nn.Linear(1, 1)),
        "mood": lambda: Served("mood", Mood(), Mean().eval(), examples=[LINES[1], "<img src=x onerror=alert(1)>"]),
    }
    return [known[name]() for name in names]


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = ServeSettings(**json.loads(sys.argv[2]))
    run(create_app(served(), settings), port=0, started=lambda address: print(address, flush=True))
    Path(sys.argv[1]).write_text("returned")
