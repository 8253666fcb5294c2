"""Where weights come from: a run folder of ours, or a Hugging Face folder, under our names.

Opening reads names and shapes alone; everything is checked before a tensor is read. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from multihead import strict_yaml
from multihead.codec.foreign import FILES, ForeignCodec, read_json
from multihead.codec.image import FILE as PICTURES
from multihead.codec.image import ImageCodec
from multihead.codec.processor import FILE as PROCESSOR
from multihead.codec.processor import check_hearing, read_processor
from multihead.codec.text import LABELS_FILE, LabelCodec, TextCodec
from multihead.errors import Problem, UserError, nearest, tr
from multihead.run import RECIPE, RunFolder
from multihead.runtime.checkpoint import load_weights
from multihead.transformer.config import TRAINING_ONLY, TransformerConfig
from multihead.weights.bert import BERT, ROBERTA
from multihead.weights.gpt2 import GPT2
from multihead.weights.llama import LLAMA, QWEN2, QWEN3
from multihead.weights.names import Family, Given, Piece, Shape, shapes, sizes
from multihead.weights.vit import DEIT, DISTILLED, VIT
from multihead.weights.whisper import WHISPER

FAMILIES = (BERT, ROBERTA, GPT2, LLAMA, QWEN2, QWEN3, VIT, DISTILLED, DEIT, WHISPER)
CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MOST_HEADER = 64 << 20  # bytes of a safetensors header; a model of 100,000 tensors needs a fifth of it
GREY = {1: "grey", 3: "rgb"}
ENTRY = ("patch", "stem", "pool", "registers")
"""Options of a task on pictures that its weights decide."""
HEARING = ("front", "ctc_weight", "mels", "decoder_layers", "text_length")
"""The same of recognition."""
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Held:
    """One tensor of a folder: its file, and what its header says."""

    file: Path
    name: str
    shape: Shape
    dtype: str


class Origin:
    """Weights to start from.

    Attributes:
        path: the folder.
        family: "multihead", or the `Family.name` of a folder from elsewhere.
        reads: "text", "pictures" or "sound".
        causal: True for decoders, False for encoders.
        config: the fields of `TransformerConfig` that the weights fix, which is all but those of training.
        options: options of a task that the weights decide: ``{"tied": bool}`` for language models.
        preferred: options that they were trained with and that a recipe may change.
        vocab_size: rows of the embedding table.
        window: samples (16 kHz) that weights for sound hear at once.
        labels: names of a classifier's classes in their order, where the folder says; else None.
        unknown: tensors of the folder that have no place here.
    """

    path: Path
    family: str
    causal: bool
    config: dict[str, Any]
    options: dict[str, Any]
    vocab_size: int
    reads: str = "text"
    window: int = 0
    preferred: Mapping[str, Any] = MappingProxyType({})
    labels: list[str] | None = None
    unknown: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """The files that weights, shape and codec are read from."""
        raise NotImplementedError

    def codec(self) -> Any:
        """The codec that these weights were trained with, a `TextCodec` or an `ImageCodec`. UserError where there is
        none, or it does not fit."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The weights in float32, under our names: ``input.*``, ``trunk.*``, and of ``head.*`` what there is."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"Origin({str(self.path)!r}, family={self.family!r})"


