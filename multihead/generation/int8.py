"""Products with weights of 8 bits, by a kernel that is compiled when it is first asked for (llvmlite, extra ``int8``).

A weight is an integer of −127 … 127 times the scale of its group, 32 inputs of one output: the numbers of GGUF's Q8_0.
Reading them is half of what float16 costs. Inputs become integers of 16 bits, with a scale a group of 32, so that their
rounding stays a thousandth of the weights' own; sums within a group are exact, and do not depend on the number of rows.

Legend: N outputs, K inputs, R rows, G = K / 32 groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multihead.errors import UserError, tr

GROUP = 32  # inputs that share a scale
BLOCK = 64  # outputs that one thread works out at once
TILES = (1, 2, 4)  # rows that share one reading of the weights from the nearest cache
MOST = 32639.0  # the largest input as an integer, 127 · 256 + 127
PIECE = 2 * BLOCK + GROUP * BLOCK  # bytes of a group of one block: scales, then weights by fours of inputs
ROW = 8 + 2 * GROUP  # bytes of a group of one row: scale, 128 · sum, high bytes, low bytes
SHARED = 1 << 17  # weights from which a second thread is worth waking
CHUNK = 128  # rows of one call


def quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (N, G, 32) int8 and their scales (N, G) float16; inputs are filled up with zeros to whole groups.

    As in GGUF's Q8_0, whose halves are rounded away from zero.
    """
    weight_NGI = F.pad(weight_NK.detach().float(), (0, -weight_NK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale_NG = weight_NGI.abs().amax(2) / 127
    inverse_NG = torch.where(scale_NG == 0, scale_NG, 1 / scale_NG)
    size_NGI = (weight_NGI * inverse_NG[..., None]).abs()
    whole_NGI = size_NGI.floor()
    whole_NGI += (2 * (size_NGI - whole_NGI)).floor()
    return (whole_NGI * weight_NGI.sign()).to(torch.int8), scale_NG.half()


def dequantized(weight_NK: Tensor) -> Tensor:
    """The float32 weights that stand for `weight_NK` in 8 bits: (N, K)."""
    q_NGI, scale_NG = quantized(weight_NK)
    return (q_NGI * scale_NG.float()[..., None]).flatten(1)[:, : weight_NK.shape[1]]


class Int8Map:
    """x (R, K) → x Aᵀ + b (R, N) with the weights A in 8 bits; float32 in and out.

    Args:
        norm: an RMSNorm's weight (K,) and epsilon, where the input is to be normed first.

    Raises:
        UserError: llvmlite is not installed.
    """

    __slots__ = ("bias", "groups", "inputs", "job", "kept", "kernel", "outputs", "shared", "width")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, norm: tuple[Tensor, float] | None = None) -> None:
        self.kernel = compiled()
        (self.outputs, self.inputs), self.groups = weight.shape, -(-weight.shape[1] // GROUP)
        blocks = -(-self.outputs // BLOCK)
        self.width, self.shared = blocks * BLOCK, weight.numel() >= SHARED
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, self.width - self.outputs))
        scale = None if norm is None else F.pad(norm[0].detach().float(), (0, self.groups * GROUP - self.inputs))
        packed = packed_weights(weight)
        self.kept = (packed, scale)
        self.job = (ctypes.c_int64 * 6)(
            packed.data_ptr(), blocks, self.groups, 0 if scale is None else scale.data_ptr(), self.inputs, 0
        )
        if norm is not None:
            ctypes.cast(ctypes.byref(self.job, 40), ctypes.POINTER(ctypes.c_float))[0] = norm[1]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual` (R, N) is added to the product."""
        R = x.shape[0]
        if R > CHUNK:
            rests: Sequence[Tensor | None] = [None] * R if residual is None else residual.split(CHUNK)
            return torch.cat([self(part, rest) for part, rest in zip(x.split(CHUNK), rests, strict=False)])
        if self.inputs % GROUP:
            x = F.pad(x, (0, -self.inputs % GROUP))
        x = x.contiguous()
        start, stride, whole = self.bias, 0, self.width == self.outputs
        if start is None and residual is not None:
            start, stride = residual if whole else F.pad(residual, (0, self.width - self.outputs)), self.width
            start, residual = start.contiguous(), None
        tile = R if R < 3 else 4
        y = x.new_empty(-(-R // tile) * tile, self.width)
        scratch = torch.empty(R * self.groups * ROW, dtype=torch.uint8)
        self.kernel[tile](
            self.job, x.data_ptr(), y.data_ptr(), scratch.data_ptr(), 0 if start is None else start.data_ptr(), stride,
            R, torch.get_num_threads() if self.shared else 1,
        )
        if len(y) > R or not whole:
            y = y[:R, : self.outputs].contiguous()
        return y if residual is None else y + residual


def packed_weights(weight: Tensor) -> Tensor:
    """The weights in the order in which the kernel reads them: blocks of 64 outputs, groups of 32 inputs; of each the
    scales, then by fours of inputs 64 times 4 weights, plus 128. Bytes that begin at a multiple of 64."""
    q_NGI, scale_NG = quantized(weight)
    more = -len(weight) % BLOCK
    q_NGI, scale_NG = F.pad(q_NGI, (0, 0, 0, 0, 0, more)), F.pad(scale_NG, (0, 0, 0, more))
    blocks, groups = len(scale_NG) // BLOCK, scale_NG.shape[1]
    fours = (q_NGI.to(torch.int16) + 128).to(torch.uint8).view(blocks, BLOCK, groups, GROUP // 4, 4)
    scales = scale_NG.view(blocks, BLOCK, groups).transpose(1, 2).contiguous().view(torch.uint8)
    pieces = torch.cat((scales, fours.permute(0, 2, 3, 1, 4).reshape(blocks, groups, -1)), 2).flatten()
    room = torch.empty(len(pieces) + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    room[start : start + len(pieces)] = pieces
    return room[start : start + len(pieces)]


# ---- the kernel ------------------------------------------------------------------------------------------------------


def compiled() -> Mapping[int, Callable[..., None]]:
    """The kernel by rows a tile, in this machine's own instructions.

    Raises:
        UserError: llvmlite is not installed.
    """
    try:
        import llvmlite.binding as llvm
    except ImportError:
        raise UserError(tr(
            "precision int8 compiles a kernel of its own with llvmlite: pip install 'multihead[int8]'",
            "int8 精度需要用 llvmlite 编译自己的内核：pip install 'multihead[int8]'",
        )) from None
    return _compiled(bool(llvm.get_host_cpu_features().get("avx512vnni")))


@cache
def _compiled(vnni: bool) -> Mapping[int, Callable[..., None]]:
    import llvmlite.binding as llvm

    from multihead.generation.kernel import module

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    threads = _openmp()
    if threads:
        llvm.add_symbol("GOMP_parallel", threads)
    parsed = llvm.parse_assembly(module(vnni, bool(threads)))
    parsed.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    kind = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer, pointer, word, word, word)
    found: dict[int, Any] = {tile: kind(engine.get_function_address(f"product{tile}")) for tile in TILES}
    for function in found.values():
        function.engine = engine  # lives as long as its code
    return found


def _openmp() -> int:
    """The address of ``GOMP_parallel`` in the OpenMP that torch itself runs on, so that both share their threads; 0
    where there is none, and products stay on one thread."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0
