"""Products in 16 bits: as exact as said, whatever the numbers are, the rows beside them, and the threads."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import tiny_models
from helpers import slow
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.forward.cpu import gemm, jit, linear, llvm
from srlm_cli.forward.cpu.linear import HalfLinear
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import CachedPrefix
from srlm_cli.models import hardware
from srlm_cli.models.hardware import has_bfloat16, has_float16, pick_dtype, pick_training_dtype

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(16, 64), (64, 128), (100, 70), (576, 192), (576, 577), (1536, 576)]


def away(given: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the size of the error, as a share of what is right."""
    return ((given.double() - exact).norm() / exact.norm()).item()


def layer(inputs: int, outputs: int, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(inputs + outputs)
    made = torch.nn.Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(made.weight, std=0.05)
    return made.requires_grad_(False)


def rounded(exact: torch.nn.Linear, numbers: torch.Tensor) -> torch.Tensor:
    """Return what a layer gives when rows and weights are rounded to bfloat16, and nothing else."""
    given = numbers.bfloat16().double() @ exact.weight.bfloat16().double().T
    return given + (exact.bias if exact.bias is not None else 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 33, 300])
def test_the_error_of_float16_is_less_than_that_of_rounding_to_bfloat16(shape, rows):
    exact, numbers = layer(*shape, bias=rows % 2 == 1), torch.randn(rows, shape[0])
    wanted = exact.double()(numbers.double())
    given = HalfLinear(exact.float(), torch.float16)(numbers)
    assert given.shape == (rows, shape[1]) and given.dtype == torch.float32
    assert away(given, wanted) < 0.7 * away(rounded(exact, numbers), wanted)


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "no pairs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 33, 300])
def test_bfloat16_adds_nothing_to_the_error_of_rounding(monkeypatch, shape, rows, pairs):
    if not pairs:  # as on a processor without the instruction
        monkeypatch.setattr(llvm, "has_pairs", lambda: False)
        monkeypatch.setattr(linear, "compiled", without_pairs())
    elif not llvm.has_pairs():
        pytest.skip("the processor has no AVX512-BF16")
    exact, numbers = layer(*shape, bias=rows % 2 == 1), torch.randn(rows, shape[0])
    given = HalfLinear(exact, torch.bfloat16)(numbers)
    assert given.shape == (rows, shape[1]) and given.dtype == torch.float32
    assert away(given, rounded(exact.double(), numbers)) < 1e-6


