"""A copy of a model made for decoding on a CPU: the same numbers with packed weights and few calls a token.

A token's cost is reading the weights once and calling some hundred kernels. So the weights lie in the order in which
oneDNN's kernels read them (in bfloat16 where the CPU multiplies it), each linear map takes the addition, activation or
product behind it along, rotary positions are one complex product, and one query looks at its past by two batched
matrix products, since torch's fused attention is made for many queries. `PackedTrunk` is the fast twin of `Trunk`.

Legend: B rows, T new positions, N = B·T of these, S positions looked at, C positions that there is room for, L layers,
D d_model, H heads, K key/value heads, X = H + 2·K, G = H / K queries a key, Y = B·K, E head width, F feed-forward
width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.runtime.device import choose_precision
from multihead.transformer.cache import Cache, Step
from multihead.transformer.trunk import Attention, Block, Trunk, attention_mask

Model = TypeVar("Model", bound=nn.Module)
Change = Callable[[Tensor], Tensor]


def prepared(model: Model, precision: str = "auto") -> Model:
    """A copy of `model` for inference: the same ``start``, ``step`` and ``forward``, several times faster on a CPU.

    It is a snapshot: it does not follow the model's later training, and it is not for saving. A model prepared already
    comes back as it is.

    Args:
        precision: "float32"; "bf16": weights, activations and cache in bfloat16, half the memory to read; "auto":
            bfloat16 where the device multiplies it fast, else float32.
    """
    if any(isinstance(module, PackedTrunk) for module in model.modules()):
        return model
    device = next(model.parameters()).device
    dtype = choose_precision(precision, device)
    if device.type != "cpu":
        return copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad():
        return cast(Model, _twin(model, dtype))


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its trunks and linear maps packed; other parameters in `dtype`, shared where it is theirs."""
    if isinstance(module, Trunk):
        return PackedTrunk(module, dtype)
    if type(module) is nn.Linear:
        return PackedLinear(module, dtype)
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {name: None if child is None else _twin(child, dtype) for name, child in module._modules.items()}
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {
        name: b.to(dtype) if b is not None and b.is_floating_point() else b for name, b in module._buffers.items()
    }
    return twin


# ---- linear maps -----------------------------------------------------------------------------------------------------

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ROWS = 16  # the number of rows the packing is chosen for; others work, and one is as fast
THEN: dict[str, Change] = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "swish": F.silu}
if ONEDNN:
    _unary = torch.ops.mkldnn._linear_pointwise.default
    _binary = torch.ops.mkldnn._linear_pointwise.binary


class Map(NamedTuple):
    """A linear map ready for use: weight (out, in) as the kernels want it, and bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Map:
        weight = weight.detach().to(dtype).contiguous()
        if ONEDNN:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return cls(weight, None if bias is None else bias.detach().to(dtype))


def linear(x: Tensor, a: Map, then: str = "none") -> Tensor:
    """x Aᵀ + b, then "none", "relu", "gelu" or "swish" of it."""
    if ONEDNN:
        return _unary(x, a.weight, a.bias, then, [], "none" if then == "gelu" else "")
    return THEN[then](F.linear(x, a.weight, a.bias))


def linear_with(x: Tensor, a: Map, other: Tensor, how: str) -> Tensor:
    """x Aᵀ + b, to which `other` is added ("add") or by which it is multiplied ("mul")."""
    if ONEDNN:
        return _binary(x, other, a.weight, a.bias, how)
    y = F.linear(x, a.weight, a.bias)
    return y + other if how == "add" else y * other


class PackedLinear(nn.Module):
    """A linear map outside the trunk (the head): (…, in) → (…, out)."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.map = Map.of(module.weight, module.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.map)


# ---- the trunk -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Look:
    """The weights of one attention."""

    norm: Change
    inward: Map
    """To queries, keys and values; in cross-attention to queries only."""
    outward: Map
    q_norm: Change | None
    k_norm: Change | None
    memory: Map | None
    """Cross-attention: to the memory's keys and values."""


@dataclass(slots=True)
class Layer:
    """The weights of one block."""

    attention: Look
    cross: Look | None
    norm: Change
    gate: Map | None
    up: Map
    down: Map


