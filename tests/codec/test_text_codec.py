"""Text and labels: what is encoded decodes to itself, and a stream never gives out half a character."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from multihead.codec.text import LabelCodec, TextCodec, _sample
from multihead.errors import UserError

TEXTS = ["房间很干净，服务也好。", "早餐不好吃！ The room was fine.", "  two  spaces\n\ttabs ",
         "<eos> 不是记号 😀👨‍👩‍👧"] * 20
CHINESE = "你好，世界！😀 naïve 👨‍👩‍👧‍👦 𠮷野家 e\u0301 ﷽ end"
ANY = st.text(st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="module")
def bpe():
    return TextCodec.fit(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def char():
    return TextCodec.fit([CHINESE, *TEXTS], kind="char", vocab_size=500)


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_bytes_encode_anything_and_decode_to_the_same(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert bpe.decode(ids) == text and bpe.unk not in ids
    assert b"".join(bpe.token(i) for i in ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(ANY, max_size=5))
def test_many_are_encoded_as_one_by_one(bpe, char, texts):
    for codec in (bpe, char):
        many = codec.encode_many(texts)
        assert len(many) == len(texts)
        for text, ids in zip(texts, many, strict=True):
            np.testing.assert_array_equal(ids, codec.encode(text))
            assert ids.dtype == np.int32


def test_characters_known_and_unknown(char):
    assert char.decode(char.encode(CHINESE)) == CHINESE and len(char.encode("你好")) == 2
    ids = char.encode("你龘\U0010ffff好")
    assert list(ids[1:3]) == [char.unk] * 2 and char.decode(ids) == "你好"
    counts = TextCodec.fit(["aaabbc"], kind="char", vocab_size=6)
    assert [counts.token(i) for i in range(6)] == [b"", b"", b"", b"", b"a", b"b"], "most frequent first, then cut"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_special_tokens_are_never_read_from_text(kind):
    special = ("<pad>", "<unk>", "<bos>", "<eos>", "[x]")
    codec = TextCodec.fit(["<eos> <pad> [x]"] * 50, kind=kind, vocab_size=300, special=special)
    ids = codec.encode("a<eos><pad>[x]")
    assert min(ids) >= 5 or kind == "char"
    assert not {codec.pad, codec.bos, codec.eos, 4} & set(ids.tolist())
    assert codec.decode([codec.bos, *codec.encode("<eos>"), codec.eos, codec.pad]) == "<eos>"
    assert (codec.pad, codec.unk, codec.bos, codec.eos) == (0, 1, 2, 3)


@pytest.mark.parametrize("text", [CHINESE, "😀" * 5, "中文，没有空格", "\u200d👨‍👩‍👧\ufe0f"])
def test_a_stream_never_gives_out_half_a_character(bpe, text):
    ids = _byte_ids(bpe, text)
    for split in range(len(ids) + 1):
        stream = bpe.stream()
        shown = ""
        for i in ids[:split]:
            shown += stream.push(i)
        assert shown == text.encode()[:split].decode("utf-8", "ignore"), "all that is complete, and no more"
        held = text.encode()[len(shown.encode()):split]
        assert len(held) < 4
        assert stream.flush() == ("" if not held else held.decode("utf-8", "replace"))
    assert shown == text


def _byte_ids(codec, text):
    """One id for every byte: the hardest way to spell a text."""
    of_byte = {codec.token(i): i for i in range(codec.vocab_size) if len(codec.token(i)) == 1}
    return [of_byte[bytes([b])] for b in text.encode()]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streamed_is_whole_for_any_ids(bpe, data):
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1), max_size=40))
    stream = bpe.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == bpe.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("normalize", [None, "nfkc"])
def test_saved_and_loaded_is_the_same(tmp_path, kind, normalize):
    codec = TextCodec.fit(TEXTS, kind=kind, vocab_size=350, normalize=normalize)
    codec.save(tmp_path / "one")
    loaded = TextCodec.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    name = {"bpe": "tokenizer.json", "char": "vocab.json"}[kind]
    assert [p.name for p in (tmp_path / "one").iterdir()] == [name]
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for text in [*TEXTS[:4], CHINESE, "ＡＢＣ，１２３ ﬁ <pad>", ""]:
        np.testing.assert_array_equal(loaded.encode(text), codec.encode(text))
        assert loaded.decode(codec.encode(text)) == codec.decode(codec.encode(text))
    assert (loaded.vocab_size, loaded.special, loaded.normalize) == (codec.vocab_size, codec.special, normalize)
    if normalize and kind == "bpe":
        assert codec.decode(codec.encode("ＡＢＣ，１")) == "ABC,1"


def test_the_saved_file_is_an_ordinary_tokenizer(bpe, tmp_path):
    bpe.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("房间很干净 fine", CHINESE):
        assert theirs.encode(text).ids == bpe.encode(text).tolist()
        assert theirs.decode(bpe.encode(text).tolist()) == text


def test_fitting_is_the_same_in_every_process(tmp_path):
    code = ("import sys; from multihead.codec.text import TextCodec\n"
            "words = [f'词{i % 37}语{i % 11} word{i % 53}，' * 3 for i in range(2000)]\n"
            "TextCodec.fit(iter(words), vocab_size=700).save(sys.argv[1])")
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed, "PYTHONPATH": os.getcwd()})
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()


def test_the_sample_to_fit_on_is_bounded_and_even():
    texts = [f"{i:07d}" * 30 for i in range(20_000)]
    kept = _sample(iter(texts), 100_000)
    assert 50_000 <= sum(map(len, kept)) <= 100_000
    numbers = [int(t[:7]) for t in kept]
    assert set(np.diff(numbers)) == {numbers[1] - numbers[0]} and numbers[-1] > 19_000
    assert _sample(iter(texts), 100_000) == kept
    assert "".join(_sample(["长" * 10_000, "短"], 10**6)) == "长" * 10_000 + "短"
    assert sum(map(len, _sample(["长" * 10**6], 10**5))) <= 10**5, "one long text is sampled too"


def test_lone_surrogates_become_replacement_characters(bpe, char):
    assert bpe.decode(bpe.encode("a\ud83d b")) == "a\ufffd b"
    assert bpe.decode(bpe.encode_many(["\udc00"])[0]) == "\ufffd"
    assert char.encode("a\ud83d").shape == (2,)


def test_wrong_settings_are_refused():
    for kind, size in (("bpe", 259), ("char", 4)):
        with pytest.raises(UserError, match="too small"):
            TextCodec.fit(TEXTS, kind=kind, vocab_size=size)
    with pytest.raises(UserError, match="no text"):
        TextCodec.fit([], kind="char")
    for wrong in ({"kind": "word"}, {"normalize": "nfc"}, {"special": ("<pad>",)}, {"special": ("<pad>",) * 4},
                  {"special": ("<pad>", "<unk>", "<bos>", "<eos>", "mask")}):
        with pytest.raises(ValueError):
            TextCodec.fit(TEXTS, **wrong)
    assert TextCodec.fit([], vocab_size=300).encode("无").shape == (3,), "bytes alone when there is no text"


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_broken_codec_says_to_prepare_again(tmp_path, kind):
    with pytest.raises(UserError, match="prepare"):
        TextCodec.load(tmp_path)
    TextCodec.fit(TEXTS, kind=kind, vocab_size=300).save(tmp_path)
    path = next(tmp_path.iterdir())
    good = path.read_bytes()
    for bad in (b"", b"{}", b"[]", b"null", good[: len(good) // 2], b"\xff" + good, good.replace(b'"<unk>"', b'"<x>"')):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="prepare") as error:
            TextCodec.load(tmp_path)
        assert str(path) in str(error.value)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=20))
def test_labels_round_trip_in_a_fixed_order(labels):
    codec = LabelCodec.fit(labels)
    assert codec.names == LabelCodec.fit(reversed(labels)).names and len(codec) == len(set(labels))
    assert [codec.decode(codec.encode(name)) for name in labels] == labels


def test_labels_saved_ordered_and_unknown(tmp_path):
    codec = LabelCodec.fit(["10", "9", "好", "bad", "9"])
    assert codec.names == ["9", "10", "bad", "好"]
    codec.save(tmp_path)
    assert LabelCodec.load(tmp_path).names == codec.names
    with pytest.raises(UserError, match=r"'Bad' is not one of the 4 labels .*did you mean 'bad'"):
        codec.encode("Bad")
    with pytest.raises(UserError, match="no labels"):
        LabelCodec.fit([])
    for bad in ("", "{}", "[1]", '{"names": [1, 1]}', '{"names": null}'):
        (tmp_path / "labels.json").write_text(bad)
        with pytest.raises(UserError, match="prepare"):
            LabelCodec.load(tmp_path)


def test_real_text_round_trips(shared_data):
    text = gzip.decompress((shared_data / "hongloumeng/valid.txt.gz").read_bytes()).decode()
    codec = TextCodec.fit([text[:60_000]], vocab_size=2000)
    assert codec.vocab_size == 2000
    ids = codec.encode(text)
    assert codec.decode(ids) == text and len(ids) < len(text) * 1.3
