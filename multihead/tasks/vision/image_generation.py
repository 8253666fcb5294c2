"""image-generation: draw pictures like those learned from: freely, of a label, or of a caption.

A diffusion Transformer (Peebles & Xie 2023) that learns by flow matching which way leads from noise to pictures
(Lipman et al. 2023; Liu et al. 2023), and is steered without a classifier (Ho & Salimans 2022). It works on the
pictures' own values, or for larger ones on the latents of an autoencoder (Rombach et al. 2022), a codec of the run.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.image import ImageCodec, thumbnail
from multihead.codec.text import LabelCodec, TextCodec
from multihead.data.columns import changed
from multihead.data.rows import LABEL_NAMES, Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.generation import flow
from multihead.metrics import text as metrics
from multihead.metrics.frechet import frechet
from multihead.run import write_json
from multihead.task import Answer, Batch, Example, Loss, Task
from multihead.tasks.vision import _captions as captions
from multihead.tasks.vision import _drawn as drawn
from multihead.tasks.vision import _latents as latents
from multihead.tasks.vision._diffusion import DrawingOptions, PictureFlow, Told, Wish, check_side, check_trunk
from multihead.tasks.vision.image_classification import IMAGE_NAMES, KEPT, SAMPLE, _Some
from multihead.transformer.config import TransformerConfig

CAPTION_NAMES = ("text", "prompt", "description", "title", "name", "描述", "说明", "标题", "提示词", "文字", "名称")
TIMES = 4
"""At so many times is each held-out picture's loss measured, one in each quarter."""
AT_ONCE = 64
"""Pictures drawn side by side."""


