"""Whisper (Radford et al. 2022): an encoder of log-mel frames and a decoder that writes after a prompt of own tokens.

Keys have no bias there. Ours has one, which no softmax can tell from 0: it is 0 on the way in and left out on the way
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput
from multihead.transformer.sounds import BandInput
from multihead.transformer.trunk import Trunk
from multihead.weights.bert import ACTIVATIONS
from multihead.weights.names import Family, Given, Options, Piece, Shape, Tensors, linear

LAYOUT = {
    "norm": "layernorm", "norm_position": "before", "positions": "learned", "bias": True, "norm_eps": 1e-5,
    "embedding_norm": False, "segments": 0, "qk_norm": False, "ngrams": (), "conv_kernel": 0,
}
MOST_POSITIONS, MOST_TEXT = 1500, 1 << 12
"""30 seconds, as every Whisper has them; no decoder known writes more than 448 tokens."""


class Keyless(Piece):
    """Biases of queries and values, or of values alone, where ours has one for keys too."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        *queries, value = (part.float() for part in parts)
        return torch.cat([*queries, torch.zeros_like(value), value])

    def cut(self, whole: Tensor, sizes: Sequence[int]) -> Tensors:
        *queries, _, value = whole.chunk(len(self.theirs) + 1)
        return {name: part.contiguous() for name, part in zip(self.theirs, (*queries, value), strict=True)}

    def shapes(self, ours: Shape, sizes: Sequence[int]) -> dict[str, Shape]:
        return dict.fromkeys(self.theirs, (ours[0] // (len(self.theirs) + 1),))


def read(given: Given) -> dict[str, Any]:
    heads, inner = given.number("encoder_attention_heads"), given.number("encoder_ffn_dim")
    given.only("decoder_attention_heads", (heads,))
    given.only("decoder_ffn_dim", (inner,))
    given.only("scale_embedding", (False,), False)
    given.only("tie_word_embeddings", (True,), True)
    positions = given.number("max_source_positions", MOST_POSITIONS)
    if positions > MOST_POSITIONS:
        given.fault(f"max_source_positions is {positions}; up to {MOST_POSITIONS} (30 s) are read",
                    f"max_source_positions 是 {positions}；至多 {MOST_POSITIONS}（30 秒）")
    return {
        "d_model": given.number("d_model"),
        "num_layers": given.number("encoder_layers"),
        "num_heads": heads,
        "d_ff": inner,
        "activation": given.activation("activation_function", "gelu"),
        "max_length": positions,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "d_model": config.d_model,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.ff_size,
        "decoder_ffn_dim": config.ff_size,
        "activation_function": ACTIVATIONS[config.activation],
        "max_source_positions": config.max_length,
        "scale_embedding": False,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "dropout": config.dropout,
    }


def read_options(given: Given) -> dict[str, Any]:
    """Bands of the spectrogram, blocks of the decoder, and the most tokens of a text."""
    mels, layers = given.number("num_mel_bins", 80), given.number("decoder_layers")
    text = given.number("max_target_positions", 448)
    if not 16 <= mels <= 128 or text > MOST_TEXT or layers > 1024:
        given.fault(f"num_mel_bins is {mels}, max_target_positions {text}, decoder_layers {layers}; read are 16 to "
                    f"128, and at most {MOST_TEXT} and 1024",
                    f"num_mel_bins、max_target_positions、decoder_layers 是 {mels}、{text}、{layers}；可读取的是 "
                    f"16 到 128、至多 {MOST_TEXT}、至多 1024")
        mels, layers, text = 80, 1, 448
    return {"mels": mels, "decoder_layers": layers, "text_length": text}


def write_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_mel_bins": options["mels"], "decoder_layers": options["decoder_layers"],
            "max_target_positions": options["text_length"]}


def writing(config: TransformerConfig, options: Options) -> TransformerConfig:
    """The shape of the decoder."""
    return replace(config, num_layers=int(options["decoder_layers"]), max_length=int(options["text_length"]))


def parts(config: TransformerConfig, vocab_size: int, options: Options) -> dict[str, nn.Module]:
    decoder = writing(config, options)
    return {"input": BandInput(config, int(options["mels"])), "encoder": Trunk(config),
            "target": TokenInput(decoder, vocab_size), "decoder": Trunk(decoder, causal=True, cross_attention=True)}


def body(config: TransformerConfig, options: Options) -> list[Piece]:
    found = [
        *linear("input.first", "encoder.conv1"),
        *linear("input.second", "encoder.conv2"),
        Piece("input.position.weight", ("encoder.embed_positions.weight",)),
        Piece("target.token.weight", ("decoder.embed_tokens.weight",)),
        Piece("target.position.weight", ("decoder.embed_positions.weight",)),
    ]
    for side, layers in (("encoder", config.num_layers), ("decoder", int(options["decoder_layers"]))):
        found += linear(f"{side}.norm", f"{side}.layer_norm")
        for i in range(layers):
            a, b = f"{side}.layers.{i}.", f"{side}.blocks.{i}."
            found += [
                *linear(f"{b}attention_norm", f"{a}self_attn_layer_norm"),
                Piece(f"{b}attention.qkv.weight", tuple(f"{a}self_attn.{x}_proj.weight" for x in "qkv")),
                Keyless(f"{b}attention.qkv.bias", tuple(f"{a}self_attn.{x}_proj.bias" for x in "qv")),
                *linear(f"{b}attention.out", f"{a}self_attn.out_proj"),
                *linear(f"{b}feed_forward_norm", f"{a}final_layer_norm"),
                *linear(f"{b}feed_forward.up", f"{a}fc1"),
                *linear(f"{b}feed_forward.down", f"{a}fc2"),
            ]
            if side == "decoder":
                found += [
                    *linear(f"{b}cross_norm", f"{a}encoder_attn_layer_norm"),
                    *linear(f"{b}cross.q", f"{a}encoder_attn.q_proj"),
                    Piece(f"{b}cross.kv.weight", tuple(f"{a}encoder_attn.{x}_proj.weight" for x in "kv")),
                    Keyless(f"{b}cross.kv.bias", (f"{a}encoder_attn.v_proj.bias",)),
                    *linear(f"{b}cross.out", f"{a}encoder_attn.out_proj"),
                ]
    return found


WHISPER = Family(
    "whisper", ("whisper",), False, "model.", read, write, LAYOUT, body, heads={"speech-recognition": ()}, square=True,
    activations=tuple(ACTIVATIONS), reads="sound", ignored=r"proj_out\.weight",
    options={"front": "whisper", "ctc_weight": 0.0}, read_options=read_options, write_options=write_options,
    parts=parts,
)
