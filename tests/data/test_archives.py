"""Pictures, clips and recordings in archives: the same rows as from a folder, in parts too, and nothing left behind."""

from __future__ import annotations

import gc
import io
import os
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from multihead.data.columns import Column
from multihead.data.rows import Rows, open_rows
from multihead.data.video import ClipFile
from multihead.errors import UserError
from tests import clips

CLIP = (Column("video", "video", names=("clip",)), Column("label", "label", target=True))
PICTURE = (Column("image", "image"), Column("label", "label", target=True))
SPEECH = (Column("audio", "audio"), Column("text", "text", target=True))
FORMS = ("zip", "tar", "tar.gz")
TINY = {"model": {"d_model": 16, "num_layers": 1, "num_heads": 2}, "train": {"steps": 1, "threads": 1}}


def frame(value: int) -> bytes:
    return b"P5 8 8 255\n" + bytes([value] * 64)


def packed(path: Path, files: Mapping[str, bytes]) -> str:
    """An archive of the form that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return str(path)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def written(folder: Path, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files; nothing may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def refused(path: str, columns: Sequence[Column]) -> str:
    with pytest.raises(UserError) as told:
        for _ in open_rows(path, columns):
            pass
    assert len(told.value.problems) == 1, told.value
    return str(told.value)


# -- clips -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving() -> dict[str, bytes]:
    """A clip and two of frames for each of two labels; the frames lie by turns, and not in their order."""
    pytest.importorskip("av")
    files = {}
    for i, label in enumerate(("jump", "run")):
        files[f"{label}/1.mp4"] = clips.clip(clips.ramp(3 + i, 16, 16))
    for n in (10, 2, 1):
        for i, label in enumerate(("jump", "run")):
            files[f"{label}/a/{n}.pgm"], files[f"{label}/b/{n}.pgm"] = frame(n + i), frame(n + 100 + i)
    return files


def held(rows: Rows) -> dict[str, str]:
    """Text of the clip → label, of every row."""
    return {str(row["video"]): row["label"] for row in rows}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top", ["", "data/clips/"])
def test_clips_in_archives_are_those_of_the_folder(form: str, top: str, moving: dict[str, bytes], tmp_path: Path,
                                                   temporary: Path) -> None:  # fmt: skip
    from multihead.codec.video import sampled

    expected = held(open_rows(written(tmp_path / "clips", moving), CLIP))
    assert len(expected) == 6
    rows = open_rows(packed(tmp_path / f"all.{form}", {top + name: raw for name, raw in moving.items()}), CLIP)
    assert held(rows) == expected == held(rows) and rows.count == 6 and not rows.rejected
    most, greys = 0, {}
    for row in rows:
        assert isinstance(row["video"], ClipFile) and f"all.{form}/{top}" in row.where
        most = max(most, len(os.listdir(temporary)))
        if row["video"].frames:
            greys[row.where[-5:]] = [np.asarray(one).max() for one in sampled(row["video"], 3)]
        else:
            assert len(sampled(row["video"], 2)) == 2
    assert greys["run/b"] == [102, 103, 111]
    assert most <= 5, "a clip or two, and those whose frames lie by turns"
    del row
    gc.collect()
    assert not os.listdir(temporary)


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_clips_in_archives(form: str, moving: dict[str, bytes], tmp_path: Path, temporary: Path) -> None:
    lines = ["clip,label", "clips/jump/1.mp4,a", "clips/run/b,b", "clips/none.mp4,c", "../../etc/passwd,d",
             "clips/jump/1.mp4,again", "clips/jump/a/1.pgm,e"]  # fmt: skip
    files = {f"in/clips/{name}": raw for name, raw in moving.items()} | {"in/t.csv": "\n".join(lines).encode()}
    rows = open_rows(packed(tmp_path / f"all.{form}", files), CLIP)
    assert [row["label"] for row in rows] == ["a", "again", "b"]
    assert sorted(p.where.rsplit("/", 1)[1] for p in rows.rejected) == ["1.pgm", "t.csv:4", "t.csv:5"]
    whole = {str(row["video"]) for row in rows}
    assert whole < set(held(open_rows(written(tmp_path / "clips", moving), CLIP)))
    named = open_rows(str(tmp_path / f"all.{form}" / "in" / "t.csv"), CLIP)
    assert {str(row["video"]) for row in named} == whole
    gc.collect()
    assert not os.listdir(temporary)


def test_a_row_that_is_kept_keeps_its_clip(moving: dict[str, bytes], tmp_path: Path, temporary: Path) -> None:
    kept = [row["video"] for row in open_rows(packed(tmp_path / "all.tar", moving), CLIP)]
    assert len(os.listdir(temporary)) == 6 and all(path.is_file() for clip in kept for path in clip.paths)
    del kept
    gc.collect()
    reading = iter(open_rows(str(tmp_path / "all.tar"), CLIP))
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    del reading
    gc.collect()
    assert not os.listdir(temporary)


def test_a_long_clip_does_not_pass_through_memory(tmp_path: Path, temporary: Path) -> None:
    raw = b"\0\0\0\x18ftypisom" + os.urandom(70 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("jump/1.mp4", raw)
        archive.writestr("run/2.mp4", raw[:100])
    packed(tmp_path / "a.tar", {"jump/1.mp4": raw, "run/2.mp4": raw[:100]})
    size = len(raw)
    del raw
    for form in ("zip", "tar"):
        tracemalloc.start()
        sizes = [row["video"].paths[0].stat().st_size for row in open_rows(str(tmp_path / f"a.{form}"), CLIP)]
        assert sizes == [size, 100] and tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.stop()
    gc.collect()
    assert not os.listdir(temporary)


def test_what_is_only_called_a_clip_is_a_rejected_row(moving: dict[str, bytes], tmp_path: Path,
                                                      temporary: Path) -> None:  # fmt: skip
    bad = {"run/2.mp4": b"\xff\xd8\xff\xe0" + bytes(100), "run/3.mp4": b"", "jump/notes.txt": b"about"}
    rows = open_rows(packed(tmp_path / "a.zip", moving | bad), CLIP)
    assert len(held(rows)) == 6 and [p.where[-9:] for p in rows.rejected] == ["run/2.mp4", "run/3.mp4"]
    assert "picture (JPEG)" in rows.rejected[0].message and "0 bytes" in rows.rejected[1].message
    gc.collect()
    assert not os.listdir(temporary)


def sparse(path: Path, size: int) -> str:
    path.write_bytes(clips.sparse(size))
    return str(path)


def test_archives_of_clips_made_to_do_harm(moving: dict[str, bytes], tmp_path: Path, temporary: Path) -> None:
    one = moving["run/1.mp4"]
    for form in FORMS:
        assert "outside" in refused(packed(tmp_path / f"climbs.{form}", {"a/1.mp4": one, "../b/2.mp4": one}), CLIP)
    for form in ("zip", "tar.gz"):
        assert "200" in refused(packed(tmp_path / f"bomb.{form}", {"a/1.mp4": one + bytes(80 << 20)}), CLIP)
    assert "200" in refused(sparse(tmp_path / "holes.tar", 3 << 30), CLIP)
    (holes,) = open_rows(sparse(tmp_path / "few.tar", 4096), CLIP[:1])
    assert holes["video"].paths[0].stat().st_size == 4096
    del holes
    with tarfile.open(tmp_path / "links.tar", "w") as links:
        info = tarfile.TarInfo("a/1.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        links.addfile(info)
    assert "no clip" in refused(str(tmp_path / "links.tar"), CLIP)
    for form in FORMS:
        whole = Path(packed(tmp_path / f"whole.{form}", moving)).read_bytes()
        for share in (0.2, 0.4, 0.6):
            (tmp_path / f"cut.{form}").write_bytes(whole[: int(len(whole) * share)])
            refused(str(tmp_path / f"cut.{form}"), CLIP)
    raw = bytearray((tmp_path / "whole.zip").read_bytes())
    raw[len(one) // 2] ^= 255  # in the first clip: its checksum does not fit
    (tmp_path / "damaged.zip").write_bytes(raw)
    assert "damaged" in refused(str(tmp_path / "damaged.zip"), CLIP)
    gc.collect()
    assert not os.listdir(temporary)


# -- recordings --------------------------------------------------------------------------------------------------------


def spoken(*names: str) -> dict[str, bytes]:
    """Recordings with their texts beside them."""
    from multihead.codec.audio import wav

    files = {}
    for i, name in enumerate(names):
        samples = np.random.default_rng(i).normal(0, 3000, 8000).astype(np.int16)
        files[f"{name}.wav"], files[f"{name}.{'lab' if i % 2 else 'txt'}"] = wav(samples), f"text {i}".encode()
    return files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top", ["", "speech/"])
def test_speakers_of_an_archive_are_those_of_the_folder(form: str, top: str, tmp_path: Path) -> None:
    def read(path: str) -> list[tuple[str, str, str | None]]:
        return sorted((row["text"], row["audio"], row.get("speaker")) for row in open_rows(path, SPEECH))

    for names in (("ann/1", "ann/deep/2", "bob/3"), ("ann/1", "ann/2"), ("1", "ann/2")):
        files = spoken(*names)
        expected = read(written(tmp_path / names[0].replace("/", "-") / str(len(names)), files))
        files = {top + name: raw for name, raw in files.items()}
        if top and names == ("ann/1", "ann/2"):
            files |= {"speech/README": b"about"}
        assert read(packed(tmp_path / f"{len(names)}.{form}", files)) == expected


# -- parts -------------------------------------------------------------------------------------------------------------


def parts(kind: str, count: int = 12) -> dict[str, bytes]:
    """Training and validation files of a task's data, in folders of their own."""
    if kind == "audio":
        return spoken(*(f"train/ann/{i}" for i in range(count)), "val/ann/100", "val/bob/101", "val/bob/102")
    files = {f"{part}/{'ab'[i % 2]}/{i}": i for part, start, end in (("train", 0, count), ("val", 90, 93))
             for i in range(start, end)}  # fmt: skip
    if kind == "image":
        return {f"{name}.pgm": frame(i) for name, i in files.items()}
    pytest.importorskip("av")
    return {f"{name}.mp4": clips.clip([np.full((16, 16, 3), i * 20 % 256, np.uint8)] * 3) for name, i in files.items()}


