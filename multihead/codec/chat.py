"""Chat templates: a conversation as one text, by the Jinja template that came with the weights.

A template is somebody else's program: it runs in jinja2's sandbox, on plain strings.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from multihead.errors import UserError, tr

_PRIVATE = [chr(c) for c in range(0xE000, 0xE100)]


def render(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The prompt that `template` makes of `messages`, open for the assistant's answer.

    Args:
        names: special tokens that a template may write: ``bos_token``, ``eos_token`` …

    Raises:
        UserError: the template does not take this conversation, or is broken; jinja2 is not installed.
    """
    compiled = _compiled(template)
    try:
        return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **names)
    except Exception as error:
        raise UserError(tr(f"the model's chat template does not take this conversation: {error}",
                           f"模型的对话模板不接受这段对话：{error}")) from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(tr("a chat template needs jinja2: pip install 'multihead[eval]'",
                           "对话模板需要 jinja2：pip install 'multihead[eval]'")) from None

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant wrote, for training; here it only passes it on."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(tr(f"the model's chat template is broken: {error}", f"模型的对话模板有误：{error}")) from None


def disguise(messages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[dict[str, Any]], str | None]:
    """The messages with a private character inside every special token's name, and that character; None where no
    message holds such a name."""
    written = "".join(value for message in messages for value in message.values() if isinstance(value, str))
    if not any(name in written for name in names):
        return [dict(message) for message in messages], None
    marker = next(c for c in _PRIVATE if c not in written)
    pattern = _pattern(names)

    def mark(value: Any) -> Any:
        return pattern.sub(lambda m: m[0][0] + marker + m[0][1:], value) if isinstance(value, str) else value

    return [{key: mark(value) for key, value in message.items()} for message in messages], marker


def pieces(text: str, names: Sequence[str], marker: str) -> Iterator[tuple[str, bool]]:
    """The text cut at special tokens: each piece, and whether it is one; the disguises taken off."""
    end = 0
    for found in _pattern(names).finditer(text):
        if found.start() > end:
            yield text[end:found.start()].replace(marker, ""), False
        yield found[0], True
        end = found.end()
    if end < len(text):
        yield text[end:].replace(marker, ""), False


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