def open_origin(path: str | Path) -> Origin:
    """A run folder or a Hugging Face folder.

    Raises:
        UserError: there is no such folder, it holds something else, a feature this Transformer lacks, or weights that
            do not fit their config.json; each with the key or the tensor.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise UserError(tr(
            f"there is no such folder{near}. Name a run, such as runs/pretrained, or a folder with config.json, "
            "*.safetensors and tokenizer.json that was downloaded before; nothing is fetched from the network",
            f"没有这个文件夹{near}。请给出一次训练的文件夹（如 runs/pretrained），"
            "或事先下载好的、含 config.json、*.safetensors 与 tokenizer.json 的文件夹；这里不会联网下载"), str(path))
    if (folder / RECIPE).is_file():
        return Own(folder)
    if (folder / CONFIG).is_file():
        return Foreign(folder)
    raise UserError(tr(
        f"is neither a run ({RECIPE}) nor a Hugging Face folder ({CONFIG}); what is inside: {_inside(folder)}",
        f"既不是训练文件夹（{RECIPE}），也不是 Hugging Face 文件夹（{CONFIG}）；里面有：{_inside(folder)}"), str(path))


def _inside(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "") if names else tr("nothing", "空")


class Own(Origin):
    """A run of ours."""

    def __init__(self, folder: Path) -> None:
        self.path, self.family = folder, "multihead"
        run = RunFolder.open(folder)
        self._weights = run.weights()
        problems: list[Problem] = []
        values = strict_yaml.read(folder / RECIPE, problems).values
        if problems:
            raise UserError.many(problems)
        names = set(TransformerConfig.__dataclass_fields__) - set(TRAINING_ONLY)
        self.config = {key: value for key, value in (values.get("model") or {}).items() if key in names}
        self.causal = values.get("task") == "text-generation"
        options = values.get("options") or {}
        self.options = {"tied": bool(options.get("tied", True))} if self.causal else {}
        self._headers = headers([self._weights])
        tokens = self._headers.get("input.token.weight")
        if tokens is None and not (folder / "codec" / PICTURES).is_file():
            raise UserError(tr(
                f"this run of {values.get('task')} has no token embedding and trunk that another task could start from",
                f"这次 {values.get('task')} 的训练没有可供其他任务使用的词嵌入与主干网络"), str(folder))
        self.vocab_size = tokens.shape[0] if tokens is not None else 0
        if tokens is None:
            codec, self.reads = ImageCodec.load(folder / "codec"), "pictures"
            self.options = {**{key: options[key] for key in ENTRY if key in options}, "channels": GREY[codec.channels]}
            self.preferred = {"size": codec.size, "fit": codec.fit_how}
        labels = folder / "codec" / LABELS_FILE
        self.labels = LabelCodec.load(labels.parent).names if labels.is_file() else None

    def files(self) -> list[Path]:
        codec = sorted(p for p in (self.path / "codec").rglob("*") if p.is_file())
        return [self.path / RECIPE, self._weights, *codec]

    def codec(self) -> TextCodec | ImageCodec:
        folder = self.path / "codec"
        return ImageCodec.load(folder) if self.reads == "pictures" else TextCodec.load(folder)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: tensor.float() for name, tensor in load_weights(self._weights).items()}
        if self.options.get("tied"):
            found["head.linear.weight"] = found["input.token.weight"]
        return found


class Foreign(Origin):
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._values = read_json(folder / CONFIG, 16 << 20)
        self._family = family_of(self._values, str(folder / CONFIG))
        self.family, self.causal = self._family.name, self._family.causal
        given = Given(self._values, str(folder / CONFIG))
        self.config, self.reads = self._family.config(given), self._family.reads
        self.vocab_size = given.number("vocab_size") if self.reads != "pictures" else 0
        self._entry = {**self._family.options, **self._family.read_options(given)}
        if given.get("quantization_config"):
            given.fault("quantization_config: weights in fewer bits are not read; choose float16 or bfloat16",
                        "quantization_config：不支持量化的权重，请选用 float16 或 bfloat16 的版本")
        if given.problems:
            raise UserError.many(given.problems)
        self._tensors = self._found()
        self._pieces = self._check()
        tied = given.get("tie_word_embeddings", None if "lm_head.weight" in self._tensors else True)
        self.options = {"tied": bool(tied) or "lm_head.weight" not in self._tensors} if self.causal else {}
        if self.reads == "pictures":
            self.options = {**{key: self._entry[key] for key in ENTRY}, "channels": GREY[self._entry["channels"]]}
            self.preferred = {"size": self._entry["size"], "fit": self._codec.fit_how}
        if self.reads == "sound":
            self.options = {key: self._entry[key] for key in HEARING}
            self.preferred = {"max_seconds": check_hearing(self.path / PROCESSOR, self._entry["mels"],
                                                           self.config["max_length"]), "plain_text": False}
            self.window = self.config["max_length"] * 320
        self.labels = _labels(self._values)

    def files(self) -> list[Path]:
        index = [self.path / INDEX] if (self.path / INDEX).is_file() else []
        tokens = [p for p in map(self.path.joinpath, (*FILES, PROCESSOR)) if p.is_file()]
        return [self.path / CONFIG, *index, *sorted({held.file for held in self._tensors.values()}), *tokens]

    def codec(self) -> ForeignCodec | ImageCodec:
        return self._codec

    @functools.cached_property
    def _codec(self) -> Any:
        if self.reads == "pictures":
            return read_processor(self.path / PROCESSOR, self._entry["size"], self._entry["channels"])
        return ForeignCodec.open(self.path, self._values, self.vocab_size, self.family)

    def tensors(self) -> dict[str, Tensor]:
        loaded = self._load({name for piece in self._pieces for name in piece.theirs})
        found = {piece.ours: piece.join([loaded[name] for name in piece.theirs]) for piece in self._pieces}
        if self.options.get("tied"):
            found["head.linear.weight"] = found["input.token.weight"]
        return found

    def _load(self, names: set[str]) -> dict[str, Tensor]:
        found = {}
        for path in sorted({self._tensors[name].file for name in names}):
            with _opened(path) as file:
                for name in sorted(names):
                    if self._tensors[name].file == path:
                        found[name] = file.get_tensor(self._tensors[name].name)
        return found

    def _found(self) -> dict[str, Held]:
        """The folder's tensors by their plain names, those without content left out."""
        held: dict[str, Held] = {}
        for name, one in headers(tensor_files(self.path)).items():
            plain = self._family.plain(name)
            if re.fullmatch(self._family.ignored, plain):
                continue
            if plain in held:
                raise UserError(tr(f"two tensors are called {plain}: {held[plain].name} and {name}",
                                   f"有两个张量都叫 {plain}：{held[plain].name} 与 {name}"), str(self.path))
            held[plain] = one
        return held

    def _check(self) -> list[Piece]:
        """The pieces that are here, each of the shape that config.json says; heads as far as they exist."""
        family, held, problems = self._family, self._tensors, []
        layers = (re.match(r"(?:encoder\.layers?|h|layers)\.(\d{1,6})\.", name) for name in held)
        layer = max((int(found[1]) for found in layers if found), default=-1) + 1
        if layer != self.config["num_layers"]:
            raise UserError(tr(
                f"config.json says {self.config['num_layers']} layers, the weights have {layer}; "
                "they do not belong together, or a file is missing",
                f"config.json 写的是 {self.config['num_layers']} 层，而权重有 {layer} 层；二者不配套，或缺少文件"),
                str(self.path))
        config = TransformerConfig(**self.config)
        own = shapes(family, config, self.vocab_size, self._entry)
        pieces = family.body(config, self._entry)
        missing = [name for piece in pieces for name in piece.theirs if name not in held]
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            problems.append(Problem(tr(f"{len(missing)} tensors are missing: {shown}; download the folder again",
                                       f"缺少 {len(missing)} 个张量：{shown}；请重新下载该文件夹"), str(self.path)))
        for piece in pieces:
            for name, shape in piece.shapes(own[piece.ours], sizes(piece, config)).items():
                if name in held and held[name].shape != shape:
                    problems.append(Problem(tr(
                        f"{held[name].name} is {held[name].shape}; by config.json it must be {shape}",
                        f"{held[name].name} 是 {held[name].shape}；按 config.json 应为 {shape}"), str(held[name].file)))
        odd = {one.dtype for one in held.values()} - set(FLOATS)
        if odd:
            problems.append(Problem(tr(
                f"weights of type {', '.join(sorted(odd))} are not read; choose the folder in float16 or bfloat16",
                f"不支持 {'、'.join(sorted(odd))} 类型的权重，请选用 float16 或 bfloat16 的版本"), str(self.path)))
        if problems:
            raise UserError.many(problems[:10])
        heads = [p for head in family.fitting(config).values() for p in head if all(name in held for name in p.theirs)]
        used = {name for piece in (*pieces, *heads) for name in piece.theirs}
        self.unknown = tuple(sorted(held[name].name for name in held.keys() - used))
        return [*pieces, *heads]


