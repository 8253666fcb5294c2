"""Answers of a trained run to new rows: texts or dicts from Python, or a file of them.

A row takes the road it took in training (`Task.request`, the column's form, `Task.encode`), so that the two agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead.data.columns import MEDIA, Column, convert
from multihead.data.encoding import read_lines
from multihead.data.files import find_sources
from multihead.data.formats import texts
from multihead.data.rows import Row, Rows, open_rows
from multihead.errors import Problem, UserError, nearest, tr
from multihead.evaluate import answers, plain, ticking
from multihead.generation.fast import prepared
from multihead.generation.loop import Emitter
from multihead.run import replacing
from multihead.task import Answer, Example, Task

CHUNK = 8  # batches read ahead: rows of like length find each other among them, and memory stays bounded
FAULTS = 20  # bad rows of a file that are reported at once


def predict(
    run: Any, rows: Iterable[Any], ask: Mapping[str, Any] | None = None, precision: str = "float32"
) -> Iterator[Answer]:
    """The answer to each row, in the order of the rows, as it is made; memory is bounded however many rows there are.

    Args:
        run: a `multihead.build.Run`.
        rows: texts, or dicts of columns; a single text or dict stands for one row.
        ask: what the task is asked for beyond its defaults (for text generation: max_tokens, temperature, …).
        precision: "float32", "bf16" or "auto"; of a model that writes tokens, on a CPU, also "half" and "int8" (see
            `multihead.generation.fast.prepared`).

    Raises:
        UserError: naming the row (``rows[3]``, or its file and line) and what is wrong with it.
    """
    if isinstance(rows, (str, Mapping)):
        rows = [rows]
    size = run.recipe.evaluate.batch_size
    model, precision = _model(run, precision)
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, CHUNK * size)):
        examples, problems = [], []
        for i, body in chunk:
            try:
                examples.append(encode(run.task, body, getattr(body, "where", "") or f"rows[{i}]"))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError.many(problems)
        yield from _answer(run, model, examples, dict(ask or {}), size, precision)


def _model(run: Any, precision: str) -> tuple[nn.Module, str]:
    """The model that answers, and in what its products are rounded beyond its own weights."""
    if precision not in ("half", "int8"):
        return run.model, precision
    if not isinstance(run.model, Emitter):
        raise UserError(tr(
            f"precision {precision} is for models that write tokens; {run.recipe.task} takes float32, bf16 and auto",
            f"{precision} 精度只用于逐词元写出文本的模型；{run.recipe.task} 可用 float32、bf16 和 auto",
        ))
    return prepared(run.model, precision), "float32"


def _answer(
    run: Any, model: nn.Module, examples: list[Example], ask: dict[str, Any], size: int, precision: str
) -> list[Answer]:
    # Rows may differ in what they hold beyond the input (some with a label, some without): a batch is what they share.
    keys = set(examples[0]).intersection(*examples[1:])
    shared = [{key: value for key, value in example.items() if key in keys} for example in examples]
    lengths = np.array([max((len(a) for a in example.values() if a.ndim), default=0) for example in shared])
    with torch.inference_mode():
        return answers(run.task, model, shared, size, ask, run.device, precision, lengths=lengths)


def encode(task: Task, body: Any, where: str = "") -> Example:
    """One request as the model reads it: its input columns checked, put into their form and encoded.

    Target columns are left out: an answer must not depend on them, nor a label never seen stand in its way.

    Raises:
        UserError: with `where` for every problem that has no place of its own.
    """
    try:
        row = Row(_requested(task, body), where)
        inputs = task.inputs()
        faults = []
        for column in inputs:
            value, fault = _formed(task, column, row)
            if fault:
                faults.append(Problem(fault))
            elif value is not None:
                row[column.name] = value
        if faults:
            raise UserError.many(faults)
        for name in {c.name for c in task.columns} - {c.name for c in inputs}:
            row.pop(name, None)
        return task.encode(row)
    except UserError as error:
        raise UserError.many([Problem(p.message, p.where or where) for p in error.problems]) from None


def _requested(task: Task, body: Any) -> dict[str, Any]:
    try:
        return dict(task.request(body))
    except (TypeError, ValueError):
        shown = repr(body)[:60]
        raise UserError(
            tr(f"is neither a text nor an object of columns: {shown}", f"既不是文本，也不是由列组成的对象：{shown}")
        ) from None


def _formed(task: Task, column: Column, row: Mapping[str, Any]) -> tuple[Any, str]:
    if column.name not in row:
        if not column.required:
            return None, ""
        have = ", ".join(map(str, row)) or "-"
        return None, tr(
            f"has no '{column.name}'{nearest(column.name, row)}; it holds: {have}",
            f"没有“{column.name}”{nearest(column.name, row)}；现有：{have}",
        )
    value = row[column.name]
    if task.emits and isinstance(value, str) and not value.strip():
        return value, ""  # a model that goes on with texts may begin from nothing
    return convert(column, value)


# -- files ------------------------------------------------------------------------------------------------------------


def predict_file(
    run: Any,
    file: str | Path,
    out: str | Path,
    ask: Mapping[str, Any] | None = None,
    progress: bool = True,
    precision: str = "float32",
) -> int:
    """Answers to every row of a file (JSONL, CSV, TSV, JSON, Parquet; or text, one row a line), as lines of JSON.

    A line of `out` is ``{"where", "input", "answer"}``, in the order of the file. The file is read twice: all bad rows
    are reported before the first answer is made. `out` appears once it is whole; rows are streamed, never all kept.

    Returns:
        The number of rows answered.

    Raises:
        UserError: with the line of every bad row (the first FAULTS), or where nothing can be read or written.
    """
    file, out = Path(file), Path(out)
    if out.exists() and file.exists() and out.resolve() == file.resolve():
        raise UserError(
            tr("is the input; choose another name for the answers", "就是输入文件；请为答案另选一个文件名"), str(out)
        )
    rows = file_rows(run, file)
    count = _check(run.task, rows, progress)
    made = 0
    with (
        replacing(out, tr("the answers", "答案")) as part,
        open(part, "w", encoding="utf-8") as target,
        ticking(tr("answering", "回答"), count, progress) as tick,
    ):
        # The same file read in step with the answers: a row is needed again for its line, and chunks keep both near.
        for row, answer in zip(rows, predict(run, rows, ask, precision), strict=True):
            line = {"where": row.where, "input": without_pictures(run.task, row), "answer": answer}
            target.write(json.dumps(plain(line), ensure_ascii=False) + "\n")
            made += 1
            tick(1)
    return made


def predict_pictures(
    run: Any,
    inputs: Sequence[str],
    ask: Mapping[str, Any] | None = None,
    progress: bool = True,
    precision: str = "float32",
) -> Iterator[tuple[str, Answer]]:
    """(place, answer) of every picture, clip or recording that `inputs` name: files, folders and globs, also archives
    and tables of them.

    Raises:
        UserError: with the place of every picture that cannot be read, before the first answer is made.
    """
    columns = [column for column in run.task.inputs() if column.required]
    rows = FileRows(Path(inputs[0]), open_rows(list(inputs), columns, base=Path.cwd()), columns[0].name)
    _check(run.task, rows, progress)
    for row, answer in zip(rows, predict(run, rows, ask, precision), strict=True):
        yield row.where, answer


def without_pictures(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is written beside its answer: of a picture or a recording its place says enough."""
    pictures = {column.name for column in task.columns if column.kind in MEDIA}
    return {name: value for name, value in row.items() if name not in pictures}


