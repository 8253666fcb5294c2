"""Error rates against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from multihead.codec.transcript import PinyinCodec, plain, syllables, toneless, units_of, words
from multihead.metrics.speech import ErrorRates


def test_rates_and_the_list_of_errors():
    rates = ErrorRates(["the cat sat", "我爱北京", "", "same"], ["the hat sat down", "我爱南京", "gone", "same"], words)
    assert rates.word_errors.tolist() == [2, 1, 1, 0] and rates.word_count.tolist() == [4, 4, 1, 1]
    assert rates.character_errors.tolist() == [5, 1, 4, 0]
    found = rates.scores()
    assert found["wer"] == pytest.approx(4 / 10) and found["exact"] == 0.25
    drawn = rates.scores(np.array([[2.0, 0, 0, 2], [1, 1, 1, 1]]))
    assert drawn["wer"].tolist() == pytest.approx([4 / 10, 4 / 10]) and drawn["exact"].tolist() == [0.5, 0.25]
    errors = [(e["truth"], e["answer"], e["count"]) for e in rates.confused()]
    assert set(errors) == {("hat", "cat", 1), ("down", "", 1), ("北", "", 0), ("南", "北", 1), ("gone", "", 1)} - {
        ("北", "", 0)}  # fmt: skip


def test_plain_texts():
    assert plain("Hello,  WORLD!  It's ‘fine’ — ＯＫ。") == "hello world it's fine ok"
    assert plain("闯码头D J版，好 吗") == "闯码头d j版好吗"
    assert words("闯码头 d j版 ok") == ["闯", "码", "头", "d", "j", "版", "ok"]


def test_syllables_go_in_and_out():
    pytest.importorskip("pypinyin")
    assert syllables("设定三十2度") == ["she4", "ding4", "san1", "shi2", "er4", "du4"]
    assert syllables("lv4 zhong1") == ["lv4", "zhong1"]
    assert [units_of(s) for s in ("zhong1", "an3", "er5", "ng2", "shi4", "ok")] == [
        ["zh", "ong1"], ["an3"], ["er5"], ["ng2"], ["sh", "i4"], ["o", "k"]]  # fmt: skip
    codec = PinyinCodec.fit(["中国人", "西安 xian1"])
    assert codec.decode(codec.encode("西安人")) == "xi1 an1 ren2"
    assert codec.decode(codec.encode("xian1 guo2")) == "xian1 guo2"
    assert toneless("xi1 an1 ren2") == "xi an ren"
