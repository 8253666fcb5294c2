"""Every broken input gives one plain message with its place and what to do, exit code 2, and leaves nothing behind.

A case is (name, what to arrange, the command, words that must be told). The real command line runs, in this process;
a handful run as processes of their own. Before and after, every file of the folder is compared.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from multihead.cli import main
from multihead.run import RunFolder
from tests.data.test_broken_inputs import BROKEN, put_broken

RECIPE = """task: text-classification
data:
  train: reviews.csv
options: {max_tokens: 16}
model: {d_model: 8, num_layers: 1, num_heads: 1, ngrams: []}
train: {steps: 2, batch_size: 8, threads: 1, precision: float32, ema: null}
evaluate: {bootstrap: 0}
"""
STORY = """task: text-generation
data:
  train: story.txt
options: {tokenizer: char, context: 8}
model: {d_model: 8, num_layers: 1, num_heads: 1}
train: {steps: 1, batch_size: 4, threads: 1, precision: float32, optimizer: adamw}
"""
REVIEWS = "text,label,user\n" + "".join(f"这是第{i}条评论,{'好' if i % 2 else '坏'},u{i % 9}\n" for i in range(60))
Arrange = Callable[[Path], object]


class Case(NamedTuple):
    name: str
    arrange: Arrange
    command: str
    told: tuple[str, ...]


def write(name: str, data: str | bytes) -> Arrange:
    """The file `name` with this content."""
    def arrange(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return arrange


def change(name: str, old: str, new: str) -> Arrange:
    """The file `name` with `new` in place of `old`."""
    def arrange(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), "utf-8")

    return arrange


def cut(name: str, size: int) -> Arrange:
    """Only the first `size` bytes of the file `name`."""
    return lambda folder: os.truncate(folder / name, size)


def flip(name: str, at: int) -> Arrange:
    """One byte of the file `name` changed."""
    def arrange(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 0xFF
        (folder / name).write_bytes(data)

    return arrange


def gone(name: str) -> Arrange:
    """No file or folder `name`."""
    def arrange(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return arrange


def folder(name: str) -> Arrange:
    """An empty folder `name`."""
    return lambda place: (place / name).mkdir(parents=True)


def both(*arrangements: Arrange) -> Arrange:
    return lambda folder: [arrange(folder) for arrange in arrangements]


def nothing(folder: Path) -> None:
    """The project as it is: the command is what is wrong."""


def recipe(text: str) -> Arrange:
    return write("r.yaml", text)


def in_recipe(old: str, new: str) -> Arrange:
    return change("r.yaml", old, new)


LAUGHS = "a: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

RECIPES = [
    Case("no such recipe", nothing, "train r.yml", ("r.yml", "did you mean 'r.yaml'", "multihead init")),
    Case("a folder for a recipe", nothing, "train runs/good", ("runs/good", "is a folder", "recipe.yaml")),
    Case("empty", recipe(""), "train r.yaml", ("r.yaml:1", "task:")),
    Case("only comments", recipe("# nothing\n"), "prepare r.yaml", ("r.yaml:1", "holds none")),
    Case("a list", recipe("- task: text-classification\n"), "train r.yaml", ("r.yaml:1", "holds none")),
    Case("a word", recipe("text-classification\n"), "train r.yaml", ("r.yaml:1", "holds none")),
    Case("the data for a recipe", nothing, "train reviews.csv", ("reviews.csv:1", "holds none")),
    Case("large data for a recipe", write("big.csv", "a,b\n" * 100_000), "train big.csv",
         ("big.csv", "multihead init")),
    Case("not YAML", in_recipe("{max_tokens: 16}", "{max_tokens: 16"), "train r.yaml", ("r.yaml:5", "not valid YAML")),
    Case("a quote left open", in_recipe("reviews.csv", "'reviews.csv"), "train r.yaml", ("r.yaml:", "not valid YAML")),
    Case("indented by a tab", in_recipe("  train: r", "\ttrain: r"), "train r.yaml", ("r.yaml:3", "spaces")),
    Case("wrong indentation", in_recipe("  train: r", "   valid: v\n  train: r"), "train r.yaml", ("r.yaml:4",)),
    Case("a key given twice", in_recipe("options:", "task: x\noptions:"), "train r.yaml",
         ("r.yaml:4", "twice", "line 1")),
    Case("not UTF-8", write("r.yaml", RECIPE.replace("reviews", "评论").encode("gbk")), "train r.yaml",
         ("r.yaml:3", "UTF-8")),
    Case("UTF-16", write("r.yaml", RECIPE.encode("utf-16")), "train r.yaml", ("r.yaml:1", "UTF-8")),
    Case("binary", write("r.yaml", bytes(range(256))), "train r.yaml", ("r.yaml:", "UTF-8")),
    Case("a NUL", in_recipe("reviews.csv", "a\0b"), "train r.yaml", ("r.yaml:3", "U+0000")),
    Case("a Python object", in_recipe("reviews.csv", "!!python/object/apply:os.system [touch x]"), "train r.yaml",
         ("r.yaml:3", "tags")),
    Case("a billion laughs", recipe(LAUGHS), "train r.yaml", ("r.yaml:1", "anchors")),
    Case("nested without end", recipe("a: " + "[" * 50_000), "train r.yaml", ("r.yaml:1", "levels deep")),
    Case("an unknown key", in_recipe("train: {steps", "trian: {steps"), "train r.yaml",
         ("r.yaml:6", "unknown key 'trian'", "did you mean 'train'")),
    Case("an unknown key of a section", in_recipe("d_model", "dmodel"), "train r.yaml",
         ("r.yaml:5", "did you mean 'd_model'")),
    Case("an unknown option of the task", in_recipe("max_tokens", "max_length"), "train r.yaml",
         ("r.yaml:4", "options.max_length", "max_tokens")),
    Case("a wrong type", in_recipe("steps: 2", "steps: two"), "train r.yaml", ("r.yaml:6", '"two"', "a whole number")),
    Case("true for a number", in_recipe("steps: 2", "steps: true"), "train r.yaml", ("r.yaml:6", "a number")),
    Case("a wrong range", in_recipe("steps: 2", "steps: 0"), "train r.yaml", ("r.yaml:6", "≥ 1")),
    Case("not a finite number", in_recipe("steps: 2", "lr: .inf"), "train r.yaml", ("r.yaml:6", "finite")),
    Case("heads that do not divide", in_recipe("num_heads: 1", "num_heads: 3"), "train r.yaml", ("r.yaml:5", "divide")),
    Case("an unknown task", in_recipe("text-class", "text-klass"), "train r.yaml",
         ("r.yaml:1", "did you mean 'text-classification'")),
    Case("a task file that is not there", in_recipe("text-classification", "./mine.py"), "train r.yaml",
         ("r.yaml:1", "mine.py")),
    Case("a task file that does not load", both(in_recipe("text-classification", "./mine.py"), write(
        "mine.py", "import nothing_of_this_name\n")), "train r.yaml", ("mine.py", "nothing_of_this_name")),
    Case("a task file without a task", both(in_recipe("text-classification", "./mine.py"), write("mine.py", "x = 1\n")),
         "train r.yaml", ("mine.py", "exactly one subclass of Task")),
    Case("no task", in_recipe("task: text-classification\n", ""), "train r.yaml", ("r.yaml:1", "'task' is missing")),
    Case("no data", recipe("task: text-classification\n"), "train r.yaml", ("r.yaml:1", "'data' is missing")),
    Case("an unknown base", in_recipe("task:", "base: all.yaml\ntask:"), "train r.yaml", ("r.yaml:1", "all.yaml")),
    Case("a base of a base", both(in_recipe("task:", "base: b.yaml\ntask:"), write("b.yaml", "base: c.yaml\n")),
         "train r.yaml", ("b.yaml:1", "one layer")),
    Case("a variable that is not set", in_recipe("reviews.csv", "${NO_SUCH_VARIABLE}/x"), "train r.yaml",
         ("r.yaml:3", "NO_SUCH_VARIABLE")),
    Case("a name that leaves the folder", in_recipe("task:", "name: ../../x\ntask:"), "train r.yaml",
         ("r.yaml:1", "name")),
    Case("parts that leave nothing", nothing, "train r.yaml data.split.valid=0.6 data.split.test=0.4",
         ("data.split.", "below 1")),
    Case("an override without =", nothing, "train r.yaml steps", ("command line, steps", "key=value")),
    Case("an override of an unknown key", nothing, "train r.yaml train.step=5",
         ("did you mean 'steps'", "train.step=5")),
    Case("an override of a wrong type", nothing, "train r.yaml train.steps=many",
         ("train.steps=many", "a whole number")),
    Case("an override that is not YAML", nothing, "train r.yaml 'data.columns={text: a'", ("data.columns", "quotes")),
    Case("many faults at once", in_recipe("steps: 2", "steps: 0, lr: x, nope: 1"), "train r.yaml task=what seed=-1",
         ("≥ 1", "a number", "unknown key 'train.nope'", "no task is called 'what'", "seed is -1")),
]

DATA = [
    Case("a column that is not there", nothing, "train r.yaml data.columns.text=评论",
         ("reviews.csv:1", "no column '评论'", "text, label, user")),
    Case("a column the task does not use", nothing, "train r.yaml data.columns.words=text", ("'words'", "text, label")),
    Case("an encoding that is none", nothing, "train r.yaml data.encoding=klingon", ("'klingon'", "utf-8")),
    Case("a wrong encoding", nothing, "train r.yaml data.encoding=utf-16", ("reviews.csv:", "data.encoding")),
    Case("a wrong delimiter", nothing, "train r.yaml \"data.delimiter='|'\"", ("reviews.csv:1", "data.columns")),
    Case("one class only", write("reviews.csv", re.sub("坏", "好", REVIEWS)), "train r.yaml",
         ("reviews.csv", "the same label, '好'", "data.columns.label")),
    Case("every row the same", write("reviews.csv", "text,label\n" + "一样,好\n" * 50), "train r.yaml",
         ("reviews.csv", "1 different rows", "data.split.test=0")),
    Case("too few rows", write("reviews.csv", "text,label\na,1\nb,2\n"), "train r.yaml",
         ("reviews.csv", "2 different rows")),
    Case("test equals train", in_recipe("options:", "  test: reviews.csv\noptions:"), "train r.yaml",
         ("reviews.csv", "no row is left", "60 also stand", "data.test")),
    Case("an unknown label in the test file", both(write("t.csv", "text,label\n新的,好\n别的,中\n"), in_recipe(
        "options:", "  test: t.csv\noptions:")), "train r.yaml", ("t.csv:3", "label '中'", "坏, 好", "max_rejected")),
    Case("no group column", nothing, "train r.yaml data.split.by=group data.split.group=usr",
         ("reviews.csv:2", "did you mean 'user'")),
    Case("rows without a group", change("reviews.csv", "评论,好,u1", "评论,好,"),
         "train r.yaml data.split.by=group data.split.group=user", ("reviews.csv:3", "group column 'user' is empty")),
    Case("too few groups", nothing, "train r.yaml data.split.by=group data.split.group=label",
         ("2 groups", "data.split.valid=0")),
    Case("faults in all parts' files", in_recipe("options:", "  test: t.csv\n  valid: v.csv\noptions:"), "train r.yaml",
         ("t.csv", "v.csv")),
    Case("plain text for a table", write("reviews.csv", "只是一些文字。\n没有列。\n"), "train r.yaml",
         ("reviews.csv:1", "without columns")),
    Case("a table for plain text", nothing, "train lm.yaml data.train=empty.csv", ("empty.csv",)),
    Case("an empty text", write("story.txt", ""), "train lm.yaml --run new", ("story.txt", "empty")),
    Case("a gz bomb",
         write("reviews.csv", gzip.compress(b"text,label\n") + gzip.compress(b"x" * 2_000_000 + b",1\n") * 60),
         "train r.yaml", ("reviews.csv", "trap")),
]

RUNS = [
    Case("a run folder of another recipe", nothing, "train r.yaml train.steps=9 --run runs/good",
         ("runs/good", "train.steps: 2 → 9", "--restart", "--run")),
    Case("a run folder that is a file", write("f", "x"), "train r.yaml --run f", ("f", "is a file", "--run")),
    Case("a run folder below a file", write("f", "x"), "train r.yaml --run f/g", ("f", "Not a directory")),
    Case("a run folder with other things in it", write("d/mine.txt", "x"), "train r.yaml --run d",
         ("d", "mine.txt", "--run")),
    Case("data changed since it was prepared", change("reviews.csv", "第1条", "第一条"), "train r.yaml --run runs/good",
         ("runs/good", "reviews.csv", "--restart")),
    Case("the run's recipe damaged", write("runs/good/recipe.yaml", "{{"), "train r.yaml --run runs/good",
         ("runs/good/recipe.yaml:1", "--restart")),
    Case("a failing restart", write("reviews.csv", "text,label\n"), "train r.yaml --run runs/good --restart",
         ("reviews.csv:1", "no row below")),
    Case("predict on no run", nothing, "predict runs/god 好", ("runs/god", "did you mean 'good'", "multihead train")),
    Case("evaluate on no run", nothing, "evaluate nowhere", ("nowhere", "multihead train")),
    Case("serve on no run", nothing, "serve nowhere", ("nowhere", "multihead train")),
    Case("a folder that is no run", nothing, "evaluate runs", ("runs", "not a run folder")),
    Case("a file for a run", nothing, "predict r.yaml 好", ("r.yaml", "not a run folder")),
    Case("a recipe for a run", nothing, "serve r.yaml", ("r.yaml", "not a run folder")),
    Case("predict on an untrained run", gone("runs/good/model.safetensors"), "predict runs/good 好",
         ("runs/good", "no trained weights", "multihead train")),
    Case("evaluate on an untrained run", gone("runs/good/model.safetensors"), "evaluate runs/good",
         ("no trained weights",)),
    Case("serve on an untrained run", gone("runs/good/model.safetensors"), "serve runs/good", ("no trained weights",)),
    Case("weights cut short", cut("runs/good/model.safetensors", 900), "predict runs/good 好",
         ("model.safetensors", "not a whole safetensors file", "multihead train")),
    Case("weights of one byte changed", flip("runs/good/model.safetensors", -5), "evaluate runs/good",
         ("model.safetensors", "altered", "Train again")),
    Case("weights that are empty", cut("runs/good/model.safetensors", 0), "predict runs/good 好",
         ("model.safetensors",)),
    Case("weights that are a pickle",
         write("runs/good/model.safetensors", b"\x80\x04\x95\x20cos\nsystem\n(S'touch x'\ntR."),
         "predict runs/good 好", ("model.safetensors", "not a whole safetensors file")),
    Case("weights of another model", lambda f: shutil.copy(f / "runs/lm/model.safetensors", f / "runs/good"),
         "predict runs/good 好", ("model.safetensors", "another model", "is missing")),
    Case("a codec damaged", write("runs/good/codec/labels.json", "{"), "predict runs/good 好",
         ("codec/labels.json", "multihead prepare")),
    Case("a codec of another shape", write("runs/good/codec/labels.json", "[1]"), "evaluate runs/good",
         ("codec/labels.json",)),
    Case("a codec gone", gone("runs/good/codec"), "evaluate runs/good", ("codec", "multihead prepare")),
    Case("the run's own recipe damaged", write("runs/good/recipe.yaml", "task: [\n"), "predict runs/good 好",
         ("runs/good/recipe.yaml",)),
    Case("the run's own recipe, a value wrong", change("runs/good/recipe.yaml", "d_model: 8", "d_model: eight"),
         "evaluate runs/good", ("runs/good/recipe.yaml:", "a whole number")),
    Case("a store cut short", cut("runs/good/data/test/ids.bin", 3), "evaluate runs/good",
         ("data/test", "ids.bin", "multihead prepare")),
    Case("a store without its index", gone("runs/good/data/test/index.json"), "evaluate runs/good",
         ("data/test", "index.json")),
    Case("a store whose index is broken", write("runs/good/data/test/index.json", "{}"), "evaluate runs/good",
         ("index.json",)),
    Case("raw rows damaged", change("runs/good/data/test/rows.jsonl", '{"row"', '("row"'), "evaluate runs/good",
         ("data/test", "row")),
]

USE = [
    Case("no part of this name", nothing, "evaluate runs/good --part tset",
         ("runs/good", "'tset'", "did you mean 'test'")),
    Case("data and a part", nothing, "evaluate runs/good --part test --data reviews.csv", ("not both",)),
    Case("evaluate on a file that is not there", nothing, "evaluate runs/good --data gone.csv",
         ("gone.csv", "no such file")),
    Case("evaluate on a file without labels",
         write("t.csv", "text,when\n好的,2020-01-01\n坏的,2021-02-03\n是的,2022-03-04\n"),
         "evaluate runs/good --data t.csv", ("t.csv:1", "'label'")),
    Case("evaluate on unknown labels",
         write("t.csv", "text,label\n好的,好\n坏的,中\n"), "evaluate runs/good --data t.csv --json",
         ("t.csv:3", "label '中'")),
    Case("predict nothing", nothing, "predict runs/good", ("--file",)),
    Case("predict texts and a file", nothing, "predict runs/good 好 --file reviews.csv", ("one of the two",)),
    Case("predict a file to nowhere", nothing, "predict runs/good --file reviews.csv", ("--out",)),
    Case("predict texts into a file", nothing, "predict runs/good 好 --out a.jsonl", ("--file",)),
    Case("predict an empty text", nothing, "predict runs/good ''", ("rows[0]", "'text' is empty")),
    Case("predict a file that is not there", nothing, "predict runs/good --file gone.csv --out a.jsonl", ("gone.csv",)),
    Case("predict an empty file", write("e.csv", ""), "predict runs/good --file e.csv --out a.jsonl",
         ("e.csv", "empty")),
    Case("predict a binary file", write("e.csv", bytes(range(256)) * 9), "predict runs/good --file e.csv --out a.jsonl",
         ("e.csv", "not a text file")),
    Case("predict broken JSONL",
         write("e.jsonl", '{"text": "好"}\n{"text": \n'), "predict runs/good --file e.jsonl --out a.jsonl",
         ("e.jsonl:2", "not JSON")),
    Case("predict rows without text", write("e.jsonl", '{"text": "好"}\n{"words": "好"}\n{"text": [1]}\n'),
         "predict runs/good --file e.jsonl --out a.jsonl", ("e.jsonl:2", "e.jsonl:3")),
    Case("answers over the input", nothing, "predict runs/good --file reviews.csv --out reviews.csv",
         ("reviews.csv", "input")),
    Case("answers into a folder", folder("answers"), "predict runs/good --file reviews.csv --out answers",
         ("answers",)),
    Case("an unknown wish", nothing, "predict runs/lm 从前 --ask temprature=1",
         ("did you mean 'temperature'", "top_p")),
    Case("a wish out of range", nothing, "predict runs/lm 从前 --ask top_p=2", ("top_p is 2",)),
    Case("a wish without =", nothing, "predict runs/lm 从前 --ask warm", ("--ask warm", "key=value")),
    Case("a wish that is not YAML", nothing, "predict runs/lm 从前 --ask 'stop=[a'", ("--ask stop=[a", "YAML")),
    Case("a device that is not there", nothing, "predict runs/good 好 --device tpu", ("tpu", "cpu")),
    Case("two runs of one name",
         lambda f: shutil.copytree(f / "runs/good", f / "runs/again"), "serve runs/good runs/again",
         ("runs/good", "runs/again", "name")),
    Case("init for an unknown task", nothing, "init text-klassification reviews.csv -o new.yaml",
         ("did you mean 'text-classification'",)),
    Case("init on a file that is not there", nothing, "init text-classification review.csv -o new.yaml",
         ("review.csv", "did you mean 'reviews.csv'")),
    Case("init on several, one missing", nothing, "init text-classification reviews.csv gone.csv -o new.yaml",
         ("gone.csv",)),
    Case("init without the label", write("t.csv", "text,when\n好的,2020-01-01\n坏的,2021-02-03\n是的,2022-03-04\n"),
         "init text-classification t.csv -o new.yaml", ("t.csv:1", "'label'")),
    Case("init over a recipe", nothing, "init text-classification reviews.csv -o r.yaml", ("r.yaml", "--force")),
    Case("init into a folder", nothing, "init text-classification reviews.csv -o runs", ("runs", "is a folder")),
    Case("init below a file", nothing, "init text-classification reviews.csv -o r.yaml/x.yaml", ("r.yaml",)),
    Case("a verb that is none", nothing, "trian r.yaml", ("No such command 'trian'", "'train'")),
    Case("an option that is none", nothing, "train r.yaml --epochs 3", ("--epochs", "train -h")),
    Case("no recipe named", nothing, "train", ("RECIPE", "train -h")),
    Case("a port that is none", nothing, "serve runs/good --port eighty", ("--port",)),
]

CASES = [*RECIPES, *DATA, *RUNS, *USE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project with two trained runs, and a copy of it."""
    place = tmp_path_factory.mktemp("whole")
    write("r.yaml", RECIPE)(place)
    write("reviews.csv", REVIEWS)(place)
    write("lm.yaml", STORY)(place)
    write("story.txt", "从前有座山，山里有座庙。\n" * 400 + "完。\n")(place)
    write("empty.csv", "")(place)
    with contextlib.chdir(place):
        for name in ("r", "lm"):
            with pytest.raises(SystemExit) as left:
                main(["train", f"{name}.yaml", "--run", f"runs/{'good' if name == 'r' else name}"])
            assert left.value.code == 0
    aside = place.with_name("aside")
    shutil.copytree(place, aside)
    return place, aside


