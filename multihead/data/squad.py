"""Questions about passages: JSON nested as SQuAD's (Rajpurkar et al. 2016) as flat records; what an answer looks like.

The form is ``data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}, is_impossible}}``, with
or without the outer ``data``. One article is held at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from multihead.data.formats import Record
from multihead.errors import tr


def nested(sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether records are articles (``paragraphs`` of objects) or passages with their questions (``qas``)."""
    return any(
        isinstance(values.get("qas"), list)
        or (isinstance(values.get("paragraphs"), list) and any(isinstance(p, dict) for p in values["paragraphs"]))
        for values in sample
    )


def unfold(records: Iterable[Record], kind: str) -> Iterator[Record]:
    """Articles or passages as records of "questions" or of "passages"; what is not as it should be, as a problem.

    A question's record holds question, context, answers, id and, where the article has one, its title. Its place is
    its id, or else its number; a passage's place is likewise its own.
    """
    for number, record in enumerate(records, 1):
        if record.problem:
            yield record
            continue
        article = record.values
        if "qas" in article:
            yield from _passage(record.line, {}, article, str(article.get("id") or number), kind)
            continue
        title = {"title": article["title"]} if "title" in article else {}
        place = tr(f"article {number}", f"第 {number} 篇")
        passages = article.get("paragraphs")
        if not isinstance(passages, list):
            yield _wrong(record.line, place, "paragraphs", passages)
            continue
        for n, passage in enumerate(passages, 1):
            within = place + tr(f", paragraph {n}", f"第 {n} 段")
            if isinstance(passage, dict):
                yield from _passage(record.line, title, passage, str(passage.get("id") or within), kind)
            else:
                told = tr("a paragraph is an object {context, qas}", "段落应为对象 {context, qas}")
                yield Record(record.line, {}, told, within)


def _passage(line: int, title: dict[str, Any], passage: Mapping[str, Any], place: str, kind: str) -> Iterator[Record]:
    context, qas = passage.get("context"), passage.get("qas")
    if kind == "passages":
        yield Record(line, {"context": context, "id": passage.get("id"), **title}, "", place)
        return
    if not isinstance(qas, list):
        yield _wrong(line, place, "qas", qas)
        return
    for n, qa in enumerate(qas, 1):
        within = place + tr(f", question {n}", f"第 {n} 问")
        if not isinstance(qa, dict):
            told = tr("a question is an object {question, answers}", "问题应为对象 {question, answers}")
            yield Record(line, {}, told, within)
            continue
        given = [] if qa.get("is_impossible") is True else qa.get("answers")
        values = {"question": qa.get("question"), "context": context, "answers": given, "id": qa.get("id"), **title}
        yield Record(line, values, "", str(qa.get("id") or within))


def _wrong(line: int, place: str, key: str, value: Any) -> Record:
    kind = type(value).__name__
    told = tr(f"'{key}' should be a list of objects, not {kind}", f"'{key}' 应为对象的列表，而不是 {kind}")
    if value is None:
        told = tr(f"there is no '{key}' here; the form is data[].paragraphs[].{{context, qas[].{{question, answers}}}}",
                  f"这里没有 '{key}'；形式应为 data[].paragraphs[].{{context, qas[].{{question, answers}}}}")
    return Record(line, {}, told, place)


def answers(value: Any) -> list[dict[str, Any]] | None:
    """Answers in any of the forms they are written in, as ``[{"text", "answer_start"}]``; None where they are none.

    A text; a list of texts or of ``{text, answer_start}``; ``{"text": […], "answer_start": […]}``; or, in a cell of a
    table, one of these as JSON. ``answer_start`` counts characters and may be absent. A blank text, or an empty list,
    says that the passage does not answer the question.
    """
    if isinstance(value, str):
        return _written(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [] if value != value else [{"text": str(value)}]
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list):
            return answers([value])
        if not isinstance(starts, list):
            starts = [None] * len(texts)
        if len(starts) != len(texts):
            return None
        return answers([{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)])
    if not isinstance(value, list):
        return None
    found = [_one(item) for item in value]
    return None if any(one is None for one in found) else [one for one in found if one is not None]


def _written(text: str) -> list[dict[str, Any]] | None:
    if not text.strip():
        return []
    if text.lstrip()[:1] in "[{":
        try:
            held = json.loads(text)
        except (ValueError, RecursionError):
            held = None
        if isinstance(held, (list, dict)) and (found := answers(held)) is not None:
            return found
    return [{"text": text}]


def _one(item: Any) -> dict[str, Any] | None:
    given = item if isinstance(item, dict) else {"text": item}
    text, start = given.get("text"), given.get("answer_start")
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        return None
    if start is None or start == -1:
        return {"text": text}
    return {"text": text, "answer_start": start} if isinstance(start, int) and not isinstance(start, bool) else None
