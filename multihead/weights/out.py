"""Our weights under the names of a family elsewhere: which family fits, its tensors, its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from multihead.errors import UserError, tr
from multihead.transformer.config import TransformerConfig
from multihead.weights.names import Family, Options, sizes
from multihead.weights.origin import FAMILIES
from multihead.weights.pegasus import PEGASUS

CLASSES = {
    "text-generation": "ForCausalLM",
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "question-answering": "ForQuestionAnswering",
    "translation": "ForConditionalGeneration",
    "image-classification": "ForImageClassification",
    "speech-recognition": "ForConditionalGeneration",
}
NAMES = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3",
         "pegasus": "Pegasus", "whisper": "Whisper", "vit": "ViT", "deit": "DeiT", "deit-distilled": "DeiT"}
ABLE = (*FAMILIES, PEGASUS)
LAST = ("roberta",)  # only where the weights came from one


def choose(
    config: TransformerConfig, task: str, came_from: str = "", options: Options = MappingProxyType({})
) -> Family:
    """The family that computes what this model computes; the one its weights came from before others.

    Args:
        options: those of the task that shape the model, for tasks on pictures.

    Raises:
        UserError: naming the keys of the recipe for which there is none.
    """
    able = [family for family in ABLE if task in family.heads
            and (family.name not in LAST or family.name == came_from)]
    able.sort(key=lambda family: family.name != came_from)
    misfits = {family.name: family.misfits(config, task, options) for family in able}
    for family in able:
        if not misfits[family.name]:
            return family
    name, wanted = min(misfits.items(), key=lambda pair: len(pair[1]))
    told = [(key, _shown(ours), _shown(theirs)) for key, (ours, theirs) in wanted.items()]
    en = "; ".join(f"{key} is {ours}, not {theirs}" for key, ours, theirs in told)
    zh = "；".join(f"{key} 是 {ours}，应为 {theirs}" for key, ours, theirs in told)
    raise UserError(tr(
        f"no class of transformers computes this model. The nearest, {NAMES[name]}, would need another recipe: {en}",
        f"transformers 中没有与该模型计算方式相同的类。最接近的 {NAMES[name]} 需要不同的配方：{zh}"))


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def class_name(family: Family, task: str) -> str:
    """Such as ``BertForMaskedLM``."""
    if family.architectures:
        return family.architectures[0]
    return "GPT2LMHeadModel" if family.name == "gpt2" else NAMES[family.name] + CLASSES[task]


def outward(
    family: Family, config: TransformerConfig, task: str, ours: Mapping[str, Tensor], tied: bool,
    options: Options = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Theirs of ours: the tensors under the family's names, and the part of config.json that fixes the shape.

    Args:
        ours: every tensor of the model.
        tied: the output shares the embedding: it is written once.
        options: as `choose`.
    """
    given = {name: tensor.detach().cpu().float() for name, tensor in ours.items()}
    config = family.fill(config, given)
    found: dict[str, Tensor] = {}
    for piece in family.body(config, options):
        cut = piece.cut(given[piece.ours], sizes(piece, config))
        found |= {f"{family.prefix}{name}": tensor for name, tensor in cut.items()}
    for piece in () if tied and family.causal else family.heads[task]:
        found |= piece.cut(given[piece.ours], [0])
    if family.name == "bert":  # its pooler is a part of the body
        found = {f"bert.{name}" if name.startswith("pooler.") else name: tensor for name, tensor in found.items()}
    shape = {"model_type": family.model_types[0], "architectures": [class_name(family, task)], **family.write(config),
             **family.write_options(options)}
    if family.causal:
        shape["tie_word_embeddings"] = tied
    return found, shape
