"""Weights out: a trained run as a folder that the library transformers loads, proved by running both.

What is written is what the ecosystem reads: config.json, model.safetensors, tokenizer.json, tokenizer_config.json,
special_tokens_map.json and, for models that write texts, generation_config.json and the chat template.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from multihead import export_images, export_sounds
from multihead.build import Run
from multihead.codec.foreign import ForeignCodec
from multihead.codec.text import TextCodec
from multihead.data.store import INDEX
from multihead.errors import Problem, UserError, tr
from multihead.proving import Proof, differ, numbered, transformers
from multihead.run import fsync_folder, temporary, write_atomic, write_json, writing
from multihead.runtime import checkpoint
from multihead.transformer.config import TransformerConfig
from multihead.weights.out import choose, class_name, outward

LONGEST = 500  # characters of one text
WRITES = ("text-generation", "translation")
SAMPLES = ("The room was clean, and breakfast was good.", "房间很干净，服务也好。", "What is this?", "今天天气不错")


@dataclass
class Exported:
    """A folder that was written."""

    path: Path
    kind: str
    """The class of transformers that loads it."""
    proof: Proof | None


def export(run: Run, folder: Path, texts: int = 20, prove: bool = True) -> Exported:
    """Write `run` into `folder` in the form of transformers, and prove it on `texts` held-out texts or pictures.

    Nothing is left behind where it fails.

    Raises:
        UserError: `folder` holds something; no class of transformers computes this model (with the keys of the recipe
            that make it so); transformers is not installed; or the two differ by more than `proving.TOLERANCE`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(tr("exists already; choose another folder with -o",
                           "已经存在，请用 -o 另选文件夹"), str(folder))
    if prove and importlib.util.find_spec("transformers") is None:
        raise UserError(tr(
            "proving an export needs transformers: pip install 'multihead[hf]'; or write it unproved with --no-proof",
            "验证导出结果需要 transformers：pip install 'multihead[hf]'；或用 --no-proof 不验证直接写出"))
    if prove and texts < 1:
        raise UserError(tr(f"--texts is {texts}; it must be at least 1 (or --no-proof)",
                           f"--texts 是 {texts}，至少要为 1（或用 --no-proof）"))
    if run.recipe.task in export_images.TASKS:
        write, compare = export_images.write, export_images.prove
    elif run.recipe.task in export_sounds.TASKS:
        write, compare = export_sounds.write, export_sounds.prove
    else:
        kind = _kind(run)
        write, compare = partial(_write, kind), partial(_prove, kind)
    part = temporary(folder)
    try:
        with writing(folder, tr("the export", "导出的文件")):
            part.mkdir(parents=True)
            name = write(run, part)
        proof = compare(run, part, name, texts) if prove else None
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(folder, name, proof)


# -- kinds of models ---------------------------------------------------------------------------------------------------

Logits = tuple[np.ndarray, Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """What one task's model is elsewhere."""

    columns: tuple[str, ...]
    """The texts of a row that both models are run on."""
    run: Callable[[nn.Module, Any, TextCodec, int, list[str]], Logits]
    """Ours, theirs, the codec, the most tokens, a row's texts → the ids that a tokenizer elsewhere must make of them,
    and the logits of both."""
    wanted: Mapping[str, Any] = field(default_factory=dict)
    """Options for which transformers has no class but with this value."""
    frame: tuple[str, ...] = ()
    """How one text, and two, of a codec of our own begin and end, as `TemplateProcessing` writes it."""


def _causal(ours: nn.Module, theirs: Any, codec: TextCodec, most: int, texts: list[str]) -> Logits:
    ids = codec.encode(texts[0])
    shown = codec.frame(ids) if isinstance(codec, ForeignCodec) else np.concatenate((codec.begin, ids))
    ids_1T = _batch(np.concatenate((codec.begin, ids)), most)
    return shown, ours(ids_1T), theirs(ids_1T).logits


def _masked(ours: nn.Module, theirs: Any, codec: TextCodec, most: int, texts: list[str]) -> Logits:
    ids = codec.frame(codec.encode(texts[0]))
    ids_1T = _batch(ids, most)
    x_1TD = ours(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))
    return ids, ours.head(x_1TD), theirs(ids_1T).logits  # type: ignore[operator]


