"""How a family of models elsewhere names its tensors, and what its config.json says in our words.

A family is one table, read in both directions: into our `input`, `trunk` and `head`, and out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multihead.errors import Problem, tr
from multihead.transformer.config import TRAINING_ONLY, TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.trunk import Trunk

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]
Options = Mapping[str, Any]
MOST = {"num_layers": 1024, "max_length": 1 << 20}
WIDEST = 1 << 17
"""No model known comes near these; a config.json beyond them is broken, or meant to exhaust a machine."""


@dataclass(frozen=True)
class Piece:
    """One tensor of ours and what it is made of."""

    ours: str
    theirs: tuple[str, ...]
    """Laid end to end along the first axis: queries, keys and values; gate and value."""
    transposed: bool = False
    """Theirs is (in, out), as in GPT-2's Conv1D; ours is (out, in)."""
    skip: int = 0
    """Rows in front of theirs that nothing reads (RoBERTa's positions 0 and 1)."""
    axes: Shape = ()
    """Theirs, each, where it has more axes than ours: a convolution, or a table with an axis of 1 in front."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Theirs → ours, float32."""
        parts = [(part.T if self.transposed else part).float() for part in parts]
        if self.axes:
            parts = [part.flatten(1) if part.dim() == 4 else part.flatten(0, 1) for part in parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[self.skip:].contiguous()

    def cut(self, whole: Tensor, sizes: Sequence[int]) -> Tensors:
        """Ours → theirs."""
        if self.skip:
            whole = torch.cat((whole.new_zeros(self.skip, *whole.shape[1:]), whole))
        if self.axes:
            chunks = whole.chunk(len(self.theirs))
            return {name: part.reshape(self.axes) for name, part in zip(self.theirs, chunks, strict=True)}
        parts = whole.split(list(sizes)) if len(sizes) > 1 else (whole,)
        return {name: (part.T if self.transposed else part).contiguous()
                for name, part in zip(self.theirs, parts, strict=True)}

    def shapes(self, ours: Shape, sizes: Sequence[int]) -> dict[str, Shape]:
        """What shapes theirs must have, by the shape of ours."""
        if self.axes:
            return dict.fromkeys(self.theirs, self.axes)
        rows = list(sizes) if len(sizes) > 1 else [ours[0] + self.skip]
        found = [(n, *ours[1:]) for n in rows]
        return {name: shape[::-1] if self.transposed else shape
                for name, shape in zip(self.theirs, found, strict=True)}


def sizes(piece: Piece, config: TransformerConfig) -> list[int]:
    """Rows of each of a piece's parts."""
    if len(piece.theirs) == 3:
        q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
        return [q, kv, kv]
    if len(piece.theirs) == 2:
        return [config.kv_heads * config.head_size if ".cross." in piece.ours else config.ff_size] * 2
    return [0]


class Given:
    """A config.json while it is read: what it lacks and what we cannot do is gathered, each with its key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.problems: list[Problem] = []

    def fault(self, en: str, zh: str) -> None:
        self.problems.append(Problem(tr(en, zh), self.where))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if type(value) is int and 1 <= value <= (WIDEST if key != "vocab_size" else 1 << 24) * 16:
            return value
        self.fault(f"{key} is {value!r}; it must be a whole number of a model's size",
                   f"{key} 是 {value!r}；应为合理大小的整数")
        return 1

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12:
            return float(value)
        self.fault(f"{key} is {value!r}; it must be a number above 0", f"{key} 是 {value!r}；应为正数")
        return default

    def only(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """A value of ours where one of `allowed`; else a fault that names the key."""
        value, allowed = self.get(key, default), list(allowed)
        if value not in allowed:
            shown = ", ".join(map(str, allowed))
            self.fault(f"{key} is {value!r}; this Transformer does only: {shown}",
                       f"{key} 是 {value!r}；这里的 Transformer 只支持：{shown}")
        return value

    def activation(self, key: str, default: str) -> str:
        kinds = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
                 "relu": "relu"}
        return kinds.get(self.only(key, kinds, default), "gelu")


@dataclass(frozen=True)
class Family:
    """One family: BERT, GPT-2, Llama …"""

    name: str
    model_types: tuple[str, ...]
    """What its config.json calls itself; the first is what we write."""
    causal: bool
    prefix: str
    """What some of its classes put before the names of the body: "bert.", "model."."""
    read: Callable[[Given], dict[str, Any]]
    """config.json → fields of `TransformerConfig`."""
    write: Callable[[TransformerConfig], dict[str, Any]]
    """The same the other way."""
    layout: Mapping[str, Any]
    """Fields of `TransformerConfig` that this family fixes."""
    body: Callable[[TransformerConfig, Options], list[Piece]]
    """All but the head. Options: those of the task that give it its shape; for text models there are none."""
    heads: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    """Heads by the kind of task: pieces of which any may be there."""
    square: bool = False
    """Every head is d_model / num_heads wide and has keys and values of its own."""
    activations: tuple[str, ...] = ("swiglu",)
    head_layout: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that a head fixes beyond the family's layout."""
    ignored: str = r"(?!)"
    """Names of tensors that hold nothing learned, as a regular expression."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Old endings of names, and what they are called now."""
    fill: Callable[[TransformerConfig, Tensors], TransformerConfig] = lambda config, given: config
    """On the way out: adds the tensors that theirs has and ours does without; the shape with them."""
    tied: bool = True
    """Whether the output shares the embedding where config.json does not say."""
    reads: str = "text"
    """"text", "pictures" or "sound"."""
    architectures: tuple[str, ...] = ()
    """The classes that are this family, where others share the model type."""
    options: Options = field(default_factory=dict)
    """Options of a task that this family fixes."""
    read_options: Callable[[Given], dict[str, Any]] = lambda given: {}
    """config.json → further options that the weights decide."""
    write_options: Callable[[Options], dict[str, Any]] = lambda options: {}
    """The same the other way."""
    entry: Callable[[TransformerConfig, int, Options], nn.Module] = lambda config, size, _: TokenInput(config, size)
    """What makes vectors of tokens or patches, by the shape, the vocabulary's size and the options."""
    parts: Callable[[TransformerConfig, int, Options], dict[str, nn.Module]] | None = None
    """Of a family of more than an input and a trunk: every module of ours that it fills, by its name."""

    def fitting(self, config: TransformerConfig) -> Mapping[str, tuple[Piece, ...]]:
        """The heads whose arithmetic is ours with such a trunk."""
        return {task: pieces for task, pieces in self.heads.items()
                if all(getattr(config, key) == value for key, value in self.head_layout.get(task, {}).items())}

    def misfits(self, config: TransformerConfig, task: str, options: Options) -> dict[str, tuple[Any, Any]]:
        """Keys of the recipe that this family cannot express: what each is, and what it would have to be."""
        found = {f"model.{key}": (getattr(config, key), value) for key, value in self._misfits(config, task).items()}
        return found | {f"options.{key}": (options.get(key), value) for key, value in self.options.items()
                        if options.get(key) != value}

    def _misfits(self, config: TransformerConfig, task: str) -> dict[str, Any]:
        wanted = {**self.layout, **self.head_layout.get(task, {})}
        found = {key: value for key, value in wanted.items() if getattr(config, key) != value}
        if config.activation not in self.activations:
            found.setdefault("activation", " / ".join(self.activations))
        if self.square and config.kv_heads != config.num_heads:
            found["num_kv_heads"] = config.num_heads
        if self.square and config.head_size * config.num_heads != config.d_model:
            found["d_head"] = config.d_model // config.num_heads
        return found

    def plain(self, name: str) -> str:
        """A tensor's name without the prefix, as it is called now."""
        name = name.removeprefix(self.prefix)
        for old, new in self.renamed:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    def config(self, given: Given) -> dict[str, Any]:
        """The fields of `TransformerConfig`, all but those of training; what cannot be is gathered in `given`."""
        fields = {**asdict(TransformerConfig()), **self.layout, **self.read(given)}
        fields = {key: value for key, value in fields.items() if key not in TRAINING_ONLY}
        config = TransformerConfig(**fields)
        wide = max(config.d_model, config.num_heads * config.head_size, config.ff_size)
        if wide > WIDEST * 4 or any(fields[key] > most for key, most in MOST.items()):
            layers, long = fields["num_layers"], fields["max_length"]
            given.fault(f"these sizes cannot be: {layers} layers, {wide} wide, {long} long",
                        f"这样的尺寸不可能：{layers} 层，宽 {wide}，长 {long}")
        if not given.problems:
            for _, en, zh in config.faults():
                given.fault(en, zh)
        return fields


def shapes(family: Family, config: TransformerConfig, vocab_size: int, options: Options) -> dict[str, Shape]:
    """Every tensor of our input and trunk with its shape; nothing is allocated."""
    with torch.device("meta"):
        parts = (family.parts(config, vocab_size, options) if family.parts else
                 {"input": family.entry(config, vocab_size, options), "trunk": Trunk(config)})
    return {f"{part}.{name}": tuple(value.shape)
            for part, module in parts.items() for name, value in module.state_dict().items()}


def linear(ours: str, *theirs: str, bias: bool = True, transposed: bool = False) -> list[Piece]:
    """Weight and bias of a linear map (or a norm)."""
    found = [Piece(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)]
    return [*found, Piece(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))] if bias else found
