"""The report of an evaluation: one HTML file that opens from the disk, in English and Chinese, light and dark.

Everything shown comes from the run folder and the evaluation's result; the template escapes every text of the data, and
the page forbids itself scripts and the network (Content-Security-Policy).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multihead import charts
from multihead.charts import Pair, Series
from multihead.errors import UserError, language, tr
from multihead.metrics.names import NAMES, UNBOUNDED
from multihead.run import RECIPE
from multihead.runtime.log import read_log

POINTS = 400  # of one curve: more than a screen has columns to show them in
LABELS = 40  # of one confusion matrix: beyond, cells are too small to read and the list of pairs says more
CLASSES = 200  # rows of the table of classes
PARTS: dict[str, Pair] = {
    "train": ("training", "训练集"),
    "valid": ("validation", "验证集"),
    "test": ("test", "测试集"),
}


def name_of(metric: str) -> Pair:
    """A metric's name for people."""
    return NAMES.get(metric, (metric.replace("_", " "),) * 2)


def digits(value: float, low: float | None, high: float | None) -> int:
    """Decimals worth showing: those that the interval's half width reaches, one more where that begins with 1 or 2."""
    if low is None or high is None or not high > low:
        return 4 if abs(value) < 100 else 1
    half = (high - low) / 2
    place = math.floor(math.log10(half))
    return max(0, min(4, -place + (half / 10.0**place < 3)))


def shown(metric: Mapping[str, Any]) -> tuple[str, str, str]:
    """Value, low and high of a metric as text; low and high are "" where there is no interval."""
    value, low, high = metric["value"], metric.get("low"), metric.get("high")
    if value is None:
        return "–", "", ""
    places = digits(value, low, high)
    if low is None or high is None:
        return f"{value:.{places}f}", "", ""
    return f"{value:.{places}f}", f"{low:.{places}f}", f"{high:.{places}f}"


def sorted_metrics(run: Any, result: Mapping[str, Any]) -> list[str]:
    """Names of the metrics, the one that picks the best weights first."""
    return sorted(result["metrics"], key=lambda name: name != run.task.metric[0])


def commands(run: Any, result: Mapping[str, Any]) -> list[tuple[Pair, str]]:
    """The exact commands that train, measure and serve this run."""
    place = shlex.quote(str(run.folder.path))
    recipe = shlex.quote(str(run.folder.file(RECIPE)))
    return [
        (
            ("train it again, elsewhere", "在别处重新训练"),
            f"multihead train {recipe} --run {shlex.quote(f'{run.folder.path}-again')}",
        ),
        (("measure it again", "重新评估"), result["command"]),
        (("ask it", "使用模型"), f"multihead predict {place} --file rows.jsonl --out answers.jsonl"),
        (("serve it", "部署服务"), f"multihead serve {place}"),
    ]


