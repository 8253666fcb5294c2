"""Step 1: who goes to which part, what is written, what is reported, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multihead import prepare
from multihead.codec.text import LabelCodec
from multihead.data.rows import LABEL_NAMES, TEXT_NAMES, Column, Row, open_rows
from multihead.data.store import Store
from multihead.dealing import DROPPED, PARTS, Dealt, conflicts, deal
from multihead.errors import UserError
from multihead.recipe import Recipe
from multihead.run import RunFolder
from multihead.task import Task, find


class Labels(Task):
    """Texts with labels, encoded as code points: the smallest task there is."""

    columns = (Column("text", "text", names=TEXT_NAMES), Column("label", "label", names=LABEL_NAMES, target=True))

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        self.labels = LabelCodec.fit(row["label"] for row in rows)

    def encode(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        ids = np.frombuffer(row["text"].encode("utf-32-le"), np.int32)
        return {"ids": ids, "label": np.array(self.labels.encode(row["label"]))}

    def save(self, folder: Path) -> None:
        self.labels.save(folder)

    def load(self, folder: Path) -> None:
        self.labels = LabelCodec.load(folder)


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def recipe_of(seed: int = 0, **data: Any) -> Recipe:
    return Recipe(task="labels", name="x", seed=seed, data=data)  # type: ignore[arg-type]


def prepared(recipe: Recipe, run: Path, task: Task | None = None, **options: Any) -> dict[str, Any]:
    return prepare.prepare(recipe, task or Labels(), RunFolder.create(run), **options)


def texts(run: Path, part: str) -> list[str]:
    return ["".join(map(chr, example["ids"])) for example in Store(run / "data" / part)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its content, but for the lock."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def some_rows(count: int, kinds: int = 10**6, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": f"text {rng.randrange(kinds)}", "label": rng.choice("ab"), "user": rng.randrange(40)}
            for _ in range(count)]


# -- dealing -----------------------------------------------------------------------------------------------------------

row = st.tuples(st.sampled_from("abcdefghijklmnop"), st.sampled_from("uvwxyz"))


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=60), later=st.lists(row, max_size=12),
       valid_file=st.lists(row, max_size=6), by=st.sampled_from(["random", "order", "group"]),
       shares=st.tuples(*[st.sampled_from([0.0, 0.1, 0.3])] * 2), deduplicate=st.booleans(), seed=st.integers(0, 5))
def test_no_row_stands_in_two_parts(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], later: list[Any],
                                    valid_file: list[Any], by: str, shares: tuple[float, float], deduplicate: bool,
                                    seed: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    given = {"train": rows, "test": later, "valid": valid_file}
    files = {part: jsonl(folder / f"{part}.jsonl", ({"text": t, "label": g, "user": g} for t, g in of))
             for part, of in given.items() if of}
    split = {"valid": shares[0], "test": shares[1], "by": by, "group": "user" if by == "group" else None}
    recipe, task = recipe_of(seed, **files, split=split, deduplicate=deduplicate), Labels()
    sources = {part: open_rows(path, task.columns) for part, path in files.items()}
    try:
        dealt = deal(recipe, task, sources, lambda n: None)
    except UserError:
        assume(False)
    for part, of in dealt.items():
        check_source(of, given[part], part, by, deduplicate)
    where: dict[str, set[int]] = {}
    for part, of in dealt.items():
        for (text, _), to in zip(given[part], of.parts.tolist(), strict=True):
            if to != DROPPED:
                where.setdefault(text, set()).add(to)
    assert all(len(parts) == 1 for parts in where.values()), "a row in two parts"
    assert set(where) == {text for of in given.values() for text, _ in of}, "a row in no part"
    if later:
        kept = {text for (text, _), to in zip(later, dealt["test"].parts, strict=True) if to == 2}
        assert kept == {text for text, _ in later}, "a given test file stays whole"
    assert (dealt["train"].parts == 0).any()


def check_source(dealt: Dealt, rows: Sequence[Any], part: str, by: str, deduplicate: bool) -> None:
    to = dealt.parts
    dropped = int((to == DROPPED).sum())
    assert dropped == dealt.leaks + (dealt.copies if deduplicate else 0)
    assert dealt.copies <= len(rows) - len({text for text, _ in rows})
    if part != "train":
        assert set(to.tolist()) <= {PARTS.index(part), DROPPED}
    elif by == "order":
        kept = to[to != DROPPED]
        assert (np.diff(kept.astype(int)) >= 0).all(), "train, then valid, then test"
    elif by == "group":
        groups = {(g, p) for (_, g), p in zip(rows, to.tolist(), strict=True) if p != DROPPED}
        assert len(groups) == len({g for g, _ in groups}), "a group in two parts"


def test_shares_and_seeds(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", ({"text": f"t{i}", "label": i % 2} for i in range(1000)))
    held: list[set[str]] = []
    for run, seed in enumerate((0, 0, 1)):
        report = prepared(recipe_of(seed, train=train, split={"valid": 0.1, "test": 0.2}), tmp_path / str(run))
        assert [report["parts"][p]["rows"] for p in PARTS] == [700, 100, 200]
        held.append(set(texts(tmp_path / str(run), "test")))
    assert held[0] == held[1] and len(held[0] & held[2]) < 80  # 40 by chance


@pytest.mark.parametrize("by", ["group", "random"])
def test_a_large_group_or_a_row_with_many_copies_goes_to_train(tmp_path: Path, by: str) -> None:
    rows = [{"text": f"t{i}" if by == "group" else "same", "label": "a", "user": "one"} for i in range(90)]
    rows += [{"text": f"other {i}", "label": "b", "user": f"u{i // 2}"} for i in range(30)]
    train = jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(8):
        split = {"valid": 0.1, "test": 0.1, "by": by, "group": "user" if by == "group" else None}
        report = prepared(recipe_of(seed, train=train, split=split, deduplicate=False), tmp_path / str(seed))
        assert [report["parts"][p]["rows"] for p in PARTS] == [96, 12, 12]
        assert all(t.startswith("other") for p in ("valid", "test") for t in texts(tmp_path / str(seed), p))


def test_by_order_the_last_rows_are_held_out_and_order_is_kept(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", ({"text": f"{i:03}", "label": i % 2} for i in range(100)))
    prepared(recipe_of(train=train, split={"by": "order", "valid": 0.2, "test": 0.1}), tmp_path / "run")
    order = [f"{i:03}" for i in range(100)]
    assert [texts(tmp_path / "run", p) for p in PARTS] == [order[:70], order[70:90], order[90:]]


def test_five_rows_are_enough_and_two_are_not(tmp_path: Path) -> None:
    report = prepared(recipe_of(train=jsonl(tmp_path / "a.jsonl", some_rows(5))), tmp_path / "run")
    assert [report["parts"][p]["rows"] for p in PARTS] == [3, 1, 1]
    few = jsonl(tmp_path / "b.jsonl", some_rows(2))
    with pytest.raises(UserError, match=r"b\.jsonl.*2 different rows cannot be dealt to 3 parts.*data\.split\.test=0"):
        prepared(recipe_of(train=few), tmp_path / "run2")
    report = prepared(recipe_of(train=few, split={"valid": 0, "test": 0}), tmp_path / "run3")
    assert report["parts"]["train"]["rows"] == 2


def test_limit_reads_only_so_many_rows(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", ({"text": f"{i:03}", "label": "x"} for i in range(100)))
    with open(train, "a") as file:
        file.write("not json\n")
    report = prepared(recipe_of(train=train, limit=50, split={"by": "order"}), tmp_path / "run")
    assert texts(tmp_path / "run", "test") == [f"{i:03}" for i in range(45, 50)] and report["rejected"]["count"] == 0


# -- what is written ---------------------------------------------------------------------------------------------------


def test_prepared_twice_is_the_same_bytes(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", some_rows(300, kinds=200))
    first = prepared(recipe_of(train=train, deduplicate=False), tmp_path / "one")
    os.utime(train, (1, 1))
    second = prepared(recipe_of(train=train, deduplicate=False), tmp_path / "two")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert one == two and first == second
    assert {"recipe.yaml", "codec/labels.json", "data/report.json", "data/test/rows.jsonl"} <= one.keys()
    assert "data/train/rows.jsonl" not in one, "raw rows are kept where they are evaluated"


@pytest.mark.parametrize(("label", "kinds"), [
    ([1, 0, 5], ["0", "1", "5"]), ([True, False], ["false", "true"]), ([1.0, 2.5, 10], ["1", "2.5", "10"]),
    (["好", "坏"], ["坏", "好"]), ([" a", "a "], ["a"]),
])  # fmt: skip
def test_labels_of_any_plain_type(tmp_path: Path, label: list[Any], kinds: list[str]) -> None:
    train = jsonl(tmp_path / "a.jsonl", ({"text": f"t{i}", "label": label[i % len(label)]} for i in range(40)))
    prepared(recipe_of(train=train), tmp_path / "run")
    assert sorted(LabelCodec.load(tmp_path / "run/codec").names) == sorted(kinds)


def test_paths_with_blanks_and_chinese_and_a_very_long_row(tmp_path: Path) -> None:
    folder = tmp_path / "我的 数据" / "it's [1]"
    folder.mkdir(parents=True)
    rows = [*some_rows(20), {"text": "长" * 1_000_000, "label": "a"}]
    recipe = recipe_of(train=jsonl(folder / "评论 1.jsonl", rows), split={"valid": 0, "test": 0})
    report = prepared(recipe, folder / "训练")
    assert report["parts"]["train"]["rows"] == 21 and report["parts"]["train"]["lengths"]["max"] == 1_000_000


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 10_000):
        body = "字" * 1000
        train = jsonl(tmp_path / f"{count}.jsonl", ({"text": f"{i}{body}", "label": i % 2} for i in range(count)))
        recipe = recipe_of(train=train)
        tracemalloc.start()
        prepared(recipe, tmp_path / f"run{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert os.path.getsize(train) > 30_000_000
    assert peaks[1] < 8_000_000 and peaks[1] < 2 * peaks[0]


# -- what is reported --------------------------------------------------------------------------------------------------


def test_copies_leaks_and_rejected_rows_are_counted_and_listed(tmp_path: Path) -> None:
    train = tmp_path / "a.csv"
    good = "".join(f"t{i},{i % 2}\n" for i in range(40))
    train.write_text("text,label\n" + good + "t0,0\nt1,1\nt1,1\n,0\nx,\na,b,c\n")
    pairs = [("t5", 1), ("new", 0), ("odd", 7)]
    test = jsonl(tmp_path / "b.jsonl", ({"text": text, "label": label} for text, label in pairs))
    report = prepared(recipe_of(train=str(train), test=test, max_rejected=0.5), tmp_path / "run")
    assert report["duplicates"] == {"copies": 3, "leaks": 1, "dropped": True}
    assert report["rejected"]["count"] == 4
    said = {Path(p["where"]).name: p["message"] for p in report["rejected"]["examples"]}
    assert said.keys() == {"a.csv:45", "a.csv:46", "a.csv:47", "b.jsonl:3"}
    assert "'text' is empty" in said["a.csv:45"] and "label '7' is not one of the 2 labels" in said["b.jsonl:3"]
    assert report["parts"]["test"]["rows"] == 2 and report["parts"]["train"]["rows"] == 35


def test_too_many_rejected_rows_stop_with_their_places_and_the_way_out(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", [*some_rows(50), *({"text": "", "label": "a"} for _ in range(30))])
    with pytest.raises(UserError) as caught:
        prepared(recipe_of(train=train), tmp_path / "run")
    problems = caught.value.problems
    assert [p.where for p in problems[:10]] == [f"{train}:{i}" for i in range(51, 61)] and len(problems) == 11
    assert "30 of 80 rows" in problems[-1].message and "data.max_rejected=0.38" in problems[-1].message
    assert tree(tmp_path / "run") == {}
    prepared(recipe_of(train=train, max_rejected=0.38), tmp_path / "run")


def test_rows_that_contradict_each_other_are_counted_and_shown(tmp_path: Path) -> None:
    odd = [("好", "a"), ("坏", "b"), ("好", "b"), ("好", "a"), ("坏", "b")]
    rows = [*some_rows(60, seed=3), *({"text": text, "label": label} for text, label in odd)]
    train = jsonl(tmp_path / "a.jsonl", rows)
    test = jsonl(tmp_path / "b.jsonl", [{"text": "坏", "label": "a"}])
    found = prepared(recipe_of(train=train, test=test), tmp_path / "run")["conflicts"]
    assert (found["identities"], found["rows"]) == (2, 6)
    places = [[(Path(r["where"]).name, r["target"]["label"]) for r in group] for group in found["examples"]]
    assert places == [[("a.jsonl:61", "a"), ("a.jsonl:63", "b")], [("a.jsonl:62", "b"), ("b.jsonl:1", "a")]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([None, "x", "y"])), min_size=1, max_size=30))
def test_conflicts_are_those_a_plain_count_finds(pairs: list[tuple[str, str | None]]) -> None:
    rows = [Row({"text": t, "label": y} if y else {"text": t}, str(i)) for i, (t, y) in enumerate(pairs)]
    keys = np.array([ord(t) for t, _ in pairs], np.uint64)
    targets = np.array([ord(y) if y else 0 for _, y in pairs], np.uint64)
    source = Dealt(rows, np.zeros(len(pairs), np.uint8), keys, None, targets)  # type: ignore[arg-type]
    kinds = {t: {y for s, y in pairs if s == t and y} for t, _ in pairs}
    bad = {t for t, of in kinds.items() if len(of) > 1}
    found = conflicts([source], Labels())
    assert found["identities"] == len(bad) == len(found["examples"])
    assert found["rows"] == sum(t in bad and y is not None for t, y in pairs)


def test_a_task_without_targets_has_no_conflicts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("开头\n" + "四五六\n" * 501 + "一二三\n" * 3000)
    task = find("text-generation")()
    split = {"by": "order", "valid": 0.4, "test": 0}
    recipe = recipe_of(train=str(tmp_path / "a.txt"), split=split, deduplicate=False)
    report = prepared(recipe, tmp_path / "run", task)
    assert report["conflicts"] == {"identities": 0, "rows": 0, "examples": []}
    assert report["duplicates"]["leaks"] > 0, "pieces that also stand in what is held out are not trained on"


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_group_column_that_is_not_there_and_rows_without_a_group(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", some_rows(30))
    said = r"a\.jsonl:1: there is no column 'usr'.*did you mean 'user'.*text, label, user"
    with pytest.raises(UserError, match=said):
        prepared(recipe_of(train=train, split={"by": "group", "group": "usr"}), tmp_path / "run")
    rows = some_rows(30)
    rows[3]["user"], rows[7]["user"] = "", None
    train = jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepared(recipe_of(train=train, split={"by": "group", "group": "user"}), tmp_path / "run")
    assert [p.where for p in caught.value.problems] == [f"{train}:4", f"{train}:8", ""]
    assert tree(tmp_path / "run") == {}


# -- taken up again ----------------------------------------------------------------------------------------------------

TASK = """
import numpy as np
from multihead import Column, Task
from multihead.codec.text import LabelCodec

