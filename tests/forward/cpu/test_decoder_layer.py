"""Layers in one go give what their modules give, and layers that are anything else are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import tiny_models
from srlm_cli.forward.cpu import decoder_layer, gemm, linear
from srlm_cli.forward.cpu.decoder_layer import DecoderLayer
from srlm_cli.forward.cpu.gemm import Kind
from srlm_cli.forward.kv_cache import PagedKVCache, Span
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix

SIZES = {**tiny_models.SIZES, "hidden_size": 128, "num_hidden_layers": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
FAMILY = {
    "llama": ("LlamaConfig", SIZES),
    "biased": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 24}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 32}),  # norms of queries and keys, by head
    "olmo2": ("Olmo2Config", SIZES),  # norms of their outputs, and of all queries and keys at once
    "phi3": ("Phi3Config", SIZES),  # fused projections
    "phi4": ("Phi3Config", {**SIZES, "hidden_size": 256, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 32, "sliding_window": 24, "layer_types": LAYERS}),
    "small heads": ("LlamaConfig", {**SIZES, "hidden_size": 64}),
    "neox": ("GPTNeoXConfig", NEOX),  # LayerNorm, attention beside the MLP, no gates, a part of a head rotates
    "neox in turn": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False}),
}
OTHERS = {
    "granite": ("GraniteConfig", {**SIZES, "residual_multiplier": 0.5}),  # the same parts, added otherwise
    "gelu": ("LlamaConfig", {**SIZES, "hidden_act": "gelu"}),
    "split heads": ("Phi3Config", {**SIZES, "num_key_value_heads": 1}),  # keys begin within a panel
    "no whole panel": ("LlamaConfig", {**SIZES, "intermediate_size": 72}),
}


def model(name: str, sizes: dict) -> PackedModel:
    """Return a model with random weights that multiplies in bfloat16."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, initializer_range=0.1)
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in (weight for weight in net.parameters() if weight.dim() == 1):  # biases, and those of norms
            weight.add_(torch.randn_like(weight) / 2)
    linear.use_in(net, torch.bfloat16)
    return PackedModel(net, "cpu")


def fused_layers(packed: PackedModel) -> int:
    return sum(isinstance(getattr(vars(layer).get("forward"), "__self__", None), DecoderLayer)
               for layer in packed.net.modules())  # fmt: skip


def written(packed: PackedModel) -> torch.Tensor:
    """Return the logits behind two prompts that begin alike, and behind one more token of each."""
    cache = PagedKVCache(packed.layers, 12, packed.stored, "cpu")
    common = CachedPrefix(list(range(70)), kept=True, blocks=cache.allocate(3, shared=True))
    packed.read([common], cache)
    texts = [CachedPrefix([*common.tokens, *more], common, 70, common=common) for more in (range(40), [5, 6])]
    for text in texts:
        text.blocks = cache.allocate(2, shared=True)
    read = packed.read(texts, cache)
    own = [Span(cache.allocate(1), 1, len(text.tokens), [row]) for row, text in enumerate(texts)]
    shared = [Span(text.blocks, len(text.tokens) - 70, 70, [row]) for row, text in enumerate(texts)]
    return torch.cat([read, packed.step([7, 8], cache, own, shared, common, [0, 1])])


@pytest.mark.parametrize("kind", FAMILY)
def test_a_fused_model_gives_what_its_modules_give(monkeypatch, kind):
    packed, made = model(*FAMILY[kind]), []
    feed = DecoderLayer._feed_forward
    monkeypatch.setattr(DecoderLayer, "_feed_forward", lambda self, *of: (made.append(len(of[1])), feed(self, *of)))
    with torch.inference_mode():
        assert packed.fits() and fused_layers(packed) == 3
        made.clear()
        given = written(packed)
        assert made == [70] * 3 + [42] * 3 + [2] * 3
        for layer in packed.net.base_model.layers:
            del layer.forward
        wanted = written(packed)
        assert len(made) == 9
    assert (given - wanted).norm() / wanted.norm() < 5e-3


def test_many_rows_are_computed_block_by_block(monkeypatch):
    packed = model(*FAMILY["biased"])
    with torch.inference_mode():
        assert packed.fits() and fused_layers(packed) == 3
        whole = written(packed)
        monkeypatch.setattr(
            Kind, "blocks", lambda kind, rows: [slice(at, min(rows, at + 32)) for at in range(0, rows, 32)]
        )
        assert torch.equal(written(packed), whole)


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_of_another_kind_are_left_alone(kind):
    packed = model(*OTHERS[kind])
    with torch.inference_mode():
        assert packed.fits() and fused_layers(packed) == 0


def test_passes_that_are_not_compiled_go_by_the_modules(monkeypatch):
    packed = model(*FAMILY["llama"])
    with torch.inference_mode():
        assert packed.fits()
        before = packed.read([CachedPrefix([1, 2, 3])])  # no blocks to store it in
        for layer in packed.net.base_model.layers:
            del layer.forward
        assert torch.equal(packed.read([CachedPrefix([1, 2, 3])]), before)


def made_of(make, rows: torch.Tensor, others: torch.Tensor, number: float = 0.0) -> torch.Tensor:
    """Return what is made of rows, (rows, size), before it is packed."""
    made = torch.empty_like(rows)
    for at, row in enumerate(made):
        make(rows.numpy(), others.numpy(), np.float32(number), at * rows.shape[1], row.numpy())
    return made


def test_what_lies_between_products_is_as_torch_has_it():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-5).requires_grad_(False)
    norm.weight.normal_()
    for scale in (1e-4, 1.0, 1e4):
        rows = torch.randn(5, 48) * scale
        given = made_of(gemm._normed, rows, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(given, norm(rows), rtol=1e-5, atol=1e-6)
    heads, angles = torch.randn(5, 3, 64), torch.randn(2, 5, 64)
    wanted, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], *angles[:, None])
    decoder_layer.rotate_all(heads.flatten(1).numpy(), *angles.numpy(), 64)
    torch.testing.assert_close(heads.transpose(0, 1), wanted[0], rtol=1e-5, atol=1e-5)
    gates = torch.cat([torch.linspace(-30, 30, 60), torch.tensor([-1e4, -200.0, 200.0, 1e4])]).view(2, 32)
    up = torch.randn(2, 32)
    given = made_of(gemm._gated_by(gemm.SILU), gates, up)
    torch.testing.assert_close(given, torch.nn.functional.silu(gates) * up, rtol=1e-5, atol=1e-12)
    given = made_of(gemm._gated_by(gemm.GELU), gates, up)
    wanted = torch.nn.functional.gelu(gates, approximate="tanh") * up
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def test_a_layer_that_fails_in_the_trial_is_left_alone(monkeypatch):
    packed = model(*FAMILY["llama"])
    monkeypatch.setattr(DecoderLayer, "_attend", lambda *of: torch.zeros(2) + torch.zeros(3))
    with torch.inference_mode():
        assert packed.fits() and fused_layers(packed) == 0
