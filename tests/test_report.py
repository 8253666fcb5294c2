"""The report and the card: every figure is in them, nothing of the data is markup, nothing comes from the network."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from multihead import card, charts, evaluate, report
from multihead.data.columns import Row
from tests.tiny_run import HOSTILE, LABELS, Parity, make_run, rows_of

VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails where tags do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text.append(data)


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    class Hostile(Parity):
        title = (f"tell {HOSTILE}", f"判断 {HOSTILE}")

        def figures(self, *arguments: Any) -> dict[str, Any]:
            found = super().figures(*arguments)
            found["confusion"]["labels"] = ["even", HOSTILE]
            found["classes"][1]["label"] = HOSTILE
            found["samples"] = [{"prompt": HOSTILE, "text": f"goes on {HOSTILE}"}]
            return found

    rows = rows_of(40, wrong=range(4), hostile=True)
    rows[0] = Row(rows[0], where=f"{HOSTILE}.csv:2")
    run = make_run(tmp_path / HOSTILE.replace("/", ""), {"train": rows_of(50), "test": rows}, Hostile())
    run.recipe.name = HOSTILE
    return run, evaluate.evaluate(run)


def test_nothing_in_the_report_is_script_or_comes_from_the_network(evaluated: tuple[Any, dict[str, Any]]) -> None:
    run, _ = evaluated
    source = run.folder.file("report.html").read_text("utf-8")
    page = Page(source)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert not [a for a in page.attributes if a[0].startswith("on") or a[0] in ("src", "href", "xlink:href", "action")]
    assert not re.search(r"<[^<>]*(?:(?:src|href)\s*=|https?://)", source)
    assert not re.search(r"url\(|@import", re.findall(r"<style>.*?</style>", source, re.DOTALL)[0])
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_hostile_text_is_shown_as_it_is(evaluated: tuple[Any, dict[str, Any]]) -> None:
    run, _ = evaluated
    text = "".join(Page(run.folder.file("report.html").read_text("utf-8")).text)
    # name, both titles, sample prompt and its continuation, label in matrix and table, mistake, its place …
    assert text.count(HOSTILE) >= 9
    assert "{{7*7}}" in text
    assert "49" not in re.findall(r"goes on.*", text)[0]
    assert "</pre><script>" in text, "the recipe's own text"


def test_every_figure_is_in_the_report(evaluated: tuple[Any, dict[str, Any]]) -> None:
    run, result = evaluated
    source = run.folder.file("report.html").read_text("utf-8")
    text = "".join(Page(source).text)
    assert report.shown(result["metrics"]["accuracy"]) == (
        "0.90",
        *(f"{result['metrics']['accuracy'][k]:.2f}" for k in ("low", "high")),
    )
    for words in [
        "0.90", "Confusion matrix", "混淆矩阵", "Class by class", "Worst mistakes", "最严重的错误", "What it writes",
        "How it learned", "learning rate", "classes", "reviews.csv:3", "3 exact copies", "2 rows stood in two parts",
        "有 3 行", "reviews.csv:812", "<i>nothing</i> there", "gb18030", "text ← 评论", "torch", "threads", "float32",
        "multihead train", "multihead serve", result["command"], result["model"][:12],
    ]:  # fmt: skip
        assert words.lower() in text.lower(), words
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(pictures) == 1 + 2 + 3 + 1  # interval, confusion and calibration, loss, accuracy and rate, lengths
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_both_languages_stand_in_one_file(
    evaluated: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result = evaluated
    assert 'id="show-en" aria-label="English" checked' in run.folder.file("report.html").read_text("utf-8")
    monkeypatch.setenv("MULTIHEAD_LANG", "zh")
    chinese = report.render(run, result, {})
    assert '<html lang="zh">' in chinese
    assert 'id="show-zh" aria-label="中文" checked' in chinese
    assert 'aria-label="English" checked' not in chinese
    both = [re.findall(rf'<span class="{lang}"[^>]*>([^<]*)', chinese) for lang in ("en", "zh")]
    assert len(both[0]) == len(both[1]) > 30
    assert all(re.search("[\u4e00-\u9fff]", words) for words in both[1] if not words.isascii())


def test_a_run_that_has_little_to_show_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"test": rows_of(3)}, bootstrap=0)
    for name in ("log.jsonl", "data/report.json"):
        run.folder.file(name).unlink()
    result = evaluate.evaluate(run)
    page = Page(report.render(run, result, {}))
    assert "svg" not in page.tags
    assert "How it learned" not in "".join(page.text)
    assert "no data report" in card.render(run, result, {})


def test_the_card_is_what_hubs_read(evaluated: tuple[Any, dict[str, Any]]) -> None:
    run, result = evaluated
    text = run.folder.file("README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "multihead"
    measured = front["model-index"][0]["results"][0]
    assert measured["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 0.9}]
    outside = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert "<" not in outside
    assert "](" not in outside
    for words in [
        "## English",
        "## 中文",
        "| accuracy | 0.90 |",
        "| 准确率 | 0.90 |",
        "3 exact copies",
        "recall",
        "multihead serve",
    ]:
        assert words in body, words
    assert body.index("## English") < body.index("## 中文")
    cards = pytest.importorskip("huggingface_hub")
    read = cards.ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_value, r.task_type) for r in read] == [("accuracy", 0.9, "other")]
    assert read[0].dataset_name.endswith("(test)")
    assert result["metrics"]["accuracy"]["value"] == read[0].metric_value


def test_counts_stand_where_they_belong() -> None:
    matrix = [[91, 2, 0], [3, 84, 5], [0, 6, 77]]
    picture = ElementTree.fromstring(charts.confusion(["a", "b", "c"], matrix))
    titles = [t.text for t in picture.iter("title")]
    assert titles[:3] == ["a → a: 91 (97.8%)", "a → b: 2 (2.2%)", "a → c: 0 (0.0%)"]
    assert [t.text for t in picture.iter("text") if (t.text or "").isdigit()] == [
        "91",
        "2",
        "0",
        "3",
        "84",
        "5",
        "0",
        "6",
        "77",
    ]
    pairs = report.confused(["a", "b", "c"], matrix)
    assert [(p["truth"], p["answer"], p["count"]) for p in pairs] == [
        ("c", "b", 6), ("b", "c", 5), ("b", "a", 3), ("a", "b", 2),
    ]  # fmt: skip
    assert report.confused(LABELS, [[1, 2], [3, 4]]) == []


def test_a_dot_lies_where_its_numbers_say() -> None:
    picture = ElementTree.fromstring(charts.reliability([0.5, 1.0], [0.5, 0.75], [1, 4]))
    (x0, y0), (x1, y1) = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in picture.iter("circle")]
    diagonal = next(line for line in picture.iter("line") if line.get("class") == "mark")
    assert (x0, y0) == (float(diagonal.get("x1", 0)), float(diagonal.get("y1", 0)))
    assert x1 == float(diagonal.get("x2", 0))
    assert y1 == pytest.approx((float(diagonal.get("y1", 0)) + float(diagonal.get("y2", 0))) / 2, abs=0.1)


@example(1.0, 400401.0, 2)  # no multiple of the first step that would do lies inside
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_round_even_and_inside(low: float, span: float, about: int) -> None:
    high = low + span
    found = charts.ticks(low, high, about)
    if not high > low:
        assert found == [low]
        return
    room = 1e-6 * span + 1e-9 * abs(low)
    assert 1 <= len(found) <= about + 1 or span < 1e-9 * abs(low)
    assert all(low - room <= t <= high + room for t in found)
    if len(found) > 1:
        steps = {b - a for a, b in pairwise(found)}
        assert max(steps) == pytest.approx(min(steps), rel=1e-3)
        first_figure = max(steps) / 10 ** math.floor(math.log10(max(steps)) + 1e-6)
        assert min(abs(first_figure - round_one) for round_one in (1, 2, 5)) < 0.01


def test_figures_show_the_places_their_interval_reaches() -> None:
    def shown(value: float, low: float | None, high: float | None) -> tuple[str, str, str]:
        return report.shown({"value": value, "low": low, "high": high})

    assert shown(0.91342, 0.90211, 0.92403) == ("0.913", "0.902", "0.924")
    assert shown(30.311, 29.612, 31.044) == ("30.3", "29.6", "31.0")
    assert shown(0.5, 0.1, 0.9) == ("0.5", "0.1", "0.9")
    assert shown(1.8764321, None, None) == ("1.8764", "", "")
    assert shown(1.0, 1.0, 1.0) == ("1.0000", "1.0000", "1.0000")


def test_clipping_counts_chinese_characters_as_two() -> None:
    assert charts.clip("酒店的早餐", 10) == "酒店的早餐"
    assert charts.clip("酒店的早餐", 9) == "酒店的早…"
    assert charts.clip("abcdef", 4) == "abc…"


def test_a_curve_keeps_its_ends_and_its_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(1, 2001)]
    thin = report._thin(points)
    assert len(thin) <= report.POINTS
    assert thin[-1][0] == 2000
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in points) / len(points), rel=1e-2)
    assert [y for _, y in report.smooth([(x, 2.5) for x, _ in points])] == pytest.approx([2.5] * len(points))
