"""The recipe: what to learn, from which data, how. Data, never code; checked whole before anything runs.

YAML is read with the scalars of YAML 1.2 (``1e-4`` is a number, ``no`` is a word, a key given twice is an error). Four
layers, later ones win: the task's own defaults, ``base: other.yaml``, the file, ``key=value`` on the command line.
Every fault is reported at once, each with its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from multihead.errors import Problem, UserError, nearest, tr
from multihead.serve.settings import ServeSettings
from multihead.transformer.config import TransformerConfig

Path_ = tuple[str, ...]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Split(Section):
    """How parts are cut from the training data where no file is given for them."""

    valid: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    by: Literal["random", "order", "group"] = "random"
    """random: by the recipe's seed. order: the last rows. group: rows of one group stay together."""
    group: str | None = None
    """The column that names a row's group."""


class Data(Section):
    train: str | list[str]
    """A file, several, a glob or a folder; relative to the recipe's own folder."""
    valid: str | list[str] | None = None
    test: str | list[str] | None = None
    columns: dict[str, str] = {}
    """Our column: the file's column; for columns that were guessed wrong."""
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    split: Split = Field(default_factory=Split)
    deduplicate: bool = True
    """Drop exact copies of a row. Where false, copies are kept but always fall into one part."""
    max_rejected: float = Field(0.01, ge=0, le=1)
    """Share of rows that may be unusable before the run stops."""
    limit: int | None = Field(None, ge=1)
    """Read only so many rows, to try things out."""


class EarlyStop(Section):
    metric: str | None = None
    """A validation metric; none: the task's own.
    验证指标；不写则用任务自己的。"""
    patience: int = Field(5, ge=1)
    """Evaluations without a better value before training ends.
    连续多少次评估没有改善就停止。"""


class Train(Section):
    steps: int = Field(2000, ge=1)
    """Steps of the optimizer in the whole run.
    整个训练的步数。"""
    minutes: float | None = Field(None, gt=0)
    """Time for training: sets `steps` at the start, from the measured speed (then at most the `steps` given).
    训练用时（分钟）：开始时按测得的速度定步数，不超过 steps。"""
    batch_size: int = Field(32, ge=1)
    """Rows a step, over all micro-batches and devices.
    每一步的行数，包括所有小批次与设备。"""
    micro_batch: int | None = Field(None, ge=1)
    """Rows at once; fewer than `batch_size` accumulates gradients, exactly.
    一次计算的行数；小于 batch_size 时累积梯度，结果完全一致。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    """Learning rate.
    学习率。"""
    muon_lr: float = Field(0.02, gt=0)
    """Learning rate of the 2-D weights that Muon trains.
    由 Muon 训练的二维权重的学习率。"""
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int | float = Field(0.05, ge=0)
    """Steps of linear warm-up, or (below 1) a share of all steps.
    线性预热的步数；小于 1 时为总步数的比例。"""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr: float = Field(0.05, ge=0, le=1)
    """Share of the learning rate that is left at the end.
    结束时剩余的学习率比例。"""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; null: no clipping.
    整个梯度的最大范数；null 表示不裁剪。"""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of weights that is evaluated and kept; null: none.
    权重滑动平均的衰减，用于评估与保存；null 表示不用。"""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; null: ten in a run.
    两次评估之间的步数；null 表示全程十次。"""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; null: as often as evaluations.
    两次保存之间的步数；null 表示与评估相同。"""
    log_every: int = Field(10, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints kept.
    保留的检查点个数。"""
    early_stop: EarlyStop | None = None
    precision: Literal["auto", "float32", "bf16"] = "auto"
    threads: Literal["auto"] | int = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    tensorboard: bool = False

    @field_validator("threads")
    @classmethod
    def _some_threads(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least 1")
        return value


class Evaluate(Section):
    batch_size: int = Field(64, ge=1)
    bootstrap: int = Field(1000, ge=0)
    """Resamples behind each interval; 0: no intervals."""
    confidence: float = Field(0.95, gt=0, lt=1)


class Recipe(Section):
    """A checked recipe, every default filled in."""

    task: str
    name: str = Field(pattern=r"^[^/\\\x00]{1,100}$")
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data
    options: Any = None
    model: TransformerConfig = Field(default_factory=TransformerConfig)
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    serve: ServeSettings = Field(default_factory=ServeSettings)

    def plain(self) -> dict[str, Any]:
        """As JSON-able data, in the order of the sections."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """As YAML, every value written out."""
        return yaml.safe_dump(self.plain(), allow_unicode=True, sort_keys=False, width=120)


# -- YAML with places ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
     list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text[2:], 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


class _Source:
    """A recipe's values as read, and the place of each key."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Path_, str] = {}

    def place(self, path: Sequence[Any]) -> str:
        """Where `path` stands, or the nearest section above it."""
        keys = tuple(str(p) for p in path)
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, self.places.get((), ""))

    def under(self, lower: _Source) -> _Source:
        """This source laid over `lower`."""
        merged = _Source()
        merged.values, merged.places = _merge(lower.values, self.values), {**lower.places, **self.places}
        return merged


