"""What LoRA has learned in PEFT's file form, so that it loads over the same weights elsewhere: a folder with
``adapter_config.json`` and ``adapter_model.safetensors`` (https://huggingface.co/docs/peft, "Checkpoint format").

Weights from a Hugging Face folder keep the names of that folder's own class, and a matrix of ours that is several of
theirs laid end to end (queries, keys and values; gate and value) is cut: each gets all of A and its rows of B, which is
exact. Weights of our own keep our names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multihead.codec.foreign import read_json
from multihead.run import write_json
from multihead.runtime import checkpoint
from multihead.transformer.config import TransformerConfig
from multihead.transformer.lora import LoraLinear, adapted
from multihead.weights.names import Piece, sizes
from multihead.weights.origin import CONFIG, FAMILIES

FOLDER = "adapter"


def save(folder: Path, model: nn.Module, origin: Any, config: TransformerConfig, places: Mapping[str, str]) -> None:
    """Write the adapter of `model` into `folder`.

    Args:
        origin: the weights it was trained over.
        config: the model's shape.
        places: what ``trunk`` of the origin is called in `model`.
    """
    table, kind, prefix = _names(origin, config)
    names = {ours: theirs for theirs, ours in places.items()}
    tensors: dict[str, Tensor] = {}
    for name, module in adapted(model):
        part, _, rest = name.partition(".")
        piece = table.get(f"{names.get(part, part)}.{rest}.weight")
        for theirs, b_OR in _cut(f"{names.get(part, part)}.{rest}", module, piece, config):
            tensors[f"base_model.model.{prefix}{theirs}.lora_A.weight"] = module.lora_A.detach().contiguous()
            tensors[f"base_model.model.{prefix}{theirs}.lora_B.weight"] = b_OR.detach().contiguous()
    folder.mkdir(exist_ok=True)
    checkpoint.save_weights(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", _config(model, origin, tensors, table, kind))


def _names(origin: Any, config: TransformerConfig) -> tuple[dict[str, Piece], str, str]:
    """The origin's own names by ours, its class, and what that puts before them."""
    family = next((family for family in FAMILIES if family.name == origin.family), None)
    if family is None:
        return {}, "", ""
    kind = str((read_json(Path(origin.path) / CONFIG).get("architectures") or ["Model"])[0])
    alone = kind.endswith("Model") and not kind.endswith("HeadModel")
    return {piece.ours: piece for piece in family.body(config, {})}, kind, "" if alone else family.prefix


def _cut(
    name: str, module: LoraLinear, piece: Piece | None, config: TransformerConfig
) -> Iterator[tuple[str, Tensor]]:
    """The modules elsewhere that one of ours is, each with its rows of B."""
    if piece is None or len(piece.theirs) == 1:
        yield name if piece is None else piece.theirs[0].removesuffix(".weight"), module.lora_B
        return
    parts = module.lora_B.split(sizes(piece, config))
    for theirs, part in zip(piece.theirs, parts, strict=True):
        yield theirs.removesuffix(".weight"), part


def _config(
    model: nn.Module, origin: Any, tensors: Mapping[str, Tensor], table: Mapping[str, Piece], kind: str
) -> dict[str, Any]:
    module = next(module for _, module in adapted(model))
    rank = len(module.lora_A)
    inside = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": str(origin.path),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(module.scale * rank),
        "lora_dropout": module.drop.p,
        "target_modules": inside,
        "fan_in_fan_out": any(piece.transposed for piece in table.values()),
        "bias": "none",
        "modules_to_save": None,
    }


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-9 else value
