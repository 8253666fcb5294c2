"""The recipe: what to learn, from which data, how. Data, never code; checked whole before anything runs.

Five layers, later ones win: the task's own defaults, the sizes of the weights that ``model.from`` names, ``base:
other.yaml``, the file, ``key=value`` on the command line. A path is relative to the folder of whoever wrote it: the
base's, the recipe's, or on the command line the current one. Every fault is reported at once, each with its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from multihead import starting, strict_yaml
from multihead.errors import Problem, UserError, nearest, tr
from multihead.explain import explain, truths
from multihead.serve.settings import ServeSettings
from multihead.strict_yaml import Keys, Source
from multihead.transformer.config import TransformerConfig

PATHS = ("train", "valid", "test")
OPTION_PATHS = ("items", "users")
"""Keys of ``options:`` that name a file."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, lt=1)]


class Split(Section):
    """How parts are cut from the training data where no file is given for them."""

    valid: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.1, ge=0, lt=1)
    by: Literal["random", "order", "group", "last", "time"] = "random"
    """random: by the recipe's seed. order: the last rows. group: rows of one group stay together. Of logs of
    interactions also: last, each user's last two (leave-one-out; the shares only say whether there is such a part); and
    time, what happened last."""
    group: str | None = None
    """The column that names a row's group."""


Files = str | list[str] | dict[str, str | list[str]]


class Data(Section):
    train: Files
    """A file, several, a glob or a folder; relative to the recipe's own folder. Or a file for each column, aligned line
    by line: {source: train.en, target: train.de}."""
    valid: Files | None = None
    test: Files | None = None
    columns: dict[str, str] = {}
    """Our column: the file's column, by name or by number (1 is the first); for columns that were guessed wrong."""
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    split: Split = Field(default_factory=Split)
    deduplicate: bool = True
    """Drop exact copies of a row. Where false, they are kept, but never in two parts."""
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be unusable before the run stops."""
    limit: int | None = Field(default=None, ge=1)
    """Read only so many rows, to try things out."""

    @field_validator("columns", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {ours: str(theirs) if type(theirs) is int else theirs for ours, theirs in value.items()}


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021): weights stay as they are, and small matrices beside them learn."""

    rank: int = Field(default=8, ge=1)
    """Rows of the small matrices.
    小矩阵的秩。"""
    alpha: float = Field(default=16.0, gt=0)
    """What they add is scaled by alpha / rank.
    所加部分按 alpha / rank 缩放。"""
    dropout: Share = 0.0
    targets: list[Literal["attention", "feed_forward", "all"]] = Field(default=["attention"], min_length=1)
    """Which linear maps of the trunk.
    主干网络中的哪些线性映射。"""


