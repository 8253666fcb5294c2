"""The product with 8-bit weights, written for LLVM; see `multihead.generation.int8` for the numbers and their order.

For every group of 32 inputs and 64 outputs: the high bytes of the inputs times the weights, times 256, plus the low
bytes times the weights, all in whole numbers; less 128 times the sum of the inputs, since weights are stored plus 128;
times the two scales. Threads take blocks of outputs by turns, so that one that is held up holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir

from multihead.generation.int8 import BLOCK, GROUP, MOST, PIECE, ROW, TILES

I8, I16, I32, I64, HALF, FLOAT = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.HalfType(), ir.FloatType()
POINTER = I8.as_pointer()
LANES = 16
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
VECTORS = BLOCK // LANES
FIELDS = ("weights", "y", "rows", "start", "stride", "count", "blocks", "groups", "next")
"""What threads share, a word each: where the weights, outputs, quantized rows and initial outputs lie …"""
Body = Callable[[Any, Sequence[Any]], Sequence[Any]]


def module(vnni: bool, threads: bool) -> str:
    """The kernel as LLVM's assembly.

    Args:
        vnni: the machine multiplies bytes by fours (AVX-512 VNNI).
        threads: ``GOMP_parallel`` is there.
    """
    made = ir.Module("int8")
    quantize = _quantize(made)
    for tile in TILES:
        _product(made, tile, quantize, _work(made, tile, vnni), threads)
    return str(made)


class Builder(ir.IRBuilder):
    """LLVM's builder with what the kernel says often."""

    def at(self, base: Any, offset: Any) -> Any:
        """The address `offset` bytes behind `base`."""
        return self.gep(base, [offset if isinstance(offset, ir.Value) else I64(offset)], source_etype=I8)

    def read(self, address: Any, kind: ir.Type, align: int = 4) -> Any:
        return self.load(self.bitcast(address, kind.as_pointer()), align=align)

    def write(self, value: Any, address: Any, align: int = 4) -> None:
        self.store(value, self.bitcast(address, value.type.as_pointer()), align=align)

    def splat(self, value: Any) -> Any:
        """`value` in every lane."""
        kind = ir.VectorType(value.type, LANES)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))

    def intrinsic(self, name: str, kind: ir.Type, *values: Any) -> Any:
        declared = self.module.globals.get(name)
        if declared is None:
            declared = ir.Function(self.module, ir.FunctionType(kind, [v.type for v in values]), name)
        return self.call(declared, values)

    def times(self, count: Any, body: Body, carried: Sequence[Any] = ()) -> Sequence[Any]:
        """`body(i, carried)` for i = 0 … count − 1, at least once; what it returns is carried on."""
        before, again = self.block, self.append_basic_block()
        self.branch(again)
        self.position_at_end(again)
        i = self.phi(I64)
        phis = [self.phi(value.type) for value in carried]
        after_each = body(i, phis)
        following, end = self.add(i, I64(1)), self.block
        for phi, first, later in zip([i, *phis], [I64(0), *carried], [following, *after_each], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        done = self.append_basic_block()
        self.cbranch(self.icmp_signed("<", following, count), again, done)
        self.position_at_end(done)
        return after_each


def _dot(b: Builder, vnni: bool, sums: Any, unsigned: Any, signed: Any) -> Any:
    """sums (16,) + for each lane the product of four unsigned bytes with four signed ones."""
    if vnni:
        return b.intrinsic("llvm.x86.avx512.vpdpbusd.512", INTS, sums, unsigned, signed)
    for byte in range(4):
        left = b.and_(b.lshr(unsigned, _all(8 * byte)), _all(255))
        right = b.ashr(b.shl(signed, _all(24 - 8 * byte)), _all(24))
        sums = b.add(sums, b.mul(left, right))
    return sums


def _all(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * LANES)


def _quantize(made: ir.Module) -> ir.Function:
    """(x, rows, count, groups, norm, inputs, eps): each row's groups as whole numbers, `ROW` bytes each; normed first
    where `norm` is not null."""
    kinds = [POINTER, POINTER, I64, I64, POINTER, I64, FLOAT]
    function = ir.Function(made, ir.FunctionType(ir.VoidType(), kinds), "quantize")
    function.linkage = "internal"
    b = Builder(function.append_basic_block())
    x, rows, count, groups, norm, inputs, eps = function.args
    normed = b.icmp_unsigned("!=", b.ptrtoint(norm, I64), I64(0))
    row_bytes, zero, one = b.mul(groups, I64(GROUP * 4)), FLOAT(0.0), FLOAT(1.0)

    def parts(base: Any, g: Any) -> list[Any]:
        return [b.read(b.at(base, b.add(b.mul(g, I64(GROUP * 4)), I64(64 * part))), FLOATS) for part in (0, 1)]

    def row(r: Any, _: Sequence[Any]) -> Sequence[Any]:
        x_row = b.at(x, b.mul(r, row_bytes))

        def square(g: Any, sums: Sequence[Any]) -> Sequence[Any]:
            return [b.intrinsic("llvm.fma.v16f32", FLOATS, v, v, s) for v, s in zip(parts(x_row, g), sums, strict=True)]

        before = b.block
        with b.if_then(normed):
            squares = b.times(groups, square, [ir.Constant(FLOATS, [0.0] * LANES)] * 2)
            total = b.intrinsic("llvm.vector.reduce.fadd.v16f32", FLOAT, zero, b.fadd(*squares))
            mean = b.fadd(b.fdiv(total, b.sitofp(inputs, FLOAT)), eps)
            root = b.fdiv(one, b.intrinsic("llvm.sqrt.f32", FLOAT, mean))
            inner = b.block
        phi = b.phi(FLOAT)
        phi.add_incoming(root, inner)
        phi.add_incoming(one, before)
        scale = b.splat(phi)

        def group(g: Any, _: Sequence[Any]) -> Sequence[Any]:
            values = [b.fmul(v, scale) for v in parts(x_row, g)]
            begun = b.block
            with b.if_then(normed):
                weighted = [b.fmul(v, w) for v, w in zip(values, parts(norm, g), strict=True)]
                inside = b.block
            chosen = [b.phi(FLOATS) for _ in values]
            for p, plain, w in zip(chosen, values, weighted, strict=True):
                p.add_incoming(w, inside)
                p.add_incoming(plain, begun)
            sizes = [b.intrinsic("llvm.fabs.v16f32", FLOATS, v) for v in chosen]
            most = b.intrinsic("llvm.maximum.v16f32", FLOATS, *sizes)
            most = b.intrinsic("llvm.vector.reduce.fmaximum.v16f32", FLOAT, most)
            inverse = b.splat(b.select(b.fcmp_ordered("==", most, zero), zero, b.fdiv(FLOAT(MOST), most)))
            to = b.at(rows, b.mul(b.add(b.mul(r, groups), g), I64(ROW)))
            total = None
            for part, value in enumerate(chosen):
                near = b.intrinsic("llvm.roundeven.v16f32", FLOATS, b.fmul(value, inverse))
                whole = b.intrinsic("llvm.fptosi.sat.v16i32.v16f32", INTS, near)
                high = b.ashr(b.add(whole, _all(128)), _all(8))
                for offset, numbers in ((8, high), (8 + GROUP, whole)):
                    b.write(b.trunc(numbers, ir.VectorType(I8, LANES)), b.at(to, offset + LANES * part))
                total = whole if total is None else b.add(total, whole)
            b.write(b.fdiv(most, FLOAT(MOST)), to)
            b.write(b.mul(b.intrinsic("llvm.vector.reduce.add.v16i32", I32, total), I32(128)), b.at(to, 4))
            return []

        b.times(groups, group)
        return []

    b.times(count, row)
    b.ret_void()
    return function


def _work(made: ir.Module, tile: int, vnni: bool) -> ir.Function:
    """One thread's part of a product: blocks of outputs, as long as there are any; `tile` rows at once."""
    function = ir.Function(made, ir.FunctionType(ir.VoidType(), [POINTER]), f"work{tile}")
    function.linkage = "internal"
    b = Builder(function.append_basic_block())
    job = function.args[0]
    word = {name: b.read(b.at(job, 8 * i), I64, 8) for i, name in enumerate(FIELDS[:-1])}
    weights, y, rows, start = (b.inttoptr(word[name], POINTER) for name in FIELDS[:4])
    last, tiles = b.sub(word["count"], I64(1)), b.sdiv(b.add(word["count"], I64(tile - 1)), I64(tile))
    width = b.mul(word["blocks"], I64(4 * BLOCK))
    counter = b.bitcast(b.at(job, 8 * FIELDS.index("next")), I64.as_pointer())
    grab, begin, done = (b.append_basic_block(name) for name in ("grab", "begin", "done"))
    b.branch(grab)
    b.position_at_end(grab)
    block = b.atomic_rmw("add", counter, I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", block, word["blocks"]), begin, done)
    b.position_at_end(begin)
    column = b.mul(block, I64(4 * BLOCK))
    here = b.at(weights, b.mul(b.mul(block, word["groups"]), I64(PIECE)))

    def capped(row: Any) -> Any:
        return b.select(b.icmp_signed("<", row, last), row, last)

    def begun(row: Any, _: Sequence[Any]) -> Sequence[Any]:
        """Outputs begin at zero, at the bias or at the residual."""
        to = b.at(y, b.add(b.mul(row, width), column))
        given = b.icmp_unsigned("!=", word["start"], I64(0))
        for v in range(VECTORS):
            b.write(ir.Constant(FLOATS, [0.0] * LANES), b.at(to, 64 * v))
        with b.if_then(given):
            source = b.at(start, b.add(b.mul(capped(row), word["stride"]), column))
            for v in range(VECTORS):
                b.write(b.read(b.at(source, 64 * v), FLOATS), b.at(to, 64 * v))
        return []

    def group(g: Any, _: Sequence[Any]) -> Sequence[Any]:
        piece = b.at(here, b.mul(g, I64(PIECE)))

        def some(t: Any, _: Sequence[Any]) -> Sequence[Any]:
            _tile(b, vnni, piece, [
                (b.at(rows, b.mul(b.add(b.mul(capped(row), word["groups"]), g), I64(ROW))),
                 b.at(y, b.add(b.mul(row, width), column)))
                for row in (b.add(b.mul(t, I64(tile)), I64(i)) for i in range(tile))
            ])
            return []

        b.times(tiles, some)
        return []

    b.times(b.mul(tiles, I64(tile)), begun)
    b.times(word["groups"], group)
    b.branch(grab)
    b.position_at_end(done)
    b.ret_void()
    return function


def _tile(b: Builder, vnni: bool, piece: Any, rows: Sequence[tuple[Any, Any]]) -> None:
    """One group of some rows, added to their outputs: rows are (where its numbers lie, where its outputs)."""
    sums = [[_all(0)] * VECTORS for _ in rows]
    for part in (0, 1):
        if part:
            sums = [[b.shl(s, _all(8)) for s in row] for row in sums]
        for four in range(GROUP // 4):
            numbers = [b.splat(b.read(b.at(x, 8 + GROUP * part + 4 * four), I32)) for x, _ in rows]
            for v in range(VECTORS):
                weights = b.read(b.at(piece, 2 * BLOCK + 4 * BLOCK * four + 64 * v), INTS, 64)
                for row, number in zip(sums, numbers, strict=True):
                    row[v] = _dot(b, vnni, row[v], weights, number)
    scales = [b.fpext(b.read(b.at(piece, 32 * v), ir.VectorType(HALF, LANES), 32), FLOATS) for v in range(VECTORS)]
    for (x, y), row in zip(rows, sums, strict=True):
        scale, shift = b.splat(b.read(x, FLOAT)), b.splat(b.read(b.at(x, 4), I32))
        for v in range(VECTORS):
            exact = b.sitofp(b.sub(row[v], shift), FLOATS)
            so_far = b.read(b.at(y, 64 * v), FLOATS)
            b.write(b.intrinsic("llvm.fma.v16f32", FLOATS, exact, b.fmul(scales[v], scale), so_far), b.at(y, 64 * v))


def _product(made: ir.Module, tile: int, quantize: ir.Function, work: ir.Function, threads: bool) -> None:
    """(map, x, y, rows, start, stride, count, threads), `map` being (weights, blocks, groups, norm, inputs, eps)."""
    kinds = [POINTER] * 5 + [I64] * 3
    function = ir.Function(made, ir.FunctionType(ir.VoidType(), kinds), f"product{tile}")
    b = Builder(function.append_basic_block())
    given, x, y, rows, start, stride, count, wanted = function.args
    weights, blocks, groups, norm, inputs = (b.read(b.at(given, 8 * i), I64, 8) for i in range(5))
    eps = b.read(b.at(given, 40), FLOAT)
    b.call(quantize, [x, rows, count, groups, b.inttoptr(norm, POINTER), inputs, eps])
    job = b.bitcast(b.alloca(I64, len(FIELDS)), POINTER)
    addresses = [weights, *(b.ptrtoint(p, I64) for p in (y, rows, start))]
    for i, value in enumerate([*addresses, b.mul(stride, I64(4)), count, blocks, groups, I64(0)]):
        b.write(value, b.at(job, 8 * i), 8)
    if not threads:
        b.call(work, [job])
        b.ret_void()
        return
    kind = ir.FunctionType(ir.VoidType(), [work.type, POINTER, I32, I32])
    team = made.globals.get("GOMP_parallel") or ir.Function(made, kind, "GOMP_parallel")
    with b.if_else(b.icmp_signed(">", wanted, I64(1))) as (several, one):
        with several:
            b.call(team, [work, job, b.trunc(wanted, I32), I32(0)])
        with one:
            b.call(work, [job])
    b.ret_void()
