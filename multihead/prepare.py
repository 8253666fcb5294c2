"""Step 1, prepare: from a person's files to stores of encoded rows, and a report of what the data holds.

Rows are read three times and never all kept: once to deal them out to parts (`multihead.dealing`), once to fit the
codecs on the training part, once to encode. Everything is written beside the run and moved into it when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multihead import recipe as recipes
from multihead import strict_yaml
from multihead.data.columns import MEDIA
from multihead.data.folders import parts_of
from multihead.data.rows import Row, Rows, open_rows
from multihead.data.store import Store, StoreWriter
from multihead.dealing import PARTS, Dealt, PartRows, Tick, conflicts, count, deal, names, refuse_many, refuse_none
from multihead.errors import Problem, UserError, tr
from multihead.recipe import Data, Files, Recipe
from multihead.run import RECIPE, WEIGHTS, RunFolder, file_hash, fsync_folder, write_json, writing
from multihead.starting import suits
from multihead.task import Task, find

REPORT = "data/report.json"
FAULTS = 100
"""Rows that could not be encoded whose reason is kept."""
MAY_CHANGE = ("serve.", "evaluate.", "train.log_every", "train.save_every", "train.keep", "train.device",
              "train.tensorboard", "train.parallel", "train.recompute")
"""Keys that a resumed run may change: they touch neither the data nor the weights."""
AFTER_PREPARE = ("name", "model.", "train.")
"""Keys that what is prepared does not depend on, but for those in `BEFORE`."""
BEFORE = ("model.from",)


def run_step(
    path: str | Path,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    restart: bool = False,
    tick: Tick | None = None,
) -> tuple[RunFolder, dict[str, Any]]:
    """The first step on its own: the run folder with data and codecs, and the data report.

    Args and errors: as `multihead.train.train`.
    """
    with begin(path, overrides, run, restart, tick) as (folder, _, _, report):
        return folder, report


@contextlib.contextmanager
def begin(
    path: str | Path, overrides: Sequence[str], run: str | Path | None, restart: bool, tick: Tick | None = None
) -> Iterator[tuple[RunFolder, Recipe, Task, dict[str, Any]]]:
    """A run folder, locked and prepared, with its recipe, its task and the data report; new, or as it was left.

    Where preparing fails, nothing of it is left: a folder made for it is removed again, and of a run that `restart`
    was to replace nothing is lost.
    """
    recipe = recipes.load(path, overrides, find=find)
    task = make_task(recipe, Path(path).parent)
    folder = RunFolder.create(Path(run) if run else Path("runs") / recipe.name)
    give_origin(recipe, task, folder)
    with folder.lock():
        try:
            anew = restart or not claim(folder, recipe)
            report = None if anew else prepared(folder, task)
            if report is None:
                report = prepare(recipe, task, folder, tick, anew)
            else:
                folder.write_atomic(RECIPE, recipe.dump())
        except BaseException:
            if not folder.exists():
                folder.discard()
            raise
        yield folder, recipe, task, report


def make_task(recipe: Recipe, base: Path) -> Task:
    """The recipe's task, without codecs yet. `base`: the folder a task file's path is relative to."""
    return find(recipe.task, base)(recipe.options, seed=recipe.seed)


def give_origin(recipe: Recipe, task: Task, folder: RunFolder) -> None:
    """Tell the task which weights ``model.from`` names, if any."""
    path = recipe.model.from_
    if path is None or task.origin is not None:
        return
    if Path(path).resolve() == folder.path.resolve():
        raise UserError(tr("model.from is the folder of this very run; choose another folder with --run",
                           "model.from 就是本次训练自己的文件夹；请用 --run 另选文件夹"), path)
    from multihead.weights import open_origin

    task.origin = open_origin(path)
    if suits(task, task.origin):
        return
    if task.origin.reads == "pictures":
        raise UserError(tr(f"these weights read pictures ({task.origin.family}), and {recipe.task} has none",
                           f"这些权重读取图片（{task.origin.family}），而 {recipe.task} 没有图片"), path)
    if task.origin.reads == "sound":
        raise UserError(tr(f"these weights read recordings ({task.origin.family}), and {recipe.task} has none",
                           f"这些权重读取录音（{task.origin.family}），而 {recipe.task} 没有录音"), path)
    hears = any(column.kind == "audio" for column in task.inputs())
    en, zh = ("a Whisper", "Whisper") if hears else ("a ViT or DeiT, or from a run of image-classification",
                                                     "ViT、DeiT 或 image-classification 的训练结果")
    raise UserError(tr(f"these weights read texts ({task.origin.family}), and {recipe.task} has none; start from {en}",
                       f"这些权重读取文本（{task.origin.family}），而 {recipe.task} 没有文本；请从 {zh} 开始"), path)


def prepare(
    recipe: Recipe, task: Task, folder: RunFolder, tick: Tick | None = None, restart: bool = False
) -> dict[str, Any]:
    """Read the recipe's data, deal it into parts, fit the task's codecs and write ``data/`` and ``codec/``.

    Args:
        restart: remove everything else from the folder, once the new data is whole.

    Returns:
        The data report, also written to ``data/report.json``.

    Raises:
        UserError: with the place of what is wrong; the folder is then as it was.
    """
    tick = tick or (lambda rows: None)
    give_origin(recipe, task, folder)
    sources = task.gather(_open_all(recipe.data, task, folder.path), recipe.data)
    dealt = deal(recipe, task, sources, tick)
    try:
        task.fit(PartRows(dealt["train"], "train"))
    except UserError as error:
        where = names(sources["train"])
        raise UserError.many([Problem(p.message, p.where or where) for p in error.problems]) from None
    _try_model(recipe, task)
    work = folder.file(f".prepare.tmp-{os.getpid()}")
    try:
        with writing(folder.path, tr("the prepared data", "准备好的数据")):
            report = _write(recipe, task, sources, dealt, work, tick)
            _take_up(work, folder, recipe, restart)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _try_model(recipe: Recipe, task: Task) -> None:
    """Make the model and let it go: what cannot be built is known before all rows are encoded."""
    if type(task).model is Task.model:
        return
    with torch.random.fork_rng(devices=[]):
        task.model(recipe.model)


def _write(recipe: Recipe, task: Task, sources: Mapping[str, Rows], dealt: Mapping[str, Dealt], work: Path,
           tick: Tick) -> dict[str, Any]:
    """Everything that ``prepare`` makes, into the folder `work`."""
    report: dict[str, Any] = {
        "guess": {part: source.guess for part, source in sources.items()},
        "reading": {part: source.describe() for part, source in sources.items()},
        "parts": {},
    }
    faults: list[Problem] = []
    bad = 0
    for part in PARTS:
        rows = PartRows(dealt.get(part) or dealt["train"], part)
        store, found, many = _encode(task, rows, part, work / "data" / part, part != "train", tick)
        faults, bad = faults + found, bad + many
        report["parts"][part] = describe(task, store)
    refuse_many(faults, sum(p["rows"] for p in report["parts"].values()) + bad, recipe.data.max_rejected, bad)
    rejected = [problem for d in dealt.values() for problem in d.rejected] + faults
    report["rejected"] = {
        "count": sum(d.rejected_count for d in dealt.values()) + bad,
        "examples": [{"where": p.where, "message": p.message} for p in rejected[:50]],
    }
    report["duplicates"] = {
        "copies": sum(d.copies for d in dealt.values()),
        "leaks": sum(d.leaks for d in dealt.values()),
        "dropped": recipe.data.deduplicate,
    }
    report["conflicts"] = conflicts(dealt.values(), task)
    report["data"] = files_of(dict.fromkeys(path for source in sources.values() for path in source.files))
    report["origin"] = files_of(task.origin.files()) if task.origin is not None else {}
    (work / "codec").mkdir()
    task.save(work / "codec")
    write_json(work / REPORT, report)
    return report


def _take_up(work: Path, folder: RunFolder, recipe: Recipe, restart: bool) -> None:
    """Move what was prepared into the run.

    Killed anywhere in here, the folder stays a run (it keeps a recipe) that is not prepared (the report comes with the
    data, last), and its checkpoints are gone before data of another content can stand beside them.
    """
    if restart:
        folder.empty(keep=(work.name, RECIPE, "codec", "data"))
    folder.file(REPORT).unlink(missing_ok=True)
    folder.write_atomic(RECIPE, recipe.dump())
    for name in ("codec", "data"):
        if folder.file(name).exists():
            shutil.rmtree(folder.file(name))
        os.rename(work / name, folder.file(name))
    fsync_folder(folder.path)


def read_part(
    recipe: Recipe, task: Task, paths: Files, folder: Path, base: Path, tick: Tick | None = None
) -> tuple[Store, Rows]:
    """Encode new data by codecs already fitted, into a store at `folder` (evaluation of files training never saw).

    Args:
        base: folder that relative paths start from.

    Raises:
        UserError: as ``prepare`` does.
    """
    tick = tick or (lambda rows: None)
    rows = task.gather({"test": _open(recipe.data, paths, task, base, known=True)}, recipe.data)["test"]
    dealt = count(rows, task, tick)
    total, limit = rows.count + dealt.rejected_count, recipe.data.max_rejected
    refuse_many(dealt.rejected, total, limit, dealt.rejected_count)
    refuse_none(dealt)
    store, faults, bad = _encode(task, PartRows(dealt, "train"), "test", folder, True, tick)
    refuse_many(faults, total, limit, bad)
    return store, rows


def describe(task: Task, store: Store) -> dict[str, Any]:
    """Rows, lengths and what the task itself has to say of one part."""
    if not len(store):
        return {"rows": 0}
    found: dict[str, Any] = {"rows": len(store)}
    # An array of more than two axes is a picture and no sequence; nor is what is equally long in every row.
    sequences = [key for key in store.keys if 0 < store[0][key].ndim < 3]
    ragged = next((key for key in sequences if len(store) == 1 or np.ptp(store.lengths(key)) > 0), None)
    if ragged is not None:
        lengths = store.lengths(ragged)
        counts, edges = np.histogram(lengths, bins=min(30, max(1, int(lengths.max() - lengths.min()))))
        found["lengths"] = {
            "of": ragged, "min": int(lengths.min()), "median": float(np.median(lengths)),
            "mean": round(float(lengths.mean()), 2), "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "histogram": {"counts": counts.tolist(), "edges": [round(float(e), 2) for e in edges]},
        }
    return found | task.describe(store)


def prepared(folder: RunFolder, task: Task) -> dict[str, Any] | None:
    """The report of an earlier preparation of this run, with the task's codecs loaded; None where there is none.

    Also None where the data files have changed since and nothing is trained yet, and, after a word on stderr, where
    what was prepared is no longer whole: the same data gives the same again.

    Raises:
        UserError: where the run was trained on data files that have changed since.
    """
    path = folder.file(REPORT)
    if not path.is_file():
        return None
    try:
        report = _read_report(folder)
        for part in PARTS:
            Store(folder.file(f"data/{part}"))
        task.load(folder.file("codec"))
    except UserError as error:
        what = error.problems[0]
        print(tr(f"note: {what}. Preparing the data again", f"提示：{what}。重新准备数据"), file=sys.stderr)
        return None
    since = path.stat().st_mtime_ns
    used = {**report["data"], **report.get("origin", {})}
    changed = [name for name, then in used.items() if _changed(Path(name), then, since)]
    if changed and not _trained(folder):
        return None
    if changed:
        kinds = (tr("data", "数据"), tr("weights that `model.from` names", "起始权重（model.from）"))
        raise UserError(
            tr(f"the {kinds[changed[0] not in report['data']]} of this run have changed since it was prepared: "
               f"{', '.join(changed)}; add --restart to prepare and train anew, or choose another folder with --run",
               f"本次训练的{kinds[changed[0] not in report['data']]}在准备之后有改动：{'、'.join(changed)}；"
               "加 --restart 重新准备并训练，或用 --run 另选文件夹"), str(folder.path))
    return report


def _read_report(folder: RunFolder) -> dict[str, Any]:
    report = folder.read_json(REPORT)
    data = report.get("data") if isinstance(report, dict) else None
    if not isinstance(data, dict) or not all(isinstance(v, dict) and "hash" in v for v in data.values()):
        raise UserError(tr("is not a data report", "不是数据报告"), str(folder.file(REPORT)))
    return report  # type: ignore[return-value]


def files_of(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, to notice later that one has changed."""
    return {str(path): {"bytes": path.stat().st_size, "hash": file_hash(path)} for path in paths}


