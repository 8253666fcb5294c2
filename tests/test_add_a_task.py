"""docs/add-a-task.md, followed to the letter: its code blocks become files, its commands are run."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from multihead import cli
from multihead.build import open_run
from tests.contract import Contract

DOCS = Path(__file__).resolve().parent.parent / "docs"


def block(page: Path, kind: str, start: str) -> str:
    """The code block of `kind` whose text begins with `start`."""
    found = [b for b in re.findall(rf"```{kind}\n(.*?)```", page.read_text("utf-8"), re.S) if b.startswith(start)]
    assert len(found) == 1, f"{page}: {len(found)} blocks of {kind} beginning with {start}"
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stars.py, stars.yaml and reviews.csv whose stars follow from the words."""
    place = tmp_path_factory.mktemp("stars")
    (place / "stars.py").write_text(block(DOCS / "add-a-task.md", "python", '"""stars'), "utf-8")
    (place / "stars.yaml").write_text(block(DOCS / "add-a-task.md", "yaml", "task: ./stars.py"), "utf-8")
    rng = np.random.default_rng(0)
    with open(place / "reviews.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["评论", "评分"])
        for i in range(300):
            good = int(rng.integers(0, 5))
            words = ["很好"] * good + ["太差"] * (4 - good) + [str(i)]
            writer.writerow(["".join(rng.permutation(words)), good + 1])
    return place


def test_the_commands_of_the_page_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for line in block(DOCS / "add-a-task.md", "sh", "multihead prepare").splitlines():
        words = shlex.split(line)
        if words[1] == "serve":
            continue  # serving it is part of the contract below
        with pytest.raises(SystemExit) as left:
            cli.main(words[1:])
        assert left.value.code == 0, line
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < last["stars"] < 6
    found = json.loads((folder / "runs/stars/metrics.json").read_text("utf-8"))["metrics"]["mae"]
    assert found["value"] < 0.8  # guessing the mean is wrong by 1.2
    assert open_run(folder / "runs/stars").predict(["很好很好很好很好"])[0]["stars"] > 3.5


def test_both_pages_show_the_same_code() -> None:
    blocks = [re.findall(r"```(?:python|yaml|sh|toml)\n(.*?)```", (DOCS / name).read_text("utf-8"), re.S)
              for name in ("add-a-task.md", "add-a-task.zh.md")]  # fmt: skip
    assert blocks[0] == blocks[1] and len(blocks[0]) == 5


class TestStars(Contract):
    """The task of the page keeps every promise of the shipped ones."""

    @pytest.fixture(autouse=True)
    def _named(self, folder: Path) -> None:
        self.name = str(folder / "stars.py")
