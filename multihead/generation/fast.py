"""A copy of a model made for decoding on a CPU: the same numbers with packed weights and few calls a token.

A token's cost is reading the weights once and calling some hundred kernels. So the weights are packed for the fastest
kernel, in 16 or 8 bits where that is allowed (`packing.py`); rotary positions are one complex product; one query looks
at its past by two batched matrix products, since torch's fused attention is made for many queries. `PackedTrunk` is the
fast twin of `Trunk`; activations and caches stay float32.

Legend: B rows, T new positions, N = B·T of these, S positions looked at, C positions that there is room for, L layers,
D d_model, H heads, K key/value heads, X = H + 2·K, G = H / K queries a key, Y = B·K, E head width, F feed-forward
width.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.errors import UserError, tr
from multihead.generation.int8 import Int8Map
from multihead.generation.packing import Change, Map, Packing
from multihead.runtime.device import fast_bf16
from multihead.transformer.cache import Cache, Step
from multihead.transformer.trunk import Attention, Block, Trunk, attention_mask

Model = TypeVar("Model", bound=nn.Module)
FEW_QUERIES = 8
PRECISIONS = ("auto", "float32", "half", "int8")


def prepared(model: Model, precision: str = "auto", rows: int | None = None) -> Model:
    """A copy of `model` for inference: the same ``start``, ``step`` and ``forward``, several times faster on a CPU.

    It is a snapshot: it does not follow the model's later training, and it is not for saving. A model prepared already,
    or one on another device than the CPU, comes back as it is.

    Args:
        precision: "float32"; "half": weights in float16 where few rows are multiplied, else weights and the products'
            inputs in bfloat16; "int8": weights in 8 bits with a scale for 32 of them, a quarter of float32's memory
            (needs llvmlite, and is fast on CPUs with AVX-512 VNNI); "auto": half on CPUs that multiply bfloat16 fast,
            else float32.
        rows: how many rows will be decoded at once, where it is known: only the kernel that this wants is kept, at half
            the memory. With None the copy holds both, which is 8 (half: 4) bytes a weight.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or any(isinstance(module, PackedTrunk) for module in model.modules()):
        return model
    if precision not in PRECISIONS:
        raise UserError(tr(
            f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}",
            f"precision 是 {precision!r}，应为 {'、'.join(PRECISIONS)} 之一",
        ))
    if precision == "auto":
        precision = "half" if fast_bf16(device) else "float32"
    with torch.no_grad():
        return cast(Model, _twin(model, Packing(precision, rows)))


def _twin(module: nn.Module, packing: Packing) -> nn.Module:
    """The module with its trunks and linear maps packed; what else it has is shared with the copy."""
    if isinstance(module, Trunk):
        return PackedTrunk(module, packing)
    if type(module) is nn.Linear:
        return PackedLinear(module, packing)
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {name: None if child is None else _twin(child, packing) for name, child in module._modules.items()}
    if any(p is not None and p.dtype != torch.float32 for p in module._parameters.values()):
        twin._parameters = {
            name: None if p is None else nn.Parameter(p.detach().float(), requires_grad=False)
            for name, p in module._parameters.items()
        }
    return twin


