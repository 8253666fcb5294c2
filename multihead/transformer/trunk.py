"""The one Transformer: vectors in, vectors out. It does not know tokens from patches, items or sounds.

Attention is softmax(Q Kᵀ / √d_k) V (Vaswani et al. 2017, section 3.2.1), computed by torch's
``scaled_dot_product_attention``; its slow twin of six lines stands in the tests.

Legend: B batch, T positions that ask, S positions that are looked at, D d_model, H heads, K key/value heads,
E head width, F feed-forward width, X several of these laid end to end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.cache import Cache, Step
from multihead.transformer.config import TransformerConfig
from multihead.transformer.convolution import Convolution
from multihead.transformer.dropout import Dropout
from multihead.transformer.dropout import dropout as random_zeros
from multihead.transformer.feed_forward import FeedForward, mark_split
from multihead.transformer.linear import Linear
from multihead.transformer.rotary import heads_turned, rotary_table, rotate


def make_norm(config: TransformerConfig, size: int | None = None) -> nn.Module:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis."""
    size = size or config.d_model
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Multi-head (or grouped-query) attention over the input itself, or over `memory`."""

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_size
        self.dropout = config.dropout
        q_size, kv_size = self.heads * self.head_size, self.kv_heads * self.head_size
        bias = config.bias or config.qkv_bias
        if cross:
            self.q = Linear(config.d_model, q_size, bias=bias)
            self.kv = Linear(config.d_model, 2 * kv_size, bias=bias)
            mark_split(self.kv, 2)
        else:
            self.qkv = Linear(config.d_model, q_size + 2 * kv_size, bias=bias)
            if q_size == kv_size:
                mark_split(self.qkv, 3)
        self.out = Linear(q_size, config.d_model, bias=config.bias)
        self.q_norm = make_norm(config, self.head_size) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_size) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        angles_BT2E: Tensor | None = None,
        mask_BHTS: Tensor | None = None,
        causal: bool = False,
        cache: tuple[Cache, int, Step] | None = None,
    ) -> Tensor:
        """Self-attention: x (B, T, D) → (B, T, D)."""
        q_BHTE, k_BKSE, v_BKSE = self._heads(x_BTD, angles_BT2E)
        if cache is not None:
            store, layer, step = cache
            k_BKSE, v_BKSE = store.write(layer, k_BKSE, v_BKSE, step)
        return self._attend(q_BHTE, k_BKSE, v_BKSE, mask_BHTS, causal)

    def weights(
        self, x_BTD: Tensor, angles_BT2E: Tensor | None = None, mask_BHTS: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Who looks at whom, softmax(Q Kᵀ / √E), which `forward` never holds: the same arguments → (B, H, T, S)."""
        q_BHTE, k_BKSE, _ = self._heads(x_BTD, angles_BT2E)
        k_BHSE = k_BKSE.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores_BHTS = (q_BHTE @ k_BHSE.mT).float() / math.sqrt(self.head_size)
        if causal:
            mask_BHTS = torch.ones_like(scores_BHTS, dtype=torch.bool).tril()
        if mask_BHTS is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask_BHTS, float("-inf"))
        return scores_BHTS.softmax(-1)

    def _heads(self, x_BTD: Tensor, angles_BT2E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E), keys and values (B, K, S, E) of x, normed and turned."""
        B, T, _ = x_BTD.shape
        qkv_BTXE = self.qkv(x_BTD).view(B, T, self.heads + 2 * self.kv_heads, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE, v_BTKE = qkv_BTXE.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
            if angles_BT2E is not None:
                q_BTHE, k_BTKE = rotate(q_BTHE, angles_BT2E), rotate(k_BTKE, angles_BT2E)
        elif angles_BT2E is not None:
            sizes = (self.heads, self.kv_heads, self.kv_heads)
            q_BTHE, k_BTKE, v_BTKE = heads_turned(qkv_BTXE, angles_BT2E, sizes, kept=1)
        else:
            q_BTHE, k_BTKE, v_BTKE = qkv_BTXE.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        return q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)

    def over(self, x_BTD: Tensor, memory: tuple[Tensor, Tensor], mask_BHTS: Tensor | None) -> Tensor:
        """Cross-attention: x (B, T, D) over the memory's keys and values, each (B, K, S, E) → (B, T, D).

        With fewer memories than rows, each serves as many rows that lie next to each other: the beams of one source are
        so many queries of it.
        """
        B, T, _ = x_BTD.shape
        sources = len(memory[0])
        q_BTHE = self.q(x_BTD).view(sources, B // sources * T, self.heads, self.head_size)
        if self.q_norm is not None:
            q_BTHE = self.q_norm(q_BTHE)
        return self._attend(q_BTHE.transpose(1, 2), *memory, mask_BHTS, causal=False).view(B, T, -1)

    def memory(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory (B, S, D), each (B, K, S, E); worked out once a sequence when decoding."""
        B, S, _ = memory_BSD.shape
        k_BSKE, v_BSKE = self.kv(memory_BSD).view(B, S, 2 * self.kv_heads, self.head_size).chunk(2, dim=2)
        if self.k_norm is not None:
            k_BSKE = self.k_norm(k_BSKE)
        return k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2)

    def _attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        q_BHTE, k_BKSE = q_BHTE.to(v_BKSE.dtype), k_BKSE.to(v_BKSE.dtype)
        dropout = self.dropout if self.training else 0.0
        if plain_is_faster(q_BHTE, k_BKSE) or (dropout and q_BHTE.device.type == "cpu"):  # there torch's is no faster
            y_BHTE = plain_attention(q_BHTE, k_BKSE, v_BKSE, mask, causal, dropout)
        else:
            y_BHTE = F.scaled_dot_product_attention(
                q_BHTE,
                k_BKSE,
                v_BKSE,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                enable_gqa=self.kv_heads != self.heads,
            )
        return self.out(y_BHTE.transpose(1, 2).flatten(2))


