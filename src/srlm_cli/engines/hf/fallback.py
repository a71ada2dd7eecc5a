"""Generate with `generate` of transformers, for models whose layers store more than keys and values per token.

Only prompts of the same length are in one batch, so no model needs left padding.
"""

from __future__ import annotations

from collections import deque

import torch
from transformers import LogitsProcessor, StoppingCriteria

from srlm_cli.engines.base import Sampling
from srlm_cli.engines.hf.sampling import draw, penalized, uniforms
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.engines.hf.tasks import BaseScheduler, Task
from srlm_cli.forward import memory
from srlm_cli.forward.prefix import CachedPrefix


class FallbackModel:
    """Run a model on prompts one by one."""

    def __init__(self, net, device: str) -> None:
        self.net, self.device = net, device

    def read(self, texts: list[CachedPrefix]) -> torch.Tensor:
        """Return the logits after each text, (texts, vocabulary), float32."""
        return torch.stack([self._behind(text.tokens) for text in texts])

    def _behind(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device)
        return self.net(ids, use_cache=False).logits[0, -1].float()


class FallbackScheduler(BaseScheduler):
    """Completions of tasks by `generate`, at most `limit` at a time."""

    def __init__(self, model: FallbackModel, stops: Stops, limit: int) -> None:
        super().__init__(stops, limit)
        self.model = model

    def advance(self) -> None:
        """Generate for the first waiting task and those like it; halve the batch if memory runs out."""
        if not self.waiting:
            return
        first = self.waiting[0]
        alike = [task for task in self.waiting if _kind(task) == _kind(first)]
        rows = [(task, place) for task in alike for place in task.left][: self.limit]
        try:
            written = self._generate(rows, first.request.sampling)
        except RuntimeError as error:
            self.limit = memory.halve(len(rows), error)
            return
        for (task, place), (tokens, at_limit) in zip(rows, written, strict=True):
            task.left.remove(place)
            task.finish(place, self.stops.finished(tokens, task.request.sampling, task.opened, at_limit))
        self.waiting = deque(task for task in self.waiting if task.left)

    def _generate(self, rows: list[tuple[Task, int]], sampling: Sampling) -> list[tuple[list[int], bool]]:
        """Return the tokens of each sequence with its last one, and whether its thought was closed at the limit."""
        prompts = torch.tensor([task.prompt for task, _ in rows], device=self.model.device)
        seeds = [task.request.seeds[place] for task, place in rows]
        first, width = rows[0][0], prompts.shape[1]
        drawn = [Drawn(seeds, sampling, first.budget)] if sampling.temperature > 0 else []
        penalized = [Penalized(width, sampling)] if sampling.penalizes else []
        closed = ClosedThoughts(self.stops, width, first)
        output = self.model.net.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=first.budget,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # defaults of the model's makers are not part of `Sampling`
            no_repeat_ngram_size=0,
            eos_token_id=sorted(self.stops.ids),
            pad_token_id=self.stops.tokenizer.pad_token_id,
            logits_processor=[*penalized, *drawn, closed],
            stopping_criteria=[Ended(self.stops, width, first, closed)],
        )
        cut = [self._cut(row, first, closed.until(at)) for at, row in enumerate(output[:, width:].tolist())]
        return [(tokens, closed.until(at) > 0) for at, tokens in enumerate(cut)]

    def _cut(self, tokens: list[int], task: Task, begin: int) -> list[int]:
        ends = (
            at
            for at in range(1, len(tokens) + 1)
            if (at > begin or at <= (task.request.sampling.max_thinking_tokens or 0))
            and self.stops.ended(tokens[:at], task.request.sampling, task.opened)
        )
        return tokens[: next(ends, len(tokens))]


class Drawn(LogitsProcessor):
    """Mask all tokens of a sequence except the one that its own seed draws, so that greedy decoding takes it."""

    def __init__(self, seeds: list[int], sampling: Sampling, steps: int) -> None:
        self.uniforms = torch.tensor([uniforms(seed, steps) for seed in seeds])
        self.sampling, self.step = sampling, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self.uniforms[:, self.step].to(scores.device)
        temperature, top_p, top_k, min_p = (
            torch.full_like(uniform, value)
            for value in (self.sampling.temperature, self.sampling.top_p, self.sampling.top_k, self.sampling.min_p)
        )
        token = draw(scores.float(), temperature, top_p, uniform, top_k, min_p)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


class Penalized(LogitsProcessor):
    """Apply the penalties for tokens that are already in the prompt or the completion."""

    def __init__(self, width: int, sampling: Sampling) -> None:
        self.width, self.sampling = width, sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(input_ids.tolist(), scores.float(), strict=True)
        return torch.stack([penalized(row, ids[: self.width], ids[self.width :], self.sampling) for ids, row in rows])


class ClosedThoughts(LogitsProcessor):
    """Force the tokens that close a thought, in sequences whose thought is open at its limit."""

    def __init__(self, stops: Stops, width: int, task: Task) -> None:
        self.stops, self.width, self.tail = stops, width, task.tail
        self.limit = task.request.sampling.max_thinking_tokens
        self.closing: dict[int, list[int]] = {}

    def until(self, row: int) -> int:
        """Return the number of tokens up to the end of a forced closing mark; 0 for a sequence without one."""
        return self.limit + len(self.closing[row]) if self.closing.get(row) else 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids.shape[1] - self.width
        if self.limit is None or written < self.limit:
            return scores
        for row, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if written == self.limit and self.stops.ids.isdisjoint(tokens):
                self.closing[row] = self.stops.closing(tokens, self.tail)
            if written < self.until(row):
                token = self.closing[row][written - self.limit]
                scores = scores.clone()
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores


class Ended(StoppingCriteria):
    """End a sequence where `Stops` ends it, but not inside a forced closing mark."""

    def __init__(self, stops: Stops, width: int, task: Task, closed: ClosedThoughts) -> None:
        self.stops, self.width, self.task, self.closed = stops, width, task, closed

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        rows = input_ids[:, self.width :].tolist()
        ended = [
            len(row) > self.closed.until(at) and self.stops.ended(row, self.task.request.sampling, self.task.opened)
            for at, row in enumerate(rows)
        ]
        return torch.tensor(ended, device=input_ids.device)


def _kind(task: Task) -> tuple[int, int, bool, Sampling]:
    return len(task.prompt), task.budget, task.opened, task.request.sampling