def _classified(ours: nn.Module, theirs: Any, codec: TextCodec, most: int, texts: list[str]) -> Logits:
    ids = codec.frame(codec.encode(texts[0]))
    ids_1T = _batch(ids, most)
    return ids, ours(ids_1T, _length(ids_1T)), theirs(ids_1T).logits


def _answered(ours: nn.Module, theirs: Any, codec: TextCodec, most: int, texts: list[str]) -> Logits:
    ids, segments = codec.frame_pair(codec.encode(texts[0]), codec.encode(texts[1]))
    ids_1T, segments_1T = _batch(ids, most), _batch(segments, most)
    found = theirs(ids_1T, token_type_ids=segments_1T)
    logits_1T2 = ours(ids_1T, _length(ids_1T), segments_1T, torch.zeros_like(ids_1T))
    return ids, logits_1T2, torch.stack((found.start_logits, found.end_logits), -1)


def _translated(ours: nn.Module, theirs: Any, codec: TextCodec, most: int, texts: list[str]) -> Logits:
    ids = np.append(codec.encode(texts[0]), codec.eos)
    source_1S, target_1T = _batch(ids, most), _batch(np.append(codec.bos, codec.encode(texts[1])), most)
    return ids, ours(source_1S, target_1T), theirs(input_ids=source_1S, decoder_input_ids=target_1T).logits


def _batch(ids: np.ndarray, most: int) -> Tensor:
    return torch.from_numpy(ids[:most]).long()[None]


def _length(ids_BT: Tensor) -> Tensor:
    return torch.tensor([ids_BT.shape[1]])


KINDS: dict[str, Kind] = {
    "text-generation": Kind(("text",), _causal, frame=("<eos> $A", "<eos> $A <eos> $B")),
    "fill-mask": Kind(("text",), _masked),
    "text-classification": Kind(("text",), _classified, {"pool": "first", "wide": ()}),
    "question-answering": Kind(
        ("question", "context"), _answered, {"overlap": False, "simplify": False},
        ("$A", "<bos> $A <eos> $B:1 <eos>:1"),
    ),
    "translation": Kind(
        ("source", "target"), _translated, {"shared_vocabulary": True}, ("$A <eos>", "$A $B <eos>")
    ),
}


def _kind(run: Run) -> Kind:
    task, options = run.recipe.task, run.task.options
    if task not in KINDS:
        able = (*KINDS, *export_images.TASKS, *export_sounds.TASKS)
        raise UserError(tr(f"runs of {task} cannot be exported; those of these tasks can: {', '.join(able)}",
                           f"{task} 的训练结果不能导出；可以导出的任务：{'、'.join(able)}"), str(run.path))
    wanted = KINDS[task].wanted
    faults = {key: value for key, value in wanted.items() if getattr(options, key) != value}
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


def _write(kind: Kind, run: Run, folder: Path) -> str:
    """Every file of the folder; the name of the class that loads it."""
    task, codec, options = run.recipe.task, run.task.codec, run.task.options  # type: ignore[attr-defined]
    config = TransformerConfig(**{f.name: getattr(run.recipe.model, f.name) for f in fields(TransformerConfig)})
    family = choose(config, task, getattr(codec, "family", ""))
    tied = bool(getattr(options, "tied", True))
    tensors, shape = outward(family, config, task, run.model.state_dict(), tied)
    shape |= {"vocab_size": codec.vocab_size, "dtype": "float32", "pad_token_id": codec.pad,
              "bos_token_id": _first(codec, family.causal), "eos_token_id": codec.eos}
    if task == "translation":
        shape["decoder_start_token_id"] = codec.bos
    labels = getattr(run.task, "labels", None)
    if labels is not None:
        many = "multi" if options.multiple else "single"
        shape |= {**numbered(labels.names), "problem_type": f"{many}_label_classification"}
    write_json(folder / "config.json", shape)
    checkpoint.save_weights(folder / "model.safetensors", tensors, {"format": "pt"})
    if task in WRITES:
        write_json(folder / "generation_config.json", {
            "bos_token_id": shape["bos_token_id"], "eos_token_id": sorted(codec.ends), "pad_token_id": codec.pad,
            **({} if family.causal else _search(codec, options))})
    write_tokenizer(codec, folder, kind.frame, config.max_length, shape["bos_token_id"], family.name == "bert",
                    "left" if family.causal else "right")
    return class_name(family, task)


