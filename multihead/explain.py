"""pydantic's faults in a recipe, in words for the person who wrote it: what was given, where, what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from multihead.errors import Problem, nearest, tr
from multihead.strict_yaml import Keys, Source

_LIMITS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", "≥"), "less_than": ("lt", "<"),
           "less_than_equal": ("le", "≤")}
_KINDS = {
    "int": ("a whole number", "整数"), "float": ("a number", "数字"), "finite": ("a finite number", "有限的数字"),
    "string": ("text", "文本"), "bool": ("true or false", "true 或 false"), "list": ("a list", "列表"),
    "tuple": ("a list", "列表"), "dict": ("a section of keys", "一组键"), "model": ("a section of keys", "一组键"),
    "dataclass": ("a section of keys", "一组键"),
}
_BRANCH = re.compile(r"(str|int|float|bool|none|constrained-\w+)|(literal|list|dict|tuple|function-\w+|nullable)\[.*\]")
"""How pydantic calls the members of a union in a fault's place; a person did not write that."""


def explain(
    error: ValidationError, source: Source, above: Keys, allowed: Callable[[Keys], Sequence[str]]
) -> list[Problem]:
    """pydantic's faults as our problems, one a key.

    Args:
        source: where the keys stand.
        above: the section that was checked, if it is not the whole.
        allowed: the keys of a section, to be offered where one is unknown.
    """
    faults: dict[Keys, list[Any]] = {}
    for fault in error.errors(include_url=False):
        path: Keys = above
        for part in map(str, fault["loc"]):
            if (*path, part) in source.places or not _BRANCH.fullmatch(part):
                path = (*path, part)
        faults.setdefault(path, []).append(fault)
    inner = {path[:n] for path in faults for n in range(len(path))}
    return [Problem(_say(found, path, allowed(path[:-1])), source.place(path))
            for path, found in faults.items() if path not in inner]


def _say(faults: Sequence[Any], path: Keys, allowed: Sequence[str]) -> str:
    """One message for all that pydantic says of one key: a union has a fault for each of its members."""
    key, first = ".".join(path), faults[0]
    kind, given = first["type"], first.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        near, names = nearest(path[-1], allowed), ", ".join(allowed)
        return tr(f"unknown key '{key}'{near}" + (f"; allowed here: {names}" if allowed else "; remove it"),
                  f"未知的键 '{key}'{near}" + (f"；这里可用：{names}" if allowed else "；请删去"))
    if kind in ("missing", "missing_argument"):
        return tr(f"'{key}' is missing; it must be given", f"缺少 '{key}'，必须给出")
    shown = json.dumps(given, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    wants = list(dict.fromkeys(filter(None, map(_want, faults))))
    if not wants:
        why = str((first.get("ctx") or {}).get("error") or first["msg"])
        return tr(f"{key} is {shown}: {why}", f"{key} 是 {shown}：{why}")
    words = re.findall(r"'([^']*)'", " ".join(wants))
    near = nearest(given, words) if isinstance(given, str) else ""
    return tr(f"{key} is {shown}; it must be {' or '.join(wants)}{near}",
              f"{key} 是 {shown}；应为 {' 或 '.join(wants)}{near}")


def _want(fault: Any) -> str:
    """What would be right instead; empty where only pydantic's own words say it."""
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind == "literal_error":
        expected = context.get("expected", "")
        return tr(expected, expected.replace(" or ", " 或 "))
    if kind in _LIMITS:
        name, sign = _LIMITS[kind]
        return f"{sign} {context.get(name)}"
    if kind in ("too_long", "too_short"):
        count = context.get("max_length", context.get("min_length"))
        return tr(f"{count} values", f"{count} 个值")
    if kind == "string_type" and isinstance(fault.get("input"), (int, float)):
        return tr("text: put it in quotes", "文本：请加引号")
    prefix = next((p for p in _KINDS if kind.startswith(p) and not kind.endswith("mismatch")), None)
    return tr(*_KINDS[prefix]) if prefix else ""


def truths(given: Any, made: Any, at: Keys, source: Source) -> list[Problem]:
    """Faults where true or false was given and pydantic has made a number of it."""
    if isinstance(given, dict) and isinstance(made, dict):
        return [p for key, value in given.items() for p in truths(value, made.get(key), (*at, key), source)]
    if isinstance(given, list) and isinstance(made, list):
        pairs = enumerate(zip(given, made, strict=False))
        return [p for i, (value, other) in pairs for p in truths(value, other, (*at, str(i)), source)]
    if not isinstance(given, bool) or isinstance(made, bool) or not isinstance(made, (int, float)):
        return []
    key, shown = ".".join(at), json.dumps(given)
    return [Problem(tr(f"{key} is {shown}; it must be a number", f"{key} 是 {shown}；应为数字"), source.place(at))]
