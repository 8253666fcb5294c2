"""ViT and DeiT: their folders say the same here, pictures included, and runs of ours say the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from multihead import strict_yaml
from multihead.build import Run, open_run
from multihead.codec.image import ImageCodec
from multihead.codec.processor import read_processor, write_processor
from multihead.codec.text import LabelCodec
from multihead.errors import UserError
from multihead.export import export
from multihead.tasks.vision.image_classification import ImageClassification
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.weights import open_origin
from tests.weights import peers

transformers = pytest.importorskip("transformers")
CLOSE = 1e-4
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 24, "patch_size": 8, "id2label": {0: "red", 1: "green", 2: "blue"},
         "label2id": {"red": 0, "green": 1, "blue": 2}}
KINDS = {"vit": ("ViT", "ImageClassification", {}),
         "vit, grey, tanh": ("ViT", "ImageClassification", {"num_channels": 1, "hidden_act": "gelu_new"}),
         "deit": ("DeiT", "ImageClassification", {}),
         "deit, distilled": ("DeiT", "ImageClassificationWithTeacher", {"num_channels": 1})}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {"size": {"height": 24, "width": 24}}),
    "deit": ("DeiT", {"size": {"height": 28, "width": 28}, "crop_size": {"height": 24, "width": 24}}),
    "clip": ("CLIP", {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}}),
}


def folder(path: Path, kind: str, processor: str = "vit") -> tuple[Path, Any, Any]:
    """A folder as people download it, its model and its processor."""
    name, head, more = KINDS[kind]
    model = peers.peer(name, head, **SHAPE, **more)
    channels = model.config.num_channels
    kind, settings = PROCESSORS[processor]
    made = getattr(transformers, f"{kind}ImageProcessorPil")(
        **settings, image_mean=[0.5, 0.4, 0.3][:channels], image_std=[0.2, 0.3, 0.25][:channels],
        **({"do_convert_rgb": channels == 3} if kind == "CLIP" else {}))
    model.save_pretrained(path)
    made.save_pretrained(path)
    return path, model, made


def pictures(where: Path, colours: bool = True) -> None:
    """Sixty pictures of three colours in folders, none of them square."""
    rng = np.random.default_rng(0)
    for i in range(60):
        at = where / ("red", "green", "blue")[i % 3]
        at.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 120, (30 + i % 7, 41 - i % 5, 3))
        values[..., i % 3] += 120
        picture = Image.fromarray(values.astype(np.uint8))
        (picture if colours else picture.convert("L")).save(at / f"{i}.png")


def trained(base: Path, model: dict[str, Any], options: dict[str, Any], steps: int = 1, **train_: Any) -> Run:
    base.mkdir(exist_ok=True)
    if not (base / "data").exists():
        pictures(base / "data")
    recipe = {
        "task": "image-classification", "data": {"train": "data"}, "model": model, "options": options,
        "train": {"steps": steps, "batch_size": 4, "threads": 1, "precision": "float32", "optimizer": "adamw",
                  "ema": None, **train_},
        "evaluate": {"bootstrap": 0},
    }
    (base / "r.yaml").write_text(strict_yaml.dump(recipe), "utf-8")
    train(base / "r.yaml", run=base / "run", progress=False, restart=True)
    return open_run(base / "run", "cpu")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_are_theirs(kind: str, tmp_path: Path) -> None:
    where, model, processor = folder(tmp_path, kind)
    origin = open_origin(where)
    assert not origin.unknown and not origin.causal and origin.labels == ["red", "green", "blue"]
    codec = origin.codec()
    task = ImageClassification(ImageClassification.Options(**origin.options, **origin.preferred))
    task.codec, task.labels = codec, LabelCodec(origin.labels)
    ours = task.model(TransformerConfig(**origin.config))
    ours.load_state_dict(origin.tensors())
    x = torch.randn(5, codec.channels, 24, 24, generator=torch.Generator().manual_seed(0))
    theirs = model(x).logits
    assert theirs.std() > 0.1
    assert (ours.eval()(x) - theirs).abs().max() < CLOSE
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    seen = processor(codec.plain(picture), return_tensors="pt")["pixel_values"][0]
    assert (seen - task._normal(torch.tensor(codec.array(picture)).float() / 255)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", PROCESSORS)
def test_processors_read_written_and_read_again(kind: str, tmp_path: Path) -> None:
    where, _, processor = folder(tmp_path, "vit", kind)
    codec = read_processor(where / "preprocessor_config.json", 24, 3)
    (tmp_path / "again").mkdir()
    (tmp_path / "again/preprocessor_config.json").write_text(json.dumps(write_processor(codec)))
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again")
    codec.save(tmp_path)
    loaded = ImageCodec.load(tmp_path)
    mean, std = (np.array(v)[:, None, None] for v in (codec.mean, codec.std))
    for size in ((24, 24), (70, 50), (31, 90), (13, 20)):
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8))
        ours = (loaded.array(picture) / 255 - mean) / std
        for theirs in (processor, again):
            np.testing.assert_allclose(ours, theirs(picture, return_tensors="np")["pixel_values"][0], atol=1e-5)


@pytest.mark.parametrize("kind, processor", [("vit", "vit"), ("deit", "deit"), ("deit, distilled", "clip")])
def test_there_and_back_the_bits_are_the_same(kind: str, processor: str, tmp_path: Path) -> None:
    there, model, _ = folder(tmp_path / "there", kind, processor)
    run = trained(tmp_path / "work", {"from": str(there)}, {}, steps=0)
    back = export(run, tmp_path / "back", texts=5)
    assert back.kind == type(model).__name__ and back.proof is not None
    assert back.proof.difference < CLOSE and back.proof.rows == back.proof.agree == 5 and back.proof.pixels < 1e-4
    old, new = load_file(there / "model.safetensors"), load_file(back.path / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(tensor, new[key]) for key, tensor in old.items())
    auto, report = transformers.AutoModelForImageClassification.from_pretrained(back.path, output_loading_info=True)
    if "Teacher" not in back.kind:  # which Auto does not know
        assert type(auto) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
        assert auto.config.id2label == SHAPE["id2label"]


VIT = {"d_model": 32, "num_layers": 2, "num_heads": 4, "norm": "layernorm", "activation": "gelu",
       "positions": "learned", "bias": True, "conv_kernel": 0}
LIKE = {"stem": "linear", "pool": "class", "size": 16}


def test_a_run_of_ours_and_what_no_class_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    done = export(trained(tmp_path / "work", VIT, LIKE), tmp_path / "out", texts=8)
    assert done.kind == "ViTForImageClassification" and done.proof is not None and done.proof.difference < 1e-5
    assert done.proof.agree == 8
    other = trained(tmp_path / "work", {**VIT, "activation": "relu2"}, {"size": 16})
    with pytest.raises(UserError, match=r"model.activation is relu2.*options.stem is conv, not linear.*options.pool is "
                                        "mean, not class"):
        export(other, tmp_path / "more", texts=1)


def test_other_sizes_and_other_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are stretched as transformers stretches them; a head for other labels stays behind; LoRA trains."""
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    there, model, _ = folder(tmp_path / "there", "vit")
    run = trained(tmp_path / "work", {"from": str(there)}, {"size": 40}, steps=0)
    assert run.task.codec.size == run.task.codec.edge == 40
    x = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        theirs = model(x, interpolate_pos_encoding=True).logits
        assert (run.model(x) - theirs).abs().max() < CLOSE
    for at in sorted((tmp_path / "work/data").iterdir()):
        at.rename(at.with_name(f"dark {at.name}"))
    lora = trained(tmp_path / "work", {"from": str(there), "lora": {"rank": 2}}, {}, steps=3, lr=0.01)
    assert lora.task.labels.names == ["dark blue", "dark green", "dark red"]
    merged, weight = lora.model.state_dict(), model.state_dict()
    assert torch.equal(merged["input.front"], weight["vit.embeddings.cls_token"][0])
    assert not torch.equal(merged["head.linear.weight"], weight["classifier.weight"])
    assert (tmp_path / "work/run/adapter/adapter_model.safetensors").is_file()
    own = trained(tmp_path / "own", {"from": str(tmp_path / "work/run")}, {}, steps=0)
    assert torch.equal(own.model.state_dict()["input.position"], merged["input.position"])


