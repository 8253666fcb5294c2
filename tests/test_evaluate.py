"""Evaluation: answers in the order of the rows, files that appear together or not at all, figures known beforehand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multihead import evaluate, task
from multihead.data.store import Store
from multihead.errors import UserError
from multihead.run import WEIGHTS, file_hash
from tests.tiny_run import Parity, make_run, rows_of

FILES = ["README.md", "metrics.json", "predictions.jsonl", "report.html"]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_come_in_the_order_of_the_rows(tmp_path: Path, batch_size: int) -> None:
    rows = rows_of(20)
    run = make_run(tmp_path / "run", {"test": rows})
    run.model.train()
    found = evaluate.answers(run.task, run.model, Store(tmp_path / "run/data/test"), batch_size)
    assert [a["echo"] for a in found] == [row["text"] for row in rows]
    assert all(a["size"] <= batch_size and a["ask"] == {"evaluate": True} for a in found)
    assert run.model.training, "the model is given back in the mode it came in"


def test_a_part_is_scored_against_the_rows_of_its_store(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"valid": rows_of(20, wrong=[3, 11, 12])})
    store = Store(tmp_path / "run/data/valid")
    assert evaluate.score_part(run.task, run.model, store, None, 7, "cpu", "float32") == {"accuracy": 0.85}
    assert evaluate.score_part(run.task, run.model, store, rows_of(20), 7, "cpu", torch.float32) == {"accuracy": 1.0}


def test_a_task_that_loses_an_answer_is_caught(tmp_path: Path) -> None:
    class Short(Parity):
        def predict(self, *arguments: Any) -> list[task.Answer]:
            return super().predict(*arguments)[:-1]

    run = make_run(tmp_path / "run", {"test": rows_of(4)}, Short())
    with pytest.raises(ValueError, match="3 answers to 4 rows"):
        evaluate.evaluate(run)


def test_an_evaluation_writes_what_it_returns(tmp_path: Path) -> None:
    rows = rows_of(40, wrong=range(4))
    run = make_run(tmp_path / "run", {"test": rows, "valid": rows_of(5)})
    result = evaluate.evaluate(run)
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["value"] == 0.9
    assert 0.7 <= accuracy["low"] < 0.9 < accuracy["high"] <= 1.0
    assert (result["rows"], result["part"], result["data"]) == (40, "test", [])
    assert result["model"] == file_hash(run.folder.file(WEIGHTS))
    assert result["command"] == f"multihead evaluate {tmp_path}/run"
    assert json.loads(run.folder.file("metrics.json").read_text("utf-8")) == result
    lines = [json.loads(line) for line in run.folder.file("predictions.jsonl").read_text("utf-8").splitlines()]
    for line, row in zip(lines, rows, strict=True):
        assert line["where"] == row.where
        assert line["input"] == {"text": row["text"]}
        assert line["target"] == {"label": row["label"]}
        assert line["answer"]["echo"] == row["text"]
    assert all(run.folder.file(name).is_file() for name in FILES)


def test_no_resamples_means_no_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"valid": rows_of(6)}, bootstrap=0)
    result = evaluate.evaluate(run)
    assert result["part"] == "valid"
    assert result["metrics"] == {"accuracy": {"value": 1.0, "low": None, "high": None}}
    assert "interval does" not in run.folder.file("report.html").read_text("utf-8")


def test_a_failed_evaluation_changes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"test": rows_of(10)})
    evaluate.evaluate(run)
    before = contents(tmp_path)

    class Broken(Parity):
        def figures(self, *_: Any) -> dict[str, Any]:
            return {"mistakes": [{"text": object.__new__(Unprintable)}]}

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("cannot be shown")

    run.task = Broken()
    with pytest.raises(RuntimeError, match="cannot be shown"):
        evaluate.evaluate(run)
    assert contents(tmp_path) == before

    run.task = Parity()
    (tmp_path / "bad.csv").write_text("text,label\nroom,purple\n", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"bad\.csv:2.*purple"):
        evaluate.evaluate(run, tmp_path / "bad.csv")
    assert contents(tmp_path) == before


def test_a_file_of_ones_own_is_measured_and_leaves_no_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"test": rows_of(10)})
    file = tmp_path / "新.csv"
    file.write_bytes("review,标签\n房间,even\n差,odd\n早餐好,even\n很干净,odd\n".encode("gb18030"))
    run.recipe.data.columns = {"label": "标签"}
    result = evaluate.evaluate(run, str(file))
    assert (result["rows"], result["part"], result["data"]) == (4, None, [str(file)])
    assert result["metrics"]["accuracy"]["value"] == 0.75
    assert "--data" in result["command"]
    assert sorted(p.name for p in (tmp_path / "run/data").iterdir()) == ["report.json", "test"]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    class Lost(Parity):
        def score(self, *_: Any) -> dict[str, float]:
            return {"accuracy": float("nan"), "perplexity": float("inf")}

        def predict(self, *arguments: Any) -> list[task.Answer]:
            return [answer | {"score": float("nan")} for answer in super().predict(*arguments)]

    run = make_run(tmp_path / "run", {"test": rows_of(3)}, Lost(), bootstrap=0)
    result = evaluate.evaluate(run)
    assert result["metrics"]["perplexity"] == {"value": None, "low": None, "high": None}

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = run.folder.file("predictions.jsonl").read_text("utf-8").splitlines()
    for text in [*lines, run.folder.file("metrics.json").read_text("utf-8")]:
        json.loads(text, parse_constant=refuse)


def test_nothing_to_measure_on_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"train": rows_of(5)})
    with pytest.raises(UserError, match="--data"):
        evaluate.evaluate(run)
    with pytest.raises(UserError, match="--data"):
        evaluate.evaluate(run, part="nonsense")
    with pytest.raises(UserError, match="only the encoding was kept"):
        evaluate.evaluate(run, part="train")
    with pytest.raises(UserError, match="not both"):
        evaluate.evaluate(run, "x.csv", part="test")