def plain_is_faster(q_BHTE: Tensor, k_BKSE: Tensor) -> bool:
    """Whether to train with `plain_attention`. In bfloat16 on CPUs the backward pass of torch's fused kernel takes
    three to six times as long (4,096 tokens in rows of 128, 4 heads of 32: 42 against 12 ms a layer)."""
    on_cpu = q_BHTE.dtype == torch.bfloat16 and q_BHTE.device.type == "cpu"
    return on_cpu and torch.is_grad_enabled() and q_BHTE.shape[2] * k_BKSE.shape[2] <= 512 * 512


def plain_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """softmax(Q Kᵀ / √E) V by matrix products, all B·H·T·S scores in memory: (B, H, T, E)."""
    B, H, T, E = q_BHTE.shape
    S = k_BKSE.shape[2]
    if k_BKSE.shape[1] != H:
        k_BKSE, v_BKSE = (z.repeat_interleave(H // z.shape[1], dim=1) for z in (k_BKSE, v_BKSE))
    q_XTE, k_XSE, v_XSE = (z.reshape(B * H, -1, E) for z in (q_BHTE, k_BKSE, v_BKSE))
    far = -1e30  # not −∞: a row with nothing to look at must not become NaN
    if causal:
        bias_XTS = q_XTE.new_full((T, S), far).triu_(1)
    elif mask is not None:
        bias_BHTS = torch.zeros_like(mask, dtype=q_XTE.dtype).masked_fill_(~mask, far).expand(B, H, T, S)
        bias_XTS = bias_BHTS.reshape(B * H, T, S)
    else:
        bias_XTS = q_XTE.new_zeros(())
    scores_XTS = torch.baddbmm(bias_XTS, q_XTE, k_XSE.mT, beta=int(bias_XTS.dim() > 0), alpha=E**-0.5)
    weights_XTS = scores_XTS.softmax(-1, dtype=v_XSE.dtype)
    if dropout:
        weights_XTS = random_zeros(weights_XTS, dropout)
    return torch.bmm(weights_XTS, v_XSE).view(B, H, T, E)


class Modulation(nn.Module):
    """From a condition (B, D) to `parts` vectors for each example, (B, parts, D): adaptive layer norm (Peebles & Xie
    2023, "Scalable Diffusion Models with Transformers", section 3.2, adaLN-Zero).

    They start near zero rather than at it, so that every weight behind a gate learns from the first step.
    """

    START = 0.02

    def __init__(self, d_model: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(d_model, parts * d_model)
        mark_split(self.linear, 0)  # no hidden matrix: AdamW's, not Muon's

    def forward(self, condition_BD: Tensor) -> Tensor:
        return self.linear(F.silu(condition_BD)).unflatten(-1, (self.parts, -1))


def modulated(x_BTD: Tensor, by_BMD: Tensor | None, first: int) -> Tensor:
    """x · (1 + scale) + shift of each example, by the vectors number `first` (shift) and `first` + 1 (scale)."""
    if by_BMD is None:
        return x_BTD
    return torch.addcmul(by_BMD[:, None, first], x_BTD, 1 + by_BMD[:, None, first + 1])


def gated(x_BTD: Tensor, by_BMD: Tensor | None, place: int) -> Tensor:
    """x times each example's vector number `place`."""
    return x_BTD if by_BMD is None else x_BTD * by_BMD[:, None, place]


class Block(nn.Module):
    """Attention, optional attention over a memory, feed-forward; each with its norm and its residual. Where it is
    `conditioned`, the first and the last have their norm shifted and scaled, and their residual gated."""

    def __init__(
        self, config: TransformerConfig, cross_attention: bool, drop_path: float = 0.0, conditioned: bool = False,
        convolved: bool = False, square: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.before = config.norm_position == "before"
        self.attention_norm, self.attention = make_norm(config), Attention(config)
        self.cross_norm = make_norm(config) if cross_attention else None
        self.cross = Attention(config, cross=True) if cross_attention else None
        self.convolution_norm = make_norm(config) if convolved else None
        self.convolution = Convolution(config, square) if convolved else None
        self.feed_forward_norm, self.feed_forward = make_norm(config), FeedForward(config)
        self.dropout = Dropout(config.dropout, drop_path)
        self.modulation = Modulation(config.d_model, 6) if conditioned else None

    def forward(
        self,
        x_BTD: Tensor,
        angles_BT2E: Tensor | None,
        mask_BHTS: Tensor | None,
        causal: bool,
        memory: tuple[Tensor, Tensor] | None,
        memory_mask_BHTS: Tensor | None,
        cache: tuple[Cache, int, Step] | None,
        condition_BD: Tensor | None = None,
    ) -> Tensor:
        if self.before:
            by = None if self.modulation is None or condition_BD is None else self.modulation(condition_BD)
            y_BTD = modulated(self.attention_norm(x_BTD), by, 0)
            y_BTD = self.attention(y_BTD, angles_BT2E, mask_BHTS, causal, cache)
            x_BTD = x_BTD + self.dropout(gated(y_BTD, by, 2))
            if self.cross is not None and self.cross_norm is not None and memory is not None:
                x_BTD = x_BTD + self.dropout(self.cross.over(self.cross_norm(x_BTD), memory, memory_mask_BHTS))
            x_BTD = self._convolved(x_BTD, mask_BHTS)
            y_BTD = self.feed_forward(modulated(self.feed_forward_norm(x_BTD), by, 3))
            return x_BTD + self.dropout(gated(y_BTD, by, 5))
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, angles_BT2E, mask_BHTS, causal, cache)))
        if self.cross is not None and self.cross_norm is not None and memory is not None:
            x_BTD = self.cross_norm(x_BTD + self.dropout(self.cross.over(x_BTD, memory, memory_mask_BHTS)))
        x_BTD = self._convolved(x_BTD, mask_BHTS)
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))

    def _convolved(self, x_BTD: Tensor, mask_BHTS: Tensor | None) -> Tensor:
        """With what the convolution module adds, if there is one. Positions that nobody may look at are padding."""
        if self.convolution is None or self.convolution_norm is None:
            return x_BTD
        real_BT = None if mask_BHTS is None else mask_BHTS[:, 0].any(1)
        if self.before:
            return x_BTD + self.dropout(self.convolution(self.convolution_norm(x_BTD), real_BT))
        return self.convolution_norm(x_BTD + self.dropout(self.convolution(x_BTD, real_BT)))