TASKS: dict[str, dict[str, Any]] = {
    "image": {"task": "image-classification", "options": {"size": 8, "patch": 4}},
    "video": {"task": "video-classification", "options": {"size": 8, "patch": 4, "frames": 2, "tubelet": 1}},
    "audio": {"task": "speech-recognition", "options": {"mels": 16, "channels": 4}},
}


@pytest.mark.parametrize("kind", TASKS)
def test_folders_of_parts_are_parts_wherever_they_lie(kind: str, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("PIL")
    from multihead.prepare import run_step

    files = parts(kind)
    places = {"a folder": written(tmp_path / "data", files), "a zip": packed(tmp_path / "data.zip", files)}
    more = {f"data/top/{name}": raw for name, raw in files.items()} | {"data/README.txt": b"about"}
    places["a tar"] = packed(tmp_path / "data.tar.gz", more)
    for what, place in places.items():
        recipe = {"name": "r", "data": {"train": place, "split": {"test": 0.25}}, **TASKS[kind], **TINY}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        report = run_step(tmp_path / "r.yaml", run=tmp_path / "run", restart=True)[1]
        assert {part: found["rows"] for part, found in report["parts"].items()} == {
            "train": 9, "valid": 3, "test": 3}, what  # fmt: skip
        assert "/train" in report["reading"]["train"][0] and "/val" in report["reading"]["valid"][0]
        assert report["rejected"]["count"] == 0
        assert f"train = {place}" in capsys.readouterr().err, what


def test_a_part_of_an_archive_has_a_name(tmp_path: Path) -> None:
    files = {f"pets/{name}": raw for name, raw in parts("image").items()}
    path = packed(tmp_path / "a.zip", files)
    rows = open_rows("a.zip/pets/val", PICTURE, base=tmp_path)
    assert [row.where for row in rows] == [f"a.zip/pets/val/{'ab'[i % 2]}/{i}.pgm" for i in (90, 91, 92)]
    assert len(list(open_rows(["a.zip/pets/val", "a.zip/pets/train"], PICTURE, base=tmp_path))) == 15
    assert "did you mean 'pets/train'" in refused(f"{path}/pets/trian", PICTURE)
    assert "no such file or folder" in refused(str(tmp_path / "b.zip" / "pets"), PICTURE)
    (tmp_path / "t.csv").write_text("image,label\n")
    assert "no such file or folder" in refused(str(tmp_path / "t.csv" / "x"), PICTURE)
    assert f"data.train: {path}/pets/train," in refused(path, PICTURE)
    from multihead.data.folders import parts_of

    table = parts("image") | {"train.csv": b"image,label\ntrain/a/0.pgm,x\n"}
    assert parts_of(packed(tmp_path / "table.zip", table)) == {}
    assert [row["label"] for row in open_rows(str(tmp_path / "table.zip"), PICTURE)] == ["x"]
    files = {"train/1.pgm": frame(1), "val/1.pgm": frame(2), "cat/1.pgm": b""}
    assert parts_of(packed(tmp_path / "beside.tar", files)) == {} == parts_of(str(tmp_path / "none"))
    assert parts_of(packed(tmp_path / "one.tar", {"a/train/1.pgm": frame(1)})) == {}
    assert "no labels" in refused(f"{packed(tmp_path / 'bare.zip', {'test/1.pgm': frame(1)})}/test", PICTURE)


def test_init_names_the_parts_of_an_archive(tmp_path: Path) -> None:
    from multihead import recipe
    from multihead.init import write_recipe
    from multihead.task import find

    path = packed(tmp_path / "a.zip", {f"speech/{name}": raw for name, raw in parts("audio").items()})
    write_recipe("speech-recognition", [path], tmp_path / "r.yaml")
    data = recipe.load(tmp_path / "r.yaml", find=find).data
    assert str(data.train).endswith("a.zip/speech/train") and str(data.valid).endswith("a.zip/speech/val")
    rows = list(open_rows(str(data.valid), SPEECH, base=tmp_path))
    assert [row["speaker"] for row in rows] == ["ann", "bob", "bob"] and data.test is None
