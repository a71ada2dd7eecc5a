"""Vector operations in LLVM IR, shared by the compiled modules of this package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

FLOAT, HALF, INT, LONG = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(64)
LOG2_E = 1.4426950408889634
EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
        2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip
FLOATS, INTS = ir.VectorType(FLOAT, 16), ir.VectorType(INT, 16)  # one AVX-512 register
SHORTS = ir.VectorType(ir.IntType(16), 16)


class _Bfloat(ir.types.Type):
    """LLVM's bfloat16 type, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def cpu_features() -> list[str]:
    """Return the CPU features that numba compiles for, in LLVM's names: detected, or from NUMBA_CPU_FEATURES."""
    given = config.CPU_FEATURES
    return (binding.get_host_cpu_features().flatten() if given is None else given).split(",")


def has_halves() -> bool:
    """Return whether the processor has float16 arithmetic (AVX512-FP16)."""
    return "+avx512fp16" in cpu_features()


def add_halves(builder, sums, one, other):
    """Return 32 float16 sums plus the products of two float16 vectors."""
    if has_halves():
        return call(builder, "fma", sums.type, one, other, sums)
    wide = ir.VectorType(FLOAT, 32)  # LLVM would call a function per number, which does not exist
    total = call(builder, "fmuladd", wide, *(builder.fpext(of, wide) for of in (one, other, sums)))
    return builder.fptrunc(total, sums.type)


def has_pairs() -> bool:
    """Return whether the processor has dot products of bfloat16 pairs (AVX512-BF16)."""
    return "+avx512bf16" in cpu_features()


def add_pairs(builder, sums, one, other):
    """Return 16 float32 sums, each plus the dot product of two bfloat16 pairs; a pair is 32 bits."""
    if has_pairs():
        pairs = ir.VectorType(_Bfloat(), 32)
        kind = ir.FunctionType(FLOATS, [FLOATS, pairs, pairs])
        operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(operation, [sums, builder.bitcast(one, pairs), builder.bitcast(other, pairs)])
    for first, second in zip(of_pairs(builder, one), of_pairs(builder, other), strict=True):
        sums = call(builder, "fmuladd", FLOATS, first, second, sums)
    return sums


def of_pairs(builder, pairs) -> tuple:
    """Return the first and the second numbers of 16 bfloat16 pairs as float32."""
    first = builder.shl(pairs, ir.Constant(INTS, [16] * 16))
    second = builder.and_(pairs, ir.Constant(INTS, [-65536] * 16))
    return builder.bitcast(first, FLOATS), builder.bitcast(second, FLOATS)


def as_bfloat(builder, floats):
    """Return 16 float32 numbers rounded to the nearest bfloat16, as bits in int16."""
    if has_pairs():
        kind = ir.FunctionType(ir.VectorType(_Bfloat(), 16), [FLOATS])
        operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return builder.bitcast(builder.call(operation, [floats]), SHORTS)
    bits = builder.bitcast(floats, INTS)
    upper = builder.lshr(bits, ir.Constant(INTS, [16] * 16))
    last = builder.and_(upper, ir.Constant(INTS, [1] * 16))
    rounded = builder.add(bits, builder.add(last, ir.Constant(INTS, [0x7FFF] * 16)))
    return builder.trunc(builder.lshr(rounded, ir.Constant(INTS, [16] * 16)), SHORTS)


@intrinsic
def save_pairs(typing, numbers, at, scale, packed, to):
    """Write 16 numbers from index `at`, times a scale, as 8 bfloat16 pairs to an int32 array."""

    def generate(context, builder, signature, arguments):
        numbers, at, scale, packed, to = arguments
        loaded = builder.load(address(context, builder, signature.args[0], numbers, at, FLOATS), align=4)
        rounded = as_bfloat(builder, builder.fmul(loaded, each(builder, scale, 16)))
        builder.store(rounded, address(context, builder, signature.args[3], packed, to, SHORTS), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.float32, packed, types.intp), generate


