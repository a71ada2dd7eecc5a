"""Logits of chosen tokens in float32, from a head in 16 bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from srlm_cli.engines.base import Request, Sampling
from srlm_cli.engines.hf.choices import ChoiceScorer, ScoringRequest
from srlm_cli.forward.exact_logits import exact_logits

TOKENS = [3, 17, 40]


class Net(torch.nn.Module):
    """A head alone; the logits are capped as Gemma's are."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(64, 50, bias=bias).to(dtype)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(self.head(hidden) / 30)


def in_float32(net: Net, hidden: torch.Tensor) -> torch.Tensor:
    weight, bias = (None if of is None else of.float() for of in (net.head.weight, net.head.bias))
    return 30 * torch.tanh(torch.nn.functional.linear(hidden.float(), weight, bias) / 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_chosen_tokens_are_not_rounded(dtype: torch.dtype, bias: bool) -> None:
    net = Net(dtype, bias=bias)
    hidden = 20 * torch.randn(1, 8, 64).to(dtype)
    before = net(hidden)
    with exact_logits(net, TOKENS):
        found = net(hidden)
    wanted = in_float32(net, hidden)[..., TOKENS]
    torch.testing.assert_close(found[..., TOKENS], wanted, rtol=1e-5, atol=1e-5)
    assert (before[..., TOKENS] - wanted).abs().max() > 1e-3, "the test sees no rounding"
    others = [token for token in range(50) if token not in TOKENS]
    torch.testing.assert_close(found[..., others].to(dtype), before[..., others], rtol=2e-2, atol=1e-2)
    assert torch.equal(net(hidden), before), "nothing stays behind"


def test_a_head_in_float32_is_left_alone() -> None:
    net = Net(torch.float32, bias=True)
    hidden = torch.randn(1, 8, 64)
    before = net(hidden)
    with exact_logits(net, TOKENS):
        assert torch.equal(net(hidden), before)


@torch.inference_mode()
def test_choices_are_scored_by_logits_in_float32() -> None:
    net = Net(torch.bfloat16, bias=False)
    hidden = 20 * torch.randn(1, 1, 64).to(torch.bfloat16)
    model = SimpleNamespace(net=net, read=lambda texts: net(hidden)[0].float())
    asked = ScoringRequest(
        Request([], Sampling(), (0,), choices=("a", "b", "c")), 2, [1, 2], [[token] for token in TOKENS]
    )
    [found] = ChoiceScorer(model).answer([asked])
    wanted = in_float32(net, hidden)[0, 0, TOKENS].softmax(-1).tolist()
    assert found.probabilities == pytest.approx(wanted, rel=1e-5)
    assert net(hidden)[0, 0, TOKENS].float().softmax(-1).tolist() != pytest.approx(wanted, rel=1e-3)
