"""What goes wrong, said to a person: what was given, where, what is allowed, what to do.

Every message stands here in two languages, side by side at the place that raises it, so that the two cannot drift
apart: ``tr("no such file", "没有这个文件")``.
"""

from __future__ import annotations

import difflib
import locale
import os
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

SPEAKS: ContextVar[str] = ContextVar("multihead_language", default="")
"""The language of whoever is being answered just now ("zh" or "en"), where that is known: a server's caller."""


def language() -> str:
    """"zh" or "en": the caller's (`SPEAKS`), else ``MULTIHEAD_LANG``, else the locale of the environment."""
    named = SPEAKS.get() or os.environ.get("MULTIHEAD_LANG", "")
    if not named:
        named = next((os.environ[k] for k in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(k)), "")
    if not named:
        named = locale.getlocale()[0] or ""
    return "zh" if named.lower().startswith(("zh", "chinese")) else "en"


def tr(en: str, zh: str) -> str:
    """The English or the Chinese form of one message, by ``language()``."""
    return zh if language() == "zh" else en


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and its place: ``reviews.csv:812``, ``recipe.yaml:12``, or nothing."""

    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UserError(Exception):
    """Something a person can put right. Holds one problem or several; never shown with a traceback."""

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.problems: list[Problem] = [Problem(message, where)]

    @classmethod
    def many(cls, problems: Iterable[Problem]) -> UserError:
        """One error that reports all of `problems` (at least one) at once."""
        found = list(problems)
        error = cls(found[0].message, found[0].where)
        error.problems = found
        return error

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self.problems)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """" (did you mean 'x'?)" where a known name lies close to `given`, else an empty string."""
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(str(given).lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    if not close:
        return ""
    name = names[[n.lower() for n in names].index(close[0])]
    return tr(f" (did you mean '{name}'?)", f"（是不是想写 '{name}'？）")