# ---- files -----------------------------------------------------------------------------------------------------------


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to. UserError where it is none of ours."""
    kind, named = values.get("model_type"), values.get("architectures") or ()
    for family in FAMILIES:
        if kind in family.model_types and (not family.architectures or set(family.architectures) & set(named)):
            return family
    known = list(dict.fromkeys(name for family in FAMILIES for name in family.model_types))
    raise UserError(tr(
        f"model_type is {kind!r}{nearest(str(kind), known)}; weights of these can be read: {', '.join(known)}",
        f"model_type 是 {kind!r}{nearest(str(kind), known)}；可以读取的有：{'、'.join(known)}"), where)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or those its index names."""
    if (folder / TENSORS).is_file():
        return [folder / TENSORS]
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
        odd = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if not names or odd:
            raise UserError(tr(f"names no files of this folder ({', '.join(odd[:2])}); download the folder again",
                               f"所列的不是该文件夹中的文件（{'、'.join(odd[:2])}），请重新下载"), str(folder / INDEX))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(tr(f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}; "
                               "download them",
                               f"{len(names)} 个权重文件中缺少 {len(missing)} 个：{'、'.join(missing[:3])}；请补全"),
                            str(folder))
        return [folder / name for name in names]
    if (folder / "adapter_config.json").is_file():
        raise UserError(tr("holds a PEFT adapter, not whole weights; merge it into its base with PEFT first",
                           "是 PEFT 适配器而不是完整权重；请先用 PEFT 合并到基础模型"), str(folder))
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(tr(
            f"has its weights as pickles only ({', '.join(pickles[:3])}), which can run any code when they are opened. "
            "Choose a version with *.safetensors; or, if you trust the author, convert it with transformers: "
            f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained('safe', safe_serialization=True)",
            f"只有 pickle 格式的权重（{'、'.join(pickles[:3])}），打开时可能执行任意代码。"
            "请选用含 *.safetensors 的版本；若信任作者，可用 transformers 转换："
            f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained('safe', safe_serialization=True)"),
            str(folder))
    raise UserError(tr(f"has a {CONFIG} but no weights: {TENSORS} (or {INDEX} with its parts) is missing",
                       f"有 {CONFIG} 但没有权重：缺少 {TENSORS}（或 {INDEX} 及其各部分）"), str(folder))


def headers(files: list[Path]) -> dict[str, Held]:
    """Every tensor's shape and type, read from the headers alone."""
    found: dict[str, Held] = {}
    for path in files:
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > MOST_HEADER:
            raise _not_whole(path, tr(f"a header of {size:,} bytes", f"文件头有 {size:,} 字节"))
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise UserError(tr(f"the tensor {name} is in two files: {found[name].file.name} and {path.name}",
                                       f"张量 {name} 同时在两个文件中：{found[name].file.name} 与 {path.name}"),
                                    str(path.parent))
                part = file.get_slice(name)
                found[name] = Held(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_whole(path, error) from None


def _not_whole(path: Path, why: object) -> UserError:
    return UserError(tr(f"is not a whole safetensors file ({why}); copy or download it again",
                        f"不是完整的 safetensors 文件（{why}）；请重新复制或下载"), str(path))


def _labels(values: Mapping[str, Any]) -> list[str] | None:
    """The names of a classifier's classes; None where they are only numbered."""
    named = values.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))}:
        return None
    labels = [str(named[str(i)]) for i in range(len(named))]
    return None if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels
