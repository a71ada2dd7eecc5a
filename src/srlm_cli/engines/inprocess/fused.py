"""Layers of the Llama family in one go, on a CPU that multiplies in 16 bits itself.

What such a layer does between its products takes longer by operations of torch than by compiled code, and each
operation costs its call. A layer is computed here as its modules would, from the same weights. One that is made of
anything else, or gives anything else when it is tried out, is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from srlm_cli.engines.inprocess.attention import Pass, under_way
from srlm_cli.engines.inprocess.compiled_passes import CompiledReading, CompiledStep
from srlm_cli.engines.inprocess.halves import HalfLinear, Packed
from srlm_cli.engines.inprocess.jit import jit
from srlm_cli.engines.inprocess.vectors import FLOAT, LOG2_E, LONG, address, call, each, exp2, loop

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SILU = {"SiLU", "SiLUActivation"}
CLOSE = 1e-2  # of what a layer adds: more than another order of sums makes, with products in 16 bits


def use_in(net: torch.nn.Module, run: Callable[[], object]) -> None:
    """Compute those layers of a model by `FusedLayer` that give the same by it while `run` runs the model."""
    trials = [(layer, Trial(FusedLayer.of(layer))) for layer in net.modules() if FusedLayer.fits(layer)]
    for layer, trial in trials:
        layer.forward = trial.forward
    run()
    for layer, trial in trials:
        del layer.forward
        if trial.away < CLOSE:
            layer.forward = trial.layer.forward


@dataclass
class Trial:
    """Computes a layer both ways: `away` is the largest difference so far, as a share of what the layer adds."""

    layer: FusedLayer
    away: float = 0.0

    def forward(self, hidden_states: torch.Tensor, *positional, **named) -> torch.Tensor:
        """Return what the layer gives by its modules, and learn from them what they ask of the pass."""
        run = under_way()
        attend, asked = run.attend, []

        def noted(layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
            asked.append((layer, scaling, window))
            return attend(layer, query, key, value, scaling, window)

        run.attend = noted
        try:
            wanted = self.layer.forward_before(hidden_states, *positional, **named)
        finally:
            del run.attend
        try:
            ((layer, scaling, window),) = asked
            self.layer = replace(self.layer, layer=layer, scaling=scaling, window=window)
            given = self.layer.forward(hidden_states.clone(), *positional, **named)
            away = (given - wanted).norm(dim=-1) / (wanted - hidden_states).norm(dim=-1)
            self.away = max(self.away, away.nan_to_num(nan=1.0).max().item())
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
            self.away = float("inf")  # its modules can do without
        return wanted


@dataclass(frozen=True)
class Norm:
    """A root mean square norm (Zhang and Sennrich, arXiv 1910.07467)."""

    weight: np.ndarray
    epsilon: float

    @classmethod
    def of(cls, module: torch.nn.Module) -> Norm:
        return cls(module.weight.detach().float().numpy(), float(module.variance_epsilon))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(rows)
        _norm(rows.view(-1).numpy(), self.weight, np.float32(self.epsilon), normed.view(-1).numpy())
        return normed


@dataclass(frozen=True)
class FusedLayer:
    """One layer: the modules that multiply, and what is between them.

    `layer` is its number, `scaling` that of scores, and it sees the last `window` tokens, if that is not None.
    """

    forward_before: Callable[..., torch.Tensor]  # by its modules
    norms: tuple[Norm, Norm]
    projections: tuple[HalfLinear, HalfLinear, HalfLinear]  # of queries, keys and values
    output: HalfLinear
    gate: HalfLinear
    up: HalfLinear
    down: HalfLinear
    layer: int = 0
    scaling: float = 1.0
    window: int | None = None

    @classmethod
    def fits(cls, layer: torch.nn.Module) -> bool:
        """Tell whether a layer is made of such parts, and of nothing else."""
        if {name for name, _ in layer.named_children()} != LAYER:
            return False
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        parts = ((layer.self_attn, ATTENTION), (layer.mlp, MLP))
        if any({name for name, _ in part.named_children()} != wanted for part, wanted in parts):
            return False
        products = [module for part, _ in parts for name, module in part.named_children() if name != "act_fn"]
        return (
            all(hasattr(norm, "variance_epsilon") and not list(norm.children()) for norm in norms)
            and type(layer.mlp.act_fn).__name__ in SILU
            and all(isinstance(module, HalfLinear) and module.plain for module in products)
            and getattr(layer.self_attn, "head_dim", 1) % 32 == 0
        )

    @classmethod
    def of(cls, layer: torch.nn.Module) -> FusedLayer:
        norms = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        part, mlp = layer.self_attn, layer.mlp
        projections = part.q_proj, part.k_proj, part.v_proj
        return cls(layer.forward, norms, projections, part.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def forward(self, hidden_states: torch.Tensor, *positional, position_embeddings=None, **named) -> torch.Tensor:
        """Return hidden states, (1, rows, hidden), behind the layer; those before it are not needed any more."""
        run = under_way()
        if position_embeddings is None or not isinstance(run, CompiledStep | CompiledReading):
            return self.forward_before(hidden_states, *positional, position_embeddings=position_embeddings, **named)
        rows = hidden_states[0].contiguous()
        self._attend(run, rows, *(of[0].float().contiguous() for of in position_embeddings))
        for at in self.gate.kind.blocks(len(rows)):
            self._feed_forward(rows[at])
        return rows[None]

    def _attend(self, run: Pass, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Add to hidden states, (rows, hidden), what the tokens get that they see."""
        count, size = cosine.shape
        made = [of.begun(count) for of in self.projections]
        for at in self.gate.kind.blocks(count):
            packed = Packed.of(self.norms[0](rows[at]), self.gate.kind)
            for of, outputs in zip(self.projections, made, strict=True):
                of.add(packed, outputs[at], keep=of.has_bias)
        for outputs in made[:2]:
            _rotate(outputs.view(-1).numpy(), cosine.view(-1).numpy(), sine.view(-1).numpy(), size)
        query, key, value = (outputs.view(count, -1, size).transpose(0, 1)[None] for outputs in made)
        gathered = run.attend(self.layer, query, key, value, self.scaling, self.window)
        _add(self.output, gathered.view(count, -1), rows)

    def _feed_forward(self, rows: torch.Tensor) -> None:
        """Add to hidden states, (rows, hidden), what their tokens make of them."""
        packed = Packed.of(self.norms[1](rows), self.gate.kind)
        gate, up = self.gate.begun(len(rows)), self.up.begun(len(rows))
        self.gate.add(packed, gate, keep=self.gate.has_bias)
        self.up.add(packed, up, keep=self.up.has_bias)
        _silu_times(gate.view(-1).numpy(), up.view(-1).numpy())
        _add(self.down, gate, rows)


