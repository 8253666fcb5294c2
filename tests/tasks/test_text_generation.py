"""What of text-generation the contract does not cover."""

from __future__ import annotations

import pytest

from multihead.errors import UserError
from multihead.tasks.language.text_generation import TextGeneration

POEM = {"text": "國破山河在", "title": "春望", "author": "杜甫"}


def made(template: str) -> TextGeneration:
    task = TextGeneration(TextGeneration.Options(tokenizer="char", template=template))
    task.fit([POEM])
    return task


def test_a_template_makes_one_text_of_several_columns_and_leaves_a_prompt_alone() -> None:
    task = made("《{title}》{author}\n{text}\n")
    written = task.encode(POEM)["ids"]
    assert task.codec.decode(written) == "《春望》杜甫\n國破山河在\n" and written[0] == task.codec.eos
    assert task.codec.decode(task.encode({"text": "《春望》"})["ids"]) == "《春望》"


def test_a_template_that_asks_for_a_missing_column_names_it() -> None:
    with pytest.raises(UserError, match="dynasty"):
        made("{dynasty}{text}")
