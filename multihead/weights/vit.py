"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021): pictures as patches, a class token, learned positions.

DeiT without distillation is a ViT, and its folders say so. Distilled, it has a second token in front: beside the class
token alone it is one more register; where both answer, their logits are averaged (``…WithTeacher``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multihead.transformer.config import TransformerConfig
from multihead.transformer.patches import PatchInput
from multihead.weights.bert import ACTIVATIONS, read_shape, write_shape
from multihead.weights.names import Family, Given, Piece, linear

LAYOUT = {
    "norm": "layernorm", "norm_position": "before", "positions": "learned", "bias": True, "embedding_norm": False,
    "segments": 0, "qk_norm": False, "ngrams": (), "conv_kernel": 0,
}
MOST_PATCH, MOST_SIZE = 64, 1024


def read(given: Given) -> dict[str, Any]:
    given.only("qkv_bias", (True,), True)
    return read_shape(given)


def write(config: TransformerConfig) -> dict[str, Any]:
    return {**write_shape(config), "qkv_bias": True}


def read_options(given: Given) -> dict[str, Any]:
    """Side of the pictures and of a patch, and their channels."""
    side, patch = _side(given, "image_size", 224), _side(given, "patch_size", 16)
    if not (patch <= MOST_PATCH and 4 <= side <= MOST_SIZE and side % patch == 0):
        given.fault(f"image_size is {side} and patch_size {patch}; patches up to {MOST_PATCH} that divide a side of 4 "
                    f"to {MOST_SIZE} are read",
                    f"image_size 是 {side}，patch_size 是 {patch}；patch_size 至多 {MOST_PATCH}，且须整除 4 到 "
                    f"{MOST_SIZE} 之间的 image_size")
    return {"size": side, "patch": patch, "channels": given.only("num_channels", (1, 3), 3)}


def _side(given: Given, key: str, default: int) -> int:
    value = given.get(key, default)
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return value if type(value) is int and value > 0 else given.number(key)


def write_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_size": options["size"], "patch_size": options["patch"], "num_channels": options["channels"],
            "encoder_stride": options["patch"]}


def entry(config: TransformerConfig, vocab_size: int, options: Mapping[str, Any]) -> PatchInput:
    extra = front(options)
    return PatchInput(config, options["channels"], options["size"], options["patch"], "linear", extra)


def front(options: Mapping[str, Any]) -> int:
    """Vectors in front of the patches."""
    return int(options["registers"]) + {"class": 1, "distilled": 2}.get(options["pool"], 0)


def body(config: TransformerConfig, options: Mapping[str, Any], tokens: tuple[str, ...]) -> list[Piece]:
    channels, patch, side = (int(options.get(key, 1)) for key in ("channels", "patch", "size"))
    width, token, rows = config.d_model, (1, 1, config.d_model), len(tokens) + (side // patch) ** 2
    patched = "embeddings.patch_embeddings.projection"
    found = [
        Piece("input.linear.weight", (f"{patched}.weight",), axes=(width, channels, patch, patch)),
        Piece("input.linear.bias", (f"{patched}.bias",)),
        Piece("input.front", tuple(f"embeddings.{name}" for name in tokens), axes=token),
        Piece("input.position", ("embeddings.position_embeddings",), axes=(1, rows, width)),
        *linear("trunk.norm", "layernorm"),
    ]
    for i in range(config.num_layers):
        a, b = f"encoder.layer.{i}.", f"trunk.blocks.{i}."
        found += [
            *linear(f"{b}attention_norm", f"{a}layernorm_before"),
            *linear(f"{b}attention.qkv", *(f"{a}attention.attention.{x}" for x in ("query", "key", "value"))),
            *linear(f"{b}attention.out", f"{a}attention.output.dense"),
            *linear(f"{b}feed_forward_norm", f"{a}layernorm_after"),
            *linear(f"{b}feed_forward.up", f"{a}intermediate.dense"),
            *linear(f"{b}feed_forward.down", f"{a}output.dense"),
        ]
    return found


def family(name: str, kind: str, pool: str, registers: int, tokens: tuple[str, ...], *head: Piece,
           architectures: tuple[str, ...] = ()) -> Family:
    return Family(
        name, (kind,), False, f"{kind}.", read, write, LAYOUT, lambda config, options: body(config, options, tokens),
        heads={"image-classification": head}, square=True, activations=tuple(ACTIVATIONS), reads="pictures",
        ignored=r"embeddings\.mask_token", architectures=architectures, entry=entry,
        options={"stem": "linear", "pool": pool, "registers": registers},
        read_options=read_options, write_options=write_options,
    )


BOTH = ("cls_token", "distillation_token")
VIT = family("vit", "vit", "class", 0, ("cls_token",), *linear("head.linear", "classifier"))
DEIT = family("deit", "deit", "class", 1, BOTH, *linear("head.linear", "classifier"))
DISTILLED = family("deit-distilled", "deit", "distilled", 0, BOTH, *linear("head.linear", "cls_classifier"),
                   *linear("head.distilled", "distillation_classifier"),
                   architectures=("DeiTForImageClassificationWithTeacher",))
