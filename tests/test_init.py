"""``multihead init``: the recipe it writes is one, fits the data, and explains itself in the reader's language."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from multihead import init, prepare, recipe, strict_yaml
from multihead.errors import UserError
from multihead.task import find

REVIEWS = "评论,评分\n" + "".join(f"这是第{i}条评论,{'好' if i % 2 else '坏'}\n" for i in range(30))


def write(task: str, data: list[str], out: Path, force: bool = False) -> list[str]:
    return init.write_recipe(task, data, out, force)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    (tmp_path / "story.txt").write_text("从前有座山。\n" * 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_the_recipe_loads_and_says_what_each_knob_does(
    task: str, language: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", language)
    data = {"text-classification": "reviews.csv", "text-generation": "story.txt"}[task]
    found = write(task, [data], here / "r.yaml")
    text = (here / "r.yaml").read_text("utf-8")
    made = recipe.load(here / "r.yaml", find=find)
    assert made.task == task and made.name == "r" and made.data.train == str(here / data)
    assert found[0].startswith(data)
    knobs = [line for line in text.splitlines() if line.startswith("  ") and ": " in line]
    told = [line.partition(" # ")[2] for line in knobs]
    assert len(knobs) > 15 and [k for k, t in zip(knobs, told, strict=True) if not t and "train:" not in k] == []
    chinese = [any("\u4e00" <= c <= "\u9fff" for c in t) for t in told if t.strip() and "|" not in t]
    assert all(chinese) if language == "zh" else not any(chinese)


@pytest.mark.parametrize("task", ["text-classification", "text-generation", "fill-mask"])
def test_what_is_written_out_are_the_defaults(task: str, here: Path) -> None:
    write(task, ["reviews.csv"], here / "r.yaml")
    (here / "plain.yaml").write_text(f"task: {task}\nname: r\ndata: {{train: reviews.csv}}\n")
    written, plain = (recipe.load(here / name, find=find) for name in ("r.yaml", "plain.yaml"))
    assert written.model_copy(update={"data": plain.data}) == plain


def test_columns_that_were_guessed_stand_in_the_recipe(here: Path) -> None:
    (here / "odd.csv").write_text(REVIEWS.replace("评论,评分", "what they wrote,\"stars: 1\n#2\""))
    write("text-classification", ["odd.csv"], here / "r.yaml")
    assert recipe.load(here / "r.yaml", find=find).data.columns == {"text": "what they wrote", "label": "stars: 1\n#2"}
    _, report = prepare.run_step(here / "r.yaml", run=here / "run")
    assert report["parts"]["train"]["rows"] == 24


def test_paths_are_relative_to_the_recipe(here: Path) -> None:
    (here / "more 数据").mkdir()
    (here / "more 数据" / "b: 1.csv").write_text(REVIEWS)
    out = here / "recipes" / "deep" / "r.yaml"
    write("text-classification", ["reviews.csv", "more 数据/b: 1.csv"], out)
    files = strict_yaml.read(out, []).values["data"]["train"]
    assert files == [os.path.join("..", "..", "reviews.csv"), os.path.join("..", "..", "more 数据", "b: 1.csv")]
    assert recipe.load(out, find=find).data.train == [str(here / "reviews.csv"), str(here / "more 数据/b: 1.csv")]


def test_a_task_of_ones_own(here: Path) -> None:
    code = "from multihead import Column, Task\n\nclass Mine(Task):\n    columns = (Column('text'),)\n"
    (here / "mine.py").write_text(code)
    write("./mine.py", ["story.txt"], here / "recipes" / "r.yaml")
    assert recipe.load(here / "recipes/r.yaml", find=find).task == str(here / "mine.py")


@pytest.mark.parametrize(("out", "name"), [(".yaml", "yaml"), ("..x.yaml", "x"), ("a b\n#c.yaml", "a b_#c")])
def test_any_file_name_gives_a_name(here: Path, out: str, name: str) -> None:
    write("text-generation", ["story.txt"], here / out)
    assert recipe.load(here / out, find=find).name == name


def test_nothing_is_overwritten_unasked(here: Path) -> None:
    out = here / "r.yaml"
    out.write_text("mine\n")
    with pytest.raises(UserError, match=r"r\.yaml: exists already; --force"):
        write("text-generation", ["story.txt"], out)
    assert out.read_text() == "mine\n"
    with pytest.raises(UserError, match=r"gone\.txt"):
        write("text-generation", ["gone.txt"], out, force=True)
    assert out.read_text() == "mine\n"
    write("text-generation", ["story.txt"], out, force=True)
    assert recipe.load(out, find=find).task == "text-generation"
    assert sorted(p.name for p in here.iterdir()) == ["r.yaml", "reviews.csv", "story.txt"]


def test_folders_of_parts_become_parts_of_the_recipe(here: Path) -> None:
    pytest.importorskip("PIL")
    for part in ("train", "val"):
        for name, value in (("cat", 1), ("dog", 200)):
            folder = here / "pets" / part / name
            folder.mkdir(parents=True)
            (folder / "1.pgm").write_bytes(b"P5 8 8 255\n" + bytes([value] * 64))
    write("image-classification", ["pets"], here / "r.yaml")
    data = recipe.load(here / "r.yaml", find=find).data
    assert str(data.train).endswith("pets/train") and str(data.valid).endswith("pets/val") and data.test is None
    assert data.split.test == 0.1
