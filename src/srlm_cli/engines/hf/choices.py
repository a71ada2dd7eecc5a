"""Score a fixed set of texts by their probability after a prompt."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from srlm_cli.engines.base import Completion, Request
from srlm_cli.engines.choice_probabilities import completion, mass_of, of_texts
from srlm_cli.forward import memory
from srlm_cli.forward.exact_logits import exact_logits
from srlm_cli.forward.prefix import CachedPrefix, find_prefixes

MAX_TOKENS = 1 << 13
KEPT_TOKENS = 1 << 14  # of requests that later ones continue


@dataclass(eq=False)
class ScoringRequest:
    """A request for one of its choices, in tokens.

    `shared` are the common tokens of the prompt and all choices, `ends` the following tokens of each choice. Each
    choice is tokenized together with the prompt, because a tokenizer can merge the two.
    """

    request: Request
    tokens_in: int
    shared: list[int]
    ends: list[list[int]]

    @classmethod
    def of(cls, request: Request, tokens_in: int, branches: list[list[int]]) -> ScoringRequest:
        """Return the request for `branches`, which are the tokens of the prompt with each choice."""
        shared = len(os.path.commonprefix(branches))
        return cls(request, tokens_in, branches[0][:shared], [branch[shared:] for branch in branches])

    @property
    def single_token(self) -> bool:
        """Whether the logits after the shared tokens are enough to score all choices."""
        return all(len(end) == 1 for end in self.ends)

    def begun(self) -> list[tuple[int, ...]]:
        """Return the token sequences after `shared` whose logits are needed: the proper prefixes of all `ends`."""
        return sorted({tuple(end[:at]) for end in self.ends for at in range(max(1, len(end)))})


class ChoiceScorer:
    """Score the choices of many requests in one batch; common prefixes are computed once."""

    def __init__(self, model) -> None:
        self.model = model
        self.batch_size = MAX_TOKENS  # every request has at least one token
        self.last: list[CachedPrefix] = []
        self.continued: list[CachedPrefix] = []

    def answer(self, choices: list[ScoringRequest]) -> list[Completion]:
        """Return one completion per request; the batch is reduced when memory runs out."""
        answers: list[Completion] = []
        while len(answers) < len(choices):
            batch = self._batch(choices[len(answers) :])
            try:
                answers += self._read(batch)
            except RuntimeError as error:
                self.batch_size = memory.halve(len(batch), error)
                self.continued = []
        return answers

    def _batch(self, choices: list[ScoringRequest]) -> list[ScoringRequest]:
        tokens = 0
        for at, choice in enumerate(choices[: self.batch_size]):
            tokens += len(choice.shared)
            if at and tokens > MAX_TOKENS:
                return choices[:at]
        return choices[: self.batch_size]

    def _read(self, choices: list[ScoringRequest]) -> list[Completion]:
        begun = [choice.begun() for choice in choices]
        texts = [
            CachedPrefix([*choice.shared, *behind], kept=choice.request.continued)
            for choice, parts in zip(choices, begun, strict=True)
            for behind in parts
        ]
        continued = [text for text in texts if text.kept]
        find_prefixes(texts, [*self.last, *self.continued])
        texts[-1].kept = True
        with exact_logits(self.model.net, {token for choice in choices for end in choice.ends for token in end}):
            logits = iter(self.model.read(texts))
        self._keep(texts, continued)
        return [
            answer(choice, {behind: next(logits) for behind in parts})
            for choice, parts in zip(choices, begun, strict=True)
        ]

    def _keep(self, texts: list[CachedPrefix], continued: list[CachedPrefix]) -> None:
        """Keep the last text, and those that later requests continue, up to `KEPT_TOKENS`; not those continued now."""
        done = {text.prefix for text in texts if text.prefix and text.shared == len(text.prefix.tokens)}
        self.continued = [*(text for text in self.continued if text not in done), *continued]
        self.last = texts[-1:]
        for text in texts:
            text.prefix = None  # a kept text has the keys and values of its prefix, too
        while sum(len(text.tokens) for text in self.continued) > KEPT_TOKENS:
            del self.continued[0]


def answer(choice: ScoringRequest, logits: dict[tuple[int, ...], torch.Tensor]) -> Completion:
    """Return the completion of one request; `logits`, (vocabulary,), has the logits after each prefix."""
    if choice.single_token:
        row = logits[()]
        chosen = row[torch.tensor([end[0] for end in choice.ends], device=row.device)]
        probabilities = torch.softmax(chosen, -1).tolist()
        mass = float(torch.exp(torch.logsumexp(chosen.float(), -1) - torch.logsumexp(row.float(), -1)))
    else:
        steps = {behind: torch.log_softmax(row, -1) for behind, row in logits.items()}
        logs = [sum(float(steps[tuple(end[:at])][token]) for at, token in enumerate(end)) for end in choice.ends]
        probabilities, mass = of_texts(logs, choice.ends), mass_of(logs, choice.ends)
    return completion(choice.request, probabilities, mass, choice.tokens_in)