def _add(layer: HalfLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """Add to outputs, (rows, width), what a layer makes of inputs."""
    if layer.has_bias:
        outputs += layer.bias
    for at in layer.kind.blocks(len(inputs)):
        layer.add(Packed.of(inputs[at], layer.kind), outputs[at], keep=True)


# --- compiled code ---------------------------------------------------------------------------

_FLOATS = ir.VectorType(FLOAT, 16)


@jit()
def _norm(rows, weight, epsilon, normed):
    """Divide rows, (rows, size), by their root mean square, and multiply them by weights."""
    size = len(weight)
    for begin in range(0, len(rows), size):
        share = np.float32(1) / np.sqrt(_squares(rows, begin, size) / np.float32(size) + epsilon)
        _scaled(rows, begin, size, share, weight, normed)


@jit()
def _rotate(heads, cosine, sine, size):
    """Rotate the heads of rows, (rows, heads, size), by the angles of each row's position, (rows, size).

    Number i and number i + size / 2 are a pair (Su et al., arXiv 2104.09864, as transformers lays them).
    """
    rows = len(cosine) // size
    width = len(heads) // rows
    for row in range(rows):
        for begin in range(row * width, (row + 1) * width, size):
            _rotate_one(heads, begin, cosine, sine, row * size, size // 2)


@jit()
def _silu_times(gate, up):
    """Make the gate's numbers g sigmoid(g) times those beside them."""
    _silu_times_all(gate, up, len(gate))


@intrinsic
def _squares(typing, numbers, begin, count):
    """Return the sum of squares of so many numbers, a multiple of 16."""

    def generate(context, builder, signature, arguments):
        numbers, begin, count = arguments
        first = address(context, builder, signature.args[0], numbers, begin, FLOAT)

        def body(step, sums):
            number = _vector(builder, first, step)[1]
            return [call(builder, "fmuladd", _FLOATS, number, number, sums[0])]

        (sums,) = loop(builder, count, 16, [_same(0.0)], body)
        zero = ir.Constant(FLOAT, 0.0)
        return call(builder, "vector.reduce.fadd", FLOAT, zero, sums, fastmath=("reassoc",))

    return types.float32(numbers, types.intp, types.intp), generate


@intrinsic
def _scaled(typing, numbers, begin, count, share, weight, to):
    """Put so many numbers, a multiple of 16, times a share and times weights, to the same place of another array."""

    def generate(context, builder, signature, arguments):
        numbers, begin, count, share, weight, to = arguments
        first = address(context, builder, signature.args[0], numbers, begin, FLOAT)
        weights = address(context, builder, signature.args[4], weight, LONG(0), FLOAT)
        target = address(context, builder, signature.args[5], to, begin, FLOAT)
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
    """Return the place of 16 numbers, and these."""
    place = builder.bitcast(builder.gep(begin, [step]), _FLOATS.as_pointer())
    return place, builder.load(place, align=4)


def _same(number: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [number] * 16)


@intrinsic
def _rotate_one(typing, head, begin, cosine, sine, angle, half):
    """Rotate a head of 2 x `half` numbers, a multiple of 32, by the angles from a place on."""

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


@intrinsic
def _silu_times_all(typing, gate, up, count):
    def generate(context, builder, signature, arguments):
        gate, up, count = arguments
        gates = address(context, builder, signature.args[0], gate, LONG(0), FLOAT)
        ups = address(context, builder, signature.args[1], up, LONG(0), FLOAT)

        def body(step, nothing):
            place, number = _vector(builder, gates, step)
            power = builder.fmul(number, _same(-LOG2_E))
            power = call(builder, "maxnum", _FLOATS, power, _same(-126.0))
            power = call(builder, "minnum", _FLOATS, power, _same(127.0))
            share = builder.fadd(exp2(builder, power), _same(1.0))
            made = builder.fmul(number, _vector(builder, ups, step)[1])
            builder.store(builder.fdiv(made, share), place, align=4)
            return nothing

        loop(builder, count, 16, [], body)
        return context.get_dummy_value()

    return types.void(gate, up, types.intp), generate
