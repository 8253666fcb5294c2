"""Step 4, evaluate: a model's answers to rows it was not trained on, and what they are worth.

`score_part` is the part that training shares: answers in batches of like length, back in the order of the rows, scored
by the task. `evaluate` adds intervals and figures, and writes all files of the evaluation, or none of them.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multihead.data.columns import MEDIA
from multihead.data.loader import sequential
from multihead.data.store import Store
from multihead.errors import UserError, nearest, tr
from multihead.run import WEIGHTS, file_hash, replacing, size_text
from multihead.runtime import device as devices
from multihead.runtime import machine
from multihead.task import Answer, Example, Task

EVALUATE: dict[str, Any] = {"evaluate": True}
SAMPLES = 3
Tick = Callable[[int], None]


def answers(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int = 64,
    ask: Mapping[str, Any] = EVALUATE,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype = "float32",
    tick: Tick | None = None,
    lengths: np.ndarray | None = None,
) -> list[Answer]:
    """The answer to every example, in the order of the examples.

    Batches hold examples of like length; the model is put into eval mode for the time of it and back after.

    Args:
        ask: what `Task.predict` is asked for.
        precision: "float32", "bf16" or "auto", or the dtype they stand for.
        tick: called with the number of rows of each batch once it is answered (progress).
        lengths: length of each example; default: what the task says of a store's rows.
    """
    found: list[Answer | None] = [None] * len(examples)
    training = model.training
    model.eval()
    try:
        # Not inference_mode: training goes on with this module, and a table it builds now must stay usable there.
        with torch.no_grad(), _autocast(device, precision):
            for index in sequential(
                len(examples), batch_size, lengths_of(task, examples) if lengths is None else lengths
            ):
                batch = to_device(task.collate([examples[int(i)] for i in index]), device)
                replies = task.predict(model, batch, dict(ask))
                if len(replies) != len(index):
                    raise ValueError(f"{type(task).__name__}.predict gave {len(replies)} answers to {len(index)} rows")
                for i, reply in zip(index, replies, strict=True):
                    found[int(i)] = reply
                if tick is not None:
                    tick(len(index))
    finally:
        model.train(training)
    return [reply for reply in found if reply is not None]


def score_part(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    rows: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: str | torch.dtype = "float32",
) -> dict[str, float]:
    """The task's metrics of `model` over `examples`, as plain floats. Used by validation during training.

    Args:
        rows: the raw rows the examples came from, one each; taken from the store where `examples` is one, and empty
            where an example is not a row (windows of a stream).
    """
    replies = answers(task, model, examples, batch_size, device=device, precision=precision)
    return numbers(task.score(replies, raw_rows(examples) if rows is None else rows))  # type: ignore[arg-type]


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as plain floats, whatever kind of number the task returned."""
    return {name: float(value) for name, value in scores.items()}


def raw_rows(examples: Sequence[Example]) -> Sequence[dict[str, Any]]:
    """The raw row of each example: read from the store as asked for, or empty where an example is not a stored row."""
    if isinstance(examples, Store):
        if not _keeps_rows(examples):
            raise UserError(
                tr(
                    "of its rows only the encoding was kept, and metrics need the rows; give the file with --data",
                    "只保存了编码，没有保存原始数据行，而指标需要原始数据；请用 --data 给出文件本身",
                ),
                str(examples.folder),
            )
        return StoreRows(examples)
    return [{} for _ in range(len(examples))]


def _keeps_rows(store: Store) -> bool:
    try:
        if len(store):
            store.row(0)
    except ValueError:
        return False
    return True


class StoreRows(Sequence[dict[str, Any]]):
    """The raw rows of a store as a sequence that reads them when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: Any) -> Any:
        return [self.store.row(j) for j in range(*i.indices(len(self)))] if isinstance(i, slice) else self.store.row(i)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.store.rows()


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _autocast(device: torch.device | str, precision: str | torch.dtype) -> Any:
    place = torch.device(device)
    return devices.autocast(
        place, devices.choose_precision(precision, place) if isinstance(precision, str) else precision
    )


def lengths_of(task: Task, examples: Sequence[Example]) -> np.ndarray | None:
    """What the task says of the examples' lengths, where it can say it of these; else None."""
    lengths = task.length(examples) if isinstance(examples, Store) or hasattr(examples, "lengths") else None
    return lengths if lengths is not None and len(lengths) == len(examples) else None


# -- the whole evaluation ---------------------------------------------------------------------------------------------


