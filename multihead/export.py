"""Weights out: a trained run as a folder that the library transformers loads, proved by running both.

What is written is what the ecosystem reads: config.json, model.safetensors, tokenizer.json, tokenizer_config.json,
special_tokens_map.json and, for models that write texts, generation_config.json and the chat template.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from multihead.build import Run
from multihead.codec.foreign import ForeignCodec
from multihead.codec.text import TextCodec
from multihead.data.store import INDEX
from multihead.errors import Problem, UserError, tr
from multihead.run import fsync_folder, temporary, write_atomic, write_json, writing
from multihead.runtime import checkpoint
from multihead.transformer.config import TransformerConfig
from multihead.weights.out import choose, class_name, outward

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit (or of 1). Two float32 programs that sum the same
products in another order differ by about 1e-6 of it; a wrong map or a missing norm by more than 1e-2."""
LONGEST = 500  # characters of one text
SAMPLES = ("The room was clean, and breakfast was good.", "房间很干净，服务也好。", "What is this?", "今天天气不错")


@dataclass
class Proof:
    """What running both has shown."""

    texts: int
    difference: float
    """The largest, of any logit."""
    scale: float
    """The largest logit."""


@dataclass
class Exported:
    """A folder that was written."""

    path: Path
    kind: str
    """The class of transformers that loads it."""
    proof: Proof | None


def export(run: Run, folder: Path, texts: int = 20, prove: bool = True) -> Exported:
    """Write `run` into `folder` in the form of transformers, and prove it on `texts` held-out texts.

    Nothing is left behind where it fails.

    Raises:
        UserError: `folder` holds something; no class of transformers computes this model (with the keys of the recipe
            that make it so); transformers is not installed; or the two differ by more than `TOLERANCE`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(tr("exists already; choose another folder with -o",
                           "已经存在，请用 -o 另选文件夹"), str(folder))
    if prove and importlib.util.find_spec("transformers") is None:
        raise UserError(tr(
            "proving an export needs transformers: pip install 'multihead[hf]'; or write it unproved with --no-proof",
            "验证导出结果需要 transformers：pip install 'multihead[hf]'；或用 --no-proof 不验证直接写出"))
    kind = _kind(run)
    part = temporary(folder)
    try:
        with writing(folder, tr("the export", "导出的文件")):
            part.mkdir(parents=True)
            name = _write(run, kind, part)
        proof = _prove(run, kind, part, name, texts) if prove else None
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(folder, name, proof)


# -- kinds of models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What one task's model is elsewhere."""

    faults: Callable[[Any], dict[str, Any]]
    """Options that no class of transformers has: each with what it would have to be."""
    frame: Callable[[TextCodec], tuple[str, str] | None]
    """How texts of a codec of our own begin and end, as `TemplateProcessing` writes it: for one and for two."""
    logits: Callable[[nn.Module, Tensor, Tensor], Tensor]
    """Ours of ids (1, T) and segments (1, T)."""
    theirs: Callable[[Any], Tensor]
    """The same of what transformers gives."""
    pair: bool = False


def _plainly(options: Any) -> dict[str, Any]:
    return {}


def _classes(options: Any) -> dict[str, Any]:
    wanted = {"pool": "first", "wide": ()}
    return {key: value for key, value in wanted.items() if getattr(options, key) != value}


def _answers(options: Any) -> dict[str, Any]:
    return {key: False for key in ("overlap", "simplify") if getattr(options, key)}


def _ends(codec: TextCodec) -> dict[str, str]:
    names = codec.as_tokenizer().id_to_token
    return {"bos": names(codec.bos) or "", "eos": names(codec.eos) or ""}


def _length(ids_BT: Tensor) -> Tensor:
    return torch.tensor([ids_BT.shape[1]])


KINDS: dict[str, Kind] = {
    "text-generation": Kind(
        _plainly, lambda codec: ("{eos} $A".format(**_ends(codec)), "{eos} $A {eos} $B".format(**_ends(codec))),
        lambda model, ids, _: model(ids), lambda out: out.logits,
    ),
    "fill-mask": Kind(
        _plainly, lambda codec: None,
        lambda model, ids, _: model.head(model(ids, torch.ones_like(ids, dtype=torch.bool))),  # type: ignore[operator]
        lambda out: out.logits,
    ),
    "text-classification": Kind(
        _classes, lambda codec: None, lambda model, ids, _: model(ids, _length(ids)), lambda out: out.logits,
    ),
    "question-answering": Kind(
        _answers, lambda codec: ("$A", "{bos} $A {eos} $B:1 {eos}:1".format(**_ends(codec))),
        lambda model, ids, segments: model(ids, _length(ids), segments, torch.zeros_like(ids)),
        lambda out: torch.stack((out.start_logits, out.end_logits), -1), pair=True,
    ),
}