@pytest.mark.parametrize("key, value, told", [
    ("size", {"height": 24, "width": 30}, "shortest_edge"), ("do_resize", False, "do_resize is False"),
    ("rescale_factor", 1.0, "1/255"), ("image_std", [0, 1, 1], "image_std"),
    ("size", {"height": 20, "width": 20}, "24 × 24"),
    ("resample", 9, "bicubic"),
])
def test_processors_that_do_something_else_are_refused(
    key: str, value: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    there, _, _ = folder(tmp_path, "vit")
    file = there / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=told):
        open_origin(there)
    file.unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        open_origin(there)


def test_weights_that_read_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    folder(tmp_path / "vit", "vit")
    peers.write(tmp_path / "bert", peers.peer("Bert", "MaskedLM", **peers.ENCODERS["bert"][1]))
    pictures(tmp_path / "data")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n' * 9)
    for task, data, weights, told in (("text-classification", "rows.jsonl", "vit", "read pictures"),
                                      ("image-classification", "data", "bert", "read texts")):
        recipe = {"task": task, "data": {"train": data}, "model": {"from": weights}}
        (tmp_path / "r.yaml").write_text(strict_yaml.dump(recipe), "utf-8")
        with pytest.raises(UserError, match=told):
            train(tmp_path / "r.yaml", run=tmp_path / "run", progress=False)
