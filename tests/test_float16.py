"""Products in float16: as exact as said, whatever the numbers are, the rows beside them, and the threads."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from srlm_cli import models
from srlm_cli.engines import EngineSpec, open_engine
from srlm_cli.engines.base import Request, Sampling
from srlm_cli.engines.inprocess import float16
from srlm_cli.engines.inprocess.float16 import Float16Linear
from srlm_cli.engines.inprocess.packed import PackedModel
from srlm_cli.engines.inprocess.texts import Text

SHAPES = [(16, 64), (64, 128), (100, 70), (576, 192), (576, 577), (1536, 576)]


def away(given: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the size of the error, as a share of what is right."""
    return ((given.double() - exact).norm() / exact.norm()).item()


def layer(inputs: int, outputs: int, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(inputs + outputs)
    made = torch.nn.Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(made.weight, std=0.05)
    return made.requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 33, 300])
def test_the_error_is_less_than_that_of_rounding_to_bfloat16(shape, rows):
    exact, numbers = layer(*shape, bias=rows % 2 == 1), torch.randn(rows, shape[0])
    wanted = exact.double()(numbers.double())
    rounded = exact.weight.bfloat16().double() @ numbers.bfloat16().double().T
    rounded = rounded.T + (exact.bias if exact.bias is not None else 0)
    given = Float16Linear(exact.float())(numbers)
    assert given.shape == (rows, shape[1]) and given.dtype == torch.float32
    assert away(given, wanted) < 0.7 * away(rounded, wanted)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("weights", [1e-5, 1.0, 300.0])
def test_numbers_of_any_size_keep_their_digits(scale, weights):
    exact, numbers = layer(320, 96), torch.randn(7, 320)
    numbers[:, 5] *= 3000  # one input far above the others, as models have them
    numbers[3] = 0.0
    exact.weight *= weights
    wanted = exact.weight.double() @ (numbers.double() * scale).T
    given = Float16Linear(exact)(numbers * scale)
    assert away(given, wanted.T) < 2e-3
    assert not given[3].any()


def test_sums_that_float16_cannot_hold_are_right():
    exact = layer(1024, 128)
    exact.weight.fill_(100.0)
    torch.testing.assert_close(
        Float16Linear(exact)(torch.full((2, 1024), 1e3)), torch.full((2, 128), 1.024e8), rtol=0.01, atol=0
    )


def test_weights_of_zero_give_zero():
    exact = layer(64, 64)
    exact.weight.zero_()
    assert not Float16Linear(exact)(torch.randn(3, 64)).any()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    made, numbers = Float16Linear(layer(576, 192)), torch.randn(2, 140, 576)
    together = made(numbers)
    for row in (0, 1, 77, 131, 132, 139):
        assert torch.equal(made(numbers[1, row : row + 1]), together[1, row : row + 1])
    assert torch.equal(made(numbers[:, ::3]), together[:, ::3])


def test_several_threads_give_the_same(monkeypatch):
    made, numbers = Float16Linear(layer(576, 1000, bias=True)), torch.randn(40, 576)
    alone = made(numbers)
    given: list[tuple] = []
    monkeypatch.setattr(float16, "GRAIN", 1 << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(float16, "_multiply", lambda *of, to=float16._multiply: (given.append(of[-2:]), to(*of)))
    assert torch.equal(made(numbers), alone)
    assert sorted(given) == [(0, 2), (2, 5), (5, 8)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Return engines with one tiny model in float32 and float16, on whatever CPU there is."""
    folder = str(tiny_models.save(tmp_path_factory.mktemp("model")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "has_float16", lambda device: device == "cpu")
        return [open_engine(EngineSpec("hf", folder, dtype=dtype, batch_size=6)) for dtype in ("float32", "float16")]


def test_each_token_written_in_float16_is_among_the_most_probable_in_float32(engines):
    exact, halved = engines
    assert float16.multiplies(halved.net) and not float16.multiplies(exact.net)
    assert halved.reader.stored == torch.float16 and exact.reader.stored == torch.float32
    assert halved.net.dtype == torch.float32
    texts = ["a", "tell me " * 20 + "more", "tell me " * 20 + "less", "?" * 90, "", "z" * 33]
    asked = [Request([{"role": "user", "content": text}], Sampling(0.0, 1.0, 30), (0, 1)) for text in texts]
    written: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        finished = halved.stops.finished
        patch.setattr(halved.stops, "finished", lambda ids, *of: (written.append(list(ids)), finished(ids, *of))[1])
        assert len(list(halved.generate(asked))) == len(written) // 2 == 6
    for request, tokens in zip(asked, written[::2], strict=True):
        prompt = exact._render(request)
        with torch.inference_mode():
            logits = exact.net(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (behind < 0.02 * logits.std(-1)).all()


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_auto_serves_every_kind_of_model(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(models, "has_float16", lambda device: device == "cpu")
    monkeypatch.setattr(models, "has_bfloat16", lambda device: False)
    folder = str(tiny_models.save(tmp_path, kind))
    exact, auto = (open_engine(EngineSpec("hf", folder, dtype=dtype)) for dtype in ("float32", "auto"))
    packed = isinstance(exact.reader, PackedModel)
    assert float16.multiplies(auto.net) == isinstance(auto.reader, PackedModel) == packed
    assert auto.net.dtype == torch.float32
    texts = [exact._tokens(text) for text in ("a", "tell me " * 20 + "more")]
    with torch.inference_mode():
        wanted, given = (engine.reader.read([Text(tokens) for tokens in texts]) for engine in (exact, auto))
    assert away(given, wanted.double()) < (0.01 if packed else 1e-6)
    asked = Request([{"role": "user", "content": "a"}], Sampling(0.7, 0.9, 9), (0, 1))
    assert [len(done.texts) for done in auto.generate([asked])] == [2]


def test_a_token_takes_half_the_memory(engines):
    assert engines[1].reader.token_bytes() * 2 == engines[0].reader.token_bytes()


@pytest.mark.parametrize(
    ("bfloat16", "half", "asked", "hf", "others"),
    [
        (True, True, "auto", "bfloat16", "bfloat16"),
        (False, True, "auto", "float16", "float32"),
        (False, False, "auto", "float32", "float32"),
        (False, True, "float32", "float32", "float32"),
    ],
)
def test_auto_takes_what_the_processor_is_fast_in(monkeypatch, bfloat16, half, asked, hf, others):
    monkeypatch.setattr(models, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(models, "has_float16", lambda device: half)
    assert models.pick_dtype(asked, "cpu", float16=True) == hf
    assert models.pick_dtype(asked, "cpu") == others


def test_a_cpu_that_cannot_multiply_in_float16_leaves_it_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": False})
    assert not models.has_float16("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True})
    assert models.has_float16("cpu") and not models.has_float16("cuda")
