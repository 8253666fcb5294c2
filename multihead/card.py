"""The model card: ``README.md`` of a run, in English and Chinese, with the front matter that model hubs read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from multihead.charts import clip
from multihead.errors import language
from multihead.report import PARTS, commands, data_report, name_of, notes, shown, sorted_metrics

# Names that model hubs know a task by, where they are not our own.
PIPELINES = {
    "text-generation": "text-generation",
    "fill-mask": "fill-mask",
    "text-classification": "text-classification",
    "question-answering": "question-answering",
    "translation": "translation",
    "image-classification": "image-classification",
    "image-generation": "unconditional-image-generation",
    "video-classification": "video-classification",
    "speech-recognition": "automatic-speech-recognition",
    "text-to-speech": "text-to-speech",
}
Say = Callable[[str, str], str]
FEW = 30  # rows of a class: with fewer, its own figures say little


def render(run: Any, result: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The card as Markdown: results with intervals, data, limits, use. The person's language stands first.

    Args:
        run: a `multihead.build.Run`.
        result: what `evaluate` returns.
        figures: what the task's ``figures`` returns.
    """
    both = [_body(run, result, figures, lambda en, zh: en), _body(run, result, figures, lambda en, zh: zh)]
    if language() == "zh":
        both.reverse()
    head = yaml.safe_dump(_front_matter(run, result), allow_unicode=True, sort_keys=False, width=120)
    return f"---\n{head}---\n\n# {safe(run.recipe.name)}\n\n" + "\n---\n\n".join(both)


def safe(text: Any) -> str:
    """A text of the data inside Markdown: one line, and nothing in it is markup."""
    flat = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_\[\]<>|#~&])", lambda found: f"&#{ord(found[0])};", flat)


def _front_matter(run: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    task = run.recipe.task
    measured = [
        {"type": name, "name": name_of(name)[0], "value": metric["value"]}
        for name in sorted_metrics(run, result)
        if (metric := result["metrics"][name])["value"] is not None
    ]
    kind = PIPELINES.get(task, "other")
    head: dict[str, Any] = {
        "library_name": "multihead",
        "tags": [tag for tag in ("multihead", run.task.field, task) if tag],
    }
    if task in PIPELINES:
        head["pipeline_tag"] = kind
    data = ", ".join(result["data"]) or f"{run.recipe.name} ({result['part']})"
    head["model-index"] = [
        {
            "name": run.recipe.name,
            "results": [
                {"task": {"type": kind, "name": task}, "dataset": {"type": "local", "name": data}, "metrics": measured}
            ],
        }
    ]
    return head


def _body(run: Any, result: Mapping[str, Any], figures: Mapping[str, Any], say: Say) -> str:
    title = safe(say(*run.task.title) or run.recipe.task)
    size = f"{result['parameters']:,}"
    lines = [
        say("## English", "## 中文"),
        "",
        say(
            f"A multihead model. Task `{run.recipe.task}`: {title}. {size} parameters.",
            f"multihead 模型。任务 `{run.recipe.task}`：{title}。参数量 {size}。",
        ),
        say("\n### Results\n", "\n### 结果\n"),
        *_results(run, result, say),
        say("\n### Data\n", "\n### 数据\n"),
        *_data(run, say),
        say("\n### Limits\n", "\n### 局限\n"),
        *[f"- {line}" for line in _limits(run, result, figures, say)],
        say("\n### Use\n", "\n### 使用\n"),
        "```sh",
        *[f"{command}   # {say(*what)}" for what, command in commands(run, result)],
        "```",
        "",
        "```python",
        "import multihead as mh",
        f"mh.load({str(run.folder.path)!r}).predict([...])",
        "```",
        "",
    ]
    return "\n".join(lines)


def _results(run: Any, result: Mapping[str, Any], say: Say) -> list[str]:
    level, rows, day = f"{100 * result['confidence']:g} %", f"{result['rows']:,}", result["when"][:10]
    where = ", ".join(map(safe, result["data"])) or say(*PARTS[result["part"]])
    lines = [
        say(f"Measured on {rows} rows ({where}), {day}.", f"评估数据：{rows} 行（{where}），{day}。"),
        "",
        say(f"| metric | value | {level} interval |", f"| 指标 | 值 | {level} 区间 |"),
        "|---|---:|---|",
    ]
    for name in sorted_metrics(run, result):
        value, low, high = shown(result["metrics"][name])
        lines.append(f"| {safe(say(*name_of(name)))} | {value} | {f'{low} – {high}' if low else ''} |")
    facts = [safe(result["machine"][key]) for key in ("cpu", "device", "precision")]
    versions = [f"{key} {safe(result['machine'][key])}" for key in ("python", "torch")]
    return [*lines, "", say("Measured with: ", "评估环境：") + ", ".join(versions + facts)]


def _data(run: Any, say: Say) -> list[str]:
    report = data_report(run)
    parts = {name: part for name, part in report.get("parts", {}).items() if part.get("rows")}
    if not parts:
        return [say("There is no data report.", "没有数据报告。")]
    lines = [
        say("| part | rows | median length | longest |", "| 部分 | 行数 | 长度中位数 | 最长 |"),
        "|---|---:|---:|---:|",
    ]
    for name, part in parts.items():
        cells = [say(*PARTS.get(name, (name, name))), f"{part['rows']:,}"]
        cells += [f"{part['lengths'][key]:g}" if "lengths" in part else "" for key in ("median", "max")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *[f"- {say(*note)}" for note in notes(report)]]


def _limits(run: Any, result: Mapping[str, Any], figures: Mapping[str, Any], say: Say) -> list[str]:
    limits = [
        say(
            "The intervals cover the choice of the measured rows only: neither the luck of another training nor rows "
            "from elsewhere.",
            "区间只反映评估数据的抽样误差，不包括换一次训练的差异，也不适用于其他来源的数据。",
        ),
        say(
            "Fairness between groups of people and inputs made to deceive have not been checked.",
            "未检查不同人群之间的公平性，也未检查对抗性输入。",
        ),
    ]
    if run.task.emits:
        limits.append(
            say(
                "What it writes may be untrue, and may repeat its training data word for word.",
                "它写出的内容可能不真实，也可能重复训练数据中的原文。",
            )
        )
    classes = list(figures.get("classes") or [])
    if thin := _named([(one, int(one["support"])) for one in classes if one["support"] < FEW]):
        limits.append(
            say(
                f"Classes measured on fewer than {FEW} rows, whose own figures say little: {thin}.",
                f"这些类别的评估数据不足 {FEW} 行，其指标不可靠：{thin}。",
            )
        )
    measured = [one for one in classes if one["support"] >= FEW]
    if weak := _named([(one, f"{one['recall']:.2f}") for one in measured if one["recall"] < 0.5]):
        limits.append(
            say(
                f"Classes of which more than half are missed (recall): {weak}.",
                f"这些类别有一半以上没有被识别出来（召回率）：{weak}。",
            )
        )
    error = (result["metrics"].get("calibration_error") or {}).get("value")
    if error is not None and error > 0.05:
        limits.append(
            say(
                f"The confidence it states is off by {error:.2f} on average.",
                f"它给出的把握平均偏离实际正确率 {error:.2f}。",
            )
        )
    return limits


def _named(found: Sequence[tuple[Mapping[str, Any], Any]]) -> str:
    """Ten class names with a figure each."""
    return ", ".join(f"{safe(clip(str(one['label']), 30))} ({figure})" for one, figure in found[:10])