@dataclass(frozen=True)
class Model(TransformerConfig):
    """The recipe's ``model:`` section: the shape, and the weights to start from.

    A plain dataclass as its base is, so that the transformer needs no pydantic; it is checked as strictly.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    from_: Annotated[str | None, Field(alias="from")] = None
    """``from:`` a run folder, or a folder with a Hugging Face model, whose weights training starts from."""
    lora: Lora | None = None


class EarlyStop(Section):
    metric: str | None = None
    """A validation metric; none: the task's own.
    验证指标；不写则用任务自己的。"""
    patience: int = Field(default=5, ge=1)
    """Evaluations without a better value before training ends.
    连续多少次评估没有改善就停止。"""


class Train(Section):
    steps: int = Field(default=2000, ge=0)
    """Steps of the optimizer in the whole run.
    整个训练的步数。"""
    minutes: float | None = Field(default=None, gt=0)
    """Time for training: sets `steps` at the start, from the measured speed (then at most the `steps` given).
    训练用时（分钟）：开始时按测得的速度定步数，不超过 steps。"""
    batch_size: int = Field(default=32, ge=1)
    """Rows a step, over all micro-batches and devices.
    每一步的行数，包括所有小批次与设备。"""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows at once; fewer than `batch_size` accumulates gradients, exactly.
    一次计算的行数；小于 batch_size 时累积梯度，结果完全一致。"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """muon trains the 2-D weights, with AdamW beside it for the others; adamw trains all.
    muon 训练二维权重，其余由 AdamW 训练；adamw 训练全部权重。"""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate.
    学习率。"""
    muon_lr: float | None = Field(default=0.02, gt=0)
    """Learning rate of the 2-D weights that Muon trains; null: `lr`, with AdamW's step size.
    由 Muon 训练的二维权重的学习率；null 表示用 lr，步长与 AdamW 相当。"""
    weight_decay: float = Field(default=0.01, ge=0)
    """Share by which weights shrink, times the learning rate, at each step.
    权重衰减：每一步按它与学习率之积缩小权重。"""
    betas: tuple[Share, Share] = (0.9, 0.99)
    warmup: int | float = Field(default=0.05, ge=0)
    """Steps of linear warm-up, or (below 1) a share of all steps.
    线性预热的步数；小于 1 时为总步数的比例。"""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up.
    预热之后学习率如何下降。"""
    min_lr: float = Field(default=0.05, ge=0, le=1)
    """Share of the learning rate that is left at the end.
    结束时剩余的学习率比例。"""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; null: no clipping.
    整个梯度的最大范数；null 表示不裁剪。"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of weights that is evaluated and kept; null: none.
    权重滑动平均的衰减，用于评估与保存；null 表示不用。"""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: ten in a run.
    两次评估之间的步数；null 表示全程十次。"""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: as often as evaluations.
    两次保存之间的步数；null 表示与评估相同。"""
    log_every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept.
    保留的检查点个数。"""
    early_stop: EarlyStop | None = None
    """Such as {metric: loss, patience: 5}: end where validation gets no better.
    例如 {metric: loss, patience: 5}：验证指标不再改善时提前结束。"""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Cores to use; auto: as many as make the steps fastest, by a short measurement.
    使用的核数；auto 会先短测，取最快的。"""
    side_by_side: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    """On a CPU: threads that each work out a part of a batch, each for gradients of its own; 1: all cores share every
    operation. auto: what is faster, where threads is auto too.
    在 CPU 上：由这么多线程各算一批数据的一部分（各占一份梯度内存）；1 表示所有核共同完成每个运算。
    auto（且 threads 也为 auto 时）取较快的方式。"""
    device: str = "auto"
    parallel: Literal["auto", "ddp", "fsdp", "none"] = "auto"
    """Of several processes (torchrun): ddp, each a copy of the model; fsdp, each a share of it; auto, by its size.
    多进程训练（torchrun）：ddp 每个进程一份模型，fsdp 各持一部分，auto 按模型大小选择，none 只许单进程。"""
    recompute: bool = False
    """Work out the inside of each block again for the gradient: the same results, less memory, a third more time.
    计算梯度时重算每一层的中间结果：结果相同，省内存，用时约多三分之一。"""
    tensorboard: bool = False

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            raise ValueError(tr("allowed: auto, cpu, cuda, cuda:0, cuda:1 …",
                                "可选：auto、cpu、cuda、cuda:0、cuda:1 等"))
        return value


class Evaluate(Section):
    batch_size: int = Field(default=64, ge=1)
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples behind each interval; 0: no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)


