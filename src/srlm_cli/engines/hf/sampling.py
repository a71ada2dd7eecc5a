"""Draw tokens from their nucleus, exactly, without a sort of the whole vocabulary; and by further filters.

The nucleus is the smallest set of most probable tokens whose probability reaches top-p (Holtzman et
al., arXiv 1904.09751).
"""

from __future__ import annotations

import torch

from srlm_cli.engines.base import Sampling
from srlm_cli.forward import cpu

BLOCK = 16
BEST_BLOCKS = 128
PREFILTER = 256


def uniforms(seed: int, count: int) -> list[float]:
    """Return the random numbers of one completion, in [0, 1): one per token, from its own seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one token per row, each row with its own settings; the most probable token at temperature 0.

    logits: (rows, vocabulary), float32. The settings: (rows,). Returns (rows,) token ids.
    """
    greedy = temperature <= 0
    if bool(greedy.all()):
        return logits.argmax(-1)
    temperature = torch.where(greedy, 1.0, temperature)
    if logits.device.type == "cpu" and cpu.available():
        from srlm_cli.forward.cpu import sampling as compiled

        drawn = compiled.draw(logits, temperature, top_p, uniform)
    else:
        drawn = draw_nucleus(logits / temperature[:, None], top_p, uniform)
    if top_k is not None and min_p is not None and len(some := ((top_k > 0) | (min_p > 0)).nonzero()[:, 0]):
        settings = (values[some] for values in (top_k, top_p, min_p, uniform))
        drawn[some] = draw_filtered(logits[some] / temperature[some, None], *settings)
    return torch.where(greedy, logits.argmax(-1), drawn) if bool(greedy.any()) else drawn


def draw_filtered(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Return one token per row, drawn from those that top-k, then top-p, then min-p keep, as in `transformers`.

    logits: (rows, vocabulary), already divided by the temperature. top_k (0 is all), top_p, min_p, uniform: (rows,).
    The nucleus is that of the tokens that top-k keeps. min-p is a share of the largest probability (arXiv 2407.01082).
    """
    vocabulary = logits.shape[-1]
    count = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).long()
    best, ids = torch.topk(logits, int(count.max()), dim=-1)
    place = torch.arange(best.shape[-1], device=best.device)
    best = best.masked_fill(place >= count[:, None], -torch.inf)
    probabilities = torch.softmax(best, -1)
    below = probabilities < min_p[:, None] * probabilities[:, :1]
    cumulative = torch.cumsum(probabilities, -1)
    sizes = torch.stack([(cumulative < top_p[:, None]).sum(-1) + 1, count, (~below).sum(-1)])
    last = (sizes.amin(0) - 1)[:, None]
    at = torch.searchsorted(cumulative, uniform[:, None] * cumulative.gather(-1, last), right=True).minimum(last)
    return ids.gather(-1, at)[:, 0]


def penalized(logits: torch.Tensor, prompt: list[int], written: list[int], sampling: Sampling) -> torch.Tensor:
    """Return logits, (vocabulary,), after the penalties for tokens that are already in the text.

    The repetition penalty divides a logit above 0 and multiplies one below, of all tokens of prompt and text, as in
    `transformers` (arXiv 1909.05858). The presence penalty is taken from those of the text, as in OpenAI's API.
    """
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *written}), device=logits.device)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty and written:
        logits[torch.tensor(sorted(set(written)), device=logits.device)] -= sampling.presence_penalty
    return logits


def draw_nucleus(logits: torch.Tensor, top_p: torch.Tensor | float, uniform: torch.Tensor) -> torch.Tensor:
    """Return one token per row, drawn from the nucleus.

    logits: (rows, vocabulary), already divided by the temperature. top_p: (rows,) or one number.
    uniform: (rows,) in [0, 1). Returns (rows,) token ids. A row whose nucleus may be larger than the result of the
    prefilter is fully sorted, so the draw is exact.
    """
    top_p = torch.as_tensor(top_p, dtype=logits.dtype, device=logits.device).expand(len(logits))
    probabilities = torch.softmax(logits, dim=-1)
    top, ids, sure = most_probable(probabilities)
    cumulative = torch.cumsum(top, dim=-1)
    token = _draw_sorted(cumulative, ids, top_p, uniform)
    wide = (torch.where(sure, cumulative, 0.0).amax(-1) < top_p).nonzero()[:, 0]
    if len(wide):
        top, ids = torch.sort(probabilities[wide], dim=-1, descending=True)
        token[wide] = _draw_sorted(torch.cumsum(top, dim=-1), ids, top_p[wide], uniform[wide])
    return token


def most_probable(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest numbers of each row in order, their ids, and which of them are certainly the largest.

    numbers: (rows, vocabulary). All three are (rows, count). The vocabulary is split into blocks, and only the blocks
    with the largest maxima are searched. All other blocks have no number above the smallest of these maxima, so every
    candidate down to this number is in its true position. A block is a column of the vocabulary in `BLOCK` lines.
    """
    rows, vocabulary = numbers.shape
    whole = vocabulary // BLOCK
    if whole <= 2 * BEST_BLOCKS:
        top, ids = torch.topk(numbers, min(PREFILTER, vocabulary), dim=-1)
        return top, ids, torch.ones_like(ids, dtype=torch.bool)
    blocks = numbers[:, : whole * BLOCK].view(rows, BLOCK, whole)
    maxima, best = torch.topk(blocks.amax(1), BEST_BLOCKS, dim=-1, sorted=False)
    inside = blocks.gather(2, best[:, None].expand(-1, BLOCK, -1)).flatten(1)
    places = (best[:, None] + whole * torch.arange(BLOCK, device=numbers.device)[:, None]).flatten(1)
    rest = torch.arange(whole * BLOCK, vocabulary, device=numbers.device).expand(rows, -1)
    inside, places = torch.cat([inside, numbers[:, whole * BLOCK :]], 1), torch.cat([places, rest], 1)
    top, at = torch.topk(inside, PREFILTER, dim=-1)
    return top, places.gather(1, at), top >= maxima.amin(-1, keepdim=True)


def _draw_sorted(
    cumulative: torch.Tensor, ids: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Return tokens by inverting the cumulative distribution of sorted tokens, cut where it reaches top-p."""
    size = (cumulative < top_p[:, None]).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    mass = cumulative.gather(-1, size)
    at = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).minimum(size)
    return ids.gather(-1, at)[:, 0]