class PackedTrunk(nn.Module):
    """What `Trunk` computes, from packed weights: x (B, T, D) → (B, T, D), with or without a cache."""

    def __init__(self, trunk: Trunk, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.causal, self.dtype = trunk.config, trunk.causal, dtype
        self.before = trunk.config.norm_position == "before"
        self.activation = {"swiglu": "none", "relu2": "relu"}.get(trunk.config.activation, trunk.config.activation)
        self.layers = [self._layer(block) for block in trunk.blocks if isinstance(block, Block)]
        self.norm = None if trunk.norm is None else norm_of(trunk.norm, dtype)
        self.turns_TE = None
        if trunk.angles_T2E is not None:
            cos_TE, sin_TE = trunk.angles_T2E.unbind(1)
            self.turns_TE = torch.complex(cos_TE.contiguous(), sin_TE.contiguous())
        self.eval()

    def _layer(self, block: Block) -> Layer:
        up, gate = block.feed_forward.up, None
        weight: Tensor = up.weight
        bias: Tensor | None = up.bias
        if self.config.activation == "swiglu":
            gate_weight, weight = weight.chunk(2)
            gate_bias, bias = (None, None) if bias is None else bias.chunk(2)
            gate = Map.of(gate_weight, gate_bias, self.dtype)
        return Layer(
            self._look(block.attention, block.attention_norm),
            None if block.cross is None or block.cross_norm is None else self._look(block.cross, block.cross_norm),
            norm_of(block.feed_forward_norm, self.dtype),
            gate,
            Map.of(weight, bias, self.dtype),
            Map.of(block.feed_forward.down.weight, block.feed_forward.down.bias, self.dtype),
        )

    def _look(self, attention: Attention, norm: nn.Module) -> Look:
        cross = hasattr(attention, "kv")
        inward = attention.q if cross else attention.qkv
        heads = attention.heads + attention.kv_heads if self.config.positions == "rotary" and not cross else 0
        return Look(
            norm_of(norm, self.dtype),
            Map.of(*in_pairs(inward, heads, attention.head_size), self.dtype),
            Map.of(attention.out.weight, attention.out.bias, self.dtype),
            None if attention.q_norm is None else norm_of(attention.q_norm, self.dtype, heads > 0),
            None if attention.k_norm is None else norm_of(attention.k_norm, self.dtype, heads > 0),
            Map.of(attention.kv.weight, attention.kv.bias, self.dtype) if cross else None,
        )

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
        turns_BTXE = self._turns(positions, T)
        x_ND = x_BTD.reshape(B * T, D)
        for i, layer in enumerate(self.layers):
            look = layer.attention
            qkv_NX = linear(look.norm(x_ND) if self.before else x_ND, look.inward)
            qkv_BTXE = self._inward(qkv_NX, look, B, T, turns_BTXE)
            y_NX = past.attend(i, qkv_BTXE, config.num_heads, config.kv_heads, self.dtype)
            x_ND = linear_with(y_NX, look.outward, x_ND, "add")
            x_ND = x_ND if self.before else look.norm(x_ND)
            if layer.cross is not None:
                x_ND = self._over(x_ND, i, layer.cross, B, T, memory, memory_mask, cache)
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

    def _inward(self, qkv_NX: Tensor, look: Look, B: int, T: int, turns_BTXE: Tensor | None) -> Tensor:
        """Queries, keys and values of the heads, normed and rotated: (B, T, X, E)."""
        H, K, E = self.config.num_heads, self.config.kv_heads, self.config.head_size
        qkv_BTXE = qkv_NX.view(B, T, H + 2 * K, E)
        if look.q_norm is not None and look.k_norm is not None:
            q_BTHE, k_BTKE, v_BTKE = qkv_BTXE.split((H, K, K), dim=2)
            qkv_BTXE = torch.cat((look.q_norm(q_BTHE), look.k_norm(k_BTKE), v_BTKE), dim=2)
        if turns_BTXE is None:
            return qkv_BTXE
        pairs_BTXE = torch.view_as_complex(qkv_BTXE.float().view(B, T, H + 2 * K, E // 2, 2))
        return torch.view_as_real(pairs_BTXE * turns_BTXE).flatten(3)

    def _over(
        self,
        x_ND: Tensor,
        i: int,
        look: Look,
        B: int,
        T: int,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Cross-attention of layer `i`, with its norm and residual."""
        H, K, E = self.config.num_heads, self.config.kv_heads, self.config.head_size
        kv = None if cache is None else cache.cross[i]
        if kv is None:
            assert memory is not None and look.memory is not None
            kv_B2SKE = linear(memory.flatten(0, 1), look.memory).view(B, -1, 2, K, E)
            k_BSKE, v_BSKE = kv_B2SKE.unbind(2)
            k_BSKE = k_BSKE if look.k_norm is None else look.k_norm(k_BSKE)
            kv = k_BSKE.transpose(1, 2).contiguous(), v_BSKE.transpose(1, 2).contiguous()
            if cache is not None:
                cache.cross[i] = kv
        q_BTHE = linear(look.norm(x_ND) if self.before else x_ND, look.inward).view(B, T, H, E)
        q_BTHE = q_BTHE if look.q_norm is None else look.q_norm(q_BTHE)
        y_NX = fused(q_BTHE, *kv, None if memory_mask is None else memory_mask[:, None, None], causal=False)
        x_ND = linear_with(y_NX, look.outward, x_ND, "add")
        return x_ND if self.before else look.norm(x_ND)

    def _feed_forward(self, x_ND: Tensor, layer: Layer) -> Tensor:
        h_ND = layer.norm(x_ND) if self.before else x_ND
        if layer.gate is not None:
            h_NF = linear_with(h_ND, layer.up, linear(h_ND, layer.gate, "swish"), "mul")
        else:
            h_NF = linear(h_ND, layer.up, self.activation)
            h_NF = h_NF.square() if self.config.activation == "relu2" else h_NF
        x_ND = linear_with(h_NF, layer.down, x_ND, "add")
        return x_ND if self.before else layer.norm(x_ND)


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


def norm_of(module: nn.Module, dtype: torch.dtype, paired: bool = False) -> Change:
    """RMSNorm or LayerNorm as a function; with `paired`, for heads whose rows ``in_pairs`` has reordered."""

    def ready(p: Tensor | None) -> Tensor | None:
        if p is None:
            return None
        return (p.detach().view(2, -1).T.flatten() if paired else p.detach()).to(dtype)

    size = (module.weight.numel(),)  # type: ignore[operator]
    weight, eps = ready(module.weight), module.eps  # type: ignore[arg-type]
    if isinstance(module, nn.RMSNorm):
        return lambda x: F.rms_norm(x, size, weight, eps)  # type: ignore[arg-type]
    bias = ready(module.bias)  # type: ignore[arg-type]
    return lambda x: F.layer_norm(x, size, weight, bias, eps)  # type: ignore[arg-type]


# ---- what queries look at --------------------------------------------------------------------------------------------


class Fresh:
    """The positions of this very call, without a cache."""

    def __init__(self, mask_BHTS: Tensor | None, causal: bool) -> None:
        self.mask_BHTS, self.causal = mask_BHTS, causal

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int, dtype: torch.dtype) -> Tensor:
        q_BTHE, k_BTKE, v_BTKE = qkv_BTXE.to(dtype).split((H, K, K), dim=2)
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
            kv_2BKCE[:, self.rows_B1, :, self.step.positions_BT] = kv_BT2KE.to(kv_2BKCE.dtype)

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int, dtype: torch.dtype) -> Tensor:
        B, T, _, E = qkv_BTXE.shape
        self.write(i, qkv_BTXE[:, :, H:].view(B, T, 2, K, E))
        k_BKSE, v_BKSE = self.layers[i][..., : self.step.end, :].unbind(0)
        return fused(qkv_BTXE[:, :, :H].to(dtype), k_BKSE, v_BKSE, self.mask_BHTS, self.step.causal)


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

    def attend(self, i: int, qkv_BTXE: Tensor, H: int, K: int, dtype: torch.dtype) -> Tensor:
        B, _, _, E = qkv_BTXE.shape
        self.write(i, qkv_BTXE[:, :, H:].view(B, 1, 2, K, E))
        q_YGE = qkv_BTXE[:, :, :H].reshape(B * K, H // K, E).to(dtype)
        share_YGC = torch.baddbmm(self.bias_Y1C, q_YGE, self.keys_YEC[i], alpha=E**-0.5).softmax(-1)
        return torch.bmm(share_YGC, self.values_YCE[i]).view(B, H * E)


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
