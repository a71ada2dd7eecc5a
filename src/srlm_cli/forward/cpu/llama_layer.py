"""Layers of the Llama family as one function, on a CPU with 16-bit products.

The operations between the products are faster in compiled code than in torch, where each call has a cost. The function
uses the weights of the modules and computes the same. Layers with other modules are not changed, nor are layers whose
result differs in a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from srlm_cli.forward.attention import current_pass
from srlm_cli.forward.cpu.elementwise import rotate
from srlm_cli.forward.cpu.gemm import Kind
from srlm_cli.forward.cpu.jit import jit
from srlm_cli.forward.cpu.linear import HalfLinear, Packed
from srlm_cli.forward.cpu.paged_attention import CompiledPass

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SILU = {"SiLU", "SiLUActivation"}
CLOSE = 1e-2  # relative to what a layer adds to its input; more than the order of 16-bit sums changes


def use_in(net: torch.nn.Module, run: Callable[[], object]) -> None:
    """Replace the layers of a model by `LlamaLayer` if both give the same result while `run` runs the model."""
    trials = [(layer, Trial(LlamaLayer.of(layer))) for layer in net.modules() if LlamaLayer.fits(layer)]
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

    layer: LlamaLayer
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
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467)."""

    weight: np.ndarray
    epsilon: float

    @classmethod
    def of(cls, module: torch.nn.Module) -> Norm:
        return cls(module.weight.detach().float().numpy(), float(module.variance_epsilon))

    def packed(self, rows: np.ndarray, kind: Kind) -> Packed:
        """Return rows, (rows, hidden), normalized and packed."""
        return Packed.normed(rows, self.weight, self.epsilon, kind)


@dataclass(frozen=True)
class LlamaLayer:
    """One layer: its linear layers and its norms.

    `layer` is its index, `scaling` the factor of attention scores, `window` the sliding window in tokens or None.
    """

    forward_before: Callable[..., torch.Tensor]  # of the modules
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
        """Return whether a layer has exactly these modules."""
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
    def of(cls, layer: torch.nn.Module) -> LlamaLayer:
        norms = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        part, mlp = layer.self_attn, layer.mlp
        projections = part.q_proj, part.k_proj, part.v_proj
        return cls(layer.forward, norms, projections, part.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def forward(self, hidden_states: torch.Tensor, *positional, position_embeddings=None, **named) -> torch.Tensor:
        """Return the hidden states, (1, rows, hidden), after the layer; the input is overwritten."""
        run = current_pass()
        if position_embeddings is None or not isinstance(run, CompiledPass):
            return self.forward_before(hidden_states, *positional, position_embeddings=position_embeddings, **named)
        rows = hidden_states[0].contiguous().numpy()
        self._attend(run, rows, *(of[0].float().contiguous().numpy() for of in position_embeddings))
        for at in self.gate.kind.blocks(len(rows)):
            self._feed_forward(rows[at])
        return torch.from_numpy(rows)[None]

    def _attend(self, run: CompiledPass, rows: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> None:
        """Add the output of attention to hidden states, (rows, hidden)."""
        queries, keys, values = made = [of.begun(len(rows)) for of in self.projections]
        for at in self.gate.kind.blocks(len(rows)):
            packed = self.norms[0].packed(rows[at], self.gate.kind)
            for of, outputs in zip(self.projections, made, strict=True):
                of.add(packed, outputs[at], keep=of.bias is not None)
        rotate_all(queries, cosine, sine)
        rotate_all(keys, cosine, sine)
        gathered = run.gather(self.layer, queries, keys, values, self.scaling, self.window)
        for at in self.gate.kind.blocks(len(rows)):
            _add(self.output, Packed.of(gathered[at], self.gate.kind), rows[at])

    def _feed_forward(self, rows: np.ndarray) -> None:
        """Add the output of the MLP to hidden states, (rows, hidden)."""
        packed = self.norms[1].packed(rows, self.gate.kind)
        gates, up = self.gate.begun(len(rows)), self.up.begun(len(rows))
        self.gate.add(packed, gates, keep=self.gate.bias is not None)
        self.up.add(packed, up, keep=self.up.bias is not None)
        _add(self.down, Packed.gated(gates, up, self.gate.kind), rows)


def _add(layer: HalfLinear, packed: Packed, outputs: np.ndarray) -> None:
    """Add the output of a linear layer to outputs, (rows, width)."""
    if layer.bias is not None:
        outputs += layer.bias
    layer.add(packed, outputs, keep=True)


@jit()
def rotate_all(heads, cosine, sine):
    """Apply rotary embeddings to heads, (rows, heads x size); cosine and sine are (rows, size)."""
    (count, width), size = heads.shape, cosine.shape[1]
    for row in range(count):
        for begin in range(row * width, (row + 1) * width, size):
            rotate(heads, begin, cosine, sine, row * size, size // 2)