class PackedLinear(nn.Module):
    """A linear map outside the trunk (the head): (…, in) → (…, out)."""

    def __init__(self, module: nn.Linear, packing: Packing) -> None:
        super().__init__()
        self.map = packing(module.weight, module.bias)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.map(x)
        return self.map(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


# ---- the trunk -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Look:
    """One attention."""

    norm: Change
    inward: Map | Int8Map
    """To queries, keys and values; in cross-attention to queries only."""
    outward: Map | Int8Map
    q_norm: Change | None
    k_norm: Change | None
    memory: Map | Int8Map | None
    """Cross-attention: to the memory's keys and values."""


@dataclass(slots=True)
class Layer:
    """One block."""

    attention: Look
    cross: Look | None
    norm: Change
    up: Map | Int8Map
    down: Map | Int8Map


class PackedTrunk(nn.Module):
    """What `Trunk` computes, from packed weights: x (B, T, D) → (B, T, D), with or without a cache."""

    def __init__(self, trunk: Trunk, packing: Packing) -> None:
        super().__init__()
        self.config, self.causal, self.packing = trunk.config, trunk.causal, packing
        self.before = trunk.config.norm_position == "before"
        self.layers = [self._layer(block) for block in trunk.blocks if isinstance(block, Block)]
        self.norm = None if trunk.norm is None else norm_of(trunk.norm)
        self.turns_TE = None
        if trunk.angles_T2E is not None:
            cos_TE, sin_TE = trunk.angles_T2E.float().unbind(1)
            self.turns_TE = torch.complex(cos_TE.contiguous(), sin_TE.contiguous())
        self.eval()

    def _layer(self, block: Block) -> Layer:
        up, down = block.feed_forward.up, block.feed_forward.down
        return Layer(
            self._look(block.attention, block.attention_norm),
            None if block.cross is None or block.cross_norm is None else self._look(block.cross, block.cross_norm),
            *self._normed(block.feed_forward_norm, up.weight, up.bias),
            self.packing(down.weight, down.bias),
        )

    def _look(self, attention: Attention, norm: nn.Module) -> Look:
        cross = hasattr(attention, "kv")
        inward = attention.q if cross else attention.qkv
        heads = attention.heads + attention.kv_heads if self.config.positions == "rotary" and not cross else 0
        weight, bias = in_pairs(inward, heads, attention.head_size)
        return Look(
            *self._normed(norm, weight, bias),
            self.packing(attention.out.weight, attention.out.bias),
            None if attention.q_norm is None else norm_of(attention.q_norm, paired=heads > 0),
            None if attention.k_norm is None else norm_of(attention.k_norm, paired=heads > 0),
            self.packing(attention.kv.weight, attention.kv.bias) if cross else None,
        )

    def _normed(self, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Change, Map | Int8Map]:
        """A norm, and the map that it stands in front of (or behind the residual of). An RMSNorm in front costs less as
        a part of the map: all of it with 8 bits, else its scale, which the weight takes over."""
        if not self.before or not isinstance(norm, nn.RMSNorm):
            return norm_of(norm), self.packing(weight, bias)
        if self.packing.precision == "int8":
            return _same, Int8Map(weight, bias, (norm.weight, norm.eps or 0.0))
        return norm_of(norm, scaled=False), self.packing(weight * scale_of(norm), bias)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As `Trunk.forward`."""
        B, T, D = x_BTD.shape
        config = self.config
        past: Fresh | Cached
        if cache is not None:
            step = cache.plan(T, x_BTD, config.kv_heads, config.head_size)
            positions = step.positions_BT if positions is None else positions
            past = OneQuery(step) if T == 1 else Cached(step)
            memory_mask = cache.memory_mask_BS if memory_mask is None else memory_mask
        else:
            past = Fresh(*attention_mask(mask, T, self.causal, x_BTD.device))
        memory_bias = None
        if memory_mask is not None:  # once for all layers
            memory_bias = x_BTD.new_zeros(memory_mask.shape).masked_fill_(~memory_mask, -torch.inf)[:, None, None]
        turns_BTXE = self._turns(positions, T)
        x_ND = x_BTD.reshape(B * T, D)
        for i, layer in enumerate(self.layers):
            look = layer.attention
            qkv_NX = look.inward(look.norm(x_ND) if self.before else x_ND)
            qkv_BTXE = self._heads(qkv_NX, look, B, T, turns_BTXE)
            x_ND = look.outward(past.attend(i, qkv_BTXE, config.num_heads, config.kv_heads), x_ND)
            x_ND = x_ND if self.before else look.norm(x_ND)
            if layer.cross is not None:
                kv = self._memory(i, layer.cross, memory, cache)
                x_ND = self._over(x_ND, layer.cross, B, T, kv, memory_bias)
            x_ND = self._feed_forward(x_ND, layer)
        return (x_ND if self.norm is None else self.norm(x_ND)).view(B, T, D)

    def _turns(self, positions: Tensor | None, T: int) -> Tensor | None:
        """By what queries, keys and (by 1) values are multiplied, as pairs: (B or 1, T, X, E/2), complex."""
        if self.turns_TE is None:
            return None
        turns_BTE = self.turns_TE[None, :T] if positions is None else self.turns_TE[positions.reshape(-1, T)]
        b, _, half = turns_BTE.shape
        turned = turns_BTE[:, :, None].expand(b, T, self.config.num_heads + self.config.kv_heads, half)
        return torch.cat((turned, turns_BTE.new_ones(b, T, self.config.kv_heads, half)), dim=2)

    def _heads(self, qkv_NX: Tensor, look: Look, B: int, T: int, turns_BTXE: Tensor | None) -> Tensor:
        """Queries, keys and values of the heads, normed and rotated: (B, T, X, E)."""
        H, K, E = self.config.num_heads, self.config.kv_heads, self.config.head_size
        if look.q_norm is not None and look.k_norm is not None:
            q_BTHE, k_BTKE, v_BTKE = qkv_NX.view(B, T, H + 2 * K, E).split((H, K, K), dim=2)
            qkv_NX = torch.cat((look.q_norm(q_BTHE), look.k_norm(k_BTKE), v_BTKE), dim=2)
        if turns_BTXE is None:
            return qkv_NX.view(B, T, H + 2 * K, E)
        pairs_BTXE = torch.view_as_complex(qkv_NX.view(B, T, H + 2 * K, E // 2, 2)) * turns_BTXE
        return torch.view_as_real(pairs_BTXE).flatten(3)

    def _memory(self, i: int, look: Look, memory: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory for layer `i`, each (B, K, S, E), worked out once a sequence."""
        if cache is not None and (known := cache.cross[i]) is not None:
            return known
        assert memory is not None and look.memory is not None
        K, E = self.config.kv_heads, self.config.head_size
        k_BSKE, v_BSKE = look.memory(memory.flatten(0, 1)).view(len(memory), -1, 2, K, E).unbind(2)
        k_BSKE = k_BSKE if look.k_norm is None else look.k_norm(k_BSKE)
        kv = k_BSKE.transpose(1, 2).contiguous(), v_BSKE.transpose(1, 2).contiguous()
        if cache is not None:
            cache.cross[i] = kv
        return kv

    def _over(
        self, x_ND: Tensor, look: Look, B: int, T: int, kv: tuple[Tensor, Tensor], memory_bias: Tensor | None
    ) -> Tensor:
        """Cross-attention with its norm and residual; each memory serves as many rows as there are of them more."""
        q_NX = look.inward(look.norm(x_ND) if self.before else x_ND)
        sources = len(kv[0])
        q_BTHE = q_NX.view(sources, B // sources * T, self.config.num_heads, self.config.head_size)
        q_BTHE = q_BTHE if look.q_norm is None else look.q_norm(q_BTHE)
        few = q_BTHE.shape[1] <= FEW_QUERIES and kv[0].shape[1] == q_BTHE.shape[2]
        y_NX = plain(q_BTHE, *kv, memory_bias) if few else fused(q_BTHE, *kv, memory_bias, causal=False)
        x_ND = look.outward(y_NX, x_ND)
        return x_ND if self.before else look.norm(x_ND)

    def _feed_forward(self, x_ND: Tensor, layer: Layer) -> Tensor:
        h_NF = layer.up(layer.norm(x_ND) if self.before else x_ND)
        kind = self.config.activation
        if kind == "swiglu":
            gate_NF, value_NF = h_NF.chunk(2, dim=1)
            h_NF = F.silu(gate_NF).mul_(value_NF)
        elif kind in ("gelu", "gelu_tanh"):
            h_NF = F.gelu(h_NF, approximate="tanh" if kind == "gelu_tanh" else "none")
        else:
            h_NF = F.relu(h_NF).square_() if kind == "relu2" else F.relu(h_NF)
        x_ND = layer.down(h_NF, x_ND)
        return x_ND if self.before else layer.norm(x_ND)


def _same(x: Tensor) -> Tensor:
    return x


def in_pairs(module: nn.Linear, heads: int, head_size: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; in the first `heads` heads rows e and e + E/2 come to lie next to each other, as the real and
    imaginary part of one number."""
    split = heads * head_size

    def reorder(rows: Tensor) -> Tensor:
        pairs = rows[:split].view(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(split, *rows.shape[1:])
        return torch.cat((pairs, rows[split:]))

    if not heads:
        return module.weight, module.bias
    return reorder(module.weight), None if module.bias is None else reorder(module.bias)


def scale_of(norm: nn.RMSNorm) -> Tensor:
    """What x / ‖(x, √(D·eps))‖ is to be multiplied by: the norm's weight times √D."""
    return norm.weight.detach().float() * math.sqrt(norm.weight.numel())


def norm_of(module: nn.Module, scaled: bool = True, paired: bool = False) -> Change:
    """RMSNorm or LayerNorm as a function.

    Args:
        scaled: an RMSNorm's scale is in here, and not in the next weight.
        paired: for heads whose rows ``in_pairs`` has reordered.
    """

    def ready(p: Tensor) -> Tensor:
        return (p.view(2, -1).T.flatten() if paired else p).detach().float()

    if isinstance(module, nn.RMSNorm):
        scale = ready(scale_of(module))
        # torch takes six calls to an RMSNorm on a CPU; this is three.
        root = torch.tensor(math.sqrt(scale.numel() * (module.eps or 0.0)))
        norm, hypot = torch.linalg.vector_norm, torch.hypot
        if scaled:
            return lambda x: x / hypot(norm(x, dim=-1, keepdim=True), root) * scale
        return lambda x: x / hypot(norm(x, dim=-1, keepdim=True), root)
    assert isinstance(module, nn.LayerNorm)
    weight, bias = ready(module.weight), None if module.bias is None else ready(module.bias)
    size, eps = tuple(module.normalized_shape), module.eps
    return lambda x: F.layer_norm(x, size, weight, bias, eps)


# ---- what queries look at --------------------------------------------------------------------------------------------


class Fresh:
    """The positions of this very call, without a cache."""

    def __init__(self, mask_BHTS: Tensor | None, causal: bool) -> None:
        self.mask_BHTS, self.causal = mask_BHTS, causal

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int) -> Tensor:
        q_BTHE, k_BTKE, v_BTKE = qkv_BTXE.split((H, K, K), dim=2)
        return fused(q_BTHE, k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2), self.mask_BHTS, self.causal)


class Cached:
    """What a cache holds, and several new positions a row (a prompt)."""

    def __init__(self, step: Step) -> None:
        self.step, self.layers = step, step.kv_L2BKCE.unbind(0)
        self.mask_BHTS = None if step.mask_BTS is None else step.mask_BTS[:, None]
        self.rows_B1 = torch.arange(self.layers[0].shape[1])[:, None]

    def write(self, i: int, kv_BT2KE: Tensor) -> None:
        """Store the new keys and values of layer `i`."""
        if self.step.start is not None:
            self.layers[i][..., self.step.start : self.step.end, :] = kv_BT2KE.permute(2, 0, 3, 1, 4)
        else:
            kv_2BKCE = self.layers[i]
            kv_2BKCE[:, self.rows_B1, :, self.step.positions_BT] = kv_BT2KE

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int) -> Tensor:
        B, T, _, E = qkv_BTXE.shape
        self.write(i, qkv_BTXE[:, :, H:].view(B, T, 2, K, E))
        k_BKSE, v_BKSE = self.layers[i][..., : self.step.end, :].unbind(0)
        return fused(qkv_BTXE[:, :, :H], k_BKSE, v_BKSE, self.mask_BHTS, self.step.causal)