def _reducer(first: float, joined: Callable, end: Callable):
    """Return an intrinsic that reduces an array to one number, by `joined(builder, result, 16 numbers)`."""

    @intrinsic
    def reduce(typing, numbers, at, count):
        """Return the reduction of `count` numbers, a multiple of 16, from index `at`."""

        def generate(context, builder, signature, arguments):
            numbers, at, count = arguments
            begin = address(context, builder, signature.args[0], numbers, at, FLOAT)

            def body(step, results):
                return [joined(builder, results[0], builder.load(vector_at(builder, begin, step), align=4))]

            (result,) = loop(builder, count, 16, [same(first)], body)
            return end(builder, result)

        return types.float32(numbers, types.intp, types.intp), generate

    return reduce


def sum_of(builder, vector):
    """Return the sum of 16 numbers."""
    return call(builder, "vector.reduce.fadd", FLOAT, ir.Constant(FLOAT, 0.0), vector, fastmath=("reassoc",))


def largest_of(builder, vector):
    """Return the largest of 16 numbers."""
    return call(builder, "vector.reduce.fmax", FLOAT, vector)


def _larger(builder, tops, numbers):
    return call(builder, "maxnum", FLOATS, tops, numbers)


squares = _reducer(0.0, lambda builder, sums, of: call(builder, "fmuladd", FLOATS, of, of, sums), sum_of)
largest = _reducer(float("-inf"), _larger, largest_of)
largest_size = _reducer(
    0.0, lambda builder, tops, of: _larger(builder, tops, call(builder, "fabs", FLOATS, of)), largest_of
)


def vector_at(builder, begin, step):
    """Return a pointer to 16 float32 numbers, `step` numbers after `begin`."""
    return builder.bitcast(builder.gep(begin, [step]), FLOATS.as_pointer())


def address(context, builder, array_type, array, at, of):
    """Return a pointer of the type `of` to index `at` of an array."""
    place = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.bitcast(place, of.as_pointer())


def each(builder, number, width: int):
    """Return a vector with the same number in all elements."""
    kind = ir.VectorType(number.type, width)
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, INT(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT, width), [0] * width))


def call(builder, name: str, result, *arguments, **options):
    """Call an LLVM intrinsic, which is overloaded by the type of the last argument, a vector."""
    vector = arguments[-1].type
    letter = "f16" if vector.element == HALF else "f32"
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    operation = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{vector.count}{letter}")
    return builder.call(operation, arguments, **options)


def exp2(builder, power):
    """Return 2 to the power of each of 16 numbers from -125 to 127.

    A polynomial gives the power of the fractional part (coefficients of Cephes' exp2f). The nearest integer is added to
    the exponent bits.
    """
    whole = call(builder, "rint", FLOATS, power)
    rest, result = builder.fsub(power, whole), same(EXP2[0])
    for coefficient in EXP2[1:]:
        result = call(builder, "fmuladd", FLOATS, result, rest, same(coefficient))
    exponent = builder.shl(builder.fptosi(whole, INTS), ir.Constant(INTS, [23] * 16))
    return builder.bitcast(builder.add(builder.bitcast(result, INTS), exponent), FLOATS)


def same(number: float) -> ir.Constant:
    """Return a constant vector of 16 equal float32 numbers."""
    return ir.Constant(FLOATS, [float(np.float32(number))] * 16)


def loop(builder, count, step: int, values: list, body) -> list:
    """Generate a loop: `values = body(place, values)` for place in range(0, count, step), at least once."""
    before, inside, behind = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("behind")
    builder.branch(inside)
    builder.position_at_end(inside)
    place = builder.phi(LONG)
    place.add_incoming(LONG(0), before)
    carried = [builder.phi(value.type) for value in values]
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, before)
    results = body(place, list(carried))
    following = builder.add(place, LONG(step))
    place.add_incoming(following, inside)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, inside)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, behind)
    builder.position_at_end(behind)
    return results


def prefetch(builder, place, near: int = 3, write: bool = False) -> None:
    """Prefetch memory that will be read or written soon, into the L1 cache (3) or the L2 cache (2)."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(operation, [builder.bitcast(place, byte), INT(int(write)), INT(near), INT(1)])
