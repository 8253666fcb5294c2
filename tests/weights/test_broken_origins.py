"""Every broken folder of weights gives one plain message, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multihead.cli import main
from multihead.weights import open_origin
from tests.codec.test_foreign import KINDS
from tests.weights import peers

pytest.importorskip("transformers")
RECIPE = """task: text-generation
data: {train: story.txt, split: {valid: 0}}
options: {context: 8}
model: {from: weights}
train: {steps: 0, batch_size: 2, threads: 1, precision: float32}
"""
Damage = Callable[[Path], object]


def config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return damage


def renamed(name: str, data: bytes = b"") -> Damage:
    """Only this file of weights is there."""
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if name:
            (folder / name).write_bytes(data)

    return damage


def index(*files: str) -> Damage:
    named = json.dumps({"weight_map": {f"t{i}": file for i, file in enumerate(files)}}).encode()
    return renamed("model.safetensors.index.json", named)


def begins(data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(data + path.read_bytes()[len(data):])

    return damage


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no such folder", "nothing is fetched")),
    "a file": (a_file, ("no such folder",)),
    "an empty folder": (empty, ("neither", "nothing")),
    "something else": (lambda p: (p / "config.json").unlink(), ("neither a run", "model.safetensors")),
    "no weights": (renamed(""), ("model.safetensors", "missing")),
    "pickles": (renamed("pytorch_model.bin", b"PK"), ("pytorch_model.bin", "safe_serialization")),
    "an adapter": (renamed("adapter_config.json", b"{}"), ("PEFT",)),
    "another shape": (config(intermediate_size=64), ("mlp.gate_proj", "(48, 32)", "(64, 32)")),
    "a layer too few": (config(num_hidden_layers=3), ("3 layers", "weights have 2")),
    "a tensor too few": (tensors(lambda t: t.pop(Q)), ("1 tensors are missing", Q.removeprefix("model."))),
    "a tensor of another shape": (tensors(lambda t: t.update({Q: torch.zeros(5, 5)})), (Q, "(5, 5)", "(32, 32)")),
    "fewer bits": (tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), ("I8", "bfloat16")),
    "another kind": (config(model_type="mamba"), ("model_type", "mamba", "qwen3")),
    "no kind": (config(model_type=None), ("model_type", "llama")),
    "a config of a list": (lambda p: (p / "config.json").write_text("[]"), ("config.json", "object")),
    "a config that is none": (lambda p: (p / "config.json").write_text("{"), ("config.json", "JSON")),
    "a deep config": (lambda p: (p / "config.json").write_text("[" * 200_000), ("config.json", "JSON")),
    "a huge config": (lambda p: os.truncate(p / "config.json", 1 << 30), ("config.json", "bytes")),
    "absurd layers": (config(num_hidden_layers=10**15), ("num_hidden_layers",)),
    "absurd width": (config(hidden_size=10**6, head_dim=10**6), ("sizes cannot be",)),
    "a width of text": (config(hidden_size="wide"), ("hidden_size", "'wide'")),
    "no heads": (config(num_attention_heads=0), ("num_attention_heads",)),
    "other rotation": (config(rope_parameters={"rope_type": "yarn"}), ("rope_parameters", "yarn")),
    "cut in half": (lambda p: os.truncate(p / "model.safetensors", 9000), ("safetensors", "again")),
    "an empty file": (lambda p: os.truncate(p / "model.safetensors", 0), ("safetensors", "again")),
    "a header of 2^60 bytes": (begins((1 << 60).to_bytes(8, "little")), ("header of",)),
    "a header of noise": (begins((64).to_bytes(8, "little") + b"\xff" * 64), ("safetensors", "again")),
    "an index elsewhere": (index("../../etc/model.safetensors"), ("index.json", "no files of this folder")),
    "an absolute index": (index("/etc/passwd"), ("index.json", "no files of this folder")),
    "an index of nothing": (renamed("model.safetensors.index.json", b'{"weight_map": 5}'), ("index.json",)),
    "a part is missing": (index("model-00001-of-00002.safetensors"), ("1 of 1 weight files are missing",)),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ("tokenizer.json", "save_pretrained")),
    "a tokenizer of noise": (lambda p: (p / "tokenizer.json").write_text('{"model": 7}'), ("tokenizer.json",)),
    "a larger tokenizer": (lambda p: KINDS["qwen"][0]().save(str(p / "tokenizer.json")),
                           ("ids, the weights 290 embeddings",)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make, names = KINDS["llama"]
    shape = {**peers.SIZES, "vocab_size": 290}
    peers.write(folder, peers.peer("Llama", "CausalLM", **shape), make(), **names)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_one_message_and_nothing_left_behind(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "weights")
    (tmp_path / "story.txt").write_text("".join(f"the room {i}\n" for i in range(200)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    damage, told = BROKEN[name]
    damage(tmp_path / "weights")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["train", "r.yaml"])
    out, err = capsys.readouterr()
    assert left.value.code == 2, (out, err)
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines) and len(lines) <= 10, err
    assert [words for words in told if words not in err] == [], err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_whole_folder_is_right(whole: Path) -> None:
    assert open_origin(whole).codec().vocab_size == 290


@pytest.mark.parametrize("arguments, told", [
    (["runs/none"], "no such run folder"),
    (["whole"], "is not a run folder"),
    (["whole", "--to", "onnx"], "hf"),
])
def test_broken_exports(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "en")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["export", *arguments])
    assert left.value.code == 2 and told in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
