"""Generate with `generate` of transformers, for models whose layers store more than keys and values per token.

Only prompts of the same length are in one batch, so no model needs left padding.
"""

from __future__ import annotations

from collections import deque

import torch
from transformers import LogitsProcessor, StoppingCriteria

from srlm_cli.engines.base import Sampling
from srlm_cli.engines.hf.sampling import draw, uniforms
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
        for (task, place), tokens in zip(rows, written, strict=True):
            task.left.remove(place)
            task.finish(place, self.stops.finished(tokens, task.request.sampling))
        self.waiting = deque(task for task in self.waiting if task.left)

    def _generate(self, rows: list[tuple[Task, int]], sampling: Sampling) -> list[list[int]]:
        """Return the tokens of each sequence up to and with its last one."""
        prompts = torch.tensor([task.prompt for task, _ in rows], device=self.model.device)
        seeds = [task.request.seeds[place] for task, place in rows]
        width, budget = prompts.shape[1], rows[0][0].budget
        output = self.model.net.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=budget,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # defaults of the model's makers are not part of `Sampling`
            no_repeat_ngram_size=0,
            eos_token_id=sorted(self.stops.ids),
            pad_token_id=self.stops.tokenizer.pad_token_id,
            logits_processor=[Drawn(seeds, sampling, budget)] if sampling.temperature > 0 else [],
            stopping_criteria=[Ended(self.stops, width, sampling)],
        )
        return [self._cut(row, sampling) for row in output[:, width:].tolist()]

    def _cut(self, tokens: list[int], sampling: Sampling) -> list[int]:
        end = next((at for at in range(1, len(tokens) + 1) if self.stops.ended(tokens[:at], sampling)), len(tokens))
        return tokens[:end]


class Drawn(LogitsProcessor):
    """Mask all tokens of a sequence except the one that its own seed draws, so that greedy decoding takes it."""

    def __init__(self, seeds: list[int], sampling: Sampling, steps: int) -> None:
        self.uniforms = torch.tensor([uniforms(seed, steps) for seed in seeds])
        self.sampling, self.step = sampling, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self.uniforms[:, self.step].to(scores.device)
        settings = (torch.full_like(uniform, value) for value in (self.sampling.temperature, self.sampling.top_p))
        token = draw(scores.float(), *settings, uniform)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


class Ended(StoppingCriteria):
    """End a sequence where `Stops` ends it."""

    def __init__(self, stops: Stops, width: int, sampling: Sampling) -> None:
        self.stops, self.width, self.sampling = stops, width, sampling

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        ended = [self.stops.ended(row, self.sampling) for row in input_ids[:, self.width :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


def _kind(task: Task) -> tuple[int, int, Sampling]:
    return len(task.prompt), task.budget, task.request.sampling
