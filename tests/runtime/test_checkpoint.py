"""Checkpoints: exact round trips, the newest whole one found whatever happened to the others, resuming bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from multihead.errors import UserError
from multihead.runtime import checkpoint, optim


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def fill(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"w": torch.randn(30, 20), "b": torch.randn(20).bfloat16(), "n": torch.tensor(seed), "e": torch.empty(0, 3)}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def test_weights_file_is_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    tensors = {
        **fill(0), "half": torch.randn(3).half(), "flag": torch.tensor([True, False]), "t": torch.randn(4, 6).T,
        "small": torch.arange(5, dtype=torch.int8), "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, tensors, {"task": "文本"})
    theirs = load_file(path)
    assert checkpoint.tensors_hash(theirs) == checkpoint.tensors_hash(tensors)
    assert checkpoint.tensors_hash(checkpoint.load_weights(path)) == checkpoint.tensors_hash(tensors)
    assert checkpoint.read_metadata(path) == {"task": "文本"}
    save_file({"w": tensors["w"]}, path)
    assert equal(checkpoint.load_weights(path), {"w": tensors["w"]})
    with pytest.raises(TypeError, match="c: safetensors has no"):
        checkpoint.save_weights(path, {"c": torch.zeros(2, dtype=torch.complex128)})


def test_broken_weights_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, fill(1))
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:4], b"", b"\xff" * 40, whole[:-9] + bytes([whole[-9] ^ 16]) + whole[-8:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"model\.safetensors: (is not a whole|was altered)"):
            checkpoint.load_weights(path)
    path.unlink()
    with pytest.raises(UserError, match="no such weights"):
        checkpoint.load_weights(path)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    nn.init.normal_(model.norm.get_buffer("running_mean"))
    checkpoint.save_weights(tmp_path / "m", model)
    names = set(checkpoint.load_weights(tmp_path / "m"))
    assert names == set(model.state_dict()) - {"head.weight"}
    checkpoint.load_model(other, checkpoint.load_weights(tmp_path / "m"))
    assert equal(model.state_dict(), other.state_dict())
    assert other.head.weight is other.embed.weight
    both = {k: v.clone() for k, v in model.state_dict().items()}  # as other libraries write it
    checkpoint.load_model(Tied(), both)
    del both["embed.weight"]
    checkpoint.load_model(Tied(), both)
    both["embed.weight"] = both["head.weight"] + 1
    with pytest.raises(UserError, match="one weight in this model"):
        checkpoint.load_model(Tied(), both)


def test_wrong_weights_are_all_named_at_once() -> None:
    given_ = {**checkpoint.model_tensors(Tied()), "extra": torch.zeros(2), "embed.weight": torch.zeros(8, 4)}
    del given_["norm.bias"]
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(Tied(), given_, where="m.safetensors")
    text = str(caught.value)
    assert "embed.weight is (8, 4) in the file, (7, 4) in the model" in text
    assert "norm.bias (4,) is missing" in text and "extra (2,) does not exist" in text
    assert len(caught.value.problems) == 4


tensor = st.builds(torch.full, st.just((2,)), st.floats(width=32))
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensor
tree = st.recursive(
    leaf, lambda t: st.lists(t) | st.lists(t).map(tuple) | st.dictionaries(st.text() | st.integers() | st.booleans(), t)
)


@settings(max_examples=100, deadline=None)
@given(tree)
def test_any_nested_state_survives_json_and_safetensors(state: object) -> None:
    tensors, rest = checkpoint.flatten({"all": state})
    back = checkpoint.unflatten(tensors, json.loads(json.dumps(rest)))["all"]

    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and torch.equal(a.view(torch.int32), b.view(torch.int32))
        if isinstance(a, dict):
            return isinstance(b, dict) and [*map(repr, a)] == [*map(repr, b)] and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return repr(a) == repr(b)

    assert same(state, back)


def test_flatten_names_what_it_cannot_save() -> None:
    with pytest.raises(TypeError, match=r"a\.1: cannot save a set"):
        checkpoint.flatten({"a": [1, {2}]})


def test_save_keeps_the_newest_and_latest_reads_it(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, {"model": fill(step), "ema": fill(step + 1)}, {"名": step / 3}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000030"]
    found, messages = checkpoint.latest(tmp_path)
    assert found is not None and messages == []
    assert (found.step, found.meta, found.groups) == (30, {"名": 10.0}, ("model", "ema"))
    assert equal(found.tensors("ema"), fill(31))
    with pytest.raises(KeyError):
        found.tensors("optimizer")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated": truncate, "flipped": flip, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink,
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoint_is_skipped_and_said(tmp_path: Path, fault: str, file: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": fill(step)}, {})
    newest = tmp_path / "checkpoints" / "step-00000002"
    FAULTS[fault](newest / file)
    found, messages = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1 and equal(found.tensors("model"), fill(1))
    assert len(messages) == 1 and "step-00000002" in messages[0] and file in messages[0]
    checkpoint.save(tmp_path, 2, {"model": fill(2)}, {})  # the run gets there again
    found, messages = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 2 and messages == []
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-00000001", "step-00000002"]


def test_broken_ones_do_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"model": fill(step)}, {}, keep=3)
    truncate(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    checkpoint.save(tmp_path, 2, {"model": fill(2)}, {}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path: Path) -> None:
    final = checkpoint.save(tmp_path, 5, {"model": fill(5)}, {})
    aside = final.with_name(final.name + ".old")
    final.rename(aside)  # killed between the two renames
    found, messages = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5 and messages == []
    checkpoint.save(tmp_path, 5, {"model": fill(6)}, {})
    shutil.copytree(final, aside)  # killed before the old one was removed
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None and found.path == final
    checkpoint.save(tmp_path, 5, {"model": fill(7)}, {})
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None and equal(found.tensors("model"), fill(7)) and not aside.exists()


def test_full_disk_leaves_the_earlier_checkpoint_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"model": fill(1)}, {})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(UserError, match=r"the checkpoint of step 2 .*earlier checkpoint of step 1 is whole"):
            checkpoint.save(tmp_path, 2, {"model": fill(2)}, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found, messages = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1 and messages == []


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_training_resumed_from_a_checkpoint_equals_training_not_stopped(tmp_path: Path, kind: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, optim.EMA]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 9))
        hidden: Any = model[1].weight
        hidden.muon_split = 3
        return model, optim.build(model, optimizer=kind, lr=0.01, weight_decay=0.1), optim.EMA(model, 0.9)

    def train(parts: tuple[nn.Module, torch.optim.Optimizer, optim.EMA], steps: range) -> None:
        model, optimizer, ema = parts
        for step in steps:
            optim.set_lr(optimizer, optim.lr_scale(step, steps=12, warmup=3))
            ids = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(ids).logsumexp(-1).sum().backward()
            optim.clip(model.parameters(), 1.0, 1 / 24)
            optimizer.step()
            ema.update()

    whole = start()
    train(whole, range(12))
    model, optimizer, ema = first = start()
    train(first, range(5))
    tensors, rest = checkpoint.flatten(optimizer.state_dict())
    groups = {"model": checkpoint.model_tensors(model), "ema": ema.tensors(), "optimizer": tensors}
    checkpoint.save(tmp_path, 5, groups, {"optimizer": rest, "updates": ema.updates})
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    model, optimizer, ema = second = start()
    checkpoint.load_model(model, found.tensors("model"))
    optimizer.load_state_dict(checkpoint.unflatten(found.tensors("optimizer"), found.meta["optimizer"]))
    ema.load(found.tensors("ema"), found.meta["updates"])
    train(second, range(5, 12))
    assert equal(whole[0].state_dict(), model.state_dict())
    assert equal(whole[2].tensors(), ema.tensors())
    assert equal(*(checkpoint.flatten(o.state_dict())[0] for o in (whole[1], optimizer)))
