"""Llama (Touvron et al. 2023, Dubey et al. 2024) and Qwen2 and Qwen3 (Yang et al. 2024, 2025): RMSNorm in front, rotary
positions, SwiGLU. Qwen2 has biases on queries, keys and values; Qwen3 norms them instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from multihead.transformer.config import TransformerConfig
from multihead.weights.names import Family, Given, Options, Piece, linear

LAYOUT = {
    "norm": "rmsnorm", "norm_position": "before", "positions": "rotary", "embedding_norm": False,
    "segments": 0, "ngrams": (),
}


def read(given: Given) -> dict[str, Any]:
    given.only("hidden_act", ("silu", "swish"), "silu")
    given.only("use_sliding_window", (False,), False)
    given.only("partial_rotary_factor", (1, 1.0), 1.0)
    for kind in given.get("layer_types", []):
        if kind != "full_attention":
            given.fault(f"layer_types holds {kind!r}; this Transformer does only: full_attention",
                        f"layer_types 中有 {kind!r}；这里的 Transformer 只支持：full_attention")
            break
    theta, stretched = rope(given)
    heads = given.number("num_attention_heads")
    width = given.number("hidden_size")
    return {
        "d_model": width,
        "num_layers": given.number("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": given.number("num_key_value_heads", heads),
        "d_head": given.number("head_dim", max(1, width // heads)),
        "d_ff": given.number("intermediate_size"),
        "norm_eps": given.real("rms_norm_eps", 1e-6),
        "max_length": given.number("max_position_embeddings"),
        "rope_theta": theta,
        "rope_llama3": stretched,
    }


def rope(given: Given) -> tuple[float, tuple[float, float, float, float] | None]:
    """The base of the angles, and how they are stretched; config.json says it in two ways."""
    key = "rope_parameters" if isinstance(given.get("rope_parameters"), dict) else "rope_scaling"
    held = given.get(key, {})
    held = held if isinstance(held, dict) else {"rope_type": held}
    theta = Given({"rope_theta": held.get("rope_theta", given.get("rope_theta"))}, given.where)
    base = theta.real("rope_theta", 10000.0)
    given.problems += theta.problems
    kind = held.get("rope_type", held.get("type", "default"))
    if kind in (None, "default"):
        return base, None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = [float(n) for n in map(held.get, names) if isinstance(n, (int, float)) and n > 0]
    if kind != "llama3" or len(numbers) != len(names) or numbers[1] >= numbers[2]:
        given.fault(f"{key} is {held}; this Transformer does only: default, llama3 (with {', '.join(names)})",
                    f"{key} 是 {held}；这里的 Transformer 只支持：default、llama3（须有 {'、'.join(names)}）")
        return base, None
    factor, low, high, former = numbers
    return base, (factor, low, high, former)


def read_llama(given: Given) -> dict[str, Any]:
    given.only("sliding_window", (None,))
    bias = bool(given.get("attention_bias", False))
    given.only("mlp_bias", (bias,), False)
    return {**read(given), "bias": bias, "qkv_bias": False, "qk_norm": False}


def read_qwen2(given: Given) -> dict[str, Any]:
    return {**read(given), "bias": False, "qkv_bias": True, "qk_norm": False}


def read_qwen3(given: Given) -> dict[str, Any]:
    given.only("attention_bias", (False,), False)
    return {**read(given), "bias": False, "qkv_bias": False, "qk_norm": True}


def write(config: TransformerConfig) -> dict[str, Any]:
    found = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ff_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "attention_dropout": 0.0,
    }
    if config.rope_llama3 is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = dict(zip(names, config.rope_llama3, strict=True))
        found["rope_scaling"] = {"rope_type": "llama3", **scaling, names[3]: int(scaling[names[3]])}
    return found


def write_llama(config: TransformerConfig) -> dict[str, Any]:
    return {**write(config), "attention_bias": config.bias, "mlp_bias": config.bias}


def body(config: TransformerConfig, options: Options) -> list[Piece]:
    found = [Piece("input.token.weight", ("embed_tokens.weight",)), Piece("trunk.norm.weight", ("norm.weight",))]
    for i in range(config.num_layers):
        a, b = f"layers.{i}.", f"trunk.blocks.{i}."
        qkv = (f"{a}self_attn.{x}_proj" for x in "qkv")
        found += [
            *linear(f"{b}attention_norm", f"{a}input_layernorm", bias=False),
            *linear(f"{b}attention.qkv", *qkv, bias=config.bias or config.qkv_bias),
            *linear(f"{b}attention.out", f"{a}self_attn.o_proj", bias=config.bias),
            *linear(f"{b}feed_forward_norm", f"{a}post_attention_layernorm", bias=False),
            *linear(f"{b}feed_forward.up", f"{a}mlp.gate_proj", f"{a}mlp.up_proj", bias=config.bias),
            *linear(f"{b}feed_forward.down", f"{a}mlp.down_proj", bias=config.bias),
        ]
        if config.qk_norm:
            for x in "qk":
                found += linear(f"{b}attention.{x}_norm", f"{a}self_attn.{x}_norm", bias=False)
    return found


def family(
    name: str,
    reads: Callable[[Given], dict[str, Any]],
    writes: Callable[[TransformerConfig], dict[str, Any]],
    **layout: bool,
) -> Family:
    return Family(
        name, (name,), True, "model.", reads, writes, {**LAYOUT, "activation": "swiglu", **layout}, body,
        heads={"text-generation": (Piece("head.linear.weight", ("lm_head.weight",)),)},
        ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", tied=False,
    )


LLAMA = family("llama", read_llama, write_llama, qkv_bias=False, qk_norm=False)
QWEN2 = family("qwen2", read_qwen2, write, bias=False, qkv_bias=True, qk_norm=False)
QWEN3 = family("qwen3", read_qwen3, write, bias=False, qkv_bias=False, qk_norm=True)
