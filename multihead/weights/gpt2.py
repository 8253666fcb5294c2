"""GPT-2 (Radford et al. 2019): LayerNorm in front, learned positions, the tanh form of GELU, weights as (in, out)."""

from __future__ import annotations

from typing import Any

from multihead.transformer.config import TransformerConfig
from multihead.weights.bert import ACTIVATIONS
from multihead.weights.names import Family, Given, Options, Piece, linear

LAYOUT = {
    "norm": "layernorm", "norm_position": "before", "positions": "learned", "bias": True, "embedding_norm": False,
    "segments": 0, "qk_norm": False, "ngrams": (),
}


def read(given: Given) -> dict[str, Any]:
    given.only("scale_attn_weights", (True,), True)
    given.only("scale_attn_by_inverse_layer_idx", (False,), False)
    given.only("add_cross_attention", (False,), False)
    width = given.number("n_embd")
    return {
        "d_model": width,
        "num_layers": given.number("n_layer"),
        "num_heads": given.number("n_head"),
        "d_ff": given.number("n_inner", 4 * width),
        "activation": given.activation("activation_function", "gelu_new"),
        "norm_eps": given.real("layer_norm_epsilon", 1e-5),
        "max_length": given.number("n_positions"),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ff_size,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_length,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def body(config: TransformerConfig, options: Options) -> list[Piece]:
    found = [
        Piece("input.token.weight", ("wte.weight",)),
        Piece("input.position.weight", ("wpe.weight",)),
        *linear("trunk.norm", "ln_f"),
    ]
    for i in range(config.num_layers):
        a, b = f"h.{i}.", f"trunk.blocks.{i}."
        found += [
            *linear(f"{b}attention_norm", f"{a}ln_1"),
            *linear(f"{b}attention.qkv", f"{a}attn.c_attn", transposed=True),
            *linear(f"{b}attention.out", f"{a}attn.c_proj", transposed=True),
            *linear(f"{b}feed_forward_norm", f"{a}ln_2"),
            *linear(f"{b}feed_forward.up", f"{a}mlp.c_fc", transposed=True),
            *linear(f"{b}feed_forward.down", f"{a}mlp.c_proj", transposed=True),
        ]
    return found


GPT2 = Family(
    "gpt2", ("gpt2",), True, "transformer.", read, write, LAYOUT, body, square=True,
    activations=tuple(ACTIVATIONS),
    heads={"text-generation": (Piece("head.linear.weight", ("lm_head.weight",)),)},
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
