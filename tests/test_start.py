"""`model.from`: sizes, codec and weights come from a run; what does not fit is refused; resumed is never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multihead import build, prepare, task
from multihead import recipe as recipes
from multihead.build import Run, open_run
from multihead.errors import UserError
from multihead.generation.seq2seq import EncoderDecoder
from multihead.run import RunFolder
from multihead.runtime import checkpoint
from multihead.train import train
from multihead.weights import open_origin
from tests.trainers import fit_until, trainer

GOOD, BAD = "房间干净，服务很好。", "太吵了，早餐也很差。"
TRAIN = {"steps": 6, "batch_size": 8, "eval_every": 3, "save_every": 2, "log_every": 1, "threads": 1, "lr": 1e-3,
         "precision": "float32"}  # fmt: skip
PLAIN = {"wide": [], "guess": 0, "hidden": 0, "head_dropout": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and two runs to start from: an encoder (fill-mask) and a decoder (text-generation)."""
    home = tmp_path_factory.mktemp("home")
    rows = [{"text": f"{i}{GOOD if i % 2 else BAD}{i * 7}", "label": "好" if i % 2 else "差"} for i in range(60)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 2, "max_length": 64, "activation": "gelu", "ngrams": []}
    for name, kind in (("encoder", "fill-mask"), ("decoder", "text-generation")):
        options = {"context": 24} | ({"tokenizer": "char"} if name == "decoder" else {})
        path = written(home / f"{name}.yaml", task=kind, options=options, model=shape)
        train(path, run=home / name, progress=False)
    return home


def written(path: Path, **sections: Any) -> Path:
    values = {"name": path.stem, "data": {"train": "rows.jsonl"}, "train": TRAIN, "evaluate": {"bootstrap": 0}}
    path.write_text(yaml.safe_dump({**values, **sections}, allow_unicode=True), "utf-8")
    return path


