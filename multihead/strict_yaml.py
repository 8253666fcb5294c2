"""YAML as recipes use it: plain data with the scalars of YAML 1.2's core schema, and the place of every key.

``1e-4`` is a number, ``no`` and ``2024-01-01`` are words, ``012`` is twelve; a key given twice is an error. Tags,
anchors and aliases are refused: no file can name a Python object, nor can a few lines unfold into gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from multihead.errors import Problem, UserError, tr

MAX_BYTES = 1 << 17
MAX_DEPTH = 32
Keys = tuple[str, ...]

_CORE = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
              r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.0123456789")),
)
"""YAML 1.2.2, section 10.3.2: tag, the words it is read from, and their first characters."""


class _Refused(yaml.MarkedYAMLError):
    """What is valid YAML and yet not read here."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(problem=message, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader that composes plain data only, to a bounded depth."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way; filled below
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refused(tr("anchors (&name) and aliases (*name) are not read here; write the value out, and put "
                              "text that begins with & or * in quotes",
                              "这里不支持锚点（&name）与别名（*name）；请把值写全，以 & 或 * 开头的文本请加引号"),
                           event.start_mark)
        if event.tag is not None:
            raise _Refused(tr("tags such as !!str or !name are not read here; write the value alone, and put text in "
                              "quotes",
                              "这里不支持 !!str、!name 这样的标签；请只写值，文本请加引号"), event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _Refused(tr(f"nested more than {MAX_DEPTH} levels deep; close a bracket or mend the indentation",
                              f"嵌套超过 {MAX_DEPTH} 层；请检查括号与缩进"), event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose text reads back as the same values, by this reader and by one of YAML 1.1; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Inline(_Dumper):
    """Writes text that holds line breaks in double quotes, where they are escaped."""


_BREAKS = re.compile("[\\x85\\u2028\\u2029]")
"""What YAML takes for breaks of a line beside "\\n": unless quoted and escaped they come back as spaces."""


def _escaped(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _BREAKS.search(text) else None)


def _one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text or _BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _escaped)
_Inline.add_representer(str, _one_line)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    try:
        return int(text[2:], 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)
    except ValueError:  # Python reads no number of more than 4300 digits
        raise _Refused(tr("a number of too many digits", "数字的位数太多"), node.start_mark) from None


for _tag, _pattern, _first in _CORE:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)


class Source:
    """Values as read, and the place of each key: ``("train", "lr")`` → ``recipe.yaml:12``."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Keys, str] = {}

    def place(self, path: Sequence[Any]) -> str:
        """Where `path` stands, or the nearest section above it."""
        keys = tuple(str(p) for p in path)
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, self.places.get((), ""))

    def under(self, lower: Source) -> Source:
        """This source laid over `lower`."""
        merged = Source()
        merged.values, merged.places = merge(lower.values, self.values), {**lower.places, **self.places}
        return merged


def merge(lower: Any, upper: Any) -> Any:
    """`upper` over `lower`: sections are joined key by key, everything else is replaced."""
    if isinstance(lower, dict) and isinstance(upper, dict):
        both = {**lower, **upper}
        return {k: merge(lower[k], upper[k]) if k in lower and k in upper else v for k, v in both.items()}
    return upper


def read(path: Path, problems: list[Problem]) -> Source:
    """Read a file of keys. Keys given twice, and keys that are no text, are added to `problems` with their lines.

    Raises:
        UserError: the file cannot be read, is too large, not UTF-8, not YAML or holds no keys.
    """
    text = _text(path)
    source = Source()
    node, values = _load(text, lambda line: f"{path}:{line}", source.places, problems)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(tr("a recipe is a list of keys such as `task: text-classification`; this file holds none",
                           "配方由 `task: text-classification` 这样的键组成；此文件中没有"), f"{path}:1")
    source.values = values
    source.places[()] = f"{path}:1"
    return source


def overrides(texts: Sequence[str], problems: list[Problem]) -> Source:
    """``train.steps=500`` … as one source; the value is YAML, and a later text wins over an earlier one.

    What is not written so is added to `problems`.
    """
    source = Source()
    for text in texts:
        key, equals, value = text.partition("=")
        where = tr(f"command line, {text[:80]}", f"命令行 {text[:80]}")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            problems.append(Problem(tr("an override is written key=value, such as train.steps=500",
                                       "覆盖项写作 键=值，例如 train.steps=500"), where))
            continue
        keys = tuple(key.split("."))
        try:
            parsed = parse(value, where, problems)
        except UserError as error:
            problems += error.problems
            continue
        for n in range(1, len(keys) + 1):
            source.places[keys[:n]] = where
        for k in reversed(keys):
            parsed = {k: parsed}
        source.values = merge(source.values, parsed)
    return source


def parse(text: str, where: str, problems: list[Problem]) -> Any:
    """The value of one word of a command line; nothing at all is null.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return _load(text, lambda line: where, {}, problems)[1]
    except UserError as error:
        hint = tr("put text with special characters in quotes, twice: once for the shell, once for YAML",
                  "含特殊字符的文本要加两层引号：一层给命令行，一层给 YAML")
        raise UserError(f"{error.problems[0].message}; {hint}", where) from None