@cache
def without_pairs():
    """Return `products.compiled` that keeps nothing, so that no other process takes its code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "jit", lambda shape: jit.numba.njit(error_model="numpy", fastmath=True))
        made = gemm.compiled.__wrapped__(gemm.BFLOAT16)
        numbers = np.zeros((1, 64), np.float32)
        made.pack(numbers, numbers, np.float32(0), np.zeros(32, np.int32), np.zeros(1, np.float32))
    return lambda kind: made


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("weights", [1e-5, 1.0, 300.0])
def test_numbers_of_any_size_keep_their_digits(scale, weights, half):
    exact, numbers = layer(320, 96), torch.randn(7, 320)
    numbers[:, 5] *= 3000  # one input far above the others, as models have them
    numbers[3] = 0.0
    exact.weight *= weights
    wanted = exact.weight.double() @ (numbers.double() * scale).T
    given = HalfLinear(exact, half)(numbers * scale)
    assert away(given, wanted.T) < (2e-3 if half == torch.float16 else 6e-3)
    assert not given[3].any()


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_sums_that_float16_cannot_hold_are_right(half):
    exact = layer(1024, 128)
    exact.weight.fill_(100.0)
    torch.testing.assert_close(
        HalfLinear(exact, half)(torch.full((2, 1024), 1e3)), torch.full((2, 128), 1.024e8), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_weights_of_zero_give_zero(half):
    exact = layer(64, 64)
    exact.weight.zero_()
    assert not HalfLinear(exact, half)(torch.randn(3, 64)).any()


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(half):
    made, numbers = HalfLinear(layer(576, 192), half), torch.randn(2, 300, 576)
    together = made(numbers)
    for row in (0, 1, 77, 131, 132, 139, 227, 228, 299):  # more than a block of them
        assert torch.equal(made(numbers[1, row : row + 1]), together[1, row : row + 1])
    assert torch.equal(made(numbers[:, ::3]), together[:, ::3])


@pytest.mark.parametrize(
    ("half", "parts"),
    [(torch.float16, [(0, 2), (2, 5), (5, 8)]), (torch.bfloat16, [(0, 5), (5, 10), (10, 16)])],
    ids=str,
)
def test_several_threads_give_the_same(monkeypatch, half, parts):
    made, numbers = HalfLinear(layer(576, 1000, bias=True), half), torch.randn(40, 576)
    alone = made(numbers)
    given: list[tuple] = []
    monkeypatch.setattr(linear, "GRAIN", 1 << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    code = gemm.compiled(made.kind)
    noted = code._replace(multiply=lambda *of: (given.append(of[-2:]), code.multiply(*of)))
    monkeypatch.setattr(linear, "compiled", lambda kind: noted)
    assert torch.equal(made(numbers), alone)
    assert sorted(given) == parts


def on_such_a_cpu(patch: pytest.MonkeyPatch, half: torch.dtype) -> None:
    """Let the CPU be one that is fast in a type of 16 bits, and has no AMX."""
    patch.setattr(hardware, "has_bfloat16", lambda device: False)
    patch.setattr(hardware, "has_float16", lambda device: device == "cpu" and half == torch.float16)
    patch.setattr(hardware, "has_fast_pairs", lambda device: device == "cpu" and half == torch.bfloat16)


@pytest.fixture(scope="module", params=HALVES, ids=str)
def engines(request, tmp_path_factory):
    """Return engines with one tiny model in float32 and in 16 bits, on whatever CPU there is."""
    folder = str(tiny_models.save(tmp_path_factory.mktemp("model")))
    with pytest.MonkeyPatch.context() as patch:
        on_such_a_cpu(patch, request.param)
        exact = open_engine(EngineSpec("hf", folder, dtype="float32", batch_size=6))
        return exact, open_engine(EngineSpec("hf", folder, dtype="auto", batch_size=6)), request.param


def test_each_token_written_in_16_bits_is_among_the_most_probable_in_float32(engines):
    exact, halved, half = engines
    assert linear.type_of(halved.net) == half and linear.type_of(exact.net) is None
    assert halved.reader.stored == half and exact.reader.stored == torch.float32
    assert halved.net.dtype == torch.float32
    texts = ["a", "tell me " * 20 + "more", "tell me " * 20 + "less", "?" * 90, "", "z" * 33]
    asked = [Request([{"role": "user", "content": text}], Sampling(0.0, 1.0, 30), (0, 1)) for text in texts]
    written: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        finished = halved.stops.finished
        patch.setattr(halved.stops, "finished", lambda ids, *of: (written.append(list(ids)), finished(ids, *of))[1])
        assert len(list(halved.generate(asked))) == len(written) == 6  # what two seeds write alike is written once
    for request, tokens in zip(asked, written, strict=True):
        prompt = exact._tokens(exact.template.turn(request))
        with torch.inference_mode():
            logits = exact.net(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (behind < (0.02 if half == torch.float16 else 0.1) * logits.std(-1)).all()


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        *((kind, half) for kind in ("llama", "mamba") for half in HALVES),
        *(slow(kind, half) for kind in tiny_models.KINDS if kind not in ("llama", "mamba") for half in HALVES),
    ],
    ids=str,
)
def test_auto_serves_every_kind_of_model(monkeypatch, tmp_path, kind, half):
    on_such_a_cpu(monkeypatch, half)
    folder = str(tiny_models.save(tmp_path, kind))
    exact, auto = (open_engine(EngineSpec("hf", folder, dtype=dtype)) for dtype in ("float32", "auto"))
    packed = isinstance(exact.reader, PackedModel)
    assert isinstance(auto.reader, PackedModel) == packed
    assert linear.type_of(auto.net) == (half if packed else None)
    plain = torch.bfloat16 if half == torch.bfloat16 else torch.float32  # PyTorch is fast in it, too
    assert auto.net.dtype == (torch.float32 if packed else plain)
    texts = [exact._tokens(text) for text in ("a", "tell me " * 20 + "more")]
    with torch.inference_mode():
        wanted, given = (engine.reader.read([CachedPrefix(tokens) for tokens in texts]) for engine in (exact, auto))
    assert away(given, wanted.double()) < {torch.float16: 0.01 if packed else 1e-6, torch.bfloat16: 0.05}[half]
    asked = Request([{"role": "user", "content": "a"}], Sampling(0.7, 0.9, 9), (0, 1))
    assert [len(done.texts) for done in auto.generate([asked])] == [2]


def test_with_amx_torch_multiplies_and_compiled_code_attends(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: device == "cpu")
    monkeypatch.setattr(hardware, "has_fast_pairs", lambda device: False)
    folder = str(tiny_models.save(tmp_path))
    exact, amx = (open_engine(EngineSpec("hf", folder, dtype=dtype, batch_size=6)) for dtype in ("float32", "auto"))
    assert amx.net.dtype == amx.reader.stored == torch.bfloat16 and linear.type_of(amx.net) is None
    assert amx.reader.compiled
    asked = [
        Request([{"role": "user", "content": text}], Sampling(0.0, 1.0, 12), (0,), choices=("0", "1", "2"))
        for text in ("a", "tell me " * 20 + "more", "tell me " * 20 + "less")
    ]
    for given, wanted in zip(amx.generate(asked), exact.generate(asked), strict=True):
        assert given.probabilities == pytest.approx(wanted.probabilities, abs=0.05)
    written = [replace(request, choices=(), seeds=(0, 1)) for request in asked]
    assert [done.tokens_out > 0 for done in amx.generate(written)] == [True] * 3


def test_a_token_takes_half_the_memory(engines):
    assert engines[1].reader.token_bytes() * 2 == engines[0].reader.token_bytes()


@pytest.mark.parametrize(
    ("bfloat16", "pairs", "half", "asked", "hf", "others"),
    [
        (True, True, True, "auto", "bfloat16", "bfloat16"),
        (False, False, True, "auto", "float16", "float32"),
        (False, True, False, "auto", "bfloat16", "bfloat16"),
        (False, False, False, "auto", "float32", "float32"),
        (False, True, True, "float32", "float32", "float32"),
    ],
)
def test_auto_takes_what_the_processor_is_fast_in(monkeypatch, bfloat16, pairs, half, asked, hf, others):
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(hardware, "has_fast_pairs", lambda device: pairs)
    monkeypatch.setattr(hardware, "has_float16", lambda device: half)
    assert pick_dtype(asked, "cpu", float16=True) == hf
    assert pick_dtype(asked, "cpu") == others


def test_a_cpu_that_cannot_multiply_in_float16_leaves_it_to_torch(monkeypatch):
    monkeypatch.setenv("SRLM_CPU", "avx512_bf16")
    assert not has_float16("cpu")
    monkeypatch.setenv("SRLM_CPU", "avx512_fp16")
    assert has_float16("cpu") and not has_float16("cuda")


XEON, EPYC = {"cpu_name": "Intel(R) Xeon(R)"}, {"cpu_name": "AMD EPYC"}


@pytest.mark.parametrize(
    ("can", "units", "auto", "half"),
    [
        ({**XEON, "avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}, True, "bfloat16", None),
        ({**XEON, "avx512_bf16": True, "avx512_fp16": True}, False, "float16", torch.float16),
        ({**XEON, "avx512_bf16": True}, False, "float32", None),
        ({**EPYC, "avx512_bf16": True}, False, "bfloat16", torch.bfloat16),
        (EPYC, False, "float32", None),
        ({}, False, "float32", None),
    ],
)
def test_a_cpu_is_taken_for_what_it_is(monkeypatch, can, units, auto, half):
    monkeypatch.delenv("SRLM_CPU", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert has_bfloat16("cpu") == units
    assert pick_training_dtype("auto", "cpu") == ("bfloat16" if auto == "bfloat16" else "float32")
    assert pick_dtype("auto", "cpu", float16=True) == auto and linear.type_for(auto, "cpu") == half
    assert linear.type_for("float16", "cpu") == (torch.float16 if can.get("avx512_fp16") else None)
    assert linear.type_for("float32", "cpu") is None and linear.type_for("bfloat16", "cuda") is None
