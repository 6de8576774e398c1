"""Vectors of 16 numbers for numba, and the functions of them that a selective scan is made of.

What a compiler makes of a scalar loop changes from version to version; so the vectors are written out, as a numba type
whose operations are LLVM's. `load`, `store` and what lies between them work on 16 lanes at once.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

LANES = 16


class Lanes(types.Type):
    """The numba type of LANES numbers of one kind, in registers."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(f"Lanes({element})")


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.element).get_value_type(), LANES))


SINGLE, DOUBLE = Lanes(types.float32), Lanes(types.float64)


def _define_operator(function, instruction: str) -> None:
    @type_callable(function)
    def typer(context):
        return lambda a, b: a if isinstance(a, Lanes) and a == b else None

    lower_builtin(function, Lanes, Lanes)(lambda context, builder, sig, args: getattr(builder, instruction)(*args))


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _splat(builder, value):
    vector = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    )


def _address(context, builder, array_type, array, index, lanes=True):
    array = context.make_array(array_type)(context, builder, array)
    pointer = builder.gep(array.data, [index])
    element = context.get_data_type(array_type.dtype)
    return builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer()) if lanes else pointer


@intrinsic
def load(typingctx, array, index):
    """array[index : index + LANES] of a flat array."""

    def generate(context, builder, sig, args):
        return builder.load(_address(context, builder, sig.args[0], *args), align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + LANES] = value."""

    def generate(context, builder, sig, args):
        builder.store(args[2], _address(context, builder, sig.args[0], *args[:2]), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


def _mask(builder, count):
    lane = ir.Constant(ir.VectorType(count.type, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lane, _splat(builder, count))


@intrinsic
def load_part(typingctx, array, index, count):
    """`load` of the first count lanes, zero in the others."""

    def generate(context, builder, sig, args):
        pointer, mask = _address(context, builder, sig.args[0], *args[:2]), _mask(builder, args[2])
        vector = pointer.type.pointee
        name = f"llvm.masked.load.v{LANES}f{array.dtype.bitwidth}.p0"
        arguments = [pointer, ir.Constant(ir.IntType(32), 4), mask, ir.Constant(vector, None)]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [a.type for a in arguments]), name
        )
        return builder.call(function, arguments)

    return Lanes(array.dtype)(array, types.intp, types.intp), generate


@intrinsic
def store_part(typingctx, array, index, count, value):
    """`store` of the first count lanes."""

    def generate(context, builder, sig, args):
        pointer, mask = _address(context, builder, sig.args[0], *args[:2]), _mask(builder, args[2])
        name = f"llvm.masked.store.v{LANES}f{array.dtype.bitwidth}.p0"
        arguments = [args[3], pointer, ir.Constant(ir.IntType(32), 4), mask]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [a.type for a in arguments]), name
        )
        builder.call(function, arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), generate


@intrinsic
def fill(typingctx, value):
    """value in every lane, float32."""

    def generate(context, builder, sig, args):
        return _splat(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return SINGLE(value), generate


@intrinsic
def fill_from(typingctx, array, index):
    """array[index] in every lane."""

    def generate(context, builder, sig, args):
        return _splat(builder, builder.load(_address(context, builder, sig.args[0], *args, lanes=False)))

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once where the machine can."""

    def generate(context, builder, sig, args):
        name = f"llvm.fmuladd.v{LANES}f{a.element.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(args[0].type, [args[0].type] * 3), name
        )
        return builder.call(function, args)

    return a(a, a, a), generate