def _merge(lower: Any, upper: Any) -> Any:
    if isinstance(lower, dict) and isinstance(upper, dict):
        return {k: _merge(lower[k], upper[k]) if k in lower and k in upper else upper.get(k, lower.get(k)) for k in {**lower, **upper}}
    return upper


def _read(path: Path, problems: list[Problem]) -> _Source:
    source = _Source()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(tr(f"cannot be read: {error.strerror}", f"无法读取：{error.strerror}"), str(path)) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(tr("a recipe is UTF-8 text; this byte is not. Save the file as UTF-8.",
                           "配方必须是 UTF-8 文本，此处不是。请把文件存为 UTF-8。"), f"{path}:{line}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            _places(node, (), source.places, path, problems)
            source.values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise UserError(tr(f"not valid YAML: {what}", f"不是合法的 YAML：{what}"), where) from None
    except ValueError as error:  # what YAML's reader says of characters that no text may hold, and of impossible scalars
        raise UserError(tr(f"not valid YAML: {error}", f"不是合法的 YAML：{error}"), str(path)) from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(tr("a recipe is a list of keys such as `task: text-classification`; this file holds none",
                           "配方由 `task: text-classification` 这样的键组成；此文件中没有"), f"{path}:1")
    source.places[()] = f"{path}:1"
    return source


def _places(node: yaml.Node, at: Path_, places: dict[Path_, str], file: Path, problems: list[Problem]) -> None:
    """Note the line of every key below `node`; report keys given twice."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*at, str(i))] = f"{file}:{item.start_mark.line + 1}"
            _places(item, (*at, str(i)), places, file, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line, path = key.start_mark.line + 1, (*at, str(key.value))
        if key.value in seen:
            problems.append(Problem(
                tr(f"'{key.value}' is given twice (first in line {seen[key.value]}); keep one",
                   f"'{key.value}' 写了两次（第一次在第 {seen[key.value]} 行），请只留一个"), f"{file}:{line}"))
        seen[str(key.value)] = line
        places[path] = f"{file}:{line}"
        _places(value, path, places, file, problems)


def _overrides(texts: Sequence[str], problems: list[Problem]) -> _Source:
    source = _Source()
    for text in texts:
        key, equals, value = text.partition("=")
        where = tr(f"command line, {text}", f"命令行 {text}")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            problems.append(Problem(tr("an override is written key=value, such as train.steps=500",
                                       "覆盖项写作 键=值，例如 train.steps=500"), where))
            continue
        try:
            parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
        except (yaml.YAMLError, ValueError):
            problems.append(Problem(tr("the value is not valid YAML", "值不是合法的 YAML"), where))
            continue
        keys = tuple(key.split("."))
        for n in range(1, len(keys) + 1):
            source.places[keys[:n]] = where
        for k in reversed(keys):
            parsed = {k: parsed}
        source.values = _merge(source.values, parsed)
    return source


# -- checking -----------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), *, find: Callable[[str, Path], Any]) -> Recipe:
    """Read and check a recipe.

    Args:
        overrides: ``key=value`` texts that win over the file.
        find: ``task.find``: the name of a task and the recipe's folder → its class (``Options`` and ``defaults``).

    Raises:
        UserError: with every fault, each with its place.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(tr(f"no such recipe{near}; `multihead init TASK DATA -o {path.name}` writes one",
                           f"没有这个配方{near}；可用 `multihead init 任务 数据 -o {path.name}` 生成"), str(path))
    problems: list[Problem] = []
    source = _read(path, problems)
    base = source.values.pop("base", None)
    if base is not None:
        lower = _base(path, base, source, problems)
        source = source.under(lower) if lower else source
    source = _overrides(overrides, problems).under(source)
    return _check(source, path, problems, find)


def _base(path: Path, base: Any, source: _Source, problems: list[Problem]) -> _Source | None:
    file = path.parent / str(base)
    if not isinstance(base, str) or not file.is_file():
        problems.append(Problem(tr(f"base: no such recipe {file}", f"base：没有配方 {file}"), source.place(("base",))))
        return None
    lower = _read(file, problems)
    if "base" in lower.values:
        problems.append(Problem(tr("a base has no base of its own: one layer only", "base 只能有一层，base 里不能再写 base"),
                                lower.place(("base",))))
        lower.values.pop("base")
    data = lower.values.get("data")
    if isinstance(data, dict):
        for part in ("train", "valid", "test"):
            if part in data:
                data[part] = resolve(data[part], file.parent, problems, lower.place(("data", part)))
    return lower


def _check(source: _Source, path: Path, problems: list[Problem], find: Callable[[str, Path], Any]) -> Recipe:
    values = source.values
    task: Any = None
    if isinstance(values.get("task"), str):
        try:
            task = find(values["task"], path.parent)
        except UserError as error:
            problems += [Problem(p.message, p.where or source.place(("task",))) for p in error.problems]
    if task is not None:
        values = _merge({key: dict(section) for key, section in task.defaults.items()}, values)
        options = values.get("options")
        try:
            values["options"] = task.Options.model_validate({} if options is None else options)
        except ValidationError as error:
            problems += _explain(error, source, ("options",), list(task.Options.model_fields))
            values.pop("options", None)
    values.setdefault("name", path.stem)
    data = values.get("data")
    if isinstance(data, dict):
        for part in ("train", "valid", "test"):
            if part in data:
                data[part] = resolve(data[part], path.parent, problems, source.place(("data", part)))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += _explain(error, source, ())
        raise UserError.many(problems) from None
    problems += [Problem(tr(en, zh), source.place(("model", key))) for key, en, zh in recipe.model.faults()]
    problems += _across(recipe, source)
    if problems:
        raise UserError.many(problems)
    return recipe


def _across(recipe: Recipe, source: _Source) -> list[Problem]:
    """Faults that lie between two keys."""
    found = []
    split, train = recipe.data.split, recipe.train
    if split.valid + split.test >= 1:
        found.append(Problem(tr(f"valid {split.valid} and test {split.test} leave nothing to train on; together they must stay below 1",
                                f"valid {split.valid} 与 test {split.test} 之和应小于 1，否则没有训练数据"), source.place(("data", "split"))))
    if split.by == "group" and not split.group:
        found.append(Problem(tr("split by group needs `group:`, the column that names the group", "按组划分需要 `group:`，即标明组的列"),
                             source.place(("data", "split", "by"))))
    if split.group and split.by != "group":
        found.append(Problem(tr(f"`group: {split.group}` has no effect with `by: {split.by}`; write `by: group`",
                                f"`by: {split.by}` 时 `group: {split.group}` 不起作用；请写 `by: group`"), source.place(("data", "split", "group"))))
    if train.micro_batch and train.batch_size % train.micro_batch:
        found.append(Problem(tr(f"micro_batch {train.micro_batch} does not divide batch_size {train.batch_size}",
                                f"micro_batch {train.micro_batch} 不能整除 batch_size {train.batch_size}"), source.place(("train", "micro_batch"))))
    return found


def resolve(value: Any, folder: Path, problems: list[Problem], where: str) -> Any:
    """Paths of a recipe: ``${NAME}`` from the environment, then relative to `folder`, made absolute.

    ``${MULTIHEAD_DATA}`` is ``../shared/data`` of the current folder where the environment does not say.
    """
    if isinstance(value, list):
        return [resolve(v, folder, problems, where) for v in value]
    if not isinstance(value, str):
        return value
    known = {"MULTIHEAD_DATA": os.path.abspath("../shared/data"), **os.environ}

    def expand(match: re.Match[str]) -> str:
        if match[1] not in known:
            problems.append(Problem(tr(f"the environment has no variable {match[1]}", f"环境变量 {match[1]} 未设置"), where))
            return ""
        return known[match[1]]

    return os.path.abspath(os.path.join(folder, os.path.expanduser(re.sub(r"\$\{(\w+)\}", expand, value))))


def _explain(error: ValidationError, source: _Source, above: Path_, options: Sequence[str] = ()) -> list[Problem]:
    """pydantic's faults as our problems, one a key; `options` are the keys that only the task knows."""
    found: dict[Path_, Problem] = {}
    for fault in error.errors(include_url=False):
        path = (*above, *(str(p) for p in fault["loc"]))
        while path not in source.places and len(path) > 1 and _is_branch(path[-1]):
            path = path[:-1]  # pydantic names the member of a union last; a person did not write that
        if path not in found:
            found[path] = Problem(_say(fault, path, _keys(path[:-1]) or list(options)), source.place(path))
    return list(found.values())


def _is_branch(name: str) -> bool:
    return bool(re.search(r"^(str|int|float|bool|list|dict|tuple|literal|constrained|function)", name)) or "[" in name


def _say(fault: Any, path: Path_, allowed: Sequence[str]) -> str:
    key, kind, given, context = ".".join(path), fault["type"], fault.get("input"), fault.get("ctx") or {}
    shown = repr(given)[:80]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        near = nearest(path[-1], allowed)
        names = ", ".join(allowed)
        return tr(f"unknown key '{key}'{near}" + (f"; allowed here: {names}" if allowed else ""),
                  f"未知的键 '{key}'{near}" + (f"；这里可用：{names}" if allowed else ""))
    if kind in ("missing", "missing_argument"):
        return tr(f"'{key}' is missing; it must be given", f"缺少 '{key}'，必须给出")
    if kind == "literal_error":
        expected = context.get("expected", "")
        near = nearest(str(given), re.findall(r"'([^']*)'", expected))
        return tr(f"{key} is {shown}; allowed: {expected}{near}", f"{key} 是 {shown}；可选：{expected}{near}")
    limits = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", "≥"), "less_than": ("lt", "<"), "less_than_equal": ("le", "≤")}
    if kind in limits:
        name, sign = limits[kind]
        return tr(f"{key} is {shown}; it must be {sign} {context.get(name)}", f"{key} 是 {shown}；应 {sign} {context.get(name)}")
    kinds = {
        "int": ("a whole number", "整数"), "float": ("a number", "数字"), "string": ("text", "文本"), "bool": ("true or false", "true 或 false"),
        "list": ("a list", "列表"), "tuple": ("a list", "列表"), "dict": ("a section of keys", "一组键"), "model": ("a section of keys", "一组键"),
        "dataclass": ("a section of keys", "一组键"),
    }
    for prefix, (en, zh) in kinds.items():
        if kind.startswith(prefix) and not kind.endswith("mismatch"):
            return tr(f"{key} is {shown}; it must be {en}", f"{key} 是 {shown}；应为{zh}")
    return tr(f"{key} is {shown}: {fault['msg']}", f"{key} 是 {shown}：{fault['msg']}")


def _keys(section: Path_) -> list[str]:
    """Names allowed in a section of the recipe; empty for a task's own options, which only the task knows."""
    if section == ("model",):
        return list(TransformerConfig.__dataclass_fields__)
    model: Any = Recipe
    for name in section:
        field = getattr(model, "model_fields", {}).get(name)
        model = getattr(field, "annotation", None)
        model = next((m for m in getattr(model, "__args__", (model,)) if isinstance(m, type)), None)
    return list(getattr(model, "model_fields", {}))


# A recipe's model section is a plain dataclass, so that the transformer needs no pydantic; unknown keys are refused there too.
TransformerConfig.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
TypeAdapter(TransformerConfig)
