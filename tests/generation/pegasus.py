"""Our encoder–decoder as transformers' Pegasus, which has the same block (LayerNorm in front, sinusoidal positions)."""

from __future__ import annotations

from typing import Any

import torch

from multihead.generation.seq2seq import EncoderDecoder


def pegasus(model: EncoderDecoder) -> Any:
    """A `PegasusForConditionalGeneration` with the weights of `model`.

    `model` has ``norm: layernorm, norm_position: before, positions: sinusoidal, bias: true``, an activation that both
    know and one table for everything.
    """
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    c, layers = model.config, len(model.decoder.blocks)
    peer = PegasusForConditionalGeneration(PegasusConfig(
        vocab_size=model.vocab_size, max_position_embeddings=c.max_length, d_model=c.d_model,
        encoder_layers=c.num_layers, decoder_layers=layers, encoder_ffn_dim=c.ff_size, decoder_ffn_dim=c.ff_size,
        encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads, activation_function=c.activation,
        scale_embedding=True, pad_token_id=model.pad, eos_token_id=model.eos, bos_token_id=model.bos,
        decoder_start_token_id=model.bos, forced_eos_token_id=None,
    )).eval()  # fmt: skip
    ours, theirs = model.state_dict(), {}
    table = ours["source.token.weight"]
    assert model.source.sinusoids_TD is not None
    for side in ("encoder", "decoder"):
        theirs[f"model.{side}.embed_tokens.weight"] = table
        theirs[f"model.{side}.embed_positions.weight"] = model.source.sinusoids_TD
        names = {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "feed_forward_norm",
                 "fc1": "feed_forward.up", "fc2": "feed_forward.down", "self_attn.out_proj": "attention.out"}
        if side == "decoder":
            names |= {"encoder_attn_layer_norm": "cross_norm", "encoder_attn.out_proj": "cross.out"}
            names |= {"encoder_attn.q_proj": "cross.q"}
        for kind in ("weight", "bias"):
            theirs[f"model.{side}.layer_norm.{kind}"] = ours[f"{side}.norm.{kind}"]
            for i in range(c.num_layers if side == "encoder" else layers):
                at, of = f"model.{side}.layers.{i}", f"{side}.blocks.{i}"
                theirs |= {f"{at}.{a}.{kind}": ours[f"{of}.{b}.{kind}"] for a, b in names.items()}
                for x, part in zip("qkv", ours[f"{of}.attention.qkv.{kind}"].chunk(3), strict=True):
                    theirs[f"{at}.self_attn.{x}_proj.{kind}"] = part
                if side == "decoder":
                    for x, part in zip("kv", ours[f"{of}.cross.kv.{kind}"].chunk(2), strict=True):
                        theirs[f"{at}.encoder_attn.{x}_proj.{kind}"] = part
    theirs |= {"model.shared.weight": table, "lm_head.weight": table}
    theirs["final_logits_bias"] = torch.zeros(1, model.vocab_size)
    peer.load_state_dict(theirs)
    peer.generation_config.max_length = None
    return peer
