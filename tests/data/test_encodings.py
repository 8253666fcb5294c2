"""Encodings found by content: all of them, with and without BOM, CRLF and gzip, give the same rows."""

from __future__ import annotations

import codecs
import gzip
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multihead.data.encoding import detect, known_encoding, read_text
from multihead.data.rows import LABEL_NAMES, TEXT_NAMES, Column, open_rows
from multihead.errors import UserError

COLUMNS = [Column("text", "text", True, TEXT_NAMES), Column("label", "label", True, LABEL_NAMES)]
SIMPLE = [("房间很干净，服务也好。", "正面"), ("早餐不好吃，不会再来了！", "负面"), ("The room was fine “OK”", "正面")]
TRADITIONAL = [("這個電影真的很好看，值得一去。", "正面"), ("劇情無聊，對話也沒有意思！", "負面"), ("還可以", "正面")]
ENCODINGS = {
    "utf-8": b"", "utf-8 BOM": codecs.BOM_UTF8, "gb18030": b"", "gb18030 BOM": b"\x84\x31\x95\x33",
    "utf-16-le": b"", "utf-16-le BOM": codecs.BOM_UTF16_LE, "utf-16-be": b"", "utf-16-be BOM": codecs.BOM_UTF16_BE,
    "utf-32-le BOM": codecs.BOM_UTF32_LE,
}


@pytest.mark.parametrize("rows", [SIMPLE, TRADITIONAL], ids=["simplified", "traditional"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_same_rows(tmp_path, name, rows):
    encoding = name.split()[0]
    for header, ending, packed in itertools.product(["text,label", "ｔｅｘｔ，标签".replace("，", ",")], ["\n", "\r\n"],
                                                    [False, True]):
        data = ENCODINGS[name] + ending.join([header, *(",".join(r) for r in rows), ""]).encode(encoding)
        path = tmp_path / "file.dat"
        path.write_bytes(gzip.compress(data) if packed else data)
        found = open_rows(path, COLUMNS)
        assert [(r["text"], r["label"], r.where) for r in found] == [
            (*row, f"{path}:{i}") for i, row in enumerate(rows, 2)], (header, ending, packed)
        assert found.guess["files"][0]["encoding"] == encoding and found.guess["files"][0]["packed"] == packed


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_chinese_may_begin_long_after_the_head(tmp_path, encoding):
    path = tmp_path / "late.csv"
    with open(path, "wb") as file:
        file.write(b"text,label\n" + b"plain ascii row,good\n" * 60_000)
        file.write("终于有了中文，很好,good\n".encode(encoding))
    last = None
    for row in open_rows(path, COLUMNS):
        last = row
    assert last is not None and last["text"] == "终于有了中文，很好" and last.where.endswith(":60002")


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), st.integers(1, 7),
       st.sampled_from(["utf-8", "gb18030", "utf-16-le", "big5", "shift_jis", "utf-16", "latin-1"]))
def test_decoding_does_not_depend_on_the_chunks(text, size, encoding):
    data = text.encode(encoding, "ignore")
    chunks = [data[i:i + size] for i in range(0, len(data), size)]
    assert "".join(read_text(chunks, "f", encoding)) == data.decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16-le", "utf-16-be"])
def test_detection_on_real_text(shared_data, encoding):
    names = ("chnsenticorp-hotel/test.csv.gz", "chinese-poetry/valid.jsonl.gz", "hongloumeng/valid.txt.gz",
             "drcd/dev.json.gz")
    texts = [gzip.decompress((shared_data / name).read_bytes()).decode() for name in names]
    for text, size in itertools.product(texts, (60, 300, 5000)):
        for start in range(0, len(text) - size, max(size, len(text) // 60)):
            part = text[start:start + size]
            if sum(ord(c) > 127 for c in part) > 10:
                assert detect(part.encode(encoding)) == encoding, part


def test_utf8_wins_over_the_gb18030_it_could_also_be():
    for text in ("café", "naïve résumé", "Привет, как дела", "测试", "联通", "日本語のテキスト", "한국어", "😀", "€5"):
        assert detect(text.encode()) == "utf-8"


def test_other_encodings_are_refused_and_can_be_named(tmp_path):
    french = "text,label\n" + "Été à la plage où les élèves étaient fatigués,oui\nça va être drôle,non\n" * 20
    taiwan = "text,label\n" + "這個電影真的很好看，值得一去。,好\n劇情無聊對話也沒有意思,壞\n" * 20
    korean = "text,label\n" + "안녕하세요 이것은 한국어 문장입니다,a\n오늘은 날씨가 좋네요,b\n" * 20
    for text, encoding, hint in ((french, "latin-1", "latin-1"), (taiwan, "big5", "big5"), (korean, "euc-kr", "")):
        path = tmp_path / encoding
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=r"data\.encoding") as error:
            open_rows(path, COLUMNS)
        assert f"{path}:2: " in str(error.value) and hint in str(error.value)
        assert len(list(open_rows(path, COLUMNS, encoding=encoding))) == 40


def test_damage_is_reported_at_its_line_and_byte(tmp_path):
    for encoding, bad in (("utf-8", b"\xff"), ("gb18030", b"\xff"), ("utf-16-le", b"\x00\xdc")):
        lines = ["text,label", *(f"第{i}条评论，写得很好,好" for i in range(9000))]
        data = [f"{line}\n".encode(encoding) for line in lines]
        offset = sum(map(len, data[:8000]))
        path = tmp_path / "damaged.csv"
        path.write_bytes(b"".join(data[:8000]) + bad + b"".join(data[8000:]))
        with pytest.raises(UserError) as error:
            list(open_rows(path, COLUMNS))
        assert f"{path}:8001: byte {offset} " in str(error.value), encoding


def test_names_of_encodings():
    assert known_encoding("GBK") == "gb18030" and known_encoding("utf-8-sig") == "utf-8"
    others = ("klingon", "base64", "rot13", "", "unicode_escape", "raw_unicode_escape", "idna", "punycode", "undefined")
    for name in others:
        with pytest.raises(UserError, match="not a known encoding"):
            known_encoding(name)