@pytest.fixture
def project(whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """It, for one case to break; put right again afterwards."""
    place, aside = whole
    monkeypatch.chdir(place)
    yield place
    if listing(place) != listing(aside):
        monkeypatch.chdir(aside)
        shutil.rmtree(place)
        shutil.copytree(aside, place)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its content, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def told(err: str) -> list[str]:
    lines = err.splitlines()
    assert 1 <= len(lines) <= 12, err
    assert all(line.startswith("error: ") and len(line) > 20 for line in lines), err
    assert "Traceback" not in err and "pydantic" not in err
    return lines


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken_input(case: Case, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.arrange(project)
    before = listing(project)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(shlex.split(case.command))
    out, err = capsys.readouterr()
    assert left.value.code == 2
    told(err)
    assert [words for words in case.told if words not in err] == [], err
    assert out == "", "nothing but the message is said"
    after = listing(project)
    assert {k for k in before.keys() | after.keys() if before.get(k, b"-") != after.get(k, b"-")} == set()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_broken(tmp_path, name)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("reviews.csv", "data.csv"))
    before = listing(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, where, words = BROKEN[name]
    for command in (["train", "r.yaml"], ["init", "text-classification", "data.csv", "-o", "new.yaml"]):
        with pytest.raises(SystemExit) as left:
            main(command)
        out, err = capsys.readouterr()
        if command[0] == "init" and left.value.code == 0:
            assert (tmp_path / "new.yaml").exists()  # init looks at the beginning of a file only
            (tmp_path / "new.yaml").unlink()
            continue
        assert left.value.code == 2 and out == ""
        told(err)
        assert where in err and words in err
    assert listing(tmp_path) == before


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    with RunFolder(run).lock():
        yield


def test_a_locked_run_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(project / "runs/good"):
        before = listing(project)
        with pytest.raises(SystemExit) as left:
            main(["train", "r.yaml", "--run", "runs/good"])
        assert left.value.code == 2
        (line,) = told(capsys.readouterr().err)
        assert f"PID {os.getpid()}" in line and "runs/good" in line
        assert listing(project) == before


@pytest.mark.parametrize(("language", "command"), [
    ("en", "train r.yml"), ("zh", "train r.yaml train.steps=none"), ("en", "predict runs/god 好"),
    ("zh", "init text-classification gone.csv"), ("en", "trian r.yaml"), ("zh", "train r.yaml --epochs 3"),
])  # fmt: skip
def test_as_a_process_of_its_own(project: Path, command: str, language: str) -> None:
    before = listing(project)
    done = subprocess.run(
        [sys.executable, "-m", "multihead", *shlex.split(command)], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "MULTIHEAD_LANG": language, "PYTHONIOENCODING": "utf-8"}, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    label = {"en": "error: ", "zh": "错误: "}[language]
    assert all(line.startswith(label) for line in done.stderr.splitlines()) and len(done.stderr.splitlines()) == 1
    assert listing(project) == before


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


def test_words_of_a_file_cannot_steer_the_terminal(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "t.csv").write_text("text,label\n新的,\x1b[31m红\n")
    with pytest.raises(SystemExit):
        main(["evaluate", "runs/good", "--data", "t.csv"])
    err = capsys.readouterr().err
    assert "\x1b" not in err and "红" in err


def test_json_of_a_run_that_is_not_what_it_should_be(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any JSON in place of a codec's file: one message, never another exception."""
    for name in (project / "runs/good/codec" / file for file in ("labels.json", "vocab.json")):
        good = name.read_bytes()
        for value in (None, 1, "x", [], {}, [1, 2], {"names": 5}, {"kind": "char"}, {"names": ["a", "a"]}):
            name.write_text(json.dumps(value))
            with pytest.raises(SystemExit) as left:
                main(["predict", "runs/good", "好"])
            out, err = capsys.readouterr()
            assert left.value.code == 2, (name, value, out)
            told(err)
            assert "codec" in err
        name.write_bytes(good)
