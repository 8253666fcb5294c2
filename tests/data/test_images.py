"""Rows with pictures from every form of data; and archives, tables and IDX files made to do harm."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multihead.data.images import from_uri, labels_of
from multihead.data.rows import Column, Rows, open_rows
from multihead.errors import UserError

COLUMNS = (Column("image", "image", names=("img", "path")), Column("label", "label", target=True))


def picture(value: int) -> bytes:
    """A picture of its own for each value."""
    return b"P5 2 2 255\n" + bytes([value] * 4)


FILES = {"cat/1.pgm": picture(1), "cat/deep/2.pgm": picture(2), "dog/3.pgm": picture(3)}
EXPECTED = {picture(1): "cat", picture(2): "cat", picture(3): "dog"}


def held(rows: Rows) -> dict[bytes, Any]:
    """Picture → label of every row."""
    return {from_uri(row["image"]): row.get("label") for row in rows}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def idx(pictures: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{pictures.ndim}I", 0, 0, 8, pictures.ndim, *pictures.shape) + pictures.tobytes()


# -- forms -------------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_globs_are_labelled_by_folder(tmp_path: Path) -> None:
    write(tmp_path / "pets", {**FILES, "README.md": b"about", ".hidden.pgm": picture(9), "notes.txt": b"not a picture"})
    rows = open_rows("pets", COLUMNS, base=tmp_path)
    assert held(rows) == EXPECTED and rows.count == 3 and not rows.rejected
    assert any("notes.txt" in line for line in rows.describe())
    assert [row.where for row in rows] == ["pets/cat/1.pgm", "pets/cat/deep/2.pgm", "pets/dog/3.pgm"]
    assert held(open_rows("pets/*/*.pgm", COLUMNS, base=tmp_path)) == {picture(1): "cat", picture(3): "dog"}
    assert held(open_rows(["pets/cat", "pets/dog"], COLUMNS, base=tmp_path)) == EXPECTED
    assert held(open_rows(str(tmp_path / "pets/cat/1.pgm"), COLUMNS[:1])) == {picture(1): None}


@pytest.mark.parametrize("make", [
    lambda path, files: zipped(path, files),
    lambda path, files: tarred(path, files, "w"),
    lambda path, files: tarred(path, files, "w:gz"),
])  # fmt: skip
@pytest.mark.parametrize("top", ["", "train/", "data/pets/"])
def test_archives_of_folders(tmp_path: Path, make: Callable[..., Path], top: str) -> None:
    files = {top + name: content for name, content in FILES.items()} | {"__MACOSX/._1.pgm": picture(8)}
    rows = open_rows(str(make(tmp_path / "pets.bin", files)), COLUMNS)
    assert held(rows) == EXPECTED == held(rows)
    assert next(iter(rows)).where.endswith(f"pets.bin/{top}cat/1.pgm")


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_tables_name_pictures_relative_to_themselves(tmp_path: Path, form: str) -> None:
    write(tmp_path, FILES)
    absolute = tmp_path / "elsewhere" / "4.pgm"
    write(absolute.parent, {"4.pgm": picture(4)})
    uri = "data:image/x-portable-anymap;base64," + base64.b64encode(picture(5)).decode()
    cells = [("cat/1.pgm", "a"), ("./dog/3.pgm", "b"), (str(absolute), "c"), (uri, "d")]
    if form == "csv":
        text = "path,label\n" + "".join(f'"{path}",{label}\n' for path, label in cells)
    else:
        objects = [{"img": path, "label": label} for path, label in cells]
        text = json.dumps(objects) if form == "json" else "".join(json.dumps(o) + "\n" for o in objects)
    (tmp_path / f"table.{form}").write_text(text)
    rows = open_rows(f"table.{form}", COLUMNS, base=tmp_path)
    assert held(rows) == {picture(1): "a", picture(3): "b", picture(4): "c", picture(5): "d"}
    # Beside its pictures, in a folder, the table leads.
    assert len(held(open_rows(str(tmp_path), COLUMNS))) == 4


@pytest.mark.parametrize("make", [zipped, tarred])
def test_archives_of_a_table_and_its_pictures(tmp_path: Path, make: Callable[..., Path]) -> None:
    lines = [{"path": "pics/1.pgm", "label": "a"}, {"path": "../in/pics/2.pgm", "label": "b"},
             {"path": "pics/none.pgm", "label": "c"}, {"path": "/etc/passwd", "label": "d"},
             {"path": "pics/1.pgm", "label": "again"}]  # fmt: skip
    table = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"in/rows.jsonl": table, "in/pics/1.pgm": picture(1), "in/pics/2.pgm": picture(2)}
    path = make(tmp_path / "all.bin", files)
    rows = open_rows(str(path), COLUMNS)
    assert [(from_uri(r["image"]), r["label"]) for r in rows] == [
        (picture(1), "a"), (picture(1), "again"), (picture(2), "b")]  # fmt: skip
    assert [p.where.rsplit(":", 1)[1] for p in rows.rejected] == ["3", "4"]


def test_idx_pairs_packed_and_plain(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(256, size=(7, 3, 5), dtype=np.uint8)
    colour = rng.integers(256, size=(2, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "t10k-images-idx4-ubyte").write_bytes(idx(colour))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    for named in ("train-*", "train-images-idx3-ubyte.gz"):  # the labels beside it are found
        rows = list(open_rows(named, COLUMNS, base=tmp_path))
        assert [row["label"] for row in rows] == list("0123456")
        assert from_uri(rows[3]["image"]) == b"P5 5 3 255\n" + grey[3].tobytes()
        assert rows[3].where == "train-images-idx3-ubyte.gz:4"
    both = list(open_rows(str(tmp_path), COLUMNS))
    assert len(both) == 9 and from_uri(both[0]["image"]) == b"P6 4 4 255\n" + colour[0].tobytes()


def test_parquet_as_hugging_face_writes_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture(i), "path": f"{i}.pgm"} for i in range(3)]
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 1, 0]}), tmp_path / "a.parquet")
    assert held(open_rows(str(tmp_path / "a.parquet"), COLUMNS)) == {picture(0): "0", picture(1): "1", picture(2): "0"}
    parquet.write_table(pyarrow.table({"img": [picture(7)], "label": ["x"]}), tmp_path / "b.parquet")
    assert held(open_rows(str(tmp_path / "b.parquet"), COLUMNS)) == {picture(7): "x"}


def test_labels_are_the_folders_in_which_paths_differ() -> None:
    assert labels_of(["a/x/1", "a/y/2", "a/y/deep/3"]) == ["x", "y", "y"]
    assert labels_of(["/data/test/cat/1", "/data/test/cat/2"]) == ["cat", "cat"]
    assert labels_of(["1", "2"]) == [None, None]
    assert labels_of(["a/1", "a/x/2", "a/y/3"]) == [None, "x", "y"]


# -- what a person may have got wrong ----------------------------------------------------------------------------------


def refused(paths: Any, base: Path, columns: Any = COLUMNS) -> str:
    with pytest.raises(UserError) as error:
        for _ in open_rows(paths, columns, base=base):
            pass
    assert len(error.value.problems) == 1, error.value
    return str(error.value)


def test_folders_of_parts_are_not_labels(tmp_path: Path) -> None:
    write(tmp_path / "data", {"train/cat/1.pgm": picture(1), "val/cat/2.pgm": picture(2)})
    assert "data/train" in refused("data", tmp_path)


def test_pictures_without_labels(tmp_path: Path) -> None:
    write(tmp_path, {"1.pgm": picture(1), "cat/2.pgm": picture(2), "dog/3.pgm": picture(3)})
    rows = open_rows(str(tmp_path), COLUMNS)
    assert len(held(rows)) == 2 and [p.where for p in rows.rejected] == [str(tmp_path / "1.pgm")]
    (tmp_path / "a-idx3").write_bytes(idx(np.zeros((1, 2, 2), np.uint8)))
    assert "labels" in refused("a-idx3", tmp_path)
    assert "jpg" in refused(["1.pgm"], tmp_path)


def test_faulty_files_are_rejected_rows_with_their_place(tmp_path: Path) -> None:
    write(tmp_path / "d", {**FILES, "dog/empty.jpg": b"", "dog/fake.jpg": b"P5"})
    (tmp_path / "t.csv").write_text(
        "path,label\nd/cat/1.pgm,a\nd/none.jpg,b\nhttps://example.org/x.jpg,c\n../t.csv,d\nd/dog/fake.jpg,e\n")
    rows = open_rows("t.csv", COLUMNS, base=tmp_path)
    assert len(list(rows)) == 1 and [p.where for p in rows.rejected] == [f"t.csv:{n}" for n in (3, 4, 5, 6)]
    for paths, broken in (("d", 2), (str(zipped(tmp_path / "d.zip", {**FILES, "dog/4.jpg": b"<html>"})), 1)):
        rows = open_rows(paths, COLUMNS, base=tmp_path)
        assert held(rows) == EXPECTED and rows.rejected_count == broken
        assert all(p.where.endswith(".jpg") for p in rows.rejected)
    assert "SVG" in refused(str(write(tmp_path / "s", {"x.svg": b"<svg/>"})), tmp_path)


def test_idx_files_that_do_not_fit(tmp_path: Path) -> None:
    grey = np.zeros((5, 2, 2), np.uint8)
    files = {"a-images-idx3": idx(grey)[:-3], "a-labels-idx1": idx(np.zeros(5, np.uint8)),
             "b-images-idx3": idx(grey), "b-labels-idx1": idx(np.zeros(4, np.uint8)),
             "c-images-idx3": struct.pack(">BBBB3I", 0, 0, 13, 3, 1, 2, 2) + bytes(16)}  # fmt: skip
    write(tmp_path, files)
    assert "4" in refused("a-*", tmp_path)
    assert "5" in refused("b-*", tmp_path)
    assert "0x0d" in refused("c-*", tmp_path)
    assert "a-labels-idx1" in refused("a-labels-idx1", tmp_path)


# -- harm --------------------------------------------------------------------------------------------------------------


def test_a_table_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {"secret.pgm": picture(9), "in/1.pgm": picture(1)})
    os.symlink(tmp_path / "secret.pgm", tmp_path / "in" / "link.pgm")
    (tmp_path / "in" / "t.csv").write_text("path,label\n1.pgm,a\n../secret.pgm,b\nlink.pgm,c\n")
    rows = open_rows("in/t.csv", COLUMNS, base=tmp_path)
    assert held(rows) == {picture(1): "a"} and rows.rejected_count == 2


@pytest.mark.parametrize("name", ["../1.pgm", "/abs/1.pgm", "a/../../1.pgm", "C:\\1.pgm", "a\\..\\..\\1.pgm"])
def test_archives_whose_names_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    for make in (zipped, tarred):
        path = make(tmp_path / "x.bin", {"cat/0.pgm": picture(0), name: picture(1)})
        assert "outside" in refused(str(path), tmp_path)


def test_links_and_devices_in_archives_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"cat/{kind.decode()}.pgm")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("cat/1.pgm", "dog/2.pgm"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            archive.addfile(info, io.BytesIO(picture(1)))
    assert [row["label"] for row in open_rows(str(tmp_path / "x.tar"), COLUMNS)] == ["cat", "dog"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("cat/link.pgm")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("cat/1.pgm", picture(1))
    assert len(list(open_rows(str(tmp_path / "x.zip"), COLUMNS))) == 1


def test_bombs_are_refused_without_being_unpacked(tmp_path: Path) -> None:
    huge = bytes(120 << 20)
    paths = [zipped(tmp_path / "z.zip", {"cat/1.bmp": huge, "dog/2.pgm": picture(1)}),
             tarred(tmp_path / "t.tar.gz", {"cat/1.bmp": huge, "dog/2.pgm": picture(1)})]  # fmt: skip
    (tmp_path / "i-idx3.gz").write_bytes(gzip.compress(idx(np.zeros((120 << 10, 32, 32), np.uint8))))
    del huge
    for path in (*paths, tmp_path / "i-idx3.gz"):
        tracemalloc.start()
        assert "200" in refused(str(path), tmp_path, COLUMNS[:1]), path
        assert tracemalloc.get_traced_memory()[1] < 100 << 20, path
        tracemalloc.stop()


def test_damaged_archives_are_one_message(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {f"cat/{i}.pgm": b"P5 40 40 255\n" + rng.bytes(1600) for i in range(20)}
    for make in (zipped, tarred, lambda path, files: tarred(path, files, "w")):
        raw = make(tmp_path / "whole", files).read_bytes()
        (tmp_path / "cut").write_bytes(raw[: len(raw) // 2])
        assert refused("cut", tmp_path)
    (tmp_path / "none.zip").write_bytes(zipped(tmp_path / "n", {"a.txt": b"hello"}).read_bytes())
    with pytest.raises(UserError, match=r"none\.zip"):
        open_rows("none.zip", COLUMNS, base=tmp_path)
