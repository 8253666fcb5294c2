"""What every task must keep, written once. `test_contract.py` walks ``tasks/``; a task of your own can use it too:

from tests.contract import Contract
class TestMine(Contract):
    name = "/home/me/mine.py"
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import costing, evaluate, prepare, task
from multihead import recipe as recipes
from multihead.data import audio, images, video
from multihead.data.store import Store
from multihead.run import RunFolder
from multihead.runtime import checkpoint, device
from multihead.runtime.shadow import Shadow, Watch
from multihead.train import Trainer, train

TINY = Path(__file__).resolve().parent.parent / "recipes" / "tiny"
WORDS = [
    "房间",
    "很干净",
    "不错",
    "太差",
    "服务",
    "早餐",
    "good",
    "bad",
    "the room",
    "quiet",
    "noisy",
    "🍜",
    "价格",
    "位置",
]
ITEMS = 40
LETTERS = "abc好"


def value(kind: str, rng: np.random.Generator, i: int) -> Any:
    """A value for a column of `kind`: text, label, labels, id, ids, time, image or number."""
    if kind == "text":
        return "".join(rng.choice(WORDS, size=int(rng.integers(20, 60)))) + str(i)
    if kind == "label":
        return ["好", "bad", "无所谓"][i % 3]
    if kind == "labels":
        return sorted({["a", "b", "c"][i % 3], ["a", "b", "c"][(i // 3) % 3]})
    if kind == "ids":
        return [str(n) for n in rng.integers(ITEMS, size=int(rng.integers(1, 5)))]
    if kind == "time":
        return 1_700_000_000 + i
    if kind == "image":
        grey = rng.integers(256, size=(20, 16), dtype=np.uint8)
        grey[:, : i % 3 * 5] = 0  # so that labels, which come by threes, can be told apart
        return images.to_uri(b"P5 16 20 255\n" + grey.tobytes())[0]
    if kind == "video":
        return clip(i % 3, rng)
    if kind == "audio":
        return tones("abc"[i % 3], rng)
    return str(i) if kind == "id" else float(rng.normal())


def clip(turn: int, rng: np.random.Generator) -> str:
    """A GIF of six frames in which a bright bar lies still, or moves down or up: labels that come by threes."""
    from PIL import Image

    frames = []
    for i in range(6):
        grey = rng.integers(100, size=(18, 16), dtype=np.uint8)
        grey[(np.arange(6) + 3 * (0, i, -i)[turn]) % 18] = 255
        frames.append(Image.fromarray(grey))
    with io.BytesIO() as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
        return video.to_uri(file.getvalue())[0]


def tones(text: str, rng: np.random.Generator) -> str:
    """A recording of a tone for every letter, on some noise."""
    second = np.arange(960) / 8000
    parts = [np.sin(2 * np.pi * (300 + 400 * LETTERS.index(letter)) * second) for letter in text]
    wave = np.concatenate([np.pad(part, 120) for part in parts]) * 8000 + rng.normal(0, 50, 1200 * len(text))
    size = 2 * len(wave)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16,
                       b"data", size)  # fmt: skip
    return audio.to_uri(head + wave.astype("<i2").tobytes())[0]


def sample_lines(kind: type[task.Task], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What a file of the task's data holds: its rows, or where rows are gathered from events, events of some users."""
    if not kind.events:
        return sample_rows(kind, count, seed)
    rng = np.random.default_rng(seed)
    lines = [{column.name: value(column.kind, rng, i) for column in kind.events} for i in range(count)]
    for i, line in enumerate(lines):
        line |= {"user": str(i % 12), "item": str(rng.integers(ITEMS))}
    return lines