class Recipe(Section):
    """A checked recipe, every default filled in."""

    task: str
    name: str
    """What the run is called: its folder under ``runs/``, and the model's name where it is served."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: Data
    options: Any = None
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    serve: ServeSettings = Field(default_factory=ServeSettings)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}", value):
            raise ValueError(tr("a name has 1 to 100 characters, none of them / or \\, and does not begin with a dot",
                                "名称有 1 到 100 个字符，不含 / 与 \\，且不以点开头"))
        return value

    def plain(self) -> dict[str, Any]:
        """As JSON-able data, in the order of the sections."""
        values = self.model_dump(mode="json", by_alias=True)
        model = values["model"]
        values["model"] = {"from": model.pop("from"), "lora": model.pop("lora"), **model}
        return values

    def dump(self) -> str:
        """As YAML, every value written out."""
        return strict_yaml.dump(self.plain())


# -- checking ----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, overrides: Sequence[str] = (), *, find: Callable[[str, Path], Any], settled: bool = False
) -> Recipe:
    """Read and check a recipe.

    Args:
        overrides: ``key=value`` texts that win over the file.
        find: ``task.find``: the name of a task and the recipe's folder → its class (``Options`` and ``defaults``).
        settled: the recipe is a run's own, which holds every size: what it was started from need not be there.

    Raises:
        UserError: with every fault, each with its place.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise UserError(tr(f"is a folder; a recipe is a YAML file: name the file inside, such as {inside}",
                           f"是文件夹；配方是一个 YAML 文件：请写里面的文件，例如 {inside}"), str(path))
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(tr(f"no such recipe{near}; `multihead init TASK DATA -o {path.name}` writes one",
                           f"没有这个配方{near}；可用 `multihead init 任务 数据 -o {path.name}` 生成"), str(path))
    problems: list[Problem] = []
    source = strict_yaml.read(path, problems)
    _settle(source, path.parent, problems)
    base = source.values.pop("base", None)
    if base is not None:
        lower = _base(path, base, source, problems)
        source = source.under(lower) if lower else source
    typed = strict_yaml.overrides(overrides, problems)
    _settle(typed, Path.cwd(), problems)
    if "base" in typed.values:
        problems.append(Problem(tr("`base` stands in the recipe, not on the command line",
                                   "`base` 写在配方里，不能写在命令行上"), typed.place(("base",))))
        typed.values.pop("base")
    return _check(typed.under(source), path, problems, find, settled)


def _base(path: Path, base: Any, source: Source, problems: list[Problem]) -> Source | None:
    file = path.parent / str(base)
    if not isinstance(base, str) or not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.y*ml")]) if file.parent.is_dir() else ""
        problems.append(Problem(tr(f"base: no such recipe {file}{near}; its path is relative to this file's folder",
                                   f"base：没有配方 {file}{near}；路径相对于本文件所在的文件夹"),
                                source.place(("base",))))
        return None
    lower = strict_yaml.read(file, problems)
    if "base" in lower.values:
        problems.append(Problem(tr("a base has no base of its own: one layer only",
                                   "base 只能有一层，base 里不能再写 base"), lower.place(("base",))))
        lower.values.pop("base")
    _settle(lower, file.parent, problems)
    return lower


def _settle(source: Source, folder: Path, problems: list[Problem]) -> None:
    """Make the paths of one source absolute, and drop section headers with nothing below: they mean the defaults."""
    values = source.values
    for name in ("data", "options", "model", "train", "evaluate", "serve"):
        if name in values and values[name] is None:
            del values[name]
    task, data, model = values.get("task"), values.get("data"), values.get("model")
    options = values.get("options")
    for name in OPTION_PATHS:
        if isinstance(options, dict) and isinstance(options.get(name), str):
            options[name] = resolve(options[name], folder, problems, source.place(("options", name)))
    if isinstance(model, dict) and "from" in model:
        model["from"] = resolve(model["from"], folder, problems, source.place(("model", "from")))
    if isinstance(task, str) and task.endswith(".py"):
        values["task"] = resolve(task, folder, problems, source.place(("task",)))
    if not isinstance(data, dict):
        return
    for name in ("columns", "split"):
        if name in data and data[name] is None:
            del data[name]
    for part in PATHS:
        if part in data:
            data[part] = resolve(data[part], folder, problems, source.place(("data", part)))


def resolve(value: Any, folder: Path, problems: list[Problem], where: str) -> Any:
    """Paths of a recipe: ``${NAME}`` from the environment, then relative to `folder`, made absolute.

    ``${MULTIHEAD_DATA}`` is ``../shared/data`` of the current folder where the environment does not say.
    """
    if isinstance(value, list):
        return [resolve(v, folder, problems, where) for v in value]
    if isinstance(value, dict):
        return {column: resolve(v, folder, problems, where) for column, v in value.items()}
    if not isinstance(value, str):
        return value
    if not value.strip():
        problems.append(Problem(tr("an empty path; give a file, a list of files, a glob or a folder, or remove the key",
                                   "路径为空；请给出文件、文件列表、通配符或文件夹，或删去这个键"), where))
        return value
    known = {"MULTIHEAD_DATA": os.path.abspath("../shared/data"), **os.environ}

    def expand(match: re.Match[str]) -> str:
        if match[1] not in known:
            problems.append(Problem(tr(f"the environment has no variable {match[1]}; set it, or write the path out",
                                       f"环境变量 {match[1]} 未设置；请设置它，或写出完整路径"), where))
            return ""
        return known[match[1]]

    return os.path.abspath(os.path.join(folder, os.path.expanduser(re.sub(r"\$\{(\w+)\}", expand, value))))


