"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): the original block, post-norm, with learned positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from multihead.transformer.config import TransformerConfig
from multihead.weights.names import Family, Given, Options, Piece, Tensors, linear

LAYOUT = {
    "norm": "layernorm", "norm_position": "after", "positions": "learned", "bias": True, "embedding_norm": True,
    "qk_norm": False, "ngrams": (), "conv_kernel": 0,
}
UNREAD = 2  # RoBERTa counts positions from padding_idx + 1
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def read_shape(given: Given) -> dict[str, Any]:
    """The sizes that every encoder of this kind names alike, of texts or of patches."""
    return {
        "d_model": given.number("hidden_size"),
        "num_layers": given.number("num_hidden_layers"),
        "num_heads": given.number("num_attention_heads"),
        "d_ff": given.number("intermediate_size"),
        "activation": given.activation("hidden_act", "gelu"),
        "norm_eps": given.real("layer_norm_eps", 1e-12),
    }


def write_shape(config: TransformerConfig) -> dict[str, Any]:
    """The other way round."""
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ff_size,
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def read(given: Given) -> dict[str, Any]:
    given.only("position_embedding_type", ("absolute",), "absolute")
    given.only("is_decoder", (False,), False)
    given.only("add_cross_attention", (False,), False)
    return {
        **read_shape(given),
        "max_length": given.number("max_position_embeddings"),
        "segments": given.number("type_vocab_size", 2),
    }


def read_roberta(given: Given) -> dict[str, Any]:
    given.only("pad_token_id", (UNREAD - 1,), UNREAD - 1)
    found = read(given)
    return {**found, "max_length": max(1, found["max_length"] - UNREAD)}


def write(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shape(config),
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.segments,
        "tie_word_embeddings": True,
    }


def write_roberta(config: TransformerConfig) -> dict[str, Any]:
    return {**write(config), "max_position_embeddings": config.max_length + UNREAD}


def body(config: TransformerConfig, options: Options, skip: int = 0) -> list[Piece]:
    found = [
        Piece("input.token.weight", ("embeddings.word_embeddings.weight",)),
        Piece("input.position.weight", ("embeddings.position_embeddings.weight",), skip=skip),
        Piece("input.segment.weight", ("embeddings.token_type_embeddings.weight",)),
        *linear("input.norm", "embeddings.LayerNorm"),
    ]
    for i in range(config.num_layers):
        a, b = f"encoder.layer.{i}.", f"trunk.blocks.{i}."
        found += [
            *linear(f"{b}attention.qkv", *(f"{a}attention.self.{x}" for x in ("query", "key", "value"))),
            *linear(f"{b}attention.out", f"{a}attention.output.dense"),
            *linear(f"{b}attention_norm", f"{a}attention.output.LayerNorm"),
            *linear(f"{b}feed_forward.up", f"{a}intermediate.dense"),
            *linear(f"{b}feed_forward.down", f"{a}output.dense"),
            *linear(f"{b}feed_forward_norm", f"{a}output.LayerNorm"),
        ]
    return found


def fill(config: TransformerConfig, given: Tensors) -> TransformerConfig:
    """Theirs has at least one kind of segment: without any, two kinds that add nothing."""
    if config.segments:
        return config
    given["input.segment.weight"] = torch.zeros(2, config.d_model)
    return replace(config, segments=2)


BERT = Family(
    "bert", ("bert",), False, "bert.", read, write, LAYOUT, body, square=True, activations=tuple(ACTIVATIONS),
    heads={
        "fill-mask": (
            *linear("head.dense", "cls.predictions.transform.dense"),
            *linear("head.norm", "cls.predictions.transform.LayerNorm"),
            Piece("head.decoder.bias", ("cls.predictions.bias",)),
        ),
        "text-classification": (*linear("head.pooler", "pooler.dense"), *linear("head.linear", "classifier")),
        "question-answering": tuple(linear("head", "qa_outputs")),
    },
    head_layout={"fill-mask": {"activation": "gelu"}},  # theirs has the trunk's activation, ours is GELU
    ignored=r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|cls\.seq_relationship\.(weight|bias)",
    fill=fill, renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)

ROBERTA = Family(
    "roberta", ("roberta", "xlm-roberta", "camembert"), False, "roberta.", read_roberta, write_roberta, LAYOUT,
    lambda config, options: body(config, options, UNREAD), square=True, activations=tuple(ACTIVATIONS),
    heads={
        "fill-mask": (
            *linear("head.dense", "lm_head.dense"),
            *linear("head.norm", "lm_head.layer_norm"),
            Piece("head.decoder.bias", ("lm_head.bias",)),
        ),
        "text-classification": (
            *linear("head.pooler", "classifier.dense"), *linear("head.linear", "classifier.out_proj"),
        ),
        "question-answering": tuple(linear("head", "qa_outputs")),
    },
    ignored=r"embeddings\.position_ids|lm_head\.decoder\.(weight|bias)|pooler\.dense\.(weight|bias)",
    fill=fill, renamed=BERT.renamed,
)
