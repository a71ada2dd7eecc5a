"""The draw of a token: the exact nucleus, whatever of it the prefilter sees."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from srlm_cli.engines.base import Sampling
from srlm_cli.engines.hf import sampling
from srlm_cli.engines.hf.sampling import PREFILTER, draw, draw_nucleus, most_probable, penalized, uniforms

VOCABULARY = 1031
DRAWS = 4000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let a small vocabulary have many blocks, as a real one has."""
    monkeypatch.setattr(sampling, "BLOCK", 8)
    monkeypatch.setattr(sampling, "BEST_BLOCKS", 32)


def exact(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return the probabilities of the nucleus in double precision, by a sort of all tokens."""
    ordered, ids = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    size = min(int((ordered.cumsum(0) < top_p).sum()) + 1, len(logits))
    wanted = torch.zeros(len(logits), dtype=torch.float64)
    wanted[ids[:size]] = ordered[:size] / ordered[:size].sum()
    return wanted


def p_value(tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the chi-square p-value of drawn tokens; rare ones are counted together, impossible ones fail."""
    counts = torch.bincount(tokens, minlength=len(wanted)).double()
    assert counts[wanted == 0].sum() == 0
    often = wanted * len(tokens) >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([wanted[often], wanted[~often].sum()[None]]) * len(tokens)
    kept = expected > 0
    assert kept.sum() > 1
    return chisquare(observed[kept], expected[kept]).pvalue


def by_torch(logits, temperature, top_p, uniform):
    """Draw as it is done on a GPU."""
    return draw_nucleus(logits / temperature[:, None], top_p, uniform)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [0.7, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("way", [draw, by_torch])
def test_frequencies_are_those_of_the_nucleus(temperature, top_p, way):
    torch.manual_seed(1)
    logits = torch.randn(VOCABULARY) * 2
    settings = [torch.full((DRAWS,), value) for value in (temperature, top_p)]
    tokens = way(logits.expand(DRAWS, -1), *settings, torch.rand(DRAWS))
    assert p_value(tokens, exact(logits, temperature, top_p)) > 1e-4


@pytest.mark.parametrize("draws", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("spread", "top_p", "wide"),
    [(2.0, 0.6, False), (2.0, 0.9, False), (2.0, 1.0, True), (0.2, 0.2, False), (0.2, 0.9, True), (0.2, 1.0, True)],
)
def test_many_draws_are_of_the_nucleus_whether_the_prefilter_holds_it_or_not(spread, top_p, wide, draws, monkeypatch):
    monkeypatch.undo()  # blocks as they are
    torch.manual_seed(0)
    logits = torch.randn(1, 1000) * spread
    wanted = exact(logits[0], 1.0, top_p)
    assert (int((wanted > 0).sum()) > PREFILTER) == wide
    tokens = [draw_nucleus(logits.expand(2000, -1), top_p, torch.rand(2000)) for _ in range(draws // 2000)]
    assert p_value(torch.cat(tokens), wanted) > 1e-4


def test_both_ways_of_the_draw_are_tried_above():
    torch.manual_seed(1)
    logits = torch.randn(VOCABULARY) * 2
    sizes = {(t, p): int((exact(logits, t, p) > 0).sum()) for t in (0.5, 1.5) for p in (0.7, 0.95)}
    assert 1 < sizes[0.5, 0.7] < 32 and sizes[1.5, 0.95] > PREFILTER


@pytest.mark.parametrize("probable", [None, slice(640, 648), slice(40, 1024, 128)], ids=["any", "neighbours", "block"])
def test_candidates_that_are_sure_are_the_largest_of_all(probable):
    torch.manual_seed(2)
    logits = torch.randn(6, VOCABULARY)
    if probable:  # all that is probable side by side or in one block, and in the rest behind the last whole line
        logits[:, probable] += 10
        logits[:, -5:] += 12
    top, ids, sure = most_probable(logits)
    wanted = logits.sort(-1, descending=True)
    for row in range(len(logits)):
        count = int(sure[row].sum())
        assert count >= 32 and sure[row, :count].all()
        assert torch.equal(top[row, :count], wanted.values[row, :count])
        assert torch.equal(logits[row, ids[row]], top[row])


def test_the_prefilter_changes_no_draw():
    torch.manual_seed(3)
    logits = torch.randn(200, VOCABULARY) * torch.linspace(0.2, 6, 200)[:, None]
    uniform = torch.rand(200)
    for top_p in (0.3, 0.9, 1.0):
        ordered, ids = logits.sort(-1, descending=True)
        cumulative = torch.softmax(ordered.double(), -1).cumsum(-1)
        size = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        at = (cumulative <= uniform[:, None] * cumulative.gather(-1, size)).sum(-1, keepdim=True).minimum(size)
        for way in (draw, by_torch):
            same = way(logits, torch.ones(200), torch.full((200,), top_p), uniform) == ids.gather(-1, at)[:, 0]
            assert same.sum() >= 199  # a draw at the very edge of a token may round to its neighbour


def test_logits_that_are_no_numbers_or_infinite_end_no_run():
    logits = torch.full((3, VOCABULARY), float("-inf"))
    logits[0], logits[1, 7], logits[2, [3, 9]] = float("nan"), 1.0, 2.0
    tokens = draw(logits, torch.ones(3), torch.ones(3), torch.tensor([0.5, 0.999, 0.999]))
    assert tokens.tolist() == [0, 7, 9]


def test_the_last_token_of_a_nucleus_can_be_drawn_and_none_behind_it():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    drawn = [
        draw(logits, torch.ones(1), torch.tensor([0.65]), torch.tensor([uniform])).item()
        for uniform in (0.0, 0.57, 0.58, 0.9999999)
    ]
    assert drawn == [0, 0, 1, 1]


def test_each_row_is_drawn_by_its_own_settings():
    torch.manual_seed(4)
    logits = torch.randn(300, VOCABULARY) * 2
    logits[200:] = logits[0]
    temperature = torch.cat([torch.zeros(100), torch.full((100,), 0.7), torch.full((100,), 2.0)])
    top_p = torch.cat([torch.ones(100), torch.full((100,), 1e-6), torch.ones(100)])
    tokens = draw(logits, temperature, top_p, torch.rand(300))
    assert torch.equal(tokens[:200], logits[:200].argmax(-1))
    assert len(set(tokens[200:].tolist())) > 50


def test_random_numbers_belong_to_a_seed_and_do_not_change_with_their_count():
    assert uniforms(7, 100)[:20] == uniforms(7, 20) != uniforms(8, 20)
    assert all(0 <= number < 1 for number in uniforms(7, 1000))


FILTERS = [
    (20, 1.0, 0.0),
    (20, 0.8, 0.0),
    (5, 0.95, 0.0),
    (0, 1.0, 0.05),
    (0, 0.9, 0.1),
    (40, 0.95, 0.02),
    (2, 1.0, 0.0),
]


def by_transformers(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Return the probabilities of tokens after the filters of `transformers`, in its order."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    return torch.softmax(scores[0].double(), -1)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_frequencies_are_those_of_the_filters_of_transformers(top_k, top_p, min_p, temperature) -> None:
    torch.manual_seed(3)
    logits = torch.randn(600) * 2
    settings = [torch.full((DRAWS,), float(value)) for value in (temperature, top_p)]
    filters = [torch.full((DRAWS,), float(value)) for value in (top_k, min_p)]
    tokens = draw(logits.expand(DRAWS, -1), *settings, torch.rand(DRAWS), *filters)
    assert p_value(tokens, by_transformers(logits, temperature, top_k, top_p, min_p)) > 1e-4


def test_each_row_is_drawn_by_its_own_filters() -> None:
    torch.manual_seed(4)
    logits, uniform = torch.randn(6, 300), torch.rand(6)
    temperature, top_p = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0]), torch.tensor([0.9, 1.0, 0.9, 0.5, 1.0, 0.3])
    top_k, min_p = torch.tensor([0.0, 7.0, 3.0, 0.0, 2.0, 9.0]), torch.tensor([0.0, 0.0, 0.0, 0.2, 0.1, 0.0])
    settings = (temperature, top_p, uniform, top_k, min_p)
    together = draw(logits, *settings)
    alone = [draw(logits[at : at + 1], *(values[at : at + 1] for values in settings)).item() for at in range(6)]
    assert together.tolist() == alone
    plain = draw(logits[:1], temperature[:1], top_p[:1], uniform[:1])
    assert together[0] == plain[0] and together[2] == logits[2].argmax()


def test_penalties_are_those_of_transformers_and_of_the_api() -> None:
    torch.manual_seed(5)
    logits, prompt, written = torch.randn(50), [3, 4, 4], [7, 3]
    repeated = penalized(logits, prompt, written, Sampling(repetition_penalty=1.7))
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *written]]), logits[None].clone())[0]
    assert torch.equal(repeated, wanted)
    present = penalized(logits, prompt, written, Sampling(presence_penalty=0.5))
    moved = (present != logits).nonzero()[:, 0].tolist()
    assert moved == [3, 7] and torch.allclose(present[moved], logits[moved] - 0.5)