class ImageGeneration(Task):
    """Pictures out of noise."""

    field = "vision"
    title = ("draw pictures like yours: freely, of a label, or of a caption",
             "画出与你的图片相似的图：自由生成、按标签或按文字描述")
    columns = (
        Column("image", "image", names=IMAGE_NAMES, target=True),
        Column("label", "label", required=False, names=LABEL_NAMES),
        Column("caption", "text", required=False, names=CAPTION_NAMES),
        *(Column(f"caption_{i}", "text", required=False) for i in (2, 3, 4)),
    )
    metric = ("loss", "min")
    draws = True
    asks = flow.ASKS
    Options = DrawingOptions
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {
            "d_model": 192, "num_layers": 6, "num_heads": 4, "norm": "layernorm", "activation": "gelu_tanh",
            "positions": "rotary", "rope_theta": 100.0, "qk_norm": True,
        },
        "train": {
            "steps": 10000, "batch_size": 64, "optimizer": "muon", "lr": 1e-3, "weight_decay": 0.0, "ema": 0.999,
        },
        "serve": {"max_rows": 8, "max_batch": 4, "queue": 32},
    }

    codec: ImageCodec
    latents: latents.Latents | None = None
    """Where the model works on latents, from pictures to them and back."""
    labels: LabelCodec
    words: TextCodec
    told: Told | None = None
    """What the model is told; None before anything is learned."""
    _judge: Any = None
    _train: Store | None = None
    _least: int = -1
    _real: tuple[Any, ...] = ()

    def inputs(self) -> list[Column]:
        wanted = {"none": (), "label": ("label",), "text": ("caption",)}.get(self.told or "", ("label", "caption"))
        return [column for column in self.columns if column.name in wanted]

    def identity(self) -> Sequence[str]:
        return ["image"]

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        counts: Counter[str] = Counter()
        total = described = 0
        for row in rows:
            total, described = total + 1, described + any(row.get(name) for name in self._captions())
            if row.get("label") is not None:
                counts[self._name(row["label"])] += 1
        found: Told = "text" if described else "label" if len(counts) > 1 else "none"
        self.told = found if self.options.condition == "auto" else self.options.condition
        if (self.told == "text" and not described) or (self.told == "label" and not counts):
            missing = "caption" if self.told == "text" else "label"
            raise UserError(tr(f"options.condition is {self.told}, but the data has no column '{missing}'; name it: "
                               f"data.columns.{missing}",
                               f"options.condition 是 {self.told}，但数据没有 '{missing}' 列；"
                               f"请指明 data.columns.{missing}"))
        o = self.options
        many = o.patch * (o.latent or 1)
        self.codec = ImageCodec.fit(_Some(rows, -(-total // SAMPLE)), o.size, many, o.channels, o.fit)
        check_side(self.codec.size, o)
        if self.told == "label":
            self.labels = LabelCodec.fit(counts)
        if self.told == "text":
            texts = (text for row in rows for name in self._captions() if (text := row.get(name)))
            self.words = TextCodec.fit(texts, o.tokenizer, o.vocab_size)
        self._looker()
        if o.latent:
            some = _Some(rows, latents.every(total, self.codec))
            self.latents = latents.Latents.learn(some, self.codec, o, self.seed)

    def _captions(self) -> list[str]:
        return [column.name for column in self.columns if column.kind == "text"]

    def _name(self, label: Any) -> str:
        names, text = self.options.names, str(label)
        return names[int(text)] if text.isdecimal() and int(text) < len(names) else text

    def encode(self, row: dict[str, Any]) -> Example:
        example: Example = {}
        if row.get("image") is not None:
            example["image"] = image = self.codec.encode(row["image"])
            if self.latents is not None:
                both = np.stack([image, image[:, :, ::-1]] if self.options.flip else [image])
                example |= dict(zip(("latent", "mirrored"), self.latents.encode(both), strict=False))
        if self.told == "text":
            texts = [text for name in self._captions() if (text := row.get(name))]
            o = self.options
            example["ids"] = captions.read(texts or [""], self.words, o.caption_length, o.keywords)
        else:
            label, known = row.get("label"), self.told == "label"
            none = len(self.labels) if known else 0
            number = self.labels.encode(self._name(label)) if known and label is not None else none
            example["label"] = np.array(number, dtype=np.int64)
        return example

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        if len(row["image"]) <= KEPT:
            return row
        return changed(row, image=thumbnail(row["image"], max(128, 2 * self.codec.size)))

    def describe(self, store: Store) -> dict[str, Any]:
        if self.told != "label":
            return {}
        counts = np.bincount(store.stream("label"), minlength=len(self.labels))[: len(self.labels)]
        return {"classes": dict(zip(self.labels.names, counts.tolist(), strict=True))}

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        """The rows; and of a held-out part, which of them a picture is drawn for: those of the smallest keys."""
        if part == "train":
            self._train = store
        elif len(store):
            self._train = self._train or drawn.training_store(store)
            keys = sorted(_key(picture) for picture in drawn.pictures_of(store))
            self._least = keys[min(self.options.samples, len(keys)) - 1] if self.options.samples else -1
        return store

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        if self.latents is not None:
            self.latents.save(folder)
        write_json(folder / "told.json", {"told": self.told})
        if self.told == "label":
            self.labels.save(folder)
        if self.told == "text":
            self.words.save(folder)

    def load(self, folder: Path) -> None:
        self.codec = ImageCodec.load(folder)
        if self.options.latent:
            self.latents = latents.Latents.load(folder, self.codec.channels, self.options)
        told = (folder / "told.json").read_text("utf-8") if (folder / "told.json").is_file() else ""
        self.told = next((kind for kind in get_args(Told) if f'"{kind}"' in told), None)
        if self.told is None:
            raise UserError(tr("this codec is not whole; prepare the run again", "编码器不完整；请重新准备"),
                            str(folder / "told.json"))
        if self.told == "label":
            self.labels = LabelCodec.load(folder)
        if self.told == "text":
            self.words = TextCodec.load(folder)

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> PictureFlow:
        check_side(self.codec.size, self.options)
        check_trunk(config)
        assert self.told is not None
        classes = len(self.labels) if self.told == "label" else 0
        vocabulary = self.words.vocab_size if self.told == "text" else 0
        return PictureFlow(config, self._shape()[:2], self.options, self.told, classes, vocabulary)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """The noise to start from, the time to look at, and whether the model is told what is on the picture."""
        o, found = self.options, dict(example)
        found["noise"] = rng.standard_normal(self._shape(), dtype=np.float32)
        found["time"] = np.array(flow.draw_time(rng, o.times), dtype=np.float32)
        dropped = rng.random() < o.drop
        mirrored = o.flip and rng.random() < 0.5
        if self.latents is not None:
            del found["image"]
            other = found.pop("mirrored", found["latent"])
            found["latent"] = other if mirrored else found["latent"]
        elif mirrored:
            found["image"] = np.ascontiguousarray(example["image"][:, :, ::-1])
        if self.told == "text":
            ids = example["ids"]
            found["ids"] = ids[:1] if dropped else captions.drawn(ids, self.words, o.keywords, rng)
        elif self.told == "label" and dropped:
            found["label"] = np.array(len(self.labels), dtype=np.int64)
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        """As `pad`, but of several captions the first alone, and the rest simply stacked."""
        batch: Batch = {}
        for key in examples[0]:
            if key == "ids":
                batch |= base.pad([{"ids": captions.first(example["ids"], self.words)} for example in examples])
            else:
                batch[key] = torch.from_numpy(np.stack([example[key] for example in examples]))
        return batch

    def _wish(self, model: Any, batch: Batch) -> Wish:
        if "ids" not in batch:
            return model.wish(batch["label"])
        ids = batch["ids"].long()
        return model.wish(None, ids, torch.arange(ids.shape[1], device=ids.device) < batch["ids_lengths"][:, None])

    def _free(self, batch: Batch) -> Batch:
        """The same batch, asking for nothing."""
        if "ids" not in batch:
            return {"label": torch.full_like(batch["label"], len(self.labels) if self.told == "label" else 0)}
        return {"ids": batch["ids"][:, :1], "ids_lengths": torch.ones_like(batch["ids_lengths"])}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        error = self._error(model, self._data(batch), batch["noise"], batch["time"], self._wish(model, batch))
        return Loss(error.sum(), len(error))

    def _shape(self) -> tuple[int, int, int]:
        """Channels and sides of what the model draws: of pictures, or of their latents."""
        o, side = self.options, self.codec.size // (self.options.latent or 1)
        return (o.latent_channels if o.latent else self.codec.channels, side, side)

    @staticmethod
    def _data(batch: Batch) -> Tensor:
        return batch["latent"] if "latent" in batch else latents.values(batch["image"])

    @staticmethod
    def _error(model: nn.Module, data: Tensor, noise: Tensor, t_B: Tensor, wish: Wish) -> Tensor:
        """Squared error of the velocity, mean over a picture's values: (B,)."""
        x, velocity = flow.on_path(noise, data, t_B)
        return (model(x, t_B, wish) - velocity).square().flatten(1).mean(1)

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"pictures": [PNG data URI …], "seed"}``; in an evaluation ``{"loss"}``, with a ``picture`` for some."""
        if ask.get("evaluate"):
            return self._measured(model, batch)
        if self.told == "none" and ask.get("guidance") not in (None, 1, 1.0):
            raise UserError(tr("guidance leads towards what is asked for, and this model is told nothing",
                               "guidance 用于贴近要求，而这个模型没有要求可言"))
        drawing = self._drawing(ask)
        seeds = [drawing.seed + i for i in range(drawing.n)]
        rows = len(next(iter(batch.values())))
        pictures = self.draw(model, _repeated(batch, drawing.n), seeds * rows, drawing)
        files = [drawn.to_png(picture) for picture in pictures]
        return [{"pictures": files[i * drawing.n : (i + 1) * drawing.n], "seed": drawing.seed} for i in range(rows)]

    def _drawing(self, ask: dict[str, Any]) -> flow.Drawing:
        o = self.options
        return flow.Drawing.of(ask, steps=o.steps, method=o.method, guidance=1.0 if self.told == "none" else o.guidance)

    def draw(self, model: nn.Module, batch: Batch, seeds: Sequence[int], drawing: flow.Drawing) -> np.ndarray:
        """One picture for each row of a batch: uint8 (B, C, S, S). `seeds`: of each picture's own noise."""
        device, found = next(model.parameters()).device, []
        for start in range(0, len(seeds), AT_ONCE):
            part = {key: value[start : start + AT_ONCE] for key, value in batch.items()}
            told, free = self._wish(model, part), self._wish(model, self._free(part))
            noise = flow.noise_of(seeds[start : start + AT_ONCE], self._shape(), device)

            def both(x: Tensor, t_B: Tensor, told: Wish = told, free: Wish = free) -> tuple[Tensor, Tensor]:
                return model(x, t_B, told), model(x, t_B, free)

            def plain(x: Tensor, t_B: Tensor, told: Wish = told) -> Tensor:
                return model(x, t_B, told)

            velocity = plain if drawing.guidance == 1 else flow.guided(both, drawing.guidance)
            x = flow.integrate(velocity, noise, drawing.steps, drawing.method)
            found.append(drawn.bytes_of(x if self.latents is None else self.latents.decode(x)))
        return np.concatenate(found)

    def _measured(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The loss of each held-out row, at times and with noise that depend on the row alone; and pictures."""
        pictures = batch["image"].cpu().numpy()
        keys = [_key(picture) for picture in pictures]
        data, wish = self._data(batch), self._wish(model, batch)
        errors = []
        for quarter in range(TIMES):
            rngs = [np.random.default_rng([key, quarter]) for key in keys]
            t_B = torch.tensor([(quarter + rng.random()) / TIMES for rng in rngs], device=data.device).float()
            noise = np.stack([rng.standard_normal(data.shape[1:], dtype=np.float32) for rng in rngs])
            errors.append(self._error(model, data, torch.from_numpy(noise).to(data.device), t_B, wish))
        answers: list[Answer] = [{"loss": float(f"{v:.6g}")} for v in torch.stack(errors).mean(0).tolist()]
        if self.latents is not None:
            again = drawn.bytes_of(self.latents.decode(data))
            for answer, decibels in zip(answers, latents.psnr(again, pictures).tolist(), strict=True):
                answer["psnr"] = float(f"{decibels:.6g}")
        chosen = [i for i, key in enumerate(keys) if key <= self._least]
        if chosen:
            told = {key: value[chosen] for key, value in batch.items() if key not in ("image", "latent", "mirrored")}
            drawings = self.draw(model, told, [keys[i] for i in chosen], self._drawing({}))
            for i, picture in zip(chosen, drawings, strict=True):
                answers[i]["picture"] = drawn.to_png(picture)
        return answers

    def _looker(self) -> Any:
        """Who looks at drawn pictures. UserError where the judge is not there, or does not know the labels."""
        if self._judge is None:
            self._judge = drawn.Judge(self.options.judge) if self.options.judge else drawn.Cells()
            unknown = sorted({*self.labels.names} - {*self._judge.labels}) if self.told == "label" else []
            if unknown and self._judge.labels:
                raise UserError(tr(f"options.judge does not know the labels {', '.join(unknown[:10])}; it knows: "
                                   f"{', '.join(self._judge.labels[:20])}",
                                   f"options.judge 不认识标签 {'、'.join(unknown[:10])}；"
                                   f"它认识：{'、'.join(self._judge.labels[:20])}"), str(self.options.judge))
        return self._judge

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """The loss; how well an autoencoder gives pictures back (PSNR in dB); of pictures drawn for held-out rows, how
        often the judge sees the label asked for, and the Fréchet distance to the held-out pictures, beside that of as
        many training pictures (its floor).

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,). A Fréchet distance has
                no such interval: a picture that counts twice makes it larger.
        """
        found: dict[str, Any] = {name: metrics.mean(np.array([answer[name] for answer in answers]), weights)
                                 for name in ("loss", "psnr") if name in answers[0]}
        chosen = [i for i, answer in enumerate(answers) if "picture" in answer]
        if len(chosen) < 2:
            return found
        if weights is None or not self._real or self._real[0] != len(rows):
            self._compare(answers, rows, chosen)
        _, agrees, distance, floor = self._real
        if agrees is not None:
            found["agreement"] = metrics.mean(agrees, None if weights is None else weights[:, chosen])
        nothing = None if weights is None else np.full(len(weights), np.nan)
        found["frechet"] = distance if nothing is None else nothing
        if floor is not None:
            found["frechet_floor"] = floor if nothing is None else nothing
        return found

    def _compare(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], chosen: list[int]) -> None:
        judge = self._looker()
        features, seen = judge.look(np.stack([drawn.from_png(answers[i]["picture"]) for i in chosen]))
        real, _ = judge.look(np.stack([self.codec.encode(row["image"]) for row in rows]))
        agrees = None
        if seen and self.told == "label":
            asked = [rows[i].get("label") for i in chosen]
            agrees = np.array([self._name(a) == s for a, s in zip(asked, seen, strict=True)])
        floor = None
        if self._train is not None and len(self._train) > 1:
            some = np.linspace(0, len(self._train) - 1, min(len(chosen), len(self._train))).astype(np.int64)
            floor = frechet(judge.look(drawn.pictures_of(self._train, some))[0], real)
        self._real = (len(rows), agrees, frechet(features, real), floor)

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pictures drawn, and the training pictures nearest to some of them."""
        chosen = [i for i, answer in enumerate(answers) if "picture" in answer]
        if not chosen:
            return {}
        asked, pictures = [self._asked(rows[i]) for i in chosen], [answers[i]["picture"] for i in chosen]
        real = np.stack([self.codec.encode(rows[i]["image"]) for i in chosen])
        found = [drawn.pairs(asked, pictures, real) if self.told == "text" else drawn.grid(asked, pictures)]
        if self._train is not None:
            found.append(drawn.copies(pictures, real, drawn.pictures_of(self._train)))
        if self.latents is not None:
            again = self.latents.rebuilt(some := real[: drawn.REBUILT])
            found.append(drawn.rebuilt(some, again, latents.psnr(some, again)))
        looked = f"Fréchet: {self._looker().name[0]}, {len(chosen)} / {len(rows)}"
        return {"galleries": found, "signatures": {"features": looked}}

    def _asked(self, row: dict[str, Any]) -> str:
        if self.told == "label":
            return self._name(row["label"]) if row.get("label") is not None else "–"
        return next((str(row[name]) for name in self._captions() if row.get(name)), "–") if self.told == "text" else ""

    # -- serve --------------------------------------------------------------------------------------------------------

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.told == "label" and row.get("label") is not None:
            return {"label": self._name(row["label"])}
        return {"caption": self._asked(row).split("\n")[0]} if self.told == "text" else {}

    def request(self, body: Any) -> dict[str, Any]:
        """An object with ``label`` or ``caption``, or the words alone; an empty text where a model is told nothing."""
        if isinstance(body, dict):
            return body
        if self.told == "none":
            if str(body or "").strip():
                raise UserError(tr("this model draws freely and cannot be told what; send an empty text",
                                   "这个模型自由生成，无法指定内容；请发送空文本"))
            return {}
        return {"label" if self.told == "label" else "caption": body}


def _key(picture: np.ndarray) -> int:
    """A number that depends on the picture alone."""
    return zlib.crc32(np.ascontiguousarray(picture).tobytes())


def _repeated(batch: Batch, n: int) -> Batch:
    return {key: value.repeat_interleave(n, dim=0) for key, value in batch.items()}