def evaluate(
    run: Any,
    data: str | Path | Sequence[str | Path] | None = None,
    part: str | None = None,
    progress: bool = True,
    console: Any = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Measure a run on its held-out part, or on files of one's own, and write what was found into its folder.

    Writes ``predictions.jsonl``, ``metrics.json``, ``report.html`` and the model card ``README.md``: all of them once
    everything is known, or, where anything fails, none.

    Args:
        run: a `multihead.build.Run`.
        data: files instead of a part of the run; relative to the current folder.
        part: "test", "valid" or "train"; default: test where it has rows, else valid.
        progress: show a bar on a terminal's standard error.
        console: a rich console for the table of results; None prints none.
        precision: "float32" gives the figures of the model as it is served; "bf16" and "auto" are faster.

    Returns:
        ``{"metrics": {name: {"value", "low", "high"}}, "confidence", "rows", "part", "data", "model", "machine", …}``,
        as in ``metrics.json``.
    """
    began, task, settings = time.perf_counter(), run.task, run.recipe.evaluate
    with _store(run, data, part) as (store, about):
        # Never the training part's windows, which overlap: a token counts once.
        examples = task.examples(store, "valid" if about["part"] == "valid" else "test")
        rows = list(raw_rows(examples))
        with ticking(tr("evaluating", "评估"), len(examples), progress) as tick, torch.inference_mode():
            replies = answers(
                task, run.model, examples, settings.batch_size, device=run.device, precision=precision, tick=tick
            )
            explained = task.explain(run.model, examples)
        metrics = _intervals(task, replies, rows, settings, run.recipe.seed)
        figures = {**task.figures(replies, rows), **explained}
        figures.setdefault("samples", _samples(run, store))
        signatures = {"signatures": figures["signatures"]} if "signatures" in figures else {}
        result: dict[str, Any] = {
            "metrics": metrics,
            "confidence": settings.confidence,
            "rows": len(store),
            "examples": len(examples),
            **signatures,
            **about,
            "model": file_hash(run.folder.file(WEIGHTS)),
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "when": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": measured_on(run.device, precision),
            "command": _command(run, data, part),
            "seconds": round(time.perf_counter() - began, 2),
        }
        _write(run, result, figures, replies, rows)
    if console is not None:
        show(result, console)
        console.print(
            tr(f"report: {run.folder.file('report.html')}", f"报告：{run.folder.file('report.html')}"), markup=False
        )
    return result


@contextmanager
def _store(run: Any, data: Any, part: str | None) -> Iterator[tuple[Store, dict[str, Any]]]:
    """The encoded rows to measure on, and where they come from; new files are encoded into a folder that goes again."""
    if not data:
        yield _held_out(run, part)
        return
    if part is not None:
        raise UserError(tr(f"either data or part {part!r}, not both", f"data 与 part {part!r} 只能给一个"))
    from multihead.prepare import read_part

    paths = [str(p) for p in data] if isinstance(data, (list, tuple)) else [str(data)]
    work = run.folder.file(f"data/.evaluate.tmp-{os.getpid()}")
    try:
        store, read = read_part(run.recipe, run.task, paths, work / "store", Path.cwd())
        yield store, {"part": None, "data": paths, "rejected": read.rejected_count}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _held_out(run: Any, part: str | None) -> tuple[Store, dict[str, Any]]:
    parts = ("train", "valid", "test")
    if part is not None and part not in parts:
        near = nearest(part, parts)
        raise UserError(tr(f"no part is called '{part}'{near}; there are: {', '.join(parts)}; or give --data",
                           f"没有名为 '{part}' 的部分{near}；现有：{'、'.join(parts)}；也可用 --data 给出文件"),
                        str(run.folder.path))
    for name in ("test", "valid") if part is None else (part,):
        folder = run.folder.file(f"data/{name}")
        if folder.is_dir() and len(store := Store(folder)):
            return store, {"part": name, "data": []}
    what = (
        tr("neither test nor valid", "test 和 valid 都")
        if part is None
        else tr(f"part {part!r} does not", f"{part!r} 部分")
    )
    raise UserError(
        tr(
            f"{what} hold rows to measure on; give a file with --data, or set data.split in the recipe and train anew",
            f"{what}没有可供评估的数据；请用 --data 给出文件，或在配方中设置 data.split 后重新训练",
        ),
        str(run.folder.path),
    )


def _intervals(
    task: Task, replies: list[Answer], rows: list[dict[str, Any]], settings: Any, seed: int
) -> dict[str, Any]:
    found: dict[str, tuple[float, float | None, float | None]] = {}
    if settings.bootstrap:
        from multihead.metrics.intervals import bootstrap

        found.update(bootstrap(task.score, replies, rows, settings.bootstrap, settings.confidence, seed))
    else:
        found.update({name: (value, None, None) for name, value in numbers(task.score(replies, rows)).items()})
    return {
        name: dict(zip(("value", "low", "high"), map(_finite, three), strict=True)) for name, three in found.items()
    }


def _finite(value: Any) -> float | None:
    """JSON has neither NaN nor infinity: null stands for both."""
    return None if value is None or not math.isfinite(value) else float(value)


def _samples(run: Any, store: Store) -> list[dict[str, str]]:
    """Prompts gone on with, where the task has ``options.prompts``: those, else the beginnings of held-out rows."""
    prompts = getattr(run.task.options, "prompts", None)
    if not run.task.emits or prompts is None:
        return []
    if not prompts:
        chosen = {int(i) for i in np.linspace(0, len(store) - 1, SAMPLES)}
        column = run.task.columns[0].name
        prompts = [beginning for i in sorted(chosen) if (beginning := _beginning(str(_row(store, i).get(column, ""))))]
    from multihead.predict import predict

    ask = {"max_tokens": 120, "temperature": 0.8, "seed": run.recipe.seed}
    return [
        {"prompt": p, "text": answer["text"]} for p, answer in zip(prompts, predict(run, prompts, ask), strict=True)
    ]


def _beginning(text: str, length: int = 32) -> str:
    """The first words of a text, not cut inside one."""
    start = text.lstrip()[:length]
    kept = start.rpartition(" ")[0] if len(text.lstrip()) > length else start
    return kept or start


def _row(store: Store, i: int) -> dict[str, Any]:
    return store.row(i) if _keeps_rows(store) else {}


def measured_on(device: torch.device, precision: str) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = dict(devices.versions())
    facts["cpu"] = machine.processor()
    facts["cores"], facts["threads"] = devices.cores(), torch.get_num_threads()
    if memory := machine.memory(torch.device("cpu")):
        facts["memory"] = size_text(memory)
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts["precision"] = str(devices.choose_precision(precision, device)).removeprefix("torch.")
    return facts


def _command(run: Any, data: Any, part: str | None) -> str:
    words = ["multihead", "evaluate", str(run.folder.path)]
    for file in data if isinstance(data, (list, tuple)) else [data] if data else []:
        words += ["--data", str(file)]
    if part is not None:
        words += ["--part", part]
    return shlex.join(words)


# -- writing and showing ----------------------------------------------------------------------------------------------


def _write(
    run: Any, result: dict[str, Any], figures: dict[str, Any], replies: Sequence[Answer], rows: Sequence[Any]
) -> None:
    """Everything is rendered and written under temporary names before the first file takes its place."""
    from multihead import card, report

    files = {
        "report.html": report.render(run, result, figures),
        "README.md": card.render(run, result, figures),
        "metrics.json": json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
    }
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(replacing(run.folder.file(name))).write_text(content, encoding="utf-8")
        with open(stack.enter_context(replacing(run.folder.file("predictions.jsonl"))), "w", encoding="utf-8") as file:
            for line in prediction_lines(run.task, replies, rows):
                file.write(line + "\n")
        for name, raw in _pictures(figures).items():
            stack.enter_context(replacing(run.folder.file(name))).write_bytes(raw)


def _pictures(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of galleries that name a folder, as files below ``pictures/`` of the run."""
    return {
        f"pictures/{gallery['folder']}-{row}-{i}.png": base64.b64decode(uri.partition(",")[2])
        for gallery in figures.get("galleries") or [] if gallery.get("folder")
        for row, one in enumerate(gallery["rows"], 1) for i, uri in enumerate(one["pictures"], 1)
    }


def prediction_lines(task: Task, replies: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of ``predictions.jsonl``: a row's place, its input and target columns, and the answer to it."""
    inputs = [c.name for c in task.inputs()]
    targets = [c.name for c in task.columns if c.name not in inputs]
    inputs = [c.name for c in task.inputs() if c.kind not in MEDIA]  # a file's place says enough
    for reply, row in zip(replies, rows, strict=True):
        line: dict[str, Any] = {}
        if row:
            line["where"] = getattr(row, "where", "")
            line["input"] = {name: row[name] for name in inputs if name in row}
            line["target"] = {name: row[name] for name in targets if name in row}
        yield json.dumps(plain(line | {"answer": reply}), ensure_ascii=False)


def plain(value: Any) -> Any:
    """The same value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return _finite(value) if isinstance(value, float) else value


def show(result: Mapping[str, Any], console: Any) -> None:
    """Print the metrics as a table on a rich console."""
    from rich.table import Table

    from multihead.report import name_of, shown

    table = Table(box=None, pad_edge=False)
    for heading, side in (
        (tr("metric", "指标"), "left"),
        (tr("value", "值"), "right"),
        (f"{100 * result['confidence']:g} %", "left"),
    ):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, metric in result["metrics"].items():
        value, low, high = shown(metric)
        table.add_row(tr(*name_of(name)), value, f"{low} – {high}" if low else "")
    console.print(table)


@contextmanager
def ticking(what: str, total: int | None, visible: bool = True) -> Iterator[Tick]:
    """A bar on standard error while the block runs, where that is a terminal. Gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as bar:
        row = bar.add_task(what, total=total)
        yield lambda n: bar.advance(row, n)
