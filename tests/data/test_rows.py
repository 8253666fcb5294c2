"""Rows from every form of file: same content, same rows; columns found or named; lines that a person can open."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multihead.data.encoding import unix_newlines
from multihead.data.formats import PIECE
from multihead.data.rows import LABEL_NAMES, TEXT_NAMES, Column, open_rows
from multihead.errors import UserError

TEXT = Column("text", "text", True, TEXT_NAMES)
LABEL = Column("label", "label", True, LABEL_NAMES)
REVIEWS = [("房间很干净，服务也好", "1"), ('he said "no", twice', "0"), ("两行\n文字", "1"), ("早餐 太差 😀", "0")] * 3


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, columns=(TEXT, LABEL), mapping=None, **options):
    return open_rows(str(path), columns, mapping, **options)


def pairs(rows):
    return [(row["text"], row["label"]) for row in rows]


def as_csv(rows, header=("review", "label"), **how):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", **how).writerows([header, *rows] if header else rows)
    return out.getvalue()


def test_every_form_gives_the_same_rows(tmp_path):
    objects = [{"评论": t, "标签": int(y)} for t, y in REVIEWS]
    forms = {
        "a.csv": as_csv(REVIEWS),
        "semicolon.csv": as_csv(REVIEWS, delimiter=";"),
        "a.tsv": as_csv(REVIEWS, delimiter="\t"),
        "a.jsonl": "\n".join(json.dumps(o, ensure_ascii=False) for o in objects),
        "a.json": json.dumps(objects, ensure_ascii=False, indent=2),
        "minified.json": json.dumps(objects),
        "inside.json": json.dumps({"version": "1.1", "about": {"n": [1, 2]}, "data": objects, "end": None}),
        "inside-indented.json": json.dumps({"data": objects, "more": []}, indent=1),
    }
    for name, content in forms.items():
        rows = read(put(tmp_path, name, content))
        assert pairs(rows) == REVIEWS, name
        assert rows.count == len(REVIEWS) and rows.rejected == []


def test_parquet_gives_the_same_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"label": [int(y) for _, y in REVIEWS], "content": [t for t, _ in REVIEWS]})
    pq.write_table(table, tmp_path / "table.bin")
    rows = read(tmp_path / "table.bin")
    assert pairs(rows) == REVIEWS
    assert next(iter(rows)).where.endswith("table.bin:1")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'multihead\[data\]'"):
        read(put(tmp_path, "a.parquet", b"PAR1" + bytes(40) + b"PAR1"))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_quoted_newlines_keep_line_numbers(tmp_path, ending):
    text = 'text,label\n"one\ntwo\n\nthree",a\nplain,b\n\n"x ""y"" z",c\n'
    rows = list(read(put(tmp_path, "q.csv", text.replace("\n", ending))))
    assert [(r.where.rsplit(":")[-1], r["text"]) for r in rows] == [
        ("2", "one\ntwo\n\nthree"), ("6", "plain"), ("8", 'x "y" z')]


def test_lines_of_every_form_point_at_the_row(tmp_path):
    objects = [{"text": f"第{i}条", "label": "a"} for i in range(5)]
    for name, content in {
        "a.jsonl": "\n\n".join(json.dumps(o, ensure_ascii=False) for o in objects),
        "a.json": json.dumps(objects, ensure_ascii=False, indent=4),
        "a.csv": "label,text\n" + "\n".join(f"a,{o['text']}" for o in objects),
    }.items():
        path = put(tmp_path, name, content)
        lines = content.split("\n")
        for row in read(path):
            line = int(row.where.rsplit(":")[-1])
            assert any(row["text"] in at for at in lines[line - 1:line + 2]), (name, row.where)
            assert name != "a.json" or lines[line - 1].strip() == "{"


def test_row_faults_are_listed_with_line_and_reason(tmp_path):
    rows = read(put(tmp_path, "a.csv", "text,label\nfine,1\na,b,c\n,1\n   ,1\nno label,\nonly\nfine too,0\n"))
    assert len(list(rows)) == 2
    where = [p.where.rsplit(":")[-1] for p in rows.rejected]
    assert where == ["3", "4", "5", "6", "7"] and rows.rejected_count == 5 and rows.count == 2
    assert "3 fields where there should be 2" in rows.rejected[0].message
    rows = read(put(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": }\n[1]\n{"text": "c"}\n'
                    '{"text": {"x": 1}, "label": 0}\n{"text": "half \\ud83d", "label": 0}\n{"text": "d", "label": 0}'))
    assert pairs(rows) == [("a", "1"), ("d", "0")]
    assert [p.where.rsplit(":")[-1] for p in rows.rejected] == ["2", "3", "4", "5", "6"]
    assert [len(list(rows)), rows.rejected_count] == [2, 5], "a second reading counts anew"


@pytest.mark.parametrize("header", ["text,label", "ｔｅｘｔ,ｌａｂｅｌ", " Text , LABEL ", "评论内容,情感",
                                    "\ufeff内容,类别", "标签,文本"])
def test_headers_are_known_by_name(tmp_path, header):
    flipped = header.startswith("标签")
    lines = [header, *(("1,很好" if flipped else "很好,1") for _ in range(3))]
    rows = read(put(tmp_path, "a.csv", "\n".join(lines)))
    assert pairs(rows) == [("很好", "1")] * 3
    assert rows.guess["files"][0]["how"] == {"text": "name", "label": "name"}


def test_columns_are_guessed_by_content(tmp_path):
    lines = ["u1\tgood\t这家酒店的服务很好，下次再来\t3"]
    lines += [f"u{i}\t{'good' if i % 2 else 'bad'}\t第{i}条评论写得很长很长\t{i}" for i in range(2, 30)]
    rows = read(put(tmp_path, "a.tsv", "\n".join(lines)))
    about = rows.guess["files"][0]
    assert about["mapping"] == {"text": "3", "label": "2"} and not about["header"]
    assert rows.describe() and "by content" in rows.describe()[0]
    assert next(iter(rows)) == {"text": "这家酒店的服务很好，下次再来", "label": "good", "1": "u1", "4": "3"}


def test_a_header_with_unknown_names_is_still_a_header(tmp_path):
    body = "".join(f"这是第 {i} 个句子,{i % 3}\n" for i in range(30))
    rows = read(put(tmp_path, "a.csv", "foo,bar\n" + body))
    assert len(list(rows)) == 30 and rows.guess["files"][0]["mapping"] == {"text": "foo", "label": "bar"}
    assert len(list(read(put(tmp_path, "b.csv", body)))) == 30
    assert len(list(read(tmp_path / "b.csv", header=True, mapping={"text": 1, "label": 2}))) == 29


def test_mapping_wins_over_names(tmp_path):
    path = put(tmp_path, "a.csv", "text,label,title,kind\na b,1,长标题,x\nc d,0,另一个,y\n")
    assert pairs(read(path, mapping={"text": "title", "label": "ＫＩＮＤ"})) == [("长标题", "x"), ("另一个", "y")]
    with pytest.raises(UserError) as error:
        read(path, mapping={"text": "titel", "lable": "kind"})
    said = str(error.value)
    assert f"{path}:1: " in said and "text, label, title, kind" in said and "did you mean 'title'" in said
    assert "did you mean 'label'" in said, "all problems at once"


def test_kinds_of_columns(tmp_path):
    columns = [Column("text"), Column("tags", "labels"), Column("score", "number"), Column("user", "id", False)]
    path = put(tmp_path, "a.jsonl", '{"text": ["一","二"], "tags": ["a","b"], "score": "３.5", "user": 7}\n'
                                    '{"text": "t", "tags": "a；c", "score": 2}\n'
                                    '{"text": "t", "tags": "a", "score": "many"}\n')
    rows = read(path, columns)
    assert list(rows) == [{"text": "一\n二", "tags": ["a", "b"], "score": 3.5, "user": "7"},
                          {"text": "t", "tags": ["a", "c"], "score": 2}]
    assert "'score' should be a number, not 'many'" in rows.rejected[0].message


def test_prose_with_commas_is_text_and_not_a_table(tmp_path):
    text = "Call me Ishmael, said he.\nSome years ago, never mind.\nI was there, then.\n" * 3
    rows = read(put(tmp_path, "a.csv", text), [TEXT])
    assert rows.guess["files"][0]["format"] == "txt" and "".join(r["text"] for r in rows) == text


def test_tsv_sentences_may_begin_with_a_quote(tmp_path):
    lines = [f'"quote {i} never ends\t{i % 2}' if i % 3 == 0 else f"plain sentence {i}\t{i % 2}" for i in range(20)]
    rows = read(put(tmp_path, "a.tsv", "\n".join(lines)))
    assert len(list(rows)) == 20 and next(iter(rows))["text"] == '"quote 0 never ends'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3 * PIECE), min_size=1,
                max_size=4).map("\n".join).filter(str.strip), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_pieces_joined_are_the_file(tmp_path_factory, text, encoding):
    path = put(tmp_path_factory.mktemp("t"), "a.txt", ("x\n" + text).encode(encoding))
    rows = list(read(path, [TEXT], delimiter=None)) if _is_text(path) else None
    if rows is None:
        return
    whole = ("x\n" + text).replace("\r\n", "\n")
    assert "".join(r["text"] for r in rows) == whole
    assert [bool(r.get("joined")) for r in rows] == [False] + [True] * (len(rows) - 1)
    assert all(0 < len(r["text"]) <= 2 * PIECE for r in rows)
    at = 0
    for row in rows:
        assert int(row.where.rsplit(":")[-1]) == 1 + whole.count("\n", 0, at)
        at += len(row["text"])


def _is_text(path):
    return open_rows(str(path), [TEXT]).guess["files"][0]["format"] == "txt"


@given(st.text(st.sampled_from("\r\na"), max_size=12), st.data())
def test_newlines_do_not_depend_on_the_chunks(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(unix_newlines(parts, lone=False)) == text.replace("\r\n", "\n")
    assert "".join(unix_newlines(parts)) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_files_globs_folders_and_labelled_folders(tmp_path, monkeypatch):
    put(tmp_path, "d/b.csv", "text,label\n乙,1\n")
    put(tmp_path, "d/a.jsonl.gz", gzip.compress('{"text": "甲", "label": 0}\n'.encode()))
    put(tmp_path, "d/README.md", "# notes")
    put(tmp_path, "d/.hidden", "x")
    for given_paths, names in [
        ("d", ["d/a.jsonl.gz", "d/b.csv"]), ("d/*", ["d/README.md"]), ("d/?.csv", ["d/b.csv"]),
        (["d/b.csv", "d/a.jsonl.gz", "d/b.csv"], ["d/b.csv", "d/a.jsonl.gz"]), (tmp_path / "d" / "b.csv", None),
    ]:
        if given_paths == "d/*":
            with pytest.raises(UserError, match="README"):
                open_rows(given_paths, [TEXT, LABEL], base=tmp_path)
            continue
        rows = open_rows(given_paths, [TEXT, LABEL], base=tmp_path)
        if names:
            assert [about["file"] for about in rows.guess["files"]] == names
            assert [r.where.rsplit(":")[0] for r in rows] == names
    assert open_rows("d", [TEXT, LABEL], base=tmp_path).guess["skipped"] == ["d/.hidden", "d/README.md"]

    put(tmp_path, "films/正面/1.txt", "很好看，\n推荐\r\n")
    put(tmp_path, "films/正面/2.txt", "喜欢，真的".encode("gb18030"))
    put(tmp_path, "films/负面/1.txt", "a, b\nc, d\n")
    rows = open_rows("films", [TEXT, LABEL], base=tmp_path)
    assert pairs(rows) == [("很好看，\n推荐", "正面"), ("喜欢，真的", "正面"), ("a, b\nc, d", "负面")]
    assert len(rows.files) == 3
    assert len(list(open_rows("films", [TEXT], base=tmp_path))) == 3, "without a label wanted they are running text"


def test_reading_is_bounded_in_memory(tmp_path):
    line = ('{"text": "' + "房间很干净" * 150 + '", "label": "1"}\n').encode()
    with open(tmp_path / "big.jsonl", "wb") as file:
        for _ in range(60_000_000 // len(line) // 1000):
            file.write(line * 1000)
    with gzip.open(tmp_path / "big.txt.gz", "wb", compresslevel=1) as packed:
        for i in range(200):
            packed.write(f"{i} 没有换行的长行，".encode() * 1000 + bytes(str(i), "ascii") * 50_000)
    tracemalloc.start()
    count = sum(1 for _ in read(tmp_path / "big.jsonl"))
    assert count > 25_000
    characters = sum(len(r["text"]) for r in read(tmp_path / "big.txt.gz", [TEXT]))
    assert characters > 20_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_real_sets(shared_data):
    def about(path, columns=(TEXT, LABEL), mapping=None):
        rows = open_rows(path, columns, mapping, base=shared_data)
        found = sum(1 for _ in rows)
        assert rows.rejected_count == 0
        return found, rows.guess["files"][0]["mapping"]

    assert about("chnsenticorp-hotel/train.csv.gz") == (5665, {"text": "review", "label": "label"})
    assert about("waimai-10k/train.csv.gz") == (8987, {"text": "review", "label": "label"})
    assert about("sst2/train.tsv.gz") == (6320, {"text": "1", "label": "2"})
    assert about("sst2/dev.tsv.gz")[0] == 872 and about("sst2/test.tsv.gz")[0] == 1821
    assert about("chinese-poetry/train.jsonl.gz", [TEXT]) == (15480, {"text": "paragraphs"})
    assert about("chinese-poetry", [TEXT])[0] > 16480
    columns = [Column("source"), Column("target")]
    assert about("tatoeba-cmn-eng/train.tsv.gz", columns, {"source": 1, "target": 2})[0] == 25155
    for name, opener in {"tinyshakespeare/input.txt": open, "hongloumeng/train.txt.gz": gzip.open}.items():
        whole = opener(shared_data / name, "rb").read().decode().replace("\r\n", "\n")
        rows = open_rows(name, [TEXT], base=shared_data)
        assert "".join(r["text"] for r in rows) == whole and rows.guess["files"][0]["format"] == "txt"