def classifier(home: Path, name: str = "labels", model: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe of text-classification that starts from the encoder."""
    what = {"task": "text-classification", "options": PLAIN, "model": {"from": "encoder", **(model or {})}}
    return written(home / f"{name}.yaml", **{**what, **sections})


def load(path: Path, *overrides: str) -> recipes.Recipe:
    return recipes.load(path, overrides, find=task.find)


def faults(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return {p.where: p.message for p in caught.value.problems}


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_origin_and_not_from_the_tasks_defaults(home: Path) -> None:
    model = load(classifier(home)).model
    assert (model.d_model, model.num_layers, model.num_heads, model.max_length) == (16, 2, 2, 64)
    assert model.ngrams == () and model.activation == "gelu"
    assert model.from_ == str(home / "encoder") and model.lora is None


def test_a_recipe_that_contradicts_the_origin_is_refused_at_each_line(home: Path) -> None:
    path = classifier(home)
    text = path.read_text("utf-8").replace("  from: encoder\n", "  from: encoder\n  d_model: 32\n  dropout: 0.3\n"
                                           "  num_heads: 2\n  d_head: 8\n  max_length: 128\n  norm: rmsnorm\n")
    path = home / "contradicts.yaml"
    path.write_text(text, "utf-8")
    line = text.splitlines().index("  d_model: 32") + 1
    found = faults(path)
    assert set(found) == {f"{path}:{line}", f"{path}:{line + 5}"}  # what agrees, dropout and rotary length may stand
    assert f"model.d_model is 32, but {home / 'encoder'} has 16" in found[f"{path}:{line}"]
    assert "command line, model.num_layers=3" in faults(classifier(home), "model.num_layers=3")


def test_a_resolved_recipe_reads_back_the_same_and_needs_no_origin(home: Path, tmp_path: Path) -> None:
    path = classifier(home, model={"lora": {"rank": 4, "targets": ["attention", "feed_forward"]}, "dropout": 0.1})
    made = load(path)
    (tmp_path / "recipe.yaml").write_text(made.dump(), "utf-8")
    assert load(tmp_path / "recipe.yaml") == made
    gone = made.dump().replace(str(home / "encoder"), str(home / "gone"))
    (tmp_path / "recipe.yaml").write_text(gone, "utf-8")
    settled = recipes.load(tmp_path / "recipe.yaml", find=task.find, settled=True)
    assert settled.plain()["model"] == {**made.plain()["model"], "from": str(home / "gone")}
    assert made.model.lora is not None and made.model.lora.alpha == 16


@pytest.mark.parametrize(("model", "key", "words"), [
    ({"from": "nowhere"}, "from", ["model.from", "nowhere"]),
    ({"from": "rows.jsonl"}, "from", ["model.from", "rows.jsonl"]),
    ({"from": "empty"}, "from", ["model.from", "empty"]),
    ({"from": "untrained"}, "from", ["model.from", "trained"]),
    ({"from": 5}, "from", ["model.from is 5", "text"]),
    ({"from": "${NO_SUCH_PLACE}/x"}, "from", ["NO_SUCH_PLACE"]),
    ({"from": "encoder", "lora": {"rank": 0}}, "rank", ["model.lora.rank is 0", "≥ 1"]),
    ({"from": "encoder", "lora": {"targets": ["atention"]}}, "targets", ["did you mean 'attention'"]),
    ({"from": "encoder", "lora": {"targets": []}}, "targets", ["model.lora.targets"]),
    ({"from": "encoder", "lora": {"ranks": 4}}, "ranks", ["unknown key 'model.lora.ranks'", "'rank'", "alpha"]),
    ({"from": "encoder", "lora": 4}, "lora", ["model.lora is 4", "a section of keys"]),
    ({"lora": {"rank": 4}}, "lora", ["lora adapts weights", "`from:`"]),
    ({"frm": "encoder"}, "frm", ["unknown key 'model.frm'", "did you mean 'from'"]),
])  # fmt: skip
def test_broken_starts_are_told_at_their_line(home: Path, model: dict[str, Any], key: str, words: list[str]) -> None:
    (home / "empty").mkdir(exist_ok=True)
    RunFolder.create(home / "untrained").write_atomic("recipe.yaml", load(classifier(home)).dump())
    path = written(home / "broken.yaml", task="text-classification", options=PLAIN, model=model)
    lines = path.read_text("utf-8").splitlines()
    at = next(i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
    (where, message), *more = faults(path).items()
    assert not more and where in (f"{path}:{at}", f"{path}:{at + 1}")  # a list's item stands a line below its key
    assert all(word in message for word in words), message


def test_no_steps_only_with_weights_to_start_from(home: Path) -> None:
    assert load(classifier(home), "train.steps=0").train.steps == 0
    found = faults(written(home / "zero.yaml", task="text-classification", options=PLAIN), "train.steps=0")
    assert "≥ 1" in found["command line, train.steps=0"]


# -- weights -----------------------------------------------------------------------------------------------------------


def test_input_and_trunk_are_the_origins_bit_for_bit_and_the_rest_is_new(home: Path, tmp_path: Path) -> None:
    begun = trainer(classifier(home), tmp_path / "run")
    origin = checkpoint.load_weights(home / "encoder" / "model.safetensors")
    own = checkpoint.model_tensors(begun.model)
    assert all(torch.equal(own[name], origin[name]) for name in own if name.startswith(("input.", "trunk.")))
    told = str(begun.taken)
    held = sum(v.numel() for k, v in origin.items() if k.startswith("input."))
    assert f"input {held:,}" in told and "new: head" in told and "not used: head" in told
    other = trainer(classifier(home), tmp_path / "other")
    theirs = Run(RunFolder.open(home / "encoder")).task.codec
    assert begun.task.codec.encode(GOOD).tolist() == theirs.encode(GOOD).tolist()
    assert torch.equal(own["head.linear.weight"], checkpoint.model_tensors(other.model)["head.linear.weight"])


def test_a_head_that_fits_is_taken_too(home: Path, tmp_path: Path) -> None:
    path = written(home / "again.yaml", task="text-generation", options={"context": 24}, model={"from": "decoder"})
    run = train(path, ["train.steps=0"], run=tmp_path / "run", progress=False)
    before = open_run(home / "decoder").predict(["房间"], max_tokens=8, temperature=0)
    assert run.predict(["房间"], max_tokens=8, temperature=0) == before
    assert Run(RunFolder.open(tmp_path / "run")).recipe.train.steps == 0
    saved, _ = checkpoint.latest(tmp_path / "run")
    assert saved is not None and saved.step == 0 and saved.meta["done"]
    train(path, ["train.steps=0"], run=tmp_path / "run", progress=False)  # is already trained


@pytest.mark.parametrize("shared", [True, False])
def test_of_an_encoder_decoder_the_reading_side_starts_from_an_encoder(home: Path, shared: bool) -> None:
    origin = open_origin(home / "encoder")
    tensors = origin.tensors()
    model = EncoderDecoder(load(classifier(home)).model, origin.vocab_size, shared=shared)
    told = str(build.take(model, origin))
    assert torch.equal(model.source.token.weight, tensors["input.token.weight"])
    name = "blocks.1.attention.qkv.weight"
    assert torch.equal(model.encoder.state_dict()[name], tensors[f"trunk.{name}"])
    assert not torch.equal(model.decoder.state_dict()[name], tensors[f"trunk.{name}"])
    assert "source " in told and "encoder " in told and "new: " in told and "decoder " in told
    with pytest.raises(UserError, match="both directions"):
        build.take(model, open_origin(home / "decoder"))


def test_directions_and_shapes_that_do_not_fit_are_refused(home: Path, tmp_path: Path) -> None:
    path = classifier(home, "backwards", {"from": "decoder"})
    with pytest.raises(UserError, match="both directions"):
        train(path, run=tmp_path / "a", progress=False)
    path = written(home / "forwards.yaml", task="text-generation", options={"context": 24}, model={"from": "encoder"})
    with pytest.raises(UserError, match="word by word"):
        train(path, run=tmp_path / "b", progress=False)
    begun = trainer(classifier(home), tmp_path / "c")
    other = begun.task.model(load(classifier(home)).model)
    other.input.token = torch.nn.Embedding(7, 16)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"input.token.weight is \(\d+, 16\) there and \(7, 16\)"):
        build.take(other, begun.task.origin)
    with pytest.raises(UserError, match="`input` and `trunk`"):
        build.take(torch.nn.Linear(2, 2), begun.task.origin)


def test_what_cannot_be_built_is_known_before_rows_are_encoded(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_tokens is 99, beyond model.max_length 64"):
        train(classifier(home), ["options.max_tokens=99", "model.max_length=64"], run=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    wish = "train.early_stop={metric: acuracy}"
    with pytest.raises(UserError, match=r"'acuracy'; this task reports: .*accuracy"):
        train(classifier(home), [wish], run=tmp_path / "other", progress=False)
    assert not list((tmp_path / "other").glob("checkpoints/*"))


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wishes", [[], ["model.lora={rank: 2, dropout: 0.1, targets: [all]}", "train.ema=0.9"]])
def test_resumed_is_never_stopped(home: Path, tmp_path: Path, wishes: list[str]) -> None:
    wishes = [*wishes, "model.dropout=0.2", "train.optimizer=muon"]
    path = classifier(home)
    train(path, wishes, run=tmp_path / "whole", progress=False)
    cut = trainer(path, tmp_path / "cut", *wishes)
    fit_until(cut, 3)
    train(path, wishes, run=tmp_path / "cut", progress=False)
    for name in ("model.safetensors", "checkpoints/step-00000006/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_run_with_lora_trains_little_and_leaves_plain_weights_and_an_adapter(home: Path, tmp_path: Path) -> None:
    wishes = ["model.lora={rank: 2, targets: [all]}", "train.lr=0.01"]
    begun = trainer(classifier(home), tmp_path / "run", *wishes)
    head = sum(p.numel() for p in begun.model.head.parameters())  # type: ignore[union-attr]
    # Each map of inputs I and outputs O gets 2·(I + O): qkv 16→48, out 16→16, up 16→64, down 64→16; two blocks.
    small = 2 * 2 * (64 + 32 + 80 + 80)
    assert build.trainable(begun.model).startswith(f"{small + head:,} of ")
    begun.fit()
    run, origin = open_run(tmp_path / "run"), checkpoint.load_weights(home / "encoder" / "model.safetensors")
    own = checkpoint.model_tensors(run.model)
    assert not any("lora" in name for name in own)
    for name in own:
        if name.startswith(("input.", "trunk.")):
            adapted = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
            assert torch.equal(own[name], origin[name]) != adapted
    saved = checkpoint.load_weights(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.trunk.blocks.0.attention.qkv.lora_{}.weight"
    added = 8 * saved[key.format("B")] @ saved[key.format("A")]  # alpha 16 over rank 2
    weight = "trunk.blocks.0.attention.qkv.weight"
    torch.testing.assert_close(own[weight], origin[weight] + added)
    assert run.recipe.model.lora is not None and run.predict([GOOD])[0]["label"] in ("好", "差")


def test_an_origin_that_changed_is_noticed_and_one_that_is_gone_is_not_needed(home: Path, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(home / "encoder", origin)
    path = classifier(home, "moved", {"from": str(origin)})
    wishes = ["model.lora={rank: 2}"]
    prepare.run_step(path, wishes, tmp_path / "run")
    weights = checkpoint.load_weights(origin / "model.safetensors")
    checkpoint.save_weights(origin / "model.safetensors", {k: v + 1 for k, v in weights.items()})
    run = train(path, wishes, run=tmp_path / "run", progress=False)  # nothing was trained yet: prepared again
    answers = run.predict([GOOD, BAD])
    checkpoint.save_weights(origin / "model.safetensors", weights)
    with pytest.raises(UserError, match=r"weights that `model.from` names.*origin"):
        train(path, wishes, run=tmp_path / "run", progress=False)
    shutil.rmtree(origin)
    assert open_run(tmp_path / "run").predict([GOOD, BAD]) == answers
    with pytest.raises(UserError, match=r"very run"):
        train(classifier(home, "self", {"from": str(tmp_path / "run")}), run=tmp_path / "run", progress=False)


def test_another_origin_prepares_again_and_a_trained_run_refuses_it(home: Path, tmp_path: Path) -> None:
    path = written(home / "scratch.yaml", task="text-classification", options=PLAIN, model={"max_length": 64})
    prepare.run_step(path, [], tmp_path / "run")
    run = train(classifier(home), ["name=scratch"], run=tmp_path / "run", progress=False)
    assert run.task.codec.vocab_size == Run(RunFolder.open(home / "encoder")).task.codec.vocab_size
    with pytest.raises(UserError, match=r"model.from: .*encoder → null"):
        train(path, run=tmp_path / "run", progress=False)
