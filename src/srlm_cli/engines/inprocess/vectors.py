"""How compiled code says vectors to LLVM: what `kernels` and `float16` share."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

FLOAT, HALF, INT, LONG = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(64)


def address(context, builder, array_type, array, at, of):
    """Return where a number or vector of the type `of` lies that begins at a place of an array."""
    place = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.bitcast(place, of.as_pointer())


def each(builder, number, width: int):
    """Return a vector with a number in all places."""
    kind = ir.VectorType(number.type, width)
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, INT(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT, width), [0] * width))


def call(builder, name: str, result, *arguments, **options):
    """Call an operation of LLVM, which is named for the type of the last argument, a vector."""
    vector = arguments[-1].type
    letter = "f16" if vector.element == HALF else "f32"
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    operation = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{vector.count}{letter}")
    return builder.call(operation, arguments, **options)


def loop(builder, count, step: int, values: list, body) -> list:
    """Return what values become by `body(place, values)` for each place in range(0, count, step), at least one."""
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


def prefetch(builder, place, near: int = 3) -> None:
    """Ask memory for what will be read soon: into the first cache (3) or the second (2)."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    operation = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(operation, [builder.bitcast(place, byte), INT(0), INT(near), INT(1)])