class Trunk(nn.Module):
    """A stack of blocks: x (B, T, D) → (B, T, D).

    Args:
        config: the shape.
        causal: position t looks at positions ≤ t only (decoders).
        cross_attention: every block also looks at a `memory` (decoders of encoder–decoder models).
        conditioned: a `condition` bends the norms and gates of every block (diffusion models); norms stand before.
        square: positions lie on a square of so many a side, behind so many others: convolutions then span both ways.
    """

    angles_T2E: Tensor | None

    def __init__(
        self, config: TransformerConfig, causal: bool = False, cross_attention: bool = False, conditioned: bool = False,
        square: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if conditioned and config.norm_position != "before":
            raise ValueError("a condition bends norms that stand before their part: norm_position 'before'")
        self.config, self.causal = config, causal
        paths = (config.drop_path * layer / config.num_layers for layer in range(1, config.num_layers + 1))
        convolved = config.conv_kernel > 0 and not causal
        kinds = (conditioned, convolved, square)
        self.blocks = nn.ModuleList(Block(config, cross_attention, path, *kinds) for path in paths)
        self.norm = make_norm(config) if config.norm_position == "before" else None
        self.modulation = Modulation(config.d_model, 2) if conditioned else None
        table = None
        if config.positions == "rotary":
            table = rotary_table(config.head_size, config.max_length, config.rope_theta, config.rope_llama3)
        self.register_buffer("angles_T2E", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1/(3·fan-in); maps that end a residual branch smaller by √(2·layers), so that the
        sum over all branches keeps its size at any depth (Radford et al. 2019, section 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = math.sqrt(1 / (3 * parameter.shape[1]))
                if "modulation" in name:
                    std *= Modulation.START
                if name.endswith(("out.weight", "down.weight")):
                    std /= math.sqrt(2 * self.config.num_layers)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """One pass.

        Args:
            x_BTD: input vectors.
            positions: (B, T) or (T,) positions for the rotation. None: 0 … T−1, or behind what `cache` holds.
            mask: (B, T) bool, True at real positions (padding mask); or (B, T, S) bool, True where query t may look
                at s.
            memory: (B, S, D) encoder output to look at; with a cache, only needed on its first call.
            memory_mask: (B, S) bool, True at real memory positions.
            cache: keys and values of earlier positions. Written, never advanced: the caller does that.
            condition: (B, D), what the whole of each example is told (a time, a class); where it is `conditioned`.
        """
        T = x_BTD.shape[1]
        x_BTD = x_BTD.contiguous()  # from convolutions it comes channels first, and so would all that is added to it
        step = cache.plan(T, x_BTD, self.config.kv_heads, self.config.head_size) if cache is not None else None
        if step is not None:
            positions = step.positions_BT if positions is None else positions
            mask_BHTS = None if step.mask_BTS is None else step.mask_BTS[:, None]
            causal = step.causal
        else:
            mask_BHTS, causal = attention_mask(mask, T, self.causal, x_BTD.device)
        angles = self._angles(positions, T)
        if cache is not None and memory_mask is None:
            memory_mask = cache.memory_mask_BS
        memory_mask_BHTS = None if memory_mask is None else memory_mask[:, None, None, :]
        for layer, block in enumerate(self.blocks):
            kv = self._memory(block, layer, memory, cache)
            place = None if cache is None or step is None else (cache, layer, step)
            x_BTD = block(x_BTD, angles, mask_BHTS, causal, kv, memory_mask_BHTS, place, condition)
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        by = None if self.modulation is None or condition is None else self.modulation(condition)
        return modulated(x_BTD, by, 0)

    def _angles(self, positions: Tensor | None, T: int) -> Tensor | None:
        if self.angles_T2E is None:
            return None
        return self.angles_T2E[None, :T] if positions is None else self.angles_T2E[positions.reshape(-1, T)]

    def _memory(
        self, block: nn.Module, layer: int, memory: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor] | None:
        if cache is not None and cache.cross[layer] is not None:
            return cache.cross[layer]
        if memory is None or not isinstance(block, Block) or block.cross is None:
            return None
        kv = block.cross.memory(memory)
        if cache is not None:
            cache.cross[layer] = kv
        return kv


def attention_mask(mask: Tensor | None, T: int, causal: bool, device: torch.device) -> tuple[Tensor | None, bool]:
    """The mask for SDPA, (B, 1, T or 1, S) bool or None, and whether SDPA's own causal order is enough."""
    if mask is None:
        return None, causal
    full = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    if causal:
        full = full & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        # A padded row in front would have nothing to look at, and a softmax over nothing is NaN: let each see itself.
        full = full | torch.eye(T, dtype=torch.bool, device=device)
    return full, False