def render(run: Any, result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The report as HTML.

    Args:
        run: a `multihead.build.Run`.
        result: what `evaluate` returns.
        figures: what the task's ``figures`` returns, each key optional.

    Raises:
        UserError: where jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError:
        raise UserError(
            tr(
                "the report needs jinja2: pip install 'multihead[eval]', then evaluate again",
                "生成报告需要 jinja2：请运行 pip install 'multihead[eval]'，然后重新评估",
            )
        ) from None

    def both(english: Any, chinese: Any) -> Any:
        if english == chinese:
            return escape(english)
        return Markup('<span class="en">{}</span><span class="zh" lang="zh">{}</span>').format(english, chinese)

    source = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    context = _context(run, result, figures)
    pictures = ("confusion", "calibration")
    context.update({name: Markup(context[name]) for name in pictures})
    context["curves"] = [Markup(curve) for curve in context["curves"]]
    for metric in context["metrics"]:
        metric["picture"] = Markup(metric["picture"])
    if context["data"]:
        context["data"]["lengths"] = Markup(context["data"]["lengths"])
    return template.render(t=both, **context)


def _context(run: Any, result: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [_metric(name, result["metrics"][name], i == 0) for i, name in enumerate(sorted_metrics(run, result))]
    measured = PARTS.get(result["part"] or "", ("", "")) if not result["data"] else (", ".join(result["data"]),) * 2
    matrix = figures.get("confusion") or {"labels": [], "matrix": []}
    calibration = figures.get("calibration") or {"confidence": [], "accuracy": [], "count": []}
    return {
        "chinese": language() == "zh",
        "name": run.recipe.name,
        "task": run.recipe.task,
        "title": run.task.title if any(run.task.title) else (run.recipe.task,) * 2,
        "measured_on": measured,
        "rows": result["rows"],
        "examples": result["examples"],
        "when": result["when"][:16].replace("T", " "),
        "weights": result["model"],
        "parameters": result.get("parameters", 0),
        "metrics": metrics,
        "confidence": f"{100 * result['confidence']:g} %",
        "signatures": list((figures.get("signatures") or {}).values()),
        "any_interval": any(m["low"] for m in metrics),
        "samples": figures.get("samples") or [],
        "confusion": charts.confusion(matrix["labels"], matrix["matrix"]) if len(matrix["labels"]) <= LABELS else "",
        "confused": confused(matrix["labels"], matrix["matrix"]),
        "pairs": [pair for pair in figures.get("pairs") or [] if any(pair["pictures"])],
        "illustrated": figures.get("galleries") or any(one.get("picture") for one in figures.get("mistakes") or []),
        "galleries": figures.get("galleries") or [],
        "sounding": any(row.get("sounds") for one in figures.get("galleries") or [] for row in one["rows"]),
        "calibration": charts.reliability(calibration["confidence"], calibration["accuracy"], calibration["count"]),
        "wide": len(matrix["labels"]) > charts.WIDE,
        "classes": list(figures.get("classes") or [])[:CLASSES],
        "importance": _importance(figures.get("importance") or []),
        "errors": figures.get("errors") or [],
        "mistakes": [_mistake(one) for one in figures.get("mistakes") or []],
        "curves": curves(run.folder.file("log.jsonl"), run.task.metric[0], run.task.metric[1]),
        "data": data_section(data_report(run)),
        "commands": commands(run, result),
        "environment": environment(result["machine"]),
        "recipe": run.folder.file(RECIPE).read_text("utf-8"),
        "version": result["machine"].get("multihead", ""),
    }


def _metric(name: str, metric: Mapping[str, Any], main: bool) -> dict[str, Any]:
    value, low, high = shown(metric)
    within = bool(low) and name not in UNBOUNDED and 0 <= metric["low"] <= metric["high"] <= 1
    picture = charts.interval(metric["value"], metric["low"], metric["high"]) if within else ""
    return {"name": name_of(name), "value": value, "low": low, "high": high, "main": main, "picture": picture}


def _importance(fields: Sequence[Mapping[str, Any]], most: int = 40) -> list[dict[str, Any]]:
    top = max((one["loss"] for one in fields), default=0.0) or 1.0
    return [{**one, "share": max(0.0, one["loss"] / top)} for one in fields[:most]]


def _mistake(one: Mapping[str, Any]) -> dict[str, Any]:
    words = str(one.get("text", ""))
    short = charts.clip(words, 320)
    score = one.get("score")
    return {
        "picture": one.get("picture") or "",
        "text": words,
        "short": short,
        "rest": short != words,
        "truth": _words(one.get("truth")),
        "answer": _words(one.get("answer")),
        "score": f"{score:.3f}" if isinstance(score, float) else _words(score),
        "where": one.get("where") or "",
    }


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def confused(labels: Sequence[str], matrix: Sequence[Sequence[int]], most: int = 8) -> list[dict[str, Any]]:
    """The pairs of labels most often taken for one another, most frequent first; none for two labels."""
    if len(labels) <= 2:
        return []
    found = [(int(n), i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    found.sort(key=lambda pair: -pair[0])
    return [{"truth": labels[i], "answer": labels[j], "count": n} for n, i, j in found[:most]]


# -- learning curves --------------------------------------------------------------------------------------------------


def curves(log: Path, metric: str = "loss", better: str = "min") -> list[str]:
    """Charts of a run's log: loss of training and validation, every validation metric, the learning rate."""
    train: dict[str, dict[int, float]] = {}
    valid: dict[str, dict[int, float]] = {}
    for entry in read_log(log):
        step = entry.get("step")
        if not isinstance(step, int):
            continue
        found = entry.get("valid")
        for name, value in (found if isinstance(found, dict) else {}).items():
            _note(valid, name, step, value)
        for name in ("loss", "lr"):
            _note(train, name, step, entry.get(name))
    steps: Pair = ("steps", "步数")
    drawn = []
    loss = _thin(sorted(train.get("loss", {}).items()))
    best = _best(valid.get(metric, {}), better)
    mark = None if best is None else (float(best), ("best", "最佳"))
    series = [
        Series(("training", "训练"), loss, "accent", "faint"),
        Series(("training", "训练"), smooth(loss), "accent"),
        Series(("validation", "验证"), sorted(valid.pop("loss", {}).items()), "second", "dots"),
    ]
    drawn.append(charts.lines([s for s in series if s.points], steps, NAMES["loss"], mark))
    for name in sorted(valid, key=lambda n: n != metric):
        points = sorted(valid[name].items())
        if len(points) > 1:
            drawn.append(
                charts.lines([Series(("validation", "验证"), points, "second", "dots")], steps, name_of(name), mark)
            )
    rate = _thin(sorted(train.get("lr", {}).items()))
    if len(rate) > 1:
        drawn.append(charts.lines([Series(NAMES["lr"], rate)], steps, NAMES["lr"]))
    return [picture for picture in drawn if picture][:6]


def _note(kept: dict[str, dict[int, float]], name: str, step: int, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        kept.setdefault(name, {})[step] = float(value)


def _best(points: Mapping[int, float], better: str) -> int | None:
    if len(points) < 2:
        return None
    return (min if better == "min" else max)(points, key=lambda step: points[step])


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of neighbours, at the last step of each group."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean: exponential, divided by the weights seen so far (Kingma & Ba 2015, section 3)."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    total, weight, out = 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, total / weight))
    return out


# -- data and environment ---------------------------------------------------------------------------------------------


def data_report(run: Any) -> dict[str, Any]:
    """What ``prepare`` found in the data; empty where the run has no report."""
    path = run.folder.file("data/report.json")
    report: Any = run.folder.read_json("data/report.json") if path.is_file() else {}
    return report


def data_section(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs of ``data/report.json``; empty where the run has none."""
    parts = {name: part for name, part in report.get("parts", {}).items() if part.get("rows")}
    if not parts:
        return {}
    extra = [k for k in dict.fromkeys(k for p in parts.values() for k in p) if k not in ("rows", "lengths")]
    scalars = [k for k in extra if all(_number(p.get(k)) for p in parts.values())]
    tables = [
        k
        for k in extra
        if any(isinstance(p.get(k), dict) and p[k] and all(map(_number, p[k].values())) for p in parts.values())
    ]
    ragged = any("lengths" in p for p in parts.values())
    columns: list[Pair] = [("rows", "行数")]
    if ragged:
        columns += [
            ("shortest", "最短"),
            ("median length", "长度中位数"),
            ("95 % are below", "95 % 低于"),
            ("longest", "最长"),
        ]
    columns += [(k.replace("_", " "),) * 2 for k in scalars]
    rows = []
    for name, part in parts.items():
        values = [part["rows"]]
        if ragged:
            values += [part.get("lengths", {}).get(k) for k in ("min", "median", "p95", "max")]
        rows.append(
            {
                "name": PARTS.get(name, (name, name)),
                "values": [_count(v) for v in values + [part.get(k) for k in scalars]],
            }
        )
    lengths = (parts.get("train") or next(iter(parts.values()))).get("lengths")
    return {
        "columns": columns,
        "parts": rows,
        "notes": notes(report),
        "lengths": _lengths(lengths) if lengths else "",
        "classes": [_class_table(k, parts) for k in tables],
        "rejected": report.get("rejected", {}).get("examples", [])[:20],
        "guess": _guesses(report.get("guess", {})),
    }


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> str:
    if not _number(value):
        return ""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"


def notes(report: Mapping[str, Any]) -> list[Pair]:
    """What the data report says of copies, of rows in two parts and of rows that were left out, as sentences."""
    about = report.get("duplicates", {})
    copies, leaks, rejected = about.get("copies", 0), about.get("leaks", 0), report.get("rejected", {}).get("count", 0)
    found: list[Pair] = []
    if copies and about.get("dropped"):
        found.append(
            (f"{copies:,} exact copies of other rows were dropped.", f"有 {copies:,} 行与其他行完全相同，已去除。")
        )
    elif copies:
        found.append(
            (
                f"{copies:,} exact copies of other rows were kept, each in the part of its original.",
                f"有 {copies:,} 行与其他行完全相同，已保留，并与原行放在同一部分。",
            )
        )
    if leaks:
        found.append(
            (
                f"{leaks:,} rows stood in two parts and were kept out of the training side.",
                f"有 {leaks:,} 行同时出现在两个部分，已从训练一侧去除。",
            )
        )
    if rejected:
        found.append((f"{rejected:,} rows could not be used.", f"有 {rejected:,} 行无法使用。"))
    return found or [("No row is a copy of another, and none was left out.", "没有重复的行，也没有被剔除的行。")]


def _lengths(lengths: Mapping[str, Any]) -> str:
    marks = [
        (lengths["median"], (f"median {lengths['median']:g}", f"中位数 {lengths['median']:g}")),
        (lengths["p95"], (f"95 %: {lengths['p95']:g}", f"95 %：{lengths['p95']:g}")),
    ]
    picture = lengths["histogram"]
    of = lengths.get("of", "")
    return charts.histogram(
        picture["edges"], picture["counts"], (f"length of {of}", f"{of} 的长度"), ("rows", "行数"), marks
    )


def _class_table(key: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    counted = {name: part[key] for name, part in parts.items() if isinstance(part.get(key), dict)}
    first = next(iter(counted.values()))
    labels = sorted(
        dict.fromkeys(label for counts in counted.values() for label in counts), key=lambda label: -first.get(label, 0)
    )
    most = max(first.values(), default=1) or 1
    rows = [
        {
            "label": label,
            "values": [_count(c.get(label, 0)) for c in counted.values()],
            "share": first.get(label, 0) / most,
        }
        for label in labels[:30]
    ]
    name = ("Classes", "类别") if key in ("classes", "labels") else (key.replace("_", " ").capitalize(),) * 2
    return {"name": name, "parts": [PARTS.get(part, (part, part)) for part in counted], "rows": rows}


def _guesses(guess: Mapping[str, Any], most: int = 12) -> list[tuple[str, str]]:
    """How each data file was read, in a line: (file, form, encoding and which column is which)."""
    lines = []
    for about in [file for source in guess.values() for file in source.get("files", [])][:most]:
        how = [str(about[k]) for k in ("format", "encoding") if about.get(k)]
        how += ["gzip"] if about.get("packed") else []
        how += [f"{ours} ← {theirs}" for ours, theirs in about.get("mapping", {}).items() if theirs]
        lines.append((str(about.get("file", "")), " · ".join(how)))
    return lines


def environment(machine: Mapping[str, Any]) -> list[tuple[Pair, str]]:
    """The machine's facts with their names in both languages."""
    names: dict[str, Pair] = {
        "system": ("system", "系统"),
        "cpu": ("processor", "处理器"),
        "cores": ("cores", "核心数"),
        "threads": ("threads", "线程数"),
        "memory": ("memory", "内存"),
        "device": ("device", "设备"),
        "precision": ("precision", "数值精度"),
        "seconds": ("seconds taken", "用时（秒）"),
    }
    return [(names.get(key, (key, key)), str(value)) for key, value in machine.items() if value not in (None, "")]
