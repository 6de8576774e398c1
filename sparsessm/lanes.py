"""Vectors of 16 numbers for numba.

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


def _chosen(kind, sign):
    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(sign, args[1], args[0]), args[1], args[0])

    return kind(kind, kind), generate


@intrinsic
def larger(typingctx, a, b):
    """The larger of the two; a where it is not a number."""
    return _chosen(a, ">")


@intrinsic
def smaller(typingctx, a, b):
    """The smaller of the two; a where it is not a number."""
    return _chosen(a, "<")


@intrinsic
def least(typingctx, a):
    """The least of all lanes."""

    def generate(context, builder, sig, args):
        name = f"llvm.vector.reduce.fmin.v{LANES}f{a.element.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(context.get_value_type(a.element), [args[0].type]), name
        )
        return builder.call(function, args)

    return a.element(a), generate


@intrinsic
def double(typingctx, a):
    """Float64 lanes."""

    def generate(context, builder, sig, args):
        return builder.fpext(args[0], ir.VectorType(ir.DoubleType(), LANES))

    return DOUBLE(a), generate


@intrinsic
def address(typingctx, array, index):
    """Where array[index] is in memory."""

    def generate(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], *args, lanes=False)
        return builder.ptrtoint(pointer, ir.IntType(64))

    return types.intp(array, types.intp), generate


@intrinsic
def prefetch(typingctx, at):
    """Asks for the cache line of an address, soon to be used."""

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        flags = [ir.Constant(ir.IntType(32), value) for value in (0, 2, 1)]  # read, second level cache, data
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *(flag.type for flag in flags)])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, *flags])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _load_transposed(context, builder, array_type, array, at, apart, count):
    """Vectors at array[at + k apart] for k < count, of which each square of count lanes is transposed."""
    rows = [
        builder.load(_address(context, builder, array_type, array, _place(builder, at, apart, k)), align=4)
        for k in range(count)
    ]
    w = 1
    while w < count:  # swaps the off-diagonal blocks of all 2w x 2w blocks
        low = [k if not k & w else k - w + LANES for k in range(LANES)]
        high = [k + w if not k & w else k + LANES for k in range(LANES)]
        for k in range(count):
            if not k & w:
                rows[k], rows[k + w] = (_shuffle(builder, rows[k], rows[k + w], order) for order in (low, high))
        w *= 2
    return rows


def _place(builder, start, apart, k):
    return builder.add(start, builder.mul(apart, ir.Constant(start.type, k)))


@intrinsic
def transpose(typingctx, source, at, apart, target, to, between):
    """target[to + i between + k] = source[at + k apart + i] for all lanes i and k below LANES."""

    def generate(context, builder, sig, args):
        source_type, target_type = sig.args[0], sig.args[3]
        source, at, apart, target, to, between = args
        for i, row in enumerate(_load_transposed(context, builder, source_type, source, at, apart, LANES)):
            builder.store(row, _address(context, builder, target_type, target, _place(builder, to, between, i)), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@intrinsic
def add_transposed(typingctx, sums, to, stride, tile, at, apart):
    """sums[to + i stride + k] += tile[at + k apart + i] for all lanes i and k below 8; sums are float64."""

    def generate(context, builder, sig, args):
        sums_type, _, _, tile_type, _, _ = sig.args
        sums, to, stride, tile, at, apart = args
        eight = ir.VectorType(ir.DoubleType(), 8)
        rows = _load_transposed(context, builder, tile_type, tile, at, apart, 8)
        for i in range(LANES):
            half = _shuffle(builder, rows[i % 8], rows[i % 8], list(range(i // 8 * 8, i // 8 * 8 + 8)))
            place = _address(context, builder, sums_type, sums, _place(builder, to, stride, i), lanes=False)
            target = builder.bitcast(place, eight.as_pointer())
            builder.store(builder.fadd(builder.load(target, align=8), builder.fpext(half, eight)), target, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.intp, types.intp, tile, types.intp, types.intp), generate


@njit(nogil=True)
def floats(size):
    """Float32 zeros from the beginning of a cache line on: vectors across two lines take twice as long."""
    whole = np.zeros(size + LANES, np.float32)
    first = -address(whole, 0) // 4 % LANES
    return whole[first : first + size]


@njit(nogil=True)
def take(array, index, width):
    """`load`, of the first width lanes."""
    return load(array, index) if width == LANES else load_part(array, index, width)


@njit(nogil=True)
def put(array, index, width, value):
    """`store`, of the first width lanes."""
    if width == LANES:  # stores of a part take many times as long
        store(array, index, value)
    else:
        store_part(array, index, width, value)


@njit(nogil=True)
def load_row(array, at):
    """Four vectors that lie side by side."""
    return load(array, at), load(array, at + LANES), load(array, at + 2 * LANES), load(array, at + 3 * LANES)


@njit(nogil=True)
def store_row(array, to, s0, s1, s2, s3):
    store(array, to, s0)
    store(array, to + LANES, s1)
    store(array, to + 2 * LANES, s2)
    store(array, to + 3 * LANES, s3)


@njit(nogil=True)
def add_wide(values, sums, to):
    """sums[to:] += values, whose length is a multiple of LANES and which are zero then; sums are float64."""
    for i in range(0, values.size, LANES):
        store(sums, to + i, load(sums, to + i) + double(load(values, i)))
        store(values, i, fill(0.0))