def _changed(path: Path, then: Mapping[str, Any], since: int) -> bool:
    """Whether a file has another content; one that was not touched after the time `since` (in ns) is not read again."""
    if not path.is_file():
        return False  # the store holds all that training needs; a file that has moved away is no other data
    stat = path.stat()
    if stat.st_size != then.get("bytes"):
        return True
    return max(stat.st_mtime_ns, stat.st_ctime_ns) >= since and file_hash(path) != then["hash"]


# -- the run folder ----------------------------------------------------------------------------------------------------


def claim(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether what is prepared in `folder`, if anything is, serves `recipe`; where nothing is trained yet, it need not.

    Raises:
        UserError: where the folder holds what another recipe has trained; it lists what differs.
    """
    if not folder.exists():
        return True
    try:
        then = strict_yaml.read(folder.file(RECIPE), []).values
    except UserError as error:
        fault = error.problems[0]
        raise UserError(tr(f"{fault.message}. The recipe of this run is damaged: choose another folder with --run, or "
                           "add --restart to remove this run and begin anew",
                           f"{fault.message}。本次训练的配方已损坏：请用 --run 另选文件夹，"
                           "或加 --restart 删除旧的训练并重新开始"), fault.where) from None
    with contextlib.suppress(UserError):  # keys that are younger than the run have had their default all the time
        then = recipes.load(folder.file(RECIPE), find=find, settled=True).plain()
    changed = [d for d in differences(then, recipe.plain()) if not d.startswith(MAY_CHANGE)]
    if changed and _trained(folder):
        raise UserError(
            tr("this run folder belongs to a recipe that differs: " + "; ".join(changed[:12]) +
               ". Choose another folder with --run, or add --restart to remove this run and begin anew",
               "这个训练文件夹属于另一份配方，不同之处：" + "；".join(changed[:12]) +
               "。请用 --run 另选文件夹，或加 --restart 删除旧的训练并重新开始"), str(folder.path))
    return all(d.startswith(AFTER_PREPARE) and not d.startswith(BEFORE) for d in changed)


def _trained(folder: RunFolder) -> bool:
    """Whether there is something that took time to learn."""
    return folder.file(WEIGHTS).exists() or any(folder.file("checkpoints").glob("step-*"))


def differences(then: dict[str, Any], now: dict[str, Any], at: str = "") -> list[str]:
    """Keys whose values differ between two resolved recipes: ``train.lr: 0.001 → 0.002``."""
    found = []
    for key in {**then, **now}:
        a, b, name = then.get(key), now.get(key), f"{at}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {strict_yaml.inline(a)} → {strict_yaml.inline(b)}")
    return found


# -- reading and encoding ---------------------------------------------------------------------------------------------


def _open_all(data: Data, task: Task, base: Path) -> dict[str, Rows]:
    """The rows of every part that has files of its own; a folder or an archive of pictures, clips or recordings may
    hold several. UserError with what is wrong in any of them."""
    sources: dict[str, Rows] = {}
    problems: list[Problem] = []
    named: dict[str, Files | None] = {part: getattr(data, part) for part in PARTS}
    alone = data.valid is None and data.test is None
    if alone and isinstance(data.train, str) and any(column.kind in MEDIA for column in task.columns):
        named |= (found := parts_of(data.train, base))
        if found:
            told = ", ".join(f"{part} = {path}" for part, path in found.items())
            print(tr(f"note: parts of the data were found by their folders: {told}",
                     f"提示：按文件夹找到了数据的各部分：{told}"), file=sys.stderr)
    for part, paths in named.items():
        if paths is None:
            continue
        try:
            sources[part] = _open(data, paths, task, base)
        except UserError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise UserError.many(problems)
    return sources


def _open(data: Data, paths: Files, task: Task, base: Path, known: bool = False) -> Rows:
    """`known`: the files are not the recipe's own, whose names for columns are then but further names to look for."""
    columns, mapping = list(task.events or task.columns), data.columns
    if known:
        columns = [replace(c, names=(mapping.get(c.name, c.name), *c.names)) for c in columns]
        mapping = {ours: theirs for ours, theirs in mapping.items() if theirs.isdecimal()}
    return open_rows(paths, columns, mapping, encoding=data.encoding, delimiter=data.delimiter, header=data.header,
                     base=base)


def _encode(
    task: Task, rows: Iterable[Row], part: str, folder: Path, keep_rows: bool, tick: Tick
) -> tuple[Store, list[Problem], int]:
    """Write the encoded rows; those that cannot be encoded (a label never seen in training) are left out.

    Returns:
        the store, why rows were left out (for the first of them), and how many were.
    """
    faults: list[Problem] = []
    bad = 0
    with StoreWriter(folder) as writer:
        for row in rows:
            try:
                task.check(row, part)
                writer.add(task.encode(row), task.kept(row) if keep_rows else None)
            except UserError as error:
                bad += 1
                if len(faults) < FAULTS:
                    faults += [Problem(p.message, p.where or row.where) for p in error.problems]
            if len(writer) % 1024 == 0:
                tick(1024)
    return Store(folder), faults, bad
