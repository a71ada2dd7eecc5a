"""Decoder layers as one function, on a CPU with 16-bit products.

The operations between the products are faster in compiled code than in torch, where each call has a cost. The function
uses the weights of the modules and computes the same. The names of its modules say what a layer may be: norms before or
after attention and MLP, norms of queries and keys, fused projections. Layers with other modules are not changed, nor
are layers whose result differs in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from srlm_cli.forward.attention import current_pass
from srlm_cli.forward.cpu.elementwise import rotate
from srlm_cli.forward.cpu.gemm import Kind
from srlm_cli.forward.cpu.jit import jit
from srlm_cli.forward.cpu.linear import HalfLinear, Packed
from srlm_cli.forward.cpu.paged_attention import CompiledPass

PARTS = {"self_attn", "mlp"}
NORMS = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
ATTENTIONS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}, {"query_key_value", "o_proj"})
HEAD_NORMS = {"q_norm", "k_norm"}
MLPS = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
OTHER_NAMES = {
    "attention": "self_attn", "dense": "o_proj", "dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj",
    "act": "act_fn", "activation_fn": "act_fn",
}  # fmt: skip
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu", "NewGELUActivation": "gelu"}
CLOSE = 1e-2  # relative to what a layer adds to its input; more than the order of 16-bit sums changes


def use_in(net: torch.nn.Module, run: Callable[[], object]) -> None:
    """Replace the layers of a model by `DecoderLayer` if both give the same result while `run` runs the model."""
    trials = [(layer, Trial(made)) for layer in net.modules() if (made := DecoderLayer.of(layer))]
    for layer, trial in trials:
        layer.forward = trial.forward
    try:
        run()
    finally:
        for layer, _ in trials:
            del layer.forward
    for layer, trial in trials:
        if trial.away and max(trial.away) < CLOSE:
            layer.forward = trial.layer.forward


@dataclass
class Trial:
    """Computes a layer in both ways; `away` has the largest relative difference of each pass."""

    layer: DecoderLayer
    away: list[float] = field(default_factory=list)

    def forward(self, hidden_states: torch.Tensor, *positional, **named) -> torch.Tensor:
        """Return the output of the layer's modules, and record how they call attention."""
        run = current_pass()
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
            self.away.append(away.nan_to_num(nan=1.0).max().item())
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
            self.away.append(float("inf"))  # the modules work without this
        return wanted


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of vectors as long as its weights."""

    weight: np.ndarray
    epsilon: float

    @classmethod
    def of(cls, module: torch.nn.Module) -> Norm:
        epsilon = _epsilon(module)
        scaled = module(torch.ones(module.weight.shape)).float()  # some multiply by 1 + weight
        return cls((scaled * (1 + epsilon) ** 0.5).numpy(), epsilon)

    def packed(self, rows: np.ndarray, kind: Kind) -> Packed:
        """Return rows, (rows, hidden), normalized and packed."""
        if rows.shape[1] != len(self.weight):
            raise ValueError("a norm of another size")
        return Packed.normed(rows, self.weight, self.epsilon, kind)

    def apply(self, rows: np.ndarray) -> None:
        """Normalize each head of rows, or each row, in place."""
        if rows.shape[1] % len(self.weight):
            raise ValueError("a norm of another size")
        normalize(rows, self.weight, np.float32(self.epsilon))


@dataclass(frozen=True)
class OtherNorm:
    """A norm that its module computes, such as LayerNorm."""

    module: torch.nn.Module

    def packed(self, rows: np.ndarray, kind: Kind) -> Packed:
        """Return rows, (rows, hidden), normalized and packed."""
        return Packed.of(self.module(torch.from_numpy(rows)).numpy(), kind)

    def apply(self, rows: np.ndarray) -> None:
        """Normalize rows in place."""
        rows[:] = self.module(torch.from_numpy(rows)).numpy()


AnyNorm = Norm | OtherNorm


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: its linear layers and its norms, of which those that it does not have are None.

    `layer` is its index, `scaling` the factor of attention scores, `window` the sliding window in tokens or None.
    """

    forward_before: Callable[..., torch.Tensor]  # of the modules
    before: tuple[AnyNorm | None, AnyNorm | None]  # norms of the input of attention and of the MLP
    after: tuple[AnyNorm | None, AnyNorm | None]  # norms of their output
    projections: tuple[HalfLinear, ...]  # of queries, keys and values, or one whose outputs are those of a head in turn
    of_heads: tuple[AnyNorm | None, AnyNorm | None]  # norms of queries and keys
    output: HalfLinear
    expansions: tuple[HalfLinear, ...]  # gate and up, or up alone
    activation: str | torch.nn.Module  # a name with gates
    down: HalfLinear
    head_size: int
    parallel: bool  # attention and MLP have the same input
    layer: int = 0
    scaling: float = 1.0
    window: int | None = None

    @classmethod
    def of(cls, layer: torch.nn.Module) -> DecoderLayer | None:
        """Return what computes a layer, or None if it has other modules than those that are known here."""
        modules = _modules(layer)
        if not PARTS <= modules.keys() <= PARTS | NORMS:
            return None
        attention, mlp = (_modules(modules.pop(part)) for part in ("self_attn", "mlp"))
        act, part = mlp.pop("act_fn", None), getattr(layer, "self_attn", None) or layer.attention
        activation = act if "up_proj" in mlp and len(mlp) == 2 else ACTIVATIONS.get(type(act).__name__)
        heads = {name: attention.pop(name) for name in HEAD_NORMS if name in attention}
        products = [*attention.values(), *mlp.values()]
        if (
            attention.keys() not in ATTENTIONS
            or mlp.keys() not in MLPS
            or activation is None
            or not all(_epsilon(norm) for norm in (*heads.values(), *modules.values()))
            or not all(isinstance(product, HalfLinear) and product.plain for product in products)
        ):
            return None
        norms = {name: _norm(module) for name, module in (*modules.items(), *heads.items())}
        second, last = norms.get("post_attention_layernorm"), norms.get("post_feedforward_layernorm")
        width = attention["o_proj"].in_features
        with suppress(ValueError):  # a fused layer whose parts begin within a panel
            return cls(
                layer.forward,
                before=(norms.get("input_layernorm"), norms.get("pre_feedforward_layernorm") if last else second),
                after=(second if last else None, last),
                projections=_parts(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", width),
                of_heads=(norms.get("q_norm"), norms.get("k_norm")),
                output=attention["o_proj"],
                expansions=_parts(mlp, ("gate_proj", "up_proj"), "gate_up_proj", mlp["down_proj"].in_features),
                activation=activation,
                down=mlp["down_proj"],
                head_size=getattr(part, "head_dim", None) or getattr(part, "head_size", 0),
                parallel=getattr(layer, "use_parallel_residual", False),
            )
        return None

    def forward(self, hidden_states: torch.Tensor, *positional, position_embeddings=None, **named) -> torch.Tensor:
        """Return the hidden states, (1, rows, hidden), after the layer; the input is overwritten."""
        run = current_pass()
        if position_embeddings is None or not isinstance(run, CompiledPass):
            return self.forward_before(hidden_states, *positional, position_embeddings=position_embeddings, **named)
        rows = hidden_states[0].contiguous().numpy()
        inputs = rows.copy() if self.parallel else rows
        self._attend(run, rows, *(of[0].float().contiguous().numpy() for of in position_embeddings))
        for at in self.down.kind.blocks(len(rows)):
            self._feed_forward(inputs[at], rows[at])
        return torch.from_numpy(rows)[None]

    def _attend(self, run: CompiledPass, rows: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
        """Add the output of attention to hidden states, (rows, hidden)."""
        made = [of.begun(len(rows)) for of in self.projections]
        for at in self.down.kind.blocks(len(rows)):
            _multiply(self._packed(0, rows[at]), self.projections, [outputs[at] for outputs in made])
        if len(made) == 1:
            of_heads = made[0].reshape(len(rows), -1, 3, self.head_size)
            made = [np.ascontiguousarray(of_heads[:, :, nth]).reshape(len(rows), -1) for nth in range(3)]
        queries, keys, values = made
        for heads, norm in zip((queries, keys), self.of_heads, strict=True):
            if norm:
                norm.apply(heads)
            rotate_all(heads, cosine, sine, self.head_size)
        gathered = run.gather(self.layer, queries, keys, values, self.scaling, self.window)
        for at in self.down.kind.blocks(len(rows)):
            self._add(0, self.output, Packed.of(gathered[at], self.down.kind), rows[at])

    def _feed_forward(self, inputs: np.ndarray, rows: np.ndarray) -> None:
        """Add the output of the MLP for inputs to hidden states, both (rows, hidden)."""
        made = [of.begun(len(rows)) for of in self.expansions]
        _multiply(self._packed(1, inputs), self.expansions, made)
        if len(made) == 2:
            packed = Packed.gated(*made, self.activation, self.down.kind)
        else:
            packed = Packed.of(self.activation(torch.from_numpy(made[0])).numpy(), self.down.kind)
        self._add(1, self.down, packed, rows)

    def _packed(self, part: int, rows: np.ndarray) -> Packed:
        """Return the input of attention (0) or of the MLP (1)."""
        norm, kind = self.before[part], self.down.kind
        return norm.packed(rows, kind) if norm else Packed.of(rows, kind)

    def _add(self, part: int, layer: HalfLinear, packed: Packed, rows: np.ndarray) -> None:
        """Add the output of a linear layer to hidden states, (rows, hidden)."""
        norm = self.after[part]
        if norm:
            outputs = layer.begun(len(rows))
            _multiply(packed, [layer], [outputs])
            norm.apply(outputs)
            rows += outputs
        else:
            if layer.bias is not None:
                rows += layer.bias
            layer.add(packed, rows, keep=True)


def _multiply(packed: Packed, layers: Sequence[HalfLinear], outputs: Sequence[np.ndarray]) -> None:
    """Add the products of rows with several layers to outputs that have `begun`."""
    for layer, made in zip(layers, outputs, strict=True):
        layer.add(packed, made, keep=layer.bias is not None)


def _modules(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules of a module by name; dropout does nothing here."""
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, torch.nn.Dropout)]
    return {OTHER_NAMES.get(name, name): child for name, child in children}


def _norm(module: torch.nn.Module) -> AnyNorm:
    return OtherNorm(module) if isinstance(module, torch.nn.LayerNorm) else Norm.of(module)


def _epsilon(norm: torch.nn.Module) -> float | None:
    """Return the small number that a norm adds to a mean square, None if the module is anything else."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    is_norm = isinstance(getattr(norm, "weight", None), torch.Tensor) and not list(norm.children())
    return found if is_norm and isinstance(found, float) else None


def _parts(of: dict[str, HalfLinear], names: tuple[str, ...], fused: str, first: int) -> tuple[HalfLinear, ...]:
    """Return linear layers by name, or the parts of a fused one: `first` outputs, and the others in equal shares."""
    if fused not in of:
        return tuple(of[name] for name in (*names, "query_key_value") if name in of)
    others = len(names) - 1
    return of[fused].split(first, *[(of[fused].out_features - first) // others] * others)


def rotate_all(heads: np.ndarray, cosine: np.ndarray, sine: np.ndarray, size: int) -> None:
    """Apply rotary embeddings to heads, (rows, heads x size); cosine and sine are (rows, numbers that rotate)."""
    rotated, width = cosine.shape[1], heads.shape[1]
    if rotated % 2 or rotated > size or width % size:
        raise ValueError(f"{rotated} of {size} numbers rotate")
    _rotate_all(heads, cosine, sine, size)


@jit()
def _rotate_all(heads, cosine, sine, size):
    (count, width), rotated = heads.shape, cosine.shape[1]
    half = rotated // 2
    for row in range(count):
        for begin in range(row * width, (row + 1) * width, size):
            if rotated % 32 == 0:
                rotate(heads, begin, cosine, sine, row * rotated, half)
            else:
                head = heads[row, begin - row * width :]
                for at in range(half):
                    one, other = head[at], head[at + half]
                    head[at] = one * cosine[row, at] - other * sine[row, at]
                    head[at + half] = other * cosine[row, at + half] + one * sine[row, at + half]


@jit()
def normalize(rows, weight, epsilon):
    """Divide each `len(weight)` numbers of rows by their root mean square and multiply them by weights, in place."""
    numbers, size = rows.reshape(-1), len(weight)
    for begin in range(0, len(numbers), size):
        part = numbers[begin : begin + size]
        squares = np.float32(0)
        for at in range(size):
            squares += part[at] * part[at]
        share = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
        for at in range(size):
            part[at] *= share * weight[at]
