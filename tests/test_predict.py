"""Prediction: answers in the order of the rows, bad rows named by their place, files streamed, and whole or absent."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multihead.errors import UserError
from multihead.predict import CHUNK, FAULTS, predict, predict_file
from tests.tiny_run import make_run, rows_of

TEXTS = [row["text"] for row in rows_of(50)]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return make_run(tmp_path / "run", {"test": rows_of(4)}, batch_size=3)


def echoes(run: Any, rows: Any, **ask: Any) -> list[str]:
    return [answer["echo"] for answer in predict(run, rows, ask)]


def test_answers_come_in_the_order_of_the_rows(run: Any) -> None:
    assert echoes(run, TEXTS) == TEXTS
    assert echoes(run, iter(TEXTS)) == TEXTS
    assert echoes(run, ({"text": text} for text in TEXTS)) == TEXTS
    answers = list(predict(run, TEXTS[:7], {"temperature": 0.5}))
    assert all(a["ask"] == {"temperature": 0.5} and a["size"] <= 3 for a in answers)


def test_one_text_is_one_row(run: Any) -> None:
    assert echoes(run, "房间") == ["房间"]
    assert echoes(run, {"text": "房间"}) == ["房间"]
    assert echoes(run, []) == []


def test_a_value_takes_the_form_it_had_in_training(run: Any) -> None:
    assert echoes(run, [{"text": ["line", "line"]}, {"text": 12}]) == ["line\nline", "12"]


def test_precisions_of_writers_are_refused_elsewhere(run: Any) -> None:
    with pytest.raises(UserError, match="write tokens"):
        list(predict(run, "good", precision="int8"))


def test_targets_do_not_reach_the_model(run: Any) -> None:
    """A label never seen in training is no hindrance, and rows with and without one share a batch."""
    assert echoes(run, [{"text": "a", "label": "purple"}, {"text": "b"}]) == ["a", "b"]


def test_every_bad_row_is_named(run: Any) -> None:
    bad = ["good", {"txet": "a"}, {"text": ""}, 5, None, {"text": {"a": 1}}, "good"]
    with pytest.raises(UserError) as error:
        list(predict(run, bad))
    assert [p.where for p in error.value.problems] == ["rows[1]", "rows[2]", "rows[4]", "rows[5]"]
    assert "did you mean 'txet'" in error.value.problems[0].message


def test_rows_are_read_as_they_are_needed(run: Any) -> None:
    """A stream of a million rows needs the memory of a few batches."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "x" * (read % 5 + 1)

    answers = predict(run, endless())
    assert read == 0
    for _ in range(10):
        next(answers)
    assert read == CHUNK * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "rows.jsonl",
            "".join(json.dumps({"id": i, "text": t, "label": "?"}) + "\n" for i, t in enumerate(TEXTS)).encode(),
        ),
        ("rows.csv", ("label,评论\r\n" + "".join(f"1,{t}\r\n" for t in TEXTS)).encode("gb18030")),
        ("rows", gzip.compress("\n\n".join(TEXTS).encode())),
    ],
)
def test_a_file_is_answered_line_by_line(run: Any, tmp_path: Path, name: str, content: bytes) -> None:
    file, out = tmp_path / name, tmp_path / "answers.jsonl"
    file.write_bytes(content)
    # What the training file was like; this one may have another name for the column, and another encoding.
    run.recipe.data.columns, run.recipe.data.encoding = {"text": "评论"}, "gb18030"
    assert predict_file(run, file, out, {"k": 1}) == len(TEXTS)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["answer"]["echo"] for line in lines] == TEXTS
    assert [line["input"]["text"] for line in lines] == TEXTS
    assert all(line["where"].startswith(f"{file}:") and line["answer"]["ask"] == {"k": 1} for line in lines)
    assert lines[3]["where"].endswith({"rows.jsonl": ":4", "rows.csv": ":5", "rows": ":7"}[name])
    if name == "rows.jsonl":
        assert [line["input"]["id"] for line in lines] == list(range(len(TEXTS)))


def test_bad_rows_of_a_file_are_reported_before_anything_is_answered(run: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    good, bad = json.dumps({"text": "good"}) + "\n", json.dumps({"text": ""}) + "\n"
    file.write_text(good + bad + "{broken\n" + good, encoding="utf-8")
    out.write_text("old", encoding="utf-8")
    with pytest.raises(UserError) as error:
        predict_file(run, file, out)
    assert [p.where for p in error.value.problems] == [f"{file}:2", f"{file}:3"]
    assert out.read_text("utf-8") == "old"
    file.write_text(good + bad * 100, encoding="utf-8")
    with pytest.raises(UserError) as error:
        predict_file(run, file, out)
    assert len(error.value.problems) == FAULTS + 1
    assert "80 more" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "rows.jsonl", "run"]


def test_the_input_is_never_overwritten(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="is the input"):
        predict_file(run, file, tmp_path / "run" / ".." / "rows.txt")
    assert file.read_text("utf-8") == "a\n"
