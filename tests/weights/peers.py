"""Models of the library transformers with random weights, written as the folders people download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

TEXTS = 20 * ["The room was clean, and breakfast didn't disappoint.", "房间很干净，服务也好。", "Hello! 早上好 😀"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 70,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 70}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama tied, wide heads": ("Llama", {**SIZES, "tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "llama with biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": False}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SIZES, "type_vocab_size": 3}),
    "bert with tanh gelu": ("Bert", {**SIZES, "hidden_act": "gelu_new"}),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
}


def word_piece() -> Tokenizer:
    """BERT's kind: lower case, pieces of words, [CLS] … [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


def byte_level(special: list[str], prefix: bool = False) -> Tokenizer:
    """GPT-2's kind: pairs of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def robertas() -> Tokenizer:
    """RoBERTa's kind: bytes, <s> a </s></s> b </s>, and a mask that takes the blank before it."""
    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram() -> Tokenizer:
    """T5's and Llama 2's kind: blanks as ▁, unknown bytes as <0x..>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = ["▁The", "▁room", "▁was", "▁clean", "▁Hello", "房间", "很", *"▁abcdefghilmnorstuw"]
    vocabulary = [(name, -20.0) for name in names] + [(piece, -float(len(names) - i)) for i, piece in enumerate(pieces)]
    tokenizer.model = models.Unigram(vocabulary, unk_id=2, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1",
                                                             special_tokens=[("<s>", 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    """XLM-RoBERTa's kind: blanks as ▁ by the pre-tokenizer, no bytes to fall back on."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁The", "▁room", "▁was", "▁", "房间", "很", *"abcdefghilmnorstuwTCL,"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i) / 9) for i, word in enumerate(words)], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def peer(kind: str, head: str, **shape: Any) -> Any:
    """``transformers.<kind>For<head>`` (or <kind>Model) with weights that leave nothing at 0 or 1."""
    import transformers

    torch.manual_seed(0)
    name = f"{kind}{head}" if head == "Model" else f"{kind}For{head}" if kind != "GPT2" else f"GPT2{head}"
    ids = {"bos_token_id": None, "eos_token_id": None} if kind not in ("Bert", "Roberta") else {}
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": 99, **ids, **shape})
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(parameter.detach().mean() > 0.5), 0.3)
        else:
            nn.init.normal_(parameter, std=0.15)
    return model


def causal(name: str, **more: Any) -> Any:
    """A language model of the row `name` of `CAUSAL`."""
    kind, shape = CAUSAL[name]
    return peer(kind, "LMHeadModel" if kind == "GPT2" else "CausalLM", **{**shape, **more})


def write(folder: Path, model: Any, tokenizer: Tokenizer | None = None, **settings: Any) -> Path:
    """The folder that ``save_pretrained`` writes, with a tokenizer where one is given."""
    import json

    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
