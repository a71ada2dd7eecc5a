"""The operations of a layer between its matrix products, as compiled code: norms, rotary embeddings, gates.

Indices count from the first element of an array, which is contiguous, whatever its shape.
"""

from __future__ import annotations

from numba.core import types
from numba.extending import intrinsic

from srlm_cli.forward.cpu.llvm import FLOAT, FLOATS, LOG2_E, LONG, address, call, each, exp2, loop, same, vector_at


@intrinsic
def scaled(typing, numbers, begin, count, share, weight, to):
    """Write `count` numbers, a multiple of 16, times `share` and times weights, to another array."""

    def generate(context, builder, signature, arguments):
        numbers, begin, count, share, weight, to = arguments
        first = address(context, builder, signature.args[0], numbers, begin, FLOAT)
        weights = address(context, builder, signature.args[4], weight, LONG(0), FLOAT)
        target = address(context, builder, signature.args[5], to, LONG(0), FLOAT)
        shares = each(builder, share, 16)

        def body(step, nothing):
            scaled = builder.fmul(_vector(builder, first, step)[1], shares)
            made = builder.fmul(scaled, _vector(builder, weights, step)[1])
            builder.store(made, _vector(builder, target, step)[0], align=4)
            return nothing

        loop(builder, count, 16, [], body)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.intp, types.float32, weight, to), generate


def _vector(builder, begin, step) -> tuple:
    """Return a pointer to 16 numbers, and the numbers."""
    place = vector_at(builder, begin, step)
    return place, builder.load(place, align=4)


@intrinsic
def rotate(typing, head, begin, cosine, sine, angle, half):
    """Apply rotary embeddings to a head of 2 x `half` numbers, a multiple of 32, with the angles from index `angle`.

    Numbers i and i + half are a pair, as in transformers (Su et al., arXiv 2104.09864).
    """

    def generate(context, builder, signature, arguments):
        head, begin, cosine, sine, angle, half = arguments
        numbers = address(context, builder, signature.args[0], head, begin, FLOAT)
        cosines = address(context, builder, signature.args[2], cosine, angle, FLOAT)
        sines = address(context, builder, signature.args[3], sine, angle, FLOAT)

        def body(step, nothing):
            behind = builder.add(step, half)
            (place, one), (beside, other) = (_vector(builder, numbers, at) for at in (step, behind))
            (cos, sin), (cos_behind, sin_behind) = (
                (_vector(builder, cosines, at)[1], _vector(builder, sines, at)[1]) for at in (step, behind)
            )
            builder.store(builder.fsub(builder.fmul(one, cos), builder.fmul(other, sin)), place, align=4)
            rotated = builder.fadd(builder.fmul(other, cos_behind), builder.fmul(one, sin_behind))
            builder.store(rotated, beside, align=4)
            return nothing

        loop(builder, half, 16, [], body)
        return context.get_dummy_value()

    return types.void(head, types.intp, cosine, sine, types.intp, types.intp), generate


def gate(linear: float, cubic: float):
    """Return an intrinsic for the gates g sigmoid(a g + b g^3): SiLU, or GELU in its form with tanh."""

    @intrinsic
    def gated(typing, gate, up, begin, count, to):
        """Write the gates times `up`, for `count` gates, a multiple of 16, to another array."""

        def generate(context, builder, signature, arguments):
            gate, up, begin, count, to = arguments
            gates = address(context, builder, signature.args[0], gate, begin, FLOAT)
            ups = address(context, builder, signature.args[1], up, begin, FLOAT)
            target = address(context, builder, signature.args[4], to, LONG(0), FLOAT)

            def body(step, nothing):
                number = _vector(builder, gates, step)[1]
                factor = same(-LOG2_E * linear)
                if cubic:
                    square = builder.fmul(number, number)
                    factor = call(builder, "fmuladd", FLOATS, square, same(-LOG2_E * cubic), factor)
                power = builder.fmul(number, factor)
                power = call(builder, "maxnum", FLOATS, power, same(-125.0))
                power = call(builder, "minnum", FLOATS, power, same(127.0))
                share = builder.fadd(exp2(builder, power), same(1.0))
                made = builder.fmul(number, _vector(builder, ups, step)[1])
                builder.store(builder.fdiv(made, share), _vector(builder, target, step)[0], align=4)
                return nothing

            loop(builder, count, 16, [], body)
            return context.get_dummy_value()

        return types.void(gate, up, types.intp, types.intp, to), generate

    return gated