def _check(task: Task, rows: FileRows, progress: bool) -> int:
    """The number of rows, all of them encoded once to see that they can be."""
    problems: list[Problem] = []
    count = bad = 0
    with ticking(tr("checking", "检查"), None, progress) as tick:
        for row in rows:
            count += 1
            try:
                encode(task, row, row.where)
            except UserError as error:
                bad += 1
                if bad <= FAULTS:
                    problems += error.problems
            tick(1)
    bad += rows.rejected_count
    problems = [*rows.rejected[:FAULTS], *problems]
    if bad:
        if bad > FAULTS:
            problems.append(
                Problem(
                    tr(f"and {bad - FAULTS} more rows; nothing was answered", f"另有 {bad - FAULTS} 行；未作任何回答")
                )
            )
        raise UserError.many(problems)
    if not count:
        raise UserError(tr("holds no row", "没有数据行"), str(rows.path))
    return count


def file_rows(run: Any, file: Path) -> FileRows:
    """The rows of one file with the columns the task's answers are made from; read anew at each iteration."""
    data = run.recipe.data
    inputs, numbered = [], {}
    for column in run.task.inputs():
        theirs = data.columns.get(column.name, "")
        if theirs.isdigit():
            numbered[column.name] = theirs
        # The recipe's name for it is one more name it may have here: a new file need not look like the old one.
        inputs.append(replace(column, names=(theirs, *column.names)) if theirs else column)
    where = Path(file)
    try:
        return FileRows(where, open_rows(str(where), inputs, numbered, base=Path.cwd()), inputs[0].name)
    except UserError:
        if data.encoding is None:
            raise
    # Its content does not tell the encoding: then it is the one of the training files.
    rows = open_rows(str(where), inputs, numbered, encoding=data.encoding, base=Path.cwd())
    return FileRows(where, rows, inputs[0].name, data.encoding)


class FileRows:
    """Rows of a table, or the lines of a text that are not blank; `rejected` after an iteration as in `Rows`."""

    def __init__(self, path: Path, rows: Rows, column: str, encoding: str | None = None) -> None:
        self.path, self.table, self.column, self.encoding = path, rows, column, encoding
        self.text = all(about["format"] == "txt" for about in rows.guess["files"])

    @property
    def rejected(self) -> list[Problem]:
        return self.table.rejected

    @property
    def rejected_count(self) -> int:
        return self.table.rejected_count

    def __iter__(self) -> Iterator[Row]:
        if not self.text:
            yield from self.table
            return
        for source in find_sources(str(self.path), Path.cwd())[0]:
            for number, line in enumerate(read_lines(texts(source, self.encoding), source.name), 1):
                if line.strip():
                    yield Row({self.column: line.rstrip("\n")}, where=f"{source.name}:{number}")
