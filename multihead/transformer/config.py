"""The numbers that fix a Transformer's shape. No torch here, so a recipe can be checked before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TRAINING_ONLY = ("dropout", "drop_path")
"""Fields that weights do not depend on: a model trained with one value runs with any other."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of one Transformer: the recipe's ``model:`` section.

    The defaults are the plain modern block: RMSNorm before each part, rotary positions, SwiGLU, no biases. The block of
    "Attention Is All You Need" (Vaswani et al. 2017, section 3) is ``norm: layernorm, norm_position: after,
    activation: relu, positions: sinusoidal, bias: true``.
    """

    d_model: int = 256
    """Width of the vectors that flow through the trunk."""
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads; fewer than `num_heads` is grouped-query attention (Ainslie et al. 2023). None: num_heads."""
    d_head: int | None = None
    """Width of one head. None: d_model / num_heads."""
    d_ff: int | None = None
    """Inner width of the feed-forward part. None: 4·d_model, or 8/3·d_model to the next 32 for swiglu."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2"] = "swiglu"
    """gelu_tanh: GELU by its tanh formula (Hendrycks & Gimpel 2016, section 2), as in GPT-2."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["before", "after"] = "before"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    """RMSNorm on queries and keys per head before the rotation (as in Qwen3)."""
    rope_llama3: tuple[float, float, float, float] | None = None
    """Rotary angles stretched for long texts as in Llama 3.1: factor, low and high frequency factor, former length."""
    bias: bool = False
    """Biases on every linear map of the trunk."""
    qkv_bias: bool = False
    """Biases on queries, keys and values, even where the other maps have none (Qwen2)."""
    embedding_norm: bool = False
    """A norm on the sum of all embeddings, before the trunk (BERT)."""
    segments: int = 0
    """Kinds of segments that have an embedding, such as 2 for question and passage (BERT); 0: none."""
    max_length: int = 1024
    """Longest sequence: size of the learned, sinusoidal and rotary tables."""
    dropout: float = 0.0
    drop_path: float = 0.0
    """Share of examples that skip a residual branch of the last block in training; a straight line from 0 leads there
    (stochastic depth, Huang et al. 2016, section 3, by example)."""
    conv_kernel: int = 0
    """Positions that the convolution module of each block spans (Conformer, Gulati et al. 2020), in trunks that look
    both ways; of patches, so many along either side; an odd number, 0 for none."""
    ngrams: tuple[int, ...] = ()
    """Orders n whose hashed n-gram embeddings are added to the token embedding (Pagnoni et al. 2024, section 3.2.1)."""
    ngram_buckets: int = 16384
    """Rows of each n-gram table."""

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.num_heads

    @property
    def ff_size(self) -> int:
        if self.d_ff:
            return self.d_ff
        return -(-self.d_model * 8 // 3 // 32) * 32 if self.activation == "swiglu" else 4 * self.d_model

    def faults(self) -> list[tuple[str, str, str]]:
        """What cannot be built: (key, message in English, message in Chinese), empty where all is well."""
        found: list[tuple[str, str, str]] = []
        for key in (
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "d_head",
            "d_ff",
            "max_length",
            "ngram_buckets",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append((key, f"{key} is {value}; it must be at least 1", f"{key} 是 {value}，至少要为 1"))
        if found:
            return found
        if self.d_head is None and self.d_model % self.num_heads:
            found.append(
                (
                    "num_heads",
                    f"num_heads is {self.num_heads}, which does not divide d_model {self.d_model}",
                    f"num_heads 是 {self.num_heads}，不能整除 d_model {self.d_model}",
                )
            )
        if self.num_heads % self.kv_heads:
            found.append(
                (
                    "num_kv_heads",
                    f"num_kv_heads is {self.kv_heads}, which does not divide num_heads {self.num_heads}",
                    f"num_kv_heads 是 {self.kv_heads}，不能整除 num_heads {self.num_heads}",
                )
            )
        if self.positions == "rotary" and self.head_size % 2:
            found.append(
                (
                    "d_head",
                    f"rotary positions turn pairs, so the head width must be even; it is {self.head_size}",
                    f"rotary 位置编码按成对的维度旋转，每个头的宽度必须是偶数；现在是 {self.head_size}",
                )
            )
        if self.segments < 0:
            found.append(
                (
                    "segments",
                    f"segments is {self.segments}; it must be at least 0",
                    f"segments 是 {self.segments}，至少要为 0",
                )
            )
        for key in TRAINING_ONLY:
            share = getattr(self, key)
            if not 0.0 <= share < 1.0:
                found.append(
                    (key, f"{key} is {share}; it must lie in [0, 1)", f"{key} 是 {share}，应在 [0, 1) 之间")
                )
        if self.conv_kernel < 0 or (self.conv_kernel and self.conv_kernel % 2 == 0):
            found.append(
                (
                    "conv_kernel",
                    f"conv_kernel is {self.conv_kernel}; it must be odd, or 0 for none",
                    f"conv_kernel 是 {self.conv_kernel}，应为奇数，或 0 表示不用",
                )
            )
        if any(n < 2 or n > 8 for n in self.ngrams):
            found.append(
                (
                    "ngrams",
                    f"ngrams is {list(self.ngrams)}; each order must be 2 to 8",
                    f"ngrams 是 {list(self.ngrams)}，每一阶应为 2 到 8",
                )
            )
        return found
