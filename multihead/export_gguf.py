"""A run that writes texts as one GGUF file, which llama.cpp and what is built on it read: weights, shape, tokenizer.

Its Q8_0 weights are the numbers that `precision: int8` multiplies with here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multihead.build import Run
from multihead.codec.foreign import ForeignCodec
from multihead.codec.text import TextCodec, _byte_of_char
from multihead.errors import Problem, UserError, tr
from multihead.generation.int8 import GROUP
from multihead.run import replacing
from multihead.transformer.config import TransformerConfig
from multihead.transformer.rotary import rotary_table
from multihead.weights.llama import LLAMA, QWEN2, QWEN3
from multihead.weights.names import Family
from multihead.weights.out import outward

FORMS = {"gguf": ("Q8_0", "MOSTLY_Q8_0"), "gguf-f16": ("F16", "MOSTLY_F16"), "gguf-f32": ("F32", "ALL_F32")}
TASK = "text-generation"
FAMILIES = (LLAMA, QWEN2, QWEN3)


def export_gguf(run: Run, path: Path, form: str = "gguf") -> str:
    """Write `run` as the file `path`, whole or not at all; what was written, for a person.

    Args:
        form: one of `FORMS`. Rows that are no multiple of 32 long are F16 where Q8_0 is asked for, norms always F32.

    Raises:
        UserError: `path` is there already; the package gguf is not installed; or llama.cpp cannot compute this model or
            cut texts as its tokenizer does, with what stands in the way.
    """
    if path.exists():
        raise UserError(tr("exists already; choose another file with -o", "已经存在，请用 -o 另选文件"), str(path))
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(tr("writing GGUF needs the package gguf: pip install 'multihead[gguf]'",
                           "写出 GGUF 需要 gguf 包：pip install 'multihead[gguf]'")) from None
    config = TransformerConfig(**{f.name: getattr(run.recipe.model, f.name) for f in fields(TransformerConfig)})
    if run.recipe.task != TASK:
        raise UserError(tr(
            f"GGUF is written of text-generation runs; this is one of {run.recipe.task}: use --to hf",
            f"只有 text-generation 的训练结果能写成 GGUF；这是 {run.recipe.task}：请用 --to hf"), str(run.path))
    try:
        vocabulary, tied = _vocabulary(run.task.codec), bool(getattr(run.task.options, "tied", True))  # type: ignore[attr-defined]
        with replacing(path, tr("the export", "导出的文件")) as part:
            family = write_file(part, FORMS[form], config, run.model.state_dict(), tied, vocabulary, run.name)
    except UserError as error:
        raise UserError.many([Problem(p.message, p.where or str(run.path)) for p in error.problems]) from None
    size = path.stat().st_size / 1e6
    return tr(f"wrote {path} (GGUF, {family.name}, {FORMS[form][0]}, {size:.1f} MB)",
              f"已写出 {path}（GGUF，{family.name}，{FORMS[form][0]}，{size:.1f} MB）")


def write_file(
    file: Path, form: tuple[str, str], config: TransformerConfig, ours: Mapping[str, torch.Tensor], tied: bool,
    vocabulary: Mapping[str, Any], name: str,
) -> Family:
    """Write a language model as a file of the architecture that computes what it computes.

    Args:
        form: one of the values of `FORMS`.
        ours: every tensor of the model.
        vocabulary: fields of the file that tell of the tokenizer, ``token_list`` among them.
    """
    import gguf

    family = _family(config)
    tensors, _ = outward(family, config, TASK, ours, tied)
    kind = gguf.GGMLQuantizationType[form[0]]
    writer = gguf.GGUFWriter(file, family.name)
    writer.add_name(name)
    _shape(writer, config)
    writer.add_vocab_size(len(vocabulary["token_list"]))
    writer.add_file_type(gguf.LlamaFileType[form[1]])
    for key, value in vocabulary.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name.upper()], config.num_layers)
    if config.rope_llama3 is not None:
        writer.add_tensor("rope_freqs.weight", _stretched(config))
    for given, tensor in tensors.items():
        values = (_paired(given, tensor, config) if family is LLAMA else tensor).contiguous().numpy()
        held = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        if held == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % GROUP:
            held = gguf.GGMLQuantizationType.F16
        theirs = names.get_name(given, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, given
        writer.add_tensor(theirs, gguf.quants.quantize(values, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return family


def _family(config: TransformerConfig) -> Family:
    """The architecture of llama.cpp that computes what the model computes."""
    misfits = [(family, family.misfits(config, TASK, {})) for family in FAMILIES]
    family, wanted = min(misfits, key=lambda pair: len(pair[1]))
    if wanted:
        raise UserError.many([Problem(tr(
            f"{key} is {ours}; llama.cpp's {family.name} has only {theirs}",
            f"{key} 是 {ours}；llama.cpp 的 {family.name} 只支持 {theirs}")) for key, (ours, theirs) in wanted.items()])
    return family


def _shape(writer: Any, config: TransformerConfig) -> None:
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ff_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _paired(name: str, tensor: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp turns them for Llama: e and e + E/2 of a head next to each other."""
    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _stretched(config: TransformerConfig) -> np.ndarray:
    """By what each pair's angle is divided (Llama 3.1): (E/2,)."""
    plain, slowed = (
        torch.atan2(sin, cos) for cos, sin in
        (rotary_table(config.head_size, 2, config.rope_theta, kind)[1].double() for kind in (None, config.rope_llama3))
    )
    return (plain / slowed).float().numpy()


def _vocabulary(codec: TextCodec) -> Mapping[str, Any]:
    """The tokenizer as llama.cpp's byte-level BPE: fields of its file.

    A codec of characters is one whose merges join the bytes of each character it knows; one that it does not know is
    left out there, where it is <unk> here.
    """
    if isinstance(codec, ForeignCodec):
        raise UserError(tr(
            "the tokenizer came with weights of others; write it with --to hf and turn that into GGUF with llama.cpp's "
            "own convert_hf_to_gguf.py, which knows their tokenizers",
            "分词器来自他人的权重；请先用 --to hf 导出，再用 llama.cpp 的 convert_hf_to_gguf.py 转换，它认识这些分词器",
        ))
    if codec.normalize is not None:
        raise UserError(tr(
            f"the tokenizer folds texts first ({codec.normalize}), which llama.cpp does not: prepare without it",
            f"分词器会先规范化文本（{codec.normalize}），llama.cpp 不会：请在准备数据时不使用它"))
    import gguf

    letters = {byte: letter for letter, byte in _byte_of_char().items()}
    spelt = ["".join(letters[byte] for byte in codec.token(i)) for i in range(len(codec.special), codec.vocab_size)]
    if codec.kind == "bpe":
        merges = [" ".join(pair) for pair in json.loads(codec.as_tokenizer().to_str())["model"]["merges"]]
    else:
        merges = list(dict.fromkeys(f"{word[:n]} {word[n]}" for word in spelt for n in range(1, len(word))))
    kinds = [gguf.TokenType.CONTROL] * len(codec.special) + [gguf.TokenType.NORMAL] * len(spelt)
    return {
        "tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": [*codec.special, *spelt],
        "token_types": [int(kind) for kind in kinds], "token_merges": merges, "bos_token_id": codec.begin[-1],
        "eos_token_id": codec.eos, "unk_token_id": codec.unk, "pad_token_id": codec.pad, "add_bos_token": True,
        "add_eos_token": False,
    }