def dump(values: Any) -> str:
    """`values` as YAML that ``read`` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=120)


def inline(value: Any) -> str:
    """One value on one line: ``0.001``, ``[a, b]``, ``'012'``."""
    text = yaml.dump(value, Dumper=_Inline, allow_unicode=True, default_flow_style=True, sort_keys=False,
                     width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(tr(f"this file has {size:,} bytes, a recipe at most {MAX_BYTES:,}; is it the data? "
                               "`multihead init TASK DATA` writes a recipe for it",
                               f"此文件有 {size:,} 字节，而配方最多 {MAX_BYTES:,} 字节；这是数据文件吗？"
                               "可用 `multihead init 任务 数据` 为它生成配方"), str(path))
        data = path.read_bytes()
    except OSError as error:
        raise UserError(tr(f"cannot be read: {error.strerror}; name a YAML file",
                           f"无法读取：{error.strerror}；请给出一个 YAML 文件"), str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(tr("a recipe is UTF-8 text; this byte is not. Save the file as UTF-8.",
                           "配方必须是 UTF-8 文本，此处不是。请把文件存为 UTF-8。"), f"{path}:{line}") from None


def _load(text: str, where: Callable[[int], str], places: dict[Keys, str],
          problems: list[Problem]) -> tuple[yaml.Node | None, Any]:
    """The node and the value of `text`; `where` makes a place of a line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _note(node, (), places, where, problems)
        return node, loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(tr(f"not valid YAML: the character U+{error.character:04X} may not stand in a text; remove it",
                           f"不是合法的 YAML：文本中不能有字符 U+{error.character:04X}，请删除"), where(line)) from None
    except _Refused as error:
        assert error.problem_mark is not None
        raise UserError(str(error.problem), where(error.problem_mark.line + 1)) from None
    except yaml.MarkedYAMLError as error:
        what, mark = error.problem or error.context, error.problem_mark or error.context_mark
        hint = tr("check the colons, brackets, quotes and indentation here", "请检查此处的冒号、括号、引号与缩进")
        if what and "'\\t'" in what:
            hint = tr("indent with spaces, not with tabs", "请用空格缩进，不要用制表符")
        raise UserError(tr(f"not valid YAML: {what}; {hint}", f"不是合法的 YAML：{what}；{hint}"),
                        where(mark.line + 1 if mark else 1)) from None


def _note(node: yaml.Node, at: Keys, places: dict[Keys, str], where: Callable[[int], str],
          problems: list[Problem]) -> None:
    """Note the line of every key below `node`; report keys given twice, and keys that are no text."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*at, str(i))] = where(item.start_mark.line + 1)
            _note(item, (*at, str(i)), places, where, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else tr("a list or a section", "列表或一组键")
            raise UserError(tr(f"a key is a name; this one is {shown}. Put it in quotes if it is one",
                               f"键应当是名称，而这里是 {shown}。如果它确实是名称，请加引号"), where(line))
        if key.value in seen:
            problems.append(Problem(
                tr(f"'{key.value}' is given twice (first in line {seen[key.value]}); keep one",
                   f"'{key.value}' 写了两次（第一次在第 {seen[key.value]} 行），请只留一个"), where(line)))
        seen.setdefault(key.value, line)
        places[(*at, key.value)] = where(line)
        _note(value, (*at, key.value), places, where, problems)