def _kind(run: Run) -> Kind:
    task, options = run.recipe.task, run.task.options
    if task not in KINDS:
        raise UserError(tr(f"runs of {task} cannot be exported; those of these tasks can: {', '.join(KINDS)}",
                           f"{task} 的训练结果不能导出；可以导出的任务：{'、'.join(KINDS)}"), str(run.path))
    faults = KINDS[task].faults(options)
    if faults:
        raise UserError.many([Problem(tr(
            f"options.{key} is {getattr(options, key)!r}, which no class of transformers computes; "
            f"train with options.{key}={_shown(value)}",
            f"options.{key} 是 {getattr(options, key)!r}，transformers 中没有这样的类；"
            f"请用 options.{key}={_shown(value)} 训练"), str(run.path)) for key, value in faults.items()])
    return KINDS[task]


def _shown(value: Any) -> str:
    return "[]" if value == () else str(value).lower() if isinstance(value, bool) else str(value)


# -- files -------------------------------------------------------------------------------------------------------------


def _write(run: Run, kind: Kind, folder: Path) -> str:
    """Every file of the folder; the name of the class that loads it."""
    task, codec, options = run.recipe.task, run.task.codec, run.task.options  # type: ignore[attr-defined]
    config = TransformerConfig(**{f.name: getattr(run.recipe.model, f.name) for f in fields(TransformerConfig)})
    family = choose(config, task, getattr(codec, "family", ""))
    tied = bool(getattr(options, "tied", True))
    tensors, shape = outward(family, config, task, run.model.state_dict(), tied)
    shape |= {"vocab_size": codec.vocab_size, "dtype": "float32", "pad_token_id": codec.pad,
              "bos_token_id": _first(codec, family.causal), "eos_token_id": codec.eos}
    labels = getattr(run.task, "labels", None)
    if labels is not None:
        many = "multi" if options.multiple else "single"
        shape |= {"id2label": {str(i): name for i, name in enumerate(labels.names)},
                  "label2id": {name: i for i, name in enumerate(labels.names)},
                  "problem_type": f"{many}_label_classification"}
    write_json(folder / "config.json", shape)
    checkpoint.save_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    if family.causal:
        write_json(folder / "generation_config.json", {
            "bos_token_id": _first(codec, True), "eos_token_id": sorted(codec.ends), "pad_token_id": codec.pad})
    write_tokenizer(codec, folder, kind.frame(codec), config.max_length, shape["bos_token_id"], family.name == "bert")
    return class_name(family, task)


def _first(codec: TextCodec, causal: bool) -> int:
    """What a text begins with; our language models learn that <eos> stands before each."""
    return codec.begin[-1] if causal else codec.bos


