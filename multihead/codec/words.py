"""Where words begin: Chinese by jieba, which knows a dictionary; everything else by its blanks. And Chinese of both
writings read as one."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from multihead.errors import UserError, tr

_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]")


@functools.cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError:
        raise UserError(
            tr("options.whole_words needs jieba: pip install 'multihead[zh]'",
               "options.whole_words 需要 jieba：请运行 pip install 'multihead[zh]'")
        ) from None
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    # It would read a cache that anybody may have written to the common temporary folder.
    with tempfile.TemporaryDirectory() as private:
        tokenizer.tmp_dir = private
        tokenizer.initialize()
    return tokenizer


def cut(text: str) -> list[str]:
    """`text` as words, which joined give `text` again; blanks stand at the head of the word behind them.

    Raises:
        UserError: the text is Chinese and jieba is not installed.
    """
    found = _jieba().lcut(text) if _CHINESE.search(text) else re.findall(r"\s*\S+|\s+", text)
    words: list[str] = []
    for word in found:
        if words and words[-1].isspace():
            words[-1] += word
        else:
            words.append(word)
    return words


def starts(text: str, spans: np.ndarray) -> np.ndarray:
    """Which tokens begin a word: (T,) uint8.

    Args:
        spans: (T, 2) the characters of each token. One that crosses from a word into the next counts to the first.
    """
    word_C = np.repeat(np.arange(len(words := cut(text))), [len(word) for word in words])
    word_T = word_C[np.minimum(spans[:, 0], len(word_C) - 1)] if len(spans) else np.zeros(0, dtype=np.int64)
    return np.diff(word_T, prepend=-1).clip(0, 1).astype(np.uint8)


@functools.cache
def simplifier() -> Callable[[str], str]:
    """Traditional Chinese → simplified, character by character in place: offsets stay what they were.

    Raises:
        UserError: where OpenCC is not installed.
    """
    try:
        import opencc
    except ImportError:
        raise UserError(tr("options.simplify needs OpenCC: pip install 'multihead[zh]'",
                           "options.simplify 需要 OpenCC：请运行 pip install 'multihead[zh]'")) from None
    convert = opencc.OpenCC("t2s").convert

    def simplify(text: str) -> str:
        simple = convert(text)
        # Rarely a phrase changes its length: then each character for itself, which does not.
        return simple if len(simple) == len(text) else "".join(convert(c)[:1] or c for c in text)

    return simplify
