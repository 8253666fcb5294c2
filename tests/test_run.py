"""The run folder: atomic writes, the lock, clean-up, and what a person is told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from multihead.errors import UserError
from multihead.run import RunFolder, replacing, write_atomic, write_json


def made(path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_atomic("recipe.yaml", "task: text-generation\n")
    return folder


def test_atomic_write_replaces_whole_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, "中文\n")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    write_json(path, {"名": [1, 2.5]})
    assert path.read_text("utf-8") == '{\n "名": [\n  1,\n  2.5\n ]\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failed_write_keeps_the_old_file_and_removes_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_says_what_where_how_much_and_what_is_whole(tmp_path: Path, code: int) -> None:
    path = tmp_path / "metrics.json"
    write_atomic(path, "{}")
    with pytest.raises(UserError) as caught, replacing(path):
        raise OSError(code, os.strerror(code))
    text = str(caught.value)
    assert str(path) in text and " free there" in text and "The earlier metrics.json is whole" in text
    assert path.read_text() == "{}"


def test_other_errors_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        pass  # nothing was written under the temporary name


def test_create_and_open_refuse_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.open(tmp_path / "none")
    made(tmp_path / "reviews")
    with pytest.raises(UserError, match="did you mean 'reviews'"):
        RunFolder.open(tmp_path / "review")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.open(tmp_path / "photos")
    with pytest.raises(UserError, match=r"holds other files \(cat.jpg\)"):
        RunFolder.create(tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "photos" / "cat.jpg")
    assert RunFolder.create(tmp_path / "reviews").exists()
    with pytest.raises(UserError, match="no trained weights yet"):
        RunFolder.open(tmp_path / "reviews").weights()


def test_damaged_json_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "r")
    folder.write_json("metrics.json", {"accuracy": 0.5})
    assert folder.read_json("metrics.json") == {"accuracy": 0.5}
    folder.file("metrics.json").write_text('{"accuracy": ')
    with pytest.raises(UserError, match="is damaged"):
        folder.read_json("metrics.json")
    with pytest.raises(UserError, match="no such file"):
        folder.read_json("none.json")


HOLD = """
import sys, time
from multihead.run import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_ends_with_it_even_by_kill_9(tmp_path: Path) -> None:
    folder = made(tmp_path / "r")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"PID {holder.pid}"), folder.lock():
            pass
        leftover = folder.path / f".model.safetensors.tmp-{holder.pid}"
        leftover.touch()
    finally:
        holder.kill()
        holder.wait()
    with folder.lock():
        assert not leftover.exists()
        with pytest.raises(UserError, match=f"PID {os.getpid()}"), folder.lock():
            pass  # nor twice in one process
    with folder.lock():
        pass


def test_clean_spares_the_files_of_living_processes(tmp_path: Path) -> None:
    folder = made(tmp_path / "r")
    (folder.path / "checkpoints" / "step-00000007.tmp-999999999").mkdir(parents=True)
    living = folder.path / f".report.html.tmp-{os.getppid()}"
    living.touch()
    mine = folder.path / f".log.jsonl.tmp-{os.getpid()}"
    mine.touch()
    assert sorted(folder.clean()) == [mine.name, "step-00000007.tmp-999999999"]
    assert living.exists() and folder.exists()


def test_messages_exist_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", "zh")
    with pytest.raises(UserError, match="没有这个训练文件夹"):
        RunFolder.open(tmp_path / "none")
