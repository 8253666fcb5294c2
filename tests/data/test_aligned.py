"""Aligned files: rows and their places, blanks, packed files, and files that do not go together."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from multihead.data.rows import Column, open_rows
from multihead.errors import UserError

COLUMNS = [Column("source", "text"), Column("target", "text", target=True)]


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path.name


def test_lines_of_one_number_are_a_row(tmp_path: Path) -> None:
    write(tmp_path / "a.en", "one", "", "two, \"2\"", "three")
    with gzip.open(tmp_path / "a.de.gz", "wt", encoding="utf-8") as file:
        file.write("eins\n\nzwei\tZWEI\ndrei")
    rows = open_rows({"source": "a.en", "target": "a.de.gz"}, COLUMNS, base=tmp_path)
    found = list(rows)
    assert found == [
        {"source": "one", "target": "eins"},
        {"source": 'two, "2"', "target": "zwei\tZWEI"},
        {"source": "three", "target": "drei"},
    ]
    assert [row.where for row in found] == ["a.en:1", "a.en:3", "a.en:4"]
    assert rows.count == 3 and not rows.rejected and [p.name for p in rows.files] == ["a.en", "a.de.gz"]
    assert list(rows) == found  # read anew
    assert "source (given)" in rows.describe()[0]


def test_several_files_a_side_go_together_in_their_order(tmp_path: Path) -> None:
    names = {side: [write(tmp_path / f"{i}.{side}", f"{side}{i}") for i in (1, 2)] for side in ("source", "target")}
    found = list(open_rows(names, COLUMNS, base=tmp_path))
    assert [(row["source"], row["target"], row.where) for row in found] == [
        ("source1", "target1", "1.source:1"), ("source2", "target2", "2.source:1"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="equal numbers, not source: 2, target: 1"):
        open_rows({**names, "target": names["target"][:1]}, COLUMNS, base=tmp_path)


def test_a_blank_on_one_side_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    rows = open_rows(
        {"source": write(tmp_path / "a.en", "one", "two", " "), "target": write(tmp_path / "a.de", "eins", "", "drei")},
        COLUMNS, base=tmp_path,
    )  # fmt: skip
    assert [row["source"] for row in rows] == ["one"]
    assert [(p.where, p.message) for p in rows.rejected] == [
        ("a.de:2", "'target' is empty"), ("a.en:3", "'source' is empty")
    ]  # fmt: skip


@pytest.mark.parametrize("shorter", ["source", "target"])
def test_files_of_different_lengths_are_refused_where_one_ends(tmp_path: Path, shorter: str) -> None:
    lines = {"source": ["a"] * 7, "target": ["b"] * 7, shorter: ["c"] * 5}
    files = {name: write(tmp_path / name, *text) for name, text in lines.items()}
    with pytest.raises(UserError, match=r"ends after line 5, while (source|target) has 7 lines") as caught:
        list(open_rows(files, COLUMNS, base=tmp_path))
    assert caught.value.problems[0].where == f"{shorter}:5"


def test_what_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04....")
    with pytest.raises(UserError) as caught:
        open_rows({"sauce": "a.en", "target": "b.zip"}, COLUMNS, base=tmp_path)
    said = str(caught.value)
    assert "'sauce' is no column of this task" in said and "source" in said and "zip archive" in said
    assert "no file for the column 'source'" in said and "no such file" in said


def test_a_command_line_names_the_files_by_column(tmp_path: Path) -> None:
    write(tmp_path / "a.en", "one"), write(tmp_path / "a.de", "eins")
    assert list(open_rows(["source=a.en", "target=a.de"], COLUMNS, base=tmp_path)) == [
        {"source": "one", "target": "eins"}
    ]  # fmt: skip
