"""Pegasus (Zhang et al. 2020), out only: the class of transformers whose encoder–decoder is ours. LayerNorm in front,
sinusoidal positions on embeddings times √d_model, and one table for source, target and output."""

from __future__ import annotations

from typing import Any

import torch

from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import sinusoids
from multihead.weights.bert import ACTIVATIONS
from multihead.weights.names import Family, Options, Piece, Tensors, linear

LAYOUT = {
    "norm": "layernorm", "norm_position": "before", "positions": "sinusoidal", "bias": True, "norm_eps": 1e-5,
    "embedding_norm": False, "segments": 0, "qk_norm": False, "ngrams": (), "conv_kernel": 0,
}


def write(config: TransformerConfig) -> dict[str, Any]:
    sides: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": config.num_layers, f"{side}_attention_heads": config.num_heads,
                  f"{side}_ffn_dim": config.ff_size}
    return {
        "d_model": config.d_model,
        **sides,
        "activation_function": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_length,
        "scale_embedding": True,
        "is_encoder_decoder": True,
        "forced_eos_token_id": None,
        "dropout": config.dropout,
        "tie_word_embeddings": True,
    }


def fill(config: TransformerConfig, given: Tensors) -> TransformerConfig:
    """Positions, which we compute, and a bias of the output, which we have none of."""
    given["positions"] = sinusoids(config.max_length, config.d_model)
    given["bias"] = torch.zeros(1, len(given["source.token.weight"]))
    return config


def body(config: TransformerConfig, options: Options) -> list[Piece]:
    found = [Piece("source.token.weight", ("shared.weight",))]
    for side in ("encoder", "decoder"):
        found.append(Piece("positions", (f"{side}.embed_positions.weight",)))
        found += linear(f"{side}.norm", f"{side}.layer_norm")
        for i in range(config.num_layers):
            a, b = f"{side}.layers.{i}.", f"{side}.blocks.{i}."
            found += [
                *linear(f"{b}attention_norm", f"{a}self_attn_layer_norm"),
                *linear(f"{b}attention.qkv", *(f"{a}self_attn.{x}_proj" for x in "qkv")),
                *linear(f"{b}attention.out", f"{a}self_attn.out_proj"),
                *linear(f"{b}feed_forward_norm", f"{a}final_layer_norm"),
                *linear(f"{b}feed_forward.up", f"{a}fc1"),
                *linear(f"{b}feed_forward.down", f"{a}fc2"),
            ]
            if side == "decoder":
                found += [
                    *linear(f"{b}cross_norm", f"{a}encoder_attn_layer_norm"),
                    *linear(f"{b}cross.q", f"{a}encoder_attn.q_proj"),
                    *linear(f"{b}cross.kv", *(f"{a}encoder_attn.{x}_proj" for x in "kv")),
                    *linear(f"{b}cross.out", f"{a}encoder_attn.out_proj"),
                ]
    return found


PEGASUS = Family(
    "pegasus", ("pegasus",), False, "model.", lambda given: {}, write, LAYOUT, body, square=True,
    activations=tuple(ACTIVATIONS), heads={"translation": (Piece("bias", ("final_logits_bias",)),)}, fill=fill,
)