class OneQuery(Cached):
    """What a cache holds, and one new position a row: every layer's views and the bias, worked out once a token.

    A batched product wants its matrices whole, so it reads the whole room for positions; what is not there yet, or
    belongs to longer rows, gets a bias of −∞.
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        _, _, B, K, C, _ = step.kv_L2BKCE.shape
        kv_L2YCE = step.kv_L2BKCE.flatten(2, 3)
        self.keys_YEC, self.values_YCE = kv_L2YCE[:, 0].mT.unbind(0), kv_L2YCE[:, 1].unbind(0)
        bias_BC = kv_L2YCE.new_zeros(1 if step.mask_BTS is None else B, C)
        bias_BC[:, step.end :] = -torch.inf
        if step.mask_BTS is not None:
            bias_BC[:, : step.end].masked_fill_(~step.mask_BTS[:, 0], -torch.inf)
            bias_BC = bias_BC.repeat_interleave(K, dim=0)
        self.bias_Y1C = bias_BC[:, None]

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int) -> Tensor:
        B, _, _, E = qkv_BTXE.shape
        self.write(i, qkv_BTXE[:, :, H:].view(B, 1, 2, K, E))
        q_YGE = qkv_BTXE[:, :, :H].reshape(B * K, H // K, E)
        share_YGC = torch.baddbmm(self.bias_Y1C, q_YGE, self.keys_YEC[i], alpha=E**-0.5).softmax(-1)
        return torch.bmm(share_YGC, self.values_YCE[i]).view(B, H * E)


def plain(q_BTHE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, bias_B11S: Tensor | None) -> Tensor:
    """Attention of a few queries by two batched products, for which torch's kernel is not made: (N, H·E)."""
    B, T, H, E = q_BTHE.shape
    q_YTE = q_BTHE.transpose(1, 2).reshape(B * H, T, E)
    bias = q_YTE.new_zeros(1) if bias_B11S is None else bias_B11S[:, 0].repeat_interleave(H, dim=0)
    share_YTS = torch.baddbmm(bias, q_YTE, k_BHSE.flatten(0, 1).mT, alpha=E**-0.5).softmax(-1)
    return torch.bmm(share_YTS, v_BHSE.flatten(0, 1)).view(B, H, T, E).transpose(1, 2).reshape(B * T, H * E)


def fused(q_BTHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BHTS: Tensor | None, causal: bool) -> Tensor:
    """Attention by torch's kernel: (N, H·E)."""
    y_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BKSE,
        v_BKSE,
        attn_mask=mask_BHTS,
        is_causal=causal,
        enable_gqa=q_BTHE.shape[2] != k_BKSE.shape[1],
    )
    return y_BHTE.transpose(1, 2).flatten(2).flatten(0, 1)