@intrinsic
def larger(typingctx, a, b):
    """The larger of the two; a where it is not a number."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return a(a, a), generate


@intrinsic
def double(typingctx, a):
    """Float64 lanes."""

    def generate(context, builder, sig, args):
        return builder.fpext(args[0], ir.VectorType(ir.DoubleType(), LANES))

    return DOUBLE(a), generate


@intrinsic
def scale(typingctx, value, rounded):
    """value 2^k of float32 lanes for k = rounded - ROUND; 0 where the result would be below 2^-125.5."""

    def generate(context, builder, sig, args):
        bits = ir.VectorType(ir.IntType(32), LANES)
        exponent = builder.shl(builder.bitcast(args[1], bits), ir.Constant(bits, [23] * LANES))
        scaled = builder.add(builder.bitcast(args[0], bits), exponent)
        vanishes = builder.fcmp_ordered("<", args[1], ir.Constant(args[1].type, [ROUND - 125.0] * LANES))
        return builder.bitcast(builder.select(vanishes, ir.Constant(bits, None), scaled), args[0].type)

    return value(value, value), generate


@intrinsic
def prefetch(typingctx, array, index):
    """Asks for the cache line of array[index], to be written soon."""

    def generate(context, builder, sig, args):
        pointer = builder.bitcast(
            _address(context, builder, sig.args[0], *args, lanes=False), ir.IntType(8).as_pointer()
        )
        flags = [ir.Constant(ir.IntType(32), value) for value in (1, 2, 1)]  # write, second level cache, data
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *(flag.type for flag in flags)])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def add_transposed(typingctx, sums, to, stride, tile, at):
    """sums[to + i stride + k] += tile[at + k LANES + i] for i and k below 8, float64."""

    def generate(context, builder, sig, args):
        sums_type, _, _, tile_type, _ = sig.args
        sums, to, stride, tile, at = args
        eight = ir.VectorType(ir.DoubleType(), 8)

        def pointer(array_type, array, index):
            return builder.bitcast(_address(context, builder, array_type, array, index, lanes=False), eight.as_pointer())

        rows = [
            builder.load(pointer(tile_type, tile, builder.add(at, ir.Constant(at.type, k * LANES))), align=8)
            for k in range(8)
        ]
        for w in (1, 2, 4):  # swaps the off-diagonal blocks of all 2w x 2w blocks
            low = [k if not k & w else k - w + 8 for k in range(8)]
            high = [k + w if not k & w else k + 8 for k in range(8)]
            for k in range(8):
                if not k & w:
                    rows[k], rows[k + w] = (
                        builder.shuffle_vector(
                            rows[k], rows[k + w], ir.Constant(ir.VectorType(ir.IntType(32), 8), order)
                        )
                        for order in (low, high)
                    )
        for i, row in enumerate(rows):
            target = pointer(sums_type, sums, builder.add(to, builder.mul(stride, ir.Constant(to.type, i))))
            builder.store(builder.fadd(builder.load(target, align=8), row), target, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.intp, types.intp, tile, types.intp), generate


LOG2E = 1.4426950408889634
LOG2E_REST = LOG2E - float(np.float32(LOG2E))
ROUND = 12582912.0  # 1.5 2^23: adding it rounds to an integer, and leaves that in the low bits


@njit(nogil=True)
def power(x, y):
    """2^(x y) of float32 lanes for x y <= 0: to 2e-7 of the unrounded product, 1 at 0, 0 below 2^-125.5."""
    rounded = fma(x, y, fill(ROUND))
    return _power(rounded, fma(x, y, fill(ROUND) - rounded))


@njit(nogil=True)
def _power(rounded, f):
    """2^(k + f) for k = rounded - ROUND and |f| <= 1/2; the polynomial is 2^f to 1e-7."""
    p = fma(f, fill(0.0013264661), fill(0.0096715664))
    p = fma(f, p, fill(0.055507344))
    p = fma(f, p, fill(0.24022241))
    p = fma(f, p, fill(0.69314698))
    p = fma(f, p, fill(1.0))
    return scale(p, rounded)


@njit(nogil=True)
def exp(x):
    """e^x of float32 lanes for x <= 88."""
    rounded = fma(x, fill(LOG2E), fill(ROUND))
    f = fma(x, fill(LOG2E), fill(ROUND) - rounded)
    return _power(rounded, fma(x, fill(LOG2E_REST), f))


@njit(nogil=True)
def softplus(x):
    """log(1 + e^x), as log(1 + w) = 2 artanh(w / (2 + w))."""
    w = exp(fill(0.0) - larger(x, fill(0.0) - x))  # e^-|x|
    s = w / (w + fill(2.0))
    q = s * s
    p = fma(q, fill(0.14012229), fill(0.13999571))
    p = fma(q, p, fill(0.2001085))
    p = fma(q, p, fill(0.33333207))
    p = fma(q, p, fill(1.0))
    return fma(s + s, p, larger(x, fill(0.0)))


@njit(nogil=True)
def silu(x):
    return x / (fill(1.0) + exp(fill(0.0) - larger(x, fill(-88.0))))


@njit(nogil=True)
def add_tile(tile, sums, to, N, count):
    """Adds a tile (N,LANES) to sums[to:] (count,N)."""
    n8 = N // 8 * 8 if count == LANES else 0
    for n in range(0, n8, 8):
        add_transposed(sums, to + n, N, tile, n * LANES)
        add_transposed(sums, to + n + 8 * N, N, tile, n * LANES + 8)
    for lane in range(count):
        for n in range(n8, N):
            sums[to + lane * N + n] += tile[n * LANES + lane]


@njit(nogil=True)
def pair_at(i, j):
    """Where the sums of products of states i >= j stand: in squares of 2 x 2, row after row of the lower triangle."""
    return ((i // 2 * (i // 2 + 1) // 2 + j // 2) * 4 + i % 2 * 2 + j % 2) * LANES


@njit(nogil=True)
def add_products(values, at, length, rows, sums, to):
    """sums += sum over the steps of values[i] values[j], for i >= j; values [step][n][lane], see `pair_at` for sums."""
    for i in range(0, rows, 2):
        for j in range(0, i + 1, 2):
            s00 = fill(0.0)
            s01 = fill(0.0)
            s10 = fill(0.0)
            s11 = fill(0.0)
            for t in range(length):
                k = at + t * rows * LANES
                x0, x1 = load(values, k + i * LANES), load(values, k + (i + 1) * LANES)
                y0, y1 = load(values, k + j * LANES), load(values, k + (j + 1) * LANES)
                s00 = fma(x0, y0, s00)
                s01 = fma(x0, y1, s01)
                s10 = fma(x1, y0, s10)
                s11 = fma(x1, y1, s11)
            store(sums, to, load(sums, to) + double(s00))
            store(sums, to + LANES, load(sums, to + LANES) + double(s01))
            store(sums, to + 2 * LANES, load(sums, to + 2 * LANES) + double(s10))
            store(sums, to + 3 * LANES, load(sums, to + 3 * LANES) + double(s11))
            to += 4 * LANES