def sample_rows(kind: type[task.Task], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a value in every column the task declares."""
    rng = np.random.default_rng(seed)
    rows = [{column.name: value(column.kind, rng, i) for column in kind.columns} for i in range(count)]
    for column in kind.columns:
        if column.kind == "answers":
            *_, passage = (c.name for c in kind.columns if c.kind == "text")
            for row in rows:
                start = int(rng.integers(0, 40))
                row[column.name] = [{"text": row[passage][start : start + 6].strip(), "answer_start": start}]
        if column.kind == "audio":
            spoken = next((c.name for c in kind.columns if c.kind == "text"), None)
            for row in rows if spoken else ():
                row[spoken] = "".join(rng.choice(list(LETTERS), size=int(rng.integers(1, 4))))
                row[column.name] = tones(row[spoken], rng)
    return rows


class Contract:
    """Subclass it, set `name`, and pytest runs every promise of the design against that task."""

    name: str

    @pytest.fixture
    def recipe_path(self, tmp_path: Path) -> Path:
        """A tiny recipe of the task on rows made up from its columns: the shipped one's sizes where there is one."""
        rows = sample_lines(task.find(self.name), 60)
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        shipped = TINY / f"{self.name}.yaml"
        values = yaml.safe_load(shipped.read_text("utf-8")) if shipped.is_file() else {}
        values |= {"task": self.name, "name": "contract", "data": {"train": str(data)}}
        values["model"] = {**values.get("model", {}), "d_model": 32, "num_layers": 2, "num_heads": 2}
        values["train"] = {
            "steps": 6,
            "batch_size": 8,
            "eval_every": 3,
            "save_every": 2,
            "log_every": 1,
            "threads": 1,
            "precision": "float32",
            "optimizer": values.get("train", {}).get("optimizer", "adamw"),
        }
        values["evaluate"] = {"bootstrap": 20}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
        return path

    def _prepared(self, path: Path, where: Path, *overrides: str) -> tuple[recipes.Recipe, task.Task, RunFolder]:
        recipe = recipes.load(path, overrides, find=task.find)
        made = prepare.make_task(recipe, path.parent)
        folder = RunFolder.create(where)
        prepare.prepare(recipe, made, folder)
        return recipe, made, folder

    def _trainer(self, path: Path, where: Path, *overrides: str) -> Trainer:
        recipe, made, folder = self._prepared(path, where, *overrides)
        return Trainer(recipe, made, folder, progress=False)

    def _batch(self, trainer: Trainer, indices: Sequence[int]) -> dict[str, Any]:
        """A batch as the training loader gives it, noise included."""
        chosen = [i for i in indices if i < len(trainer.examples)]
        return trainer._batch(0, np.array(chosen), 0)

    def test_encode_declares_one_shape(self, recipe_path: Path, tmp_path: Path) -> None:
        _, made, _ = self._prepared(recipe_path, tmp_path / "run")
        examples = [made.encode(row) for row in sample_rows(type(made), 9, seed=1)]
        first = examples[0]
        for example in examples:
            assert {k: (v.dtype, v.ndim, v.shape[1:]) for k, v in example.items()} == {
                k: (v.dtype, v.ndim, v.shape[1:]) for k, v in first.items()
            }
        assert all(len(tensor) == 9 for tensor in made.collate(examples).values())

    def test_a_gradient_reaches_every_parameter(self, recipe_path: Path, tmp_path: Path) -> None:
        trainer = self._trainer(recipe_path, tmp_path / "run")
        trainer.model.eval()
        trainer.task.loss(trainer.model, self._batch(trainer, range(8))).total.backward()
        assert [n for n, p in trainer.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_what_a_step_costs_is_counted_without_numbers(self, recipe_path: Path, tmp_path: Path) -> None:
        recipe, made, folder = self._prepared(recipe_path, tmp_path / "run", "model.dropout=0.1")
        store = Store(folder.file("data/train"))
        told, seen = (costing.step_cost(made, recipe, store, watch) for watch in (Shadow(), Watch()))
        assert told.flops == seen.flops > 0 and told.count == seen.count and told.parts == seen.parts
        for name in ("weights", "gradients", "optimizer", "activations", "peak"):
            assert getattr(told, name) == pytest.approx(getattr(seen, name), rel=0.03), name

    def test_accumulated_gradients_are_those_of_the_whole_batch(self, recipe_path: Path, tmp_path: Path) -> None:
        whole = self._trainer(recipe_path, tmp_path / "a", "model.dropout=0")
        parts = self._trainer(recipe_path, tmp_path / "b", "model.dropout=0", "train.micro_batch=2")
        for name, trainer in (("whole", whole), ("parts", parts)):
            trainer.model.eval()  # no dropout: its noise may differ, the sums may not
            loss = trainer._update(0)[0]
            assert np.isfinite(loss), name
        for (name, a), (_, b) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)

    def test_threads_side_by_side_do_what_one_does_in_turn(self, recipe_path: Path, tmp_path: Path) -> None:
        """To the bit, noise included."""
        wish = ("model.dropout=0.1", "train.batch_size=8", "train.micro_batch=4")
        alone = self._trainer(recipe_path, tmp_path / "a", *wish)
        together = self._trainer(recipe_path, tmp_path / "b", *wish, "train.side_by_side=2")
        assert together.stepper.side_by_side is not None and alone.stepper.side_by_side is None
        torch.set_num_threads(1)  # what is not side by side is to have as many cores in both
        for step in range(2):
            assert alone._update(step)[:3] == together._update(step)[:3]
            weights = zip(alone.model.named_parameters(), together.model.parameters(), strict=True)
            for (name, a), b in weights:
                assert a.grad is not None and b.grad is not None
                assert torch.equal(a.grad.to_dense(), b.grad.to_dense()), name

    def test_eight_rows_can_be_overfitted(self, recipe_path: Path, tmp_path: Path) -> None:
        plain = ["options.label_smoothing=0"] if "label_smoothing" in task.find(self.name).Options.model_fields else []
        trainer = self._trainer(
            recipe_path,
            tmp_path / "run",
            "train.steps=150",
            "train.decay=constant",
            "train.lr=0.005",
            "train.weight_decay=0",
            *plain,
        )
        model, made = trainer.model.eval(), trainer.task
        batch = self._batch(trainer, range(8))
        losses = []
        for _ in range(150):
            trainer.optimizer.zero_grad()
            loss = made.loss(model, batch)
            (loss.total / loss.count).backward()
            trainer.optimizer.step()
            losses.append(float(loss.total.detach()) / int(loss.count))
        assert losses[-1] < 0.15 * losses[0]

    def test_codecs_and_weights_come_back_bit_for_bit(self, recipe_path: Path, tmp_path: Path) -> None:
        trainer = self._trainer(recipe_path, tmp_path / "run")
        made = trainer.task
        again = type(made)(made.options, seed=made.seed)
        again.load(tmp_path / "run" / "codec")
        for row in sample_rows(type(made), 5, seed=2):
            one, two = made.encode(row), again.encode(row)
            assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
        checkpoint.save_weights(tmp_path / "w.safetensors", trainer.model, {})
        other = again.model(trainer.recipe.model)
        checkpoint.load_model(other, checkpoint.load_weights(tmp_path / "w.safetensors"))
        batch = self._batch(trainer, range(4))
        device.seed_step(0, 0)
        a = made.loss(trainer.model.eval(), batch).total
        device.seed_step(0, 0)
        assert torch.equal(a, again.loss(other.eval(), batch).total)

    def test_resumed_equals_never_stopped(self, recipe_path: Path, tmp_path: Path) -> None:
        whole = train(recipe_path, ["model.dropout=0.1"], run=tmp_path / "whole", progress=False)
        trainer = self._trainer(recipe_path, tmp_path / "cut", "model.dropout=0.1")
        trainer.caught.append(15)  # as if SIGTERM had come during the first step
        with pytest.raises(Exception, match="SIGTERM"):
            trainer.fit()
        assert trainer.step == 1
        cut = train(recipe_path, ["model.dropout=0.1"], run=tmp_path / "cut", progress=False)
        for name in (
            "model.safetensors",
            "checkpoints/step-00000006/model.safetensors",
            "checkpoints/step-00000006/optimizer.safetensors",
        ):
            assert (whole.path / name).read_bytes() == (cut.path / name).read_bytes(), name

    def test_prepared_twice_is_the_same_bytes(self, recipe_path: Path, tmp_path: Path) -> None:
        for where in ("a", "b"):
            self._prepared(recipe_path, tmp_path / where)
        files = [
            sorted(p.relative_to(tmp_path / w) for p in (tmp_path / w).rglob("*") if p.is_file()) for w in ("a", "b")
        ]
        assert files[0] == files[1] and len(files[0]) > 5
        for name in files[0]:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name

    def test_answers_in_a_batch_are_those_one_by_one(self, recipe_path: Path, tmp_path: Path) -> None:
        trainer = self._trainer(recipe_path, tmp_path / "run")
        examples = trainer.valid
        assert examples is not None
        together = evaluate.answers(trainer.task, trainer.model, examples, batch_size=64)
        alone = evaluate.answers(trainer.task, trainer.model, examples, batch_size=1)
        assert len(together) == len(examples)
        for a, b in zip(together, alone, strict=True):
            same(a, b)

    def test_the_served_answer_is_the_predicted_one(self, recipe_path: Path, tmp_path: Path) -> None:
        testclient = pytest.importorskip("fastapi.testclient")
        from multihead.serve.app import Served, create_app

        run = train(recipe_path, run=tmp_path / "run", progress=False)
        rows = sample_rows(type(run.task), 3, seed=3)
        row = run.task.sample(rows[0])
        ask = {"max_tokens": 5, "temperature": 0.0} if run.task.emits else {}
        app = create_app([Served(name="contract", task=run.task, model=run.model)], run.recipe.serve)
        with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
            reply = client.post("/v1/predict", json={"model": "contract", "input": row, **ask})
            assert reply.status_code == 200, reply.text
            served = reply.json()
        predicted = run.predict([row], **ask)[0]
        same(predicted, served["answers"][0] if "answers" in served else served["output"])

    def test_the_metric_is_among_the_scores(self, recipe_path: Path, tmp_path: Path) -> None:
        run = train(recipe_path, run=tmp_path / "run", progress=False)
        found = run.evaluate(part="valid", progress=False)
        assert run.task.metric[0] in found["metrics"] and run.task.metric[1] in ("min", "max")
        low, high = found["metrics"][run.task.metric[0]]["low"], found["metrics"][run.task.metric[0]]["high"]
        assert low <= found["metrics"][run.task.metric[0]]["value"] <= high


def same(a: Any, b: Any) -> None:
    """Equal answers: numbers to 1e-4, all else exactly."""
    if isinstance(a, float) or isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b
