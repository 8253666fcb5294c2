"""``multihead init``: look at a person's data and write the recipe that fits it, with a comment on every knob."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from multihead import recipe as recipes
from multihead import strict_yaml
from multihead import task as tasks
from multihead.data.aligned import named_files
from multihead.data.columns import MEDIA
from multihead.data.folders import parts_of
from multihead.data.rows import open_rows
from multihead.errors import UserError, language, tr
from multihead.run import replacing
from multihead.transformer.config import TransformerConfig

TRAIN = ("steps", "minutes", "batch_size", "optimizer", "lr", "muon_lr", "weight_decay", "warmup", "decay", "ema",
         "early_stop")
SHAPE = ("d_model", "num_layers", "num_heads", "dropout")
MODEL = {
    "d_model": ("width of the vectors", "向量宽度"),
    "num_layers": ("blocks", "层数"),
    "num_heads": ("attention heads", "注意力头数"),
    "conv_kernel": ("neighbours a convolution in each block spans; 0: none", "每层卷积覆盖的邻近位置数；0 表示不用"),
    "ngrams": ("lengths of runs of tokens that get an embedding of their own", "额外加入嵌入的 n 元组长度"),
    "ngram_buckets": ("rows of each table of n-grams", "每个 n 元组表的行数"),
    "norm": ("rmsnorm or layernorm; the second trains faster on a CPU", "rmsnorm 或 layernorm；后者在 CPU 上训练更快"),
    "activation": ("swiglu, gelu, relu or relu2", "激活函数：swiglu、gelu、relu 或 relu2"),
    "max_length": ("longest sequence", "最长序列"),
    "positions": ("rotary, learned, sinusoidal or none", "位置编码：rotary、learned、sinusoidal 或 none"),
    "dropout": ("share of values set to zero in training, against overfitting", "训练时随机置零的比例，防止过拟合"),
}


def write_recipe(task: str, data: Sequence[str], out: Path, force: bool = False) -> list[str]:
    """Write a commented recipe for `task` on `data` to `out`.

    Returns:
        What was found in the data, as lines to print.

    Raises:
        UserError: unknown task, unreadable data, columns that cannot be found, or `out` exists and not `force`.
    """
    if out.is_dir():
        raise UserError(tr(f"is a folder; name a file in it, such as {out / 'recipe.yaml'}",
                           f"是文件夹；请写里面的文件名，例如 {out / 'recipe.yaml'}"), str(out))
    if out.exists() and not force:
        raise UserError(tr("exists already; --force overwrites it", "已经存在；加 --force 可覆盖"), str(out))
    if task.endswith(".py"):
        kind = tasks.find(os.path.abspath(task))
        task = os.path.join(".", _relative(task, out.parent))
    else:
        kind = tasks.find(task)
    parts = parts_of(data[0]) if len(data) == 1 and any(c.kind in MEDIA for c in kind.columns) else {}
    data = [parts.pop("train")] if parts else data
    rows = open_rows(list(data), kind.events or kind.columns, base=Path())
    mapping = next(iter(rows.guess["files"]))["mapping"]
    columns = {ours: theirs for ours, theirs in mapping.items() if theirs}
    named = named_files(data, kind.columns)
    files: Any = [_relative(item, out.parent) for item in data]
    if named is not None:
        files = {column: _relative(item, out.parent) for column, item in named.items()}
    elif len(files) == 1:
        files = files[0]
    others = {part: _relative(path, out.parent) for part, path in parts.items()}
    text = _compose(task, kind, files, columns, out, others)
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")
        recipes.load(part, find=tasks.find)  # what is written must be a recipe
    return rows.describe()


def _relative(item: str, folder: Path) -> str:
    """A path of the command line as one of the recipe in `folder`."""
    path = os.path.abspath(os.path.expanduser(item))
    try:
        return os.path.relpath(path, folder.absolute())
    except ValueError:  # Windows: another drive
        return path


def _compose(
    task: str, kind: type[tasks.Task], files: Any, columns: dict[str, str], out: Path, others: dict[str, str]
) -> str:
    lines = [
        f"# {tr(*kind.title)}",
        f"# multihead train {_line_of(shlex.quote(str(out)))}",
        f"task: {_value(task)}",
        f"name: {_value(_line_of(out.stem).lstrip('.') or 'run')}",
        f"seed: 0                  # {tr('same seed, same split, same weights', '相同的种子得到相同的划分和权重')}",
        "",
        "data:",
        f"  train: {_value(files)}",
        *([f"  {part}: {_value(path)}" for part, path in others.items()] or [
            "  # valid: " + tr("a file of its own instead of a part of train; likewise test",
                               "单独的验证文件，代替从 train 划分；test 同理")]),
    ]
    if columns:
        lines.append(f"  columns: {_value(columns)}  # {tr('ours: the file’s', '我们的列：文件中的列')}")
    cuts = " | last | time" if kind.events else ""
    split = {"valid": 0.1, "test": 0.1, "by": "random"} | kind.defaults.get("data", {}).get("split", {})
    split = {key: value for key, value in split.items() if key not in others}
    lines.append(f"  split: {_value(split)}  # by: random | order | group{cuts}")
    if kind.Options.model_fields:
        lines += ["", "options:"]
        lines += _section(kind.Options, {}, list(kind.Options.model_fields))
    preferred = kind.defaults.get("model", {})
    shape = {**{name: getattr(TransformerConfig(), name) for name in SHAPE}, **preferred}
    lines += ["", "model:", "  # from: runs/pretrained  # " + tr(
        "start from the weights of a run or of a Hugging Face folder; sizes come from there, so remove those below",
        "从一次训练或 Hugging Face 文件夹的权重开始；尺寸由其决定，请删去下面的尺寸")]
    lines += [_line(name, value, tr(*MODEL[name]) if name in MODEL else "") for name, value in shape.items()]
    trained = kind.defaults.get("train", {})
    lines += ["", "train:"]
    lines += _section(recipes.Train, trained, list(dict.fromkeys((*TRAIN, *trained))))
    return "\n".join(lines) + "\n"


def _section(model: type[BaseModel], preferred: dict[str, Any], names: list[str]) -> list[str]:
    """The keys of a section with their default values and what they mean; keys without a value as comments."""
    found, said = [], _docstrings(model)
    for name in names:
        info = model.model_fields[name]
        value = preferred.get(name, info.get_default(call_default_factory=True))
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        found.append(_line(name, value, _described(said.get(name) or info.description or "")))
    return found


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each key in the source. pydantic can read it as well, but for every class and at every start,
    which takes longer than all else in a recipe's making."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        with contextlib.suppress(OSError, SyntaxError):  # no source, as of a class made in a console
            body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
            for pair in itertools.pairwise(body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[key] = inspect.cleandoc(text)
    return found


def _line(name: str, value: Any, comment: str) -> str:
    text = f"  {'# ' if value is None else ''}{name}: {'' if value is None else _value(value)}"
    return f"{text:<26} # {comment}" if comment else text


def _described(text: str) -> str:
    """The sentence for this language: a knob's docstring holds English and, after a line break, Chinese."""
    parts = [part.strip() for part in text.strip().split("\n") if part.strip()]
    chinese = [part for part in parts if any("\u4e00" <= c <= "\u9fff" for c in part)]
    english = [part for part in parts if part not in chinese]
    return " ".join(chinese if language() == "zh" and chinese else english)


def _line_of(text: str) -> str:
    """A path's text without what would break a line or a folder's name."""
    return re.sub(r"[\\\x00-\x1f\x7f]", "_", text)


def _value(value: Any) -> str:
    return strict_yaml.inline(list(value) if isinstance(value, tuple) else value)
