"""Broken data files: each gives one UserError with its place and what to do, and never another exception.

`BROKEN` is also what the end-to-end test of the command line walks through: name → (files, expected words).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from multihead.data.rows import LABEL_NAMES, TEXT_NAMES, Column, open_rows
from multihead.errors import Problem, UserError

TEXT = Column("text", "text", True, TEXT_NAMES)
LABEL = Column("label", "label", True, LABEL_NAMES)
GOOD = b"text,label\n" + "很好,1\n太差,0\n".encode() * 5


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    return out.getvalue()


def _damaged_gzip() -> bytes:
    data = bytearray(gzip.compress(GOOD * 50))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def _bomb() -> bytes:
    block = gzip.compress((b"x" * 100_000 + b",1\n") * 10)
    return gzip.compress(b"text,label\ngood,1\n") + block * 75


def _jsonl(*rows: object) -> bytes:
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows).encode()


# name: (content of data.csv, or files; where the message points; words in it)
BROKEN: dict[str, tuple[bytes | dict[str, bytes], str, str]] = {
    "empty": (b"", "data.csv", "empty"),
    "blank lines only": (b"\n\n  \n", "data.csv", "nothing but blanks"),
    "BOM only": (codecs.BOM_UTF8, "data.csv", "nothing but blanks"),
    "header only": (b"text,label\n", "data.csv:1", "no row below"),
    "header only, after blank lines": (b"\n\ntext,label\n", "data.csv:3", "no row below"),
    "empty gzip": (gzip.compress(b""), "data.csv", "empty"),
    "gzip cut short": (gzip.compress(GOOD)[:-12], "data.csv", "ends too early"),
    "gzip header only": (gzip.compress(GOOD)[:6], "data.csv", "ends too early"),
    "gzip damaged": (_damaged_gzip(), "data.csv", "damaged"),
    "gzip in gzip": (gzip.compress(gzip.compress(GOOD)), "data.csv", "twice"),
    "gzip bomb": (_bomb(), "data.csv", "trap"),
    "zip or xlsx": (_zip(), "data.csv", "Excel"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "data.csv", "CSV"),
    "tar": (_tar(), "data.csv", "tar"),
    "tar.gz": (gzip.compress(_tar()), "data.csv", "tar"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "data.csv", "PDF"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "data.csv", "PNG"),
    "WAV": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "data.csv", "WAV"),
    "NumPy array": (b"\x93NUMPY\x01\x00v\x00{'descr'", "data.csv", "NumPy"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}", "data.csv", "pickle"),
    "SQLite": (b"SQLite format 3\x00" + bytes(100), "data.csv", "SQLite"),
    "Parquet cut short": (b"PAR1" + bytes(60), "data.csv:1", "Parquet"),
    "Parquet, four bytes": (b"PAR1", "data.csv:1", "Parquet"),
    "random bytes": (bytes((i * 73 + i // 7) % 256 for i in range(5000)), "data.csv", "not a text file"),
    "NUL bytes": (b"text,label\ngood,1\nb\0d,0\nfine,1\n", "data.csv:3", "NUL"),
    "NUL block at the end": (GOOD + bytes(4096), "data.csv:12", "NUL"),
    "Latin-1": ("text,label\nété à la plage,1\nça va,0\n".encode("latin-1"), "data.csv:2", "data.encoding"),
    "UTF-8 with one bad byte": (GOOD + b"\xff\xfe,1\n" + GOOD * 20, "data.csv:12", "byte"),
    "UTF-8 cut in a character": (GOOD + "好".encode()[:2], "data.csv:12", "byte"),
    "UTF-16 cut in a character": (codecs.BOM_UTF16_LE + GOOD.decode().encode("utf-16-le")[:-1], "data.csv:11", "byte"),
    "GB18030 cut in a character": (GOOD.decode().encode("gb18030") + b"\xba", "data.csv:12", "byte"),
    "quote never closed": (b'text,label\ngood,1\n"bad,0\nfine,1\n' + GOOD, "data.csv:3", "never closed"),
    "quotes out of order": (b'text,label\ngood,1\n"a"b,0\n', "data.csv:3", "double quotes"),
    "too few fields": (b"text,label\ngood,1\nbad\n", "data.csv:3", "1 fields where there should be 2"),
    "too many fields": (b"text,label\ngood,1\na,b,0\n", "data.csv:3", "3 fields where there should be 2"),
    "every text empty": (b"text,label\n,1\n,0\n", "data.csv:2", "'text' is empty"),
    "a label missing": (b"text,label\ngood,1\nbad,\n", "data.csv:3", "'label' is empty"),
    "no label column": (b"text,when\ngood,2020-01-01\nbad,2021-03-04\nso,2022-05-06\n", "data.csv:1",
                        "data.columns.label"),
    "no text column": (b"label,number\n1,17.5\n0,18.25\n", "data.csv:1", "data.columns.text"),
    "plain text for a table": ("道可道，非常道。\n名可名，非常名。\n".encode(), "data.csv:1", "without columns"),
    "one endless line": (b"x" * 9_000_000, "data.csv:1", "without columns"),
    "endless JSON line": (b'{"text": "' + b"x" * 9_000_000, "data.csv:1", "JSON"),
    "JSONL, a broken line": (_jsonl({"text": "a", "label": 1}, '{"text": "b", "label": ', {"text": "c", "label": 0}),
                             "data.csv:2", "not JSON"),
    "JSONL, first line broken": (_jsonl('{"text": a}', {"text": "b", "label": 1}), "data.csv:1", "not JSON"),
    "JSONL, a list among objects": (_jsonl({"text": "a", "label": 1}, "[1, 2]"), "data.csv:2", "object"),
    "JSONL, text is a number list": (_jsonl({"text": "a", "label": 1}, {"text": [1, 2], "label": 1}),
                                     "data.csv:2", "should be text"),
    "JSONL, text is an object": (_jsonl({"text": "a", "label": 1}, {"text": {"b": 1}, "label": 1}),
                                 "data.csv:2", "should be text"),
    "JSONL, label is a list": (_jsonl({"text": "a", "label": 1}, {"text": "b", "label": ["x", "y"]}),
                               "data.csv:2", "should be a label"),
    "JSONL, a key missing": (_jsonl({"text": "a", "label": 1}, {"text": "b"}), "data.csv:2", "'label' is empty"),
    "JSONL, half an emoji": (_jsonl({"text": "a", "label": 1}, '{"text": "\\ud83d", "label": 1}'),
                             "data.csv:2", "half a character"),
    "JSONL, nested too deep": (_jsonl({"text": "a", "label": 1}, '{"text": ' + "[" * 100_000), "data.csv:2", "JSON"),
    "JSONL, a number too long": (_jsonl({"text": "a", "label": 1}, '{"text": "b", "label": ' + "9" * 5000 + "}"),
                                 "data.csv:2", "JSON"),
    "JSON, cut short": (b'[{"text": "a", "label": 1},\n {"text": "b"', "data.csv:2", "JSON"),
    "JSON, comma missing": (b'[{"text": "a", "label": 1}\n {"text": "b", "label": 0}]', "data.csv:2", "','"),
    "JSON, comma at the end": (b'[{"text": "a", "label": 1},\n]', "data.csv:2", "JSON"),
    "JSON, more after the end": (b'[{"text": "a", "label": 1}]\n[]', "data.csv:2", "after the end"),
    "JSON, empty array": (b"[]", "data.csv", "no row"),
    "JSON, array of words": (b'["a",\n"b"]', "data.csv:1", "object"),
    "JSON, no array": (b'{\n "text": "a",\n "label": 1\n}', "data.csv:4", "no array of objects"),
    "JSON, columns as arrays": (b'{\n"text": ["a", "b"],\n"label": [1, 2]\n}', "data.csv:4", "no array of objects"),
    "JSON, two arrays": (b'{"train": [{"text": "a", "label": 1}],\n"test": [{"text": "b", "label": 1}]}',
                         "data.csv:2", "two arrays"),
    "a label folder with an empty text": ({"data.csv/a/1.txt": b"good", "data.csv/b/1.txt": b" \n"},
                                          "data.csv/b/1.txt", "blanks"),
    "texts beside label folders": ({"data.csv/a/1.txt": b"good", "data.csv/1.txt": b"bad"}, "data.csv/1.txt:1",
                                   "folder"),
    "an empty folder": ({"data.csv/.keep": b""}, "data.csv", "no data file"),
    "nothing there": ({"data.cvs": GOOD}, "data.csv", "did you mean 'data.cvs'"),
}


def put_broken(folder: Path, name: str) -> None:
    """Write the files of one broken input into `folder`."""
    content = BROKEN[name][0]
    for place, data in (content if isinstance(content, dict) else {"data.csv": content}).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)


def read_all(folder: Path, paths="data.csv", **options) -> int:
    """Read as `prepare` does: row faults are raised at the end, all at once."""
    rows = open_rows(paths, options.pop("columns", [TEXT, LABEL]), options.pop("mapping", None), base=folder, **options)
    count = sum(1 for _ in rows)
    if rows.rejected:
        raise UserError.many(rows.rejected)
    return count


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_input(tmp_path, monkeypatch, name, language):
    monkeypatch.setenv("MULTIHEAD_LANG", language)
    put_broken(tmp_path, name)
    with pytest.raises(UserError) as error:
        read_all(tmp_path)
    _, where, words = BROKEN[name]
    first = error.value.problems[0]
    assert first.where == where, str(error.value)
    if language == "en":
        assert words in first.message
    else:
        assert any("\u4e00" <= c <= "\u9fff" for c in first.message)


@pytest.mark.parametrize(("options", "words"), [
    ({"mapping": {"text": "reviews"}}, "data.csv:1: there is no column 'reviews'"),
    ({"mapping": {"text": "9"}}, "data.csv:1: there is no column '9'"),
    ({"mapping": {"words": "text"}}, "'words', which this task does not use"),
    ({"encoding": "klingon"}, "'klingon' is not a known encoding"),
    ({"encoding": "utf-16"}, "data.csv:"),
    ({"encoding": "ascii85"}, "not a known encoding"),
    ({"delimiter": '"'}, "cannot separate columns"),
    ({"delimiter": "|"}, "data.csv:1: no column was found for"),
    ({"paths": []}, "no data file is named"),
    ({"paths": ""}, "is not the name of a file"),
    ({"paths": "a\0b"}, "is not the name of a file"),
    ({"paths": "*.nothing"}, "no file matches"),
    ({"paths": "**x/[a"}, "**x/[a"),
    ({"paths": ["data.csv", "gone.csv", "lost.csv"]}, "lost.csv: there is no such file"),
    ({"paths": "data.csv/inside.csv"}, "no such file"),
    ({"paths": "x" * 300}, "x" * 300),
    ({"paths": "/dev/null"}, "neither a file nor a folder"),
], ids=str)
def test_wrong_settings(tmp_path, options, words):
    (tmp_path / "data.csv").write_bytes(GOOD)
    with pytest.raises(UserError) as error:
        read_all(tmp_path, **{"paths": "data.csv", **options})
    assert words in str(error.value)


def test_any_damage_to_a_good_file_is_a_user_error_or_rows(tmp_path):
    """Every file is cut at every length and changed at every byte: never another exception than UserError."""
    files = {
        "csv": GOOD[:60], "gz": gzip.compress(GOOD[:60], mtime=0),
        "json": b'{"v": 1, "data": [{"text": "a\\u00e9", "label": [1]}, {"text": "b", "label": 2}]}',
        "jsonl": _jsonl({"text": "a", "label": 1}, {"text": "b", "label": 0.5}),
        "utf16": codecs.BOM_UTF16_BE + GOOD[:40].decode("utf-8", "ignore").encode("utf-16-be"),
        "gbk": GOOD[:60].decode("utf-8", "ignore").encode("gbk"),
    }
    for name, good in files.items():
        damaged = [good[:n] for n in range(len(good))]
        damaged += [good[:i] + bytes([b]) + good[i + 1:] for i in range(len(good)) for b in (0, 0x22, 0xFF)]
        for data in damaged:
            (tmp_path / "data.csv").write_bytes(data)
            try:
                read_all(tmp_path)
            except UserError as error:
                assert all(isinstance(p, Problem) and p.where.startswith("data.csv") for p in error.problems), name