def _check(
    source: Source, path: Path, problems: list[Problem], find: Callable[[str, Path], Any], settled: bool
) -> Recipe:
    values = source.values
    task: Any = None
    origin: Any = None
    if isinstance(values.get("task"), str):
        try:
            task = find(values["task"], path.parent)
        except UserError as error:
            problems += [Problem(p.message, p.where or source.place(("task",))) for p in error.problems]
    if task is not None:
        origin = None if settled else starting.origin(source, problems)
        values = strict_yaml.merge(starting.defaults(task, origin), values)
        try:
            values["options"] = task.Options.model_validate(values.get("options", {}))
        except ValidationError as error:
            problems += explain(error, source, ("options",), lambda at: _keys(at, list(task.Options.model_fields)))
            values.pop("options", None)
    values.setdefault("name", path.stem)
    problems += starting.without_origin(values, source)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += explain(error, source, (), _keys)
        raise UserError.many(problems) from None
    against = starting.contradictions(recipe, origin, source) if origin is not None else []
    if origin is not None or settled or not recipe.model.from_:  # else no size is known yet
        sizes = [Problem(tr(en, zh), source.place(("model", key))) for key, en, zh in recipe.model.faults()]
        problems += against or sizes
    problems += truths(source.values, recipe.plain(), (), source)
    problems += _across(recipe, source)
    if problems:
        raise UserError.many(problems)
    return recipe


def _across(recipe: Recipe, source: Source) -> list[Problem]:
    """Faults that lie between two keys."""
    found = []
    split, train = recipe.data.split, recipe.train

    def fault(en: str, zh: str, *place: str) -> None:
        found.append(Problem(tr(en, zh), source.place(place)))

    if split.valid + split.test >= 1:
        fault(f"valid {split.valid} and test {split.test} leave nothing to train on; together they must stay below 1",
              f"valid {split.valid} 与 test {split.test} 之和应小于 1，否则没有训练数据", "data", "split")
    if split.by == "group" and not split.group:
        fault("split by group needs `group:`, the column that names the group",
              "按组划分需要 `group:`，即标明组的列", "data", "split", "by")
    if split.group and split.by != "group":
        fault(f"`group: {split.group}` has no effect with `by: {split.by}`; write `by: group`",
              f"`by: {split.by}` 时 `group: {split.group}` 不起作用；请写 `by: group`", "data", "split", "group")
    if train.micro_batch and train.batch_size % train.micro_batch:
        fault(f"micro_batch {train.micro_batch} does not divide batch_size {train.batch_size}",
              f"micro_batch {train.micro_batch} 不能整除 batch_size {train.batch_size}", "train", "micro_batch")
    if train.early_stop and recipe.data.valid is None and split.valid == 0:
        fault("early_stop needs validation rows; give data.valid or data.split.valid",
              "early_stop 需要验证数据；请给出 data.valid 或 data.split.valid", "train", "early_stop")
    return found


def _keys(section: Keys, options: Sequence[str] = ()) -> list[str]:
    """Names allowed in a section of the recipe; `options`: those of the task's own, which only the task knows."""
    if section == ("options",):
        return list(options)
    if section == ("model",):
        return ["from", "lora", *TransformerConfig.__dataclass_fields__]
    model: Any = Lora if section == ("model", "lora") else Recipe
    for name in section if model is Recipe else ():
        field = getattr(model, "model_fields", {}).get(name)
        model = getattr(field, "annotation", None)
        model = next((m for m in getattr(model, "__args__", (model,)) if isinstance(m, type)), None)
    return [*getattr(model, "model_fields", {}), *([] if section else ["base"])]