def _first(codec: TextCodec, causal: bool) -> int:
    """What a text begins with; our language models learn that <eos> stands before each."""
    return codec.begin[-1] if causal else codec.bos


def _search(codec: TextCodec, options: Any) -> dict[str, Any]:
    """How a translation is looked for."""
    return {"decoder_start_token_id": codec.bos, "num_beams": options.beam, "length_penalty": options.length_penalty,
            "max_length": options.max_tokens, "early_stopping": False, "bad_words_ids": [[codec.pad]]}


def write_tokenizer(
    codec: TextCodec, folder: Path, frame: tuple[str, ...], longest: int, bos: int, segments: bool,
    padding: str,
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Args:
        frame: post-processing of a codec of our own; a foreign one keeps its own.
        bos: what a text begins with.
        segments: the model reads token types.
        padding: "right"; "left" for models that go on with a text.
    """
    tokenizer = Tokenizer.from_str(codec.as_tokenizer().to_str())
    if frame and not isinstance(codec, ForeignCodec):
        special = [(name, i) for i, name in enumerate(codec.special)]
        tokenizer.post_processor = processors.TemplateProcessing(frame[0], frame[1], special)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    roles = ["bos", "eos", "pad", "unk", *(["mask"] if codec.mask is not None else [])]
    names = {f"{role}_token": tokenizer.id_to_token(getattr(codec, role)) for role in roles}
    names["bos_token"] = tokenizer.id_to_token(bos)
    if codec.mask is not None and isinstance(codec, ForeignCodec):
        names |= {"cls_token": names["bos_token"], "sep_token": names["eos_token"]}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest,
        "clean_up_tokenization_spaces": False, "padding_side": padding,
        "model_input_names": ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"], **names,
    }
    if codec.chat_template is not None:
        config["chat_template"] = codec.chat_template  # where transformers before 4.50 looks
        write_atomic(folder / "chat_template.jinja", codec.chat_template)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


# -- proof -------------------------------------------------------------------------------------------------------------


def _prove(kind: Kind, run: Run, folder: Path, name: str, texts: int) -> Proof:
    """Run both on held-out texts. UserError where ids or logits differ."""
    library = transformers()
    theirs = getattr(library, name).from_pretrained(folder, local_files_only=True).eval()
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours, codec, proof = run.model.cpu().float(), run.task.codec, Proof()  # type: ignore[attr-defined]
    most = run.recipe.model.max_length
    for given in itertools.islice(_texts(run, kind), texts):
        with torch.inference_mode():
            ids, left, right = kind.run(ours, theirs, codec, most, given)
        read = given[:1] if run.recipe.task == "translation" else given
        # Elsewhere the name of a special token in a text is that token; here it never is.
        plain = not any(name in text for name in codec.special for text in read)
        if plain and list(tokenizer(*read)["input_ids"]) != ids.tolist():
            raise differ(tr(f"its tokenizer reads {given[0][:40]!r} as other tokens than ours",
                             f"导出的分词器把 {given[0][:40]!r} 切成了不同的词元"))
        proof.add(left, right)
    proof.judge()
    return proof


def _texts(run: Run, kind: Kind) -> Iterator[list[str]]:
    """Held-out texts of the run, evenly spread, or pairs of them; then some of our own, for a run without data."""
    for part in ("test", "valid"):
        if not (run.path / "data" / part / INDEX).is_file():
            continue
        store = run.store(part)
        for i in range(0, len(store), max(1, len(store) // 100)):
            given = [str(store.row(i).get(name) or "") for name in kind.columns]
            for start in range(0, min(len(given[0]), LONGEST * 100), LONGEST):
                yield [given[0][start:start + LONGEST], *(text[:LONGEST] for text in given[1:])]
    for text in SAMPLES:
        yield [text, SAMPLES[0]][: len(kind.columns)]


def words(done: Exported) -> str:
    """What was done, for a person."""
    if done.proof is None:
        return tr(f"wrote {done.path} ({done.kind}), unproved", f"已写出 {done.path}（{done.kind}），未验证")
    return tr(f"wrote {done.path} ({done.kind}); {done.proof}", f"已写出 {done.path}（{done.kind}）；{done.proof}")