class Small(Task):
    columns = (Column("text"), Column("label", "label", target=True))

    def fit(self, rows):
        self.labels = LabelCodec.fit(row["label"] for row in rows)

    def encode(self, row):
        ids = np.frombuffer(row["text"].encode("utf-32-le"), np.int32)
        return {"ids": ids, "label": np.array(self.labels.encode(row["label"]))}

    def save(self, folder):
        self.labels.save(folder)

    def load(self, folder):
        self.labels = LabelCodec.load(folder)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe, its task and its data."""
    (tmp_path / "small.py").write_text(TASK)
    jsonl(tmp_path / "a.jsonl", some_rows(50, kinds=40))
    (tmp_path / "r.yaml").write_text("task: ./small.py\ndata: {train: a.jsonl}\n")
    return tmp_path


def killed_at(call: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a child that dies without a word at its n-th call to the file system; whether it got to its end."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os._exit(9)
                return real(*args, **options)

            return wrapped

        calls_of = [(os, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir")]
        for module, name in (*calls_of, (shutil, "rmtree")):
            setattr(module, name, dying(getattr(module, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test kills a forked child, and this system cannot fork")
@pytest.mark.parametrize("restart", [False, True])
def test_killed_anywhere_the_same_command_takes_it_up(
    project: Path, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing it has written
    expected, run, recipe = project / "whole", project / "run", project / "r.yaml"
    prepare.run_step(recipe, run=expected)
    for call in range(1, 200):
        shutil.rmtree(run, ignore_errors=True)
        if restart:
            shutil.copytree(expected, run)
            (run / "log.jsonl").write_text("{}\n")
        ended = killed_at(call, lambda: prepare.run_step(recipe, run=run, restart=restart))
        if (run / "data/report.json").exists():
            left = tree(run)
            assert left.keys() >= tree(expected).keys(), f"a report beside half a preparation, killed at call {call}"
        prepare.run_step(recipe, run=run, restart=restart)
        assert tree(run) == tree(expected), f"killed at call {call}"
        if ended:
            assert call > 20
            return
    raise AssertionError("never came to an end")


@pytest.mark.parametrize(
    "name", ["codec/labels.json", "data/train/index.json", "data/test/ids.bin", "data/report.json"])
def test_what_is_damaged_is_prepared_again(project: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = project / "run"
    prepare.run_step(project / "r.yaml", run=run)
    before = tree(run)
    (run / "log.jsonl").write_text("{}\n")
    (run / name).write_bytes(b"{")
    prepare.run_step(project / "r.yaml", run=run)
    assert tree(run) == {**before, "log.jsonl": b"{}\n"}
    assert name.rpartition("/")[0] in capsys.readouterr().err


def test_data_that_has_changed_is_noticed_by_content(project: Path) -> None:
    run, data = project / "run", project / "a.jsonl"
    prepare.run_step(project / "r.yaml", run=run)
    (run / "model.safetensors").write_bytes(b"weights")
    before, old = tree(run), data.read_bytes()
    os.utime(data)
    prepare.run_step(project / "r.yaml", run=run)  # touched, and the same
    stat = data.stat()
    data.write_bytes(old.replace(b"text 1", b"text 9", 1) if b"text 1" in old else old[::-1])
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # another content, of the same size and time
    with pytest.raises(UserError, match=r"a\.jsonl.*--restart"):
        prepare.run_step(project / "r.yaml", run=run)
    assert tree(run) == before
    data.unlink()
    prepare.run_step(project / "r.yaml", run=run)  # gone: the run has all it needs


def test_a_failing_restart_loses_nothing(project: Path) -> None:
    run = project / "run"
    prepare.run_step(project / "r.yaml", run=run)
    (run / "model.safetensors").write_bytes(b"weights")
    before = tree(run)
    (project / "a.jsonl").write_text('{"text": 1}\n' * 20)
    with pytest.raises(UserError):
        prepare.run_step(project / "r.yaml", run=run, restart=True)
    assert tree(run) == before
    jsonl(project / "a.jsonl", some_rows(30, seed=9))
    prepare.run_step(project / "r.yaml", run=run, restart=True)
    assert "model.safetensors" not in tree(run)


def test_a_run_of_another_recipe_is_not_touched(project: Path) -> None:
    run = project / "run"
    prepare.run_step(project / "r.yaml", run=run)
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    before = tree(run)
    with pytest.raises(UserError, match=r"seed: 0 → 1; train\.lr: 0\.001 → 0\.5.*--run.*--restart"):
        prepare.run_step(project / "r.yaml", ["seed=1", "train.lr=0.5", "serve.port=1"], run=run)
    assert tree(run) == before
    prepare.run_step(project / "r.yaml", ["serve.port=1", "train.keep=7"], run=run)
    told = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(told.replace("  drop_path: 0.0\n", ""))  # the run is older than that key
    assert "drop_path" in told
    prepare.run_step(project / "r.yaml", run=run)
    (run / "recipe.yaml").write_text("{")
    with pytest.raises(UserError, match=r"recipe\.yaml:1: .*damaged.*--restart"):
        prepare.run_step(project / "r.yaml", run=run)


def test_before_training_a_recipe_and_its_data_may_change(project: Path) -> None:
    run, recipe = project / "run", project / "r.yaml"
    prepare.run_step(recipe, run=run)
    stat = (run / "data/report.json").stat()  # not when it was read last: reading it is allowed
    prepare.run_step(recipe, ["train.lr=0.5", "model.d_model=8"], run=run)
    now = (run / "data/report.json").stat()
    assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert "lr: 0.5" in (run / "recipe.yaml").read_text()
    jsonl(project / "a.jsonl", some_rows(30, seed=5))
    for overrides in ([], ["seed=3"]):
        prepare.run_step(recipe, overrides, run=run)
        shutil.rmtree(project / "fresh", ignore_errors=True)
        prepare.run_step(recipe, overrides, run=project / "fresh")
        assert tree(run) == tree(project / "fresh")


def test_nothing_is_left_of_a_preparation_that_failed(project: Path) -> None:
    (project / "a.jsonl").write_text('{"text": "a", "label": 1}\n' * 20)  # one row and its copies
    with pytest.raises(UserError):
        prepare.run_step(project / "r.yaml", run=project / "new" / "run")
    assert not (project / "new").exists()
    (project / "there").mkdir()
    with pytest.raises(UserError):
        prepare.run_step(project / "r.yaml", run=project / "there")
    assert list((project / "there").iterdir()) == []


def test_a_full_disk_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multihead.data.store.os.fsync", full)
    with pytest.raises(UserError, match=r"no space left.*the prepared data"):
        prepare.run_step(project / "r.yaml", run=project / "run")
    assert not (project / "run").exists()


def test_each_part_reads_its_own_file_and_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    files = {p: jsonl(tmp_path / f"{p}.jsonl", some_rows(20, seed=i)) for i, p in enumerate(PARTS)}
    report = prepared(recipe_of(0, **files, deduplicate=False), tmp_path / "run")
    for part in PARTS:
        wanted = Counter(json.loads(line)["text"] for line in Path(files[part]).read_text().splitlines())
        assert Counter(texts(tmp_path / "run", part)) == wanted and report["parts"][part]["rows"] == 20