def write_tokenizer(
    codec: TextCodec, folder: Path, frame: tuple[str, str] | None, longest: int, bos: int, segments: bool
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Args:
        frame: post-processing of a codec of our own; a foreign one keeps its own.
        bos: what a text begins with.
        segments: the model reads token types.
    """
    tokenizer = Tokenizer.from_str(codec.as_tokenizer().to_str())
    if frame is not None and not isinstance(codec, ForeignCodec):
        special = [(name, i) for i, name in enumerate(codec.special)]
        tokenizer.post_processor = processors.TemplateProcessing(*frame, special)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    roles = ["bos", "eos", "pad", "unk", *(["mask"] if codec.mask is not None else [])]
    names = {f"{role}_token": tokenizer.id_to_token(getattr(codec, role)) for role in roles}
    names["bos_token"] = tokenizer.id_to_token(bos)
    if codec.mask is not None and isinstance(codec, ForeignCodec):
        names |= {"cls_token": names["bos_token"], "sep_token": names["eos_token"]}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest,
        "clean_up_tokenization_spaces": False, "padding_side": "right",
        "model_input_names": ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"], **names,
    }
    if codec.chat_template is not None:
        write_atomic(folder / "chat_template.jinja", codec.chat_template)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


# -- proof -------------------------------------------------------------------------------------------------------------


def _prove(run: Run, kind: Kind, folder: Path, name: str, texts: int) -> Proof:
    """Run both on held-out texts. UserError where ids or logits differ."""
    transformers = _transformers()
    theirs = getattr(transformers, name).from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours, codec, proof = run.model.cpu().float(), run.task.codec, Proof(0, 0.0, 0.0)  # type: ignore[attr-defined]
    for given in itertools.islice(_texts(run, kind), texts):
        ids, segments = _framed(codec, kind, *given)
        # Elsewhere the name of a special token in a text is that token; here it never is.
        plain = not any(name in text for name in codec.special for text in given)
        if plain and list(tokenizer(*given)["input_ids"]) != ids.tolist():
            raise _differ(tr(f"its tokenizer reads {given[0][:40]!r} as other tokens than ours",
                             f"导出的分词器把 {given[0][:40]!r} 切成了不同的词元"))
        ids_1T, segments_1T = (torch.from_numpy(a[: run.recipe.model.max_length]).long()[None] for a in (ids, segments))
        read = {"token_type_ids": segments_1T} if getattr(theirs.config, "type_vocab_size", 0) > 1 else {}
        with torch.inference_mode():
            left = kind.logits(ours, ids_1T, segments_1T).float()
            right = kind.theirs(theirs(ids_1T, **read)).float()
        proof.texts += 1
        proof.difference = max(proof.difference, float((left - right).abs().max()))
        proof.scale = max(proof.scale, float(left.abs().max()))
    if not proof.difference <= TOLERANCE * max(1.0, proof.scale):
        off, most = f"{proof.difference:.2g}", f"{proof.scale:.3g}"
        raise _differ(tr(f"its logits differ from ours by up to {off} (allowed: {TOLERANCE:g} of the largest, {most})",
                         f"其 logits 与我们的最多相差 {off}；最大的 logit 是 {most}，只允许它的 {TOLERANCE:g}"))
    return proof


def _framed(codec: TextCodec, kind: Kind, text: str, other: str = "") -> tuple[np.ndarray, np.ndarray]:
    """What a tokenizer elsewhere makes of a text, or of two: ids and segments."""
    ids = codec.encode(text)
    if kind.pair:
        return codec.frame_pair(ids, codec.encode(other))
    if not isinstance(codec, ForeignCodec) and kind.frame(codec) is not None:
        ids = np.concatenate((np.array(codec.begin, dtype=ids.dtype), ids))
    else:
        ids = codec.frame(ids)
    return ids, np.zeros_like(ids)


def _texts(run: Run, kind: Kind) -> Iterator[tuple[str, ...]]:
    """Held-out texts of the run, evenly spread, or pairs of them; then some of our own, for a run without data."""
    columns = ("question", "context") if kind.pair else ("text",)
    for part in ("test", "valid"):
        if not (run.path / "data" / part / INDEX).is_file():
            continue
        store = run.store(part)
        for i in range(0, len(store), max(1, len(store) // 100)):
            given = [str(store.row(i).get(name) or "") for name in columns]
            for start in range(0, min(len(given[0]), LONGEST * 100), LONGEST):
                yield tuple(text[start if text is given[0] else 0:][:LONGEST] for text in given)
    for text in SAMPLES:
        yield (text, SAMPLES[0])[: len(columns)]


def _differ(what: str) -> UserError:
    return UserError(tr(f"the export is not the same model: {what}. Nothing was kept; please report this",
                        f"导出的模型与原模型不一致：{what}。未保留任何文件，请向我们报告"))


def _transformers() -> Any:
    """The library, without its chatter."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def words(done: Exported) -> str:
    """What was done, for a person."""
    if done.proof is None:
        return tr(f"wrote {done.path} ({done.kind}), unproved", f"已写出 {done.path}（{done.kind}），未验证")
    count, off, most = done.proof.texts, f"{done.proof.difference:.2g}", f"{done.proof.scale:.3g}"
    return tr(
        f"wrote {done.path} ({done.kind}); on {count} texts its logits differ from ours by at most {off}, "
        f"the largest being {most}",
        f"已写出 {done.path}（{done.kind}）；在 {count} 条文本上，其 logits 与我们的最多相差 {off}，"
        f"最大的 logit 为 {most}")
