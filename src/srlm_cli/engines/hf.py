"""Run a causal LM in this process with transformers: batched by length, drawn row by row.

The draw is ours and not `generate`'s own, for two reasons: every completion has a seed of its own,
so that it does not depend on the rows beside it, and an exact nucleus over the few most probable
tokens is much faster than a sort of the whole vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from transformers import LogitsProcessor, StoppingCriteria

from srlm_cli import models
from srlm_cli.engines import EngineSpec
from srlm_cli.engines.base import Completion, Request, Sampling
from srlm_cli.errors import EngineError

BATCHES_A_WINDOW = 4
MAX_BATCH_TOKENS = 1 << 17
MAX_CHOICE_TOKENS = 1 << 14
PREFILTER = 256


class HfEngine:
    """A model and its tokenizer, loaded once; adapters are merged in."""

    name = "hf"

    def __init__(self, spec: EngineSpec) -> None:
        models.quiet_libraries()
        self.model = spec.model
        self.batch_size = spec.batch_size
        self.device = models.pick_device(spec.device)
        self.tokenizer = models.load_tokenizer(spec.model)
        self.tokenizer.padding_side = "left"
        self.net = models.load_model(spec.model, models.pick_dtype(spec.dtype, self.device), self.device).eval()
        self.stop_ids = _stop_ids(self.net, self.tokenizer)
        self.context = getattr(self.net.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order; requests are taken in windows and batched by length within one."""
        for window in self._windows(requests):
            prompts = [self._render(request) for request in window]
            answers: list[Completion | None] = [None] * len(window)
            free = [index for index, request in enumerate(window) if not request.choices]
            chosen = [index for index, request in enumerate(window) if request.choices]
            with torch.inference_mode():
                self._write_texts(window, prompts, free, answers)
                self._choose(window, prompts, chosen, answers)
            yield from answers

    def _windows(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Cut requests into windows of a few batches: what a killed run has to do again."""
        window, rows = [], 0
        for request in requests:
            window.append(request)
            rows += len(request.seeds)
            if rows >= self.batch_size * BATCHES_A_WINDOW:
                yield window
                window, rows = [], 0
        if window:
            yield window

    def _render(self, request: Request) -> list[int]:
        """Return the token ids of a chat, ready for the assistant's turn: one template, one BOS."""
        return self._tokens(self._chat(request))

    def _chat(self, request: Request) -> str:
        try:
            text = self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's makers: anything can be raised
            raise EngineError(f"the chat template of {self.model} refused a prompt: {error}") from error
        return text + request.prefix

    def _tokens(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text to a tokenizer
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # --- free text ---------------------------------------------------------------------------

    def _write_texts(self, window: list[Request], prompts: list[list[int]], free: list[int], answers: list) -> None:
        """Fill in the completions of the requests at `free`."""
        by_sampling: dict[Sampling, list[int]] = defaultdict(list)
        for index in free:
            if len(prompts[index]) >= self.context:
                size = len(window[index].seeds)
                answers[index] = Completion([""] * size, ["prompt-too-long"] * size, len(prompts[index]), 0)
            else:
                by_sampling[window[index].sampling].append(index)
        for sampling, indices in by_sampling.items():
            indices.sort(key=lambda index: len(prompts[index]), reverse=True)
            for batch in self._batches(indices, window, prompts, sampling):
                written = self._write_batch([prompts[at] for at in batch], [window[at].seeds for at in batch], sampling)
                for index in batch:
                    drawn = [next(written) for _ in window[index].seeds]
                    texts, reasons, counts = map(list, zip(*drawn, strict=True))
                    answers[index] = Completion(texts, reasons, len(prompts[index]), sum(counts))

    def _batches(
        self, indices: list[int], window: list[Request], prompts: list[list[int]], sampling: Sampling
    ) -> Iterator[list[int]]:
        """Cut requests, longest prompt first, into batches that keep within the row and token limits."""
        batch, rows = [], 0
        for index in indices:
            longest = len(prompts[batch[0] if batch else index]) + sampling.max_new_tokens
            limit = max(1, min(self.batch_size, MAX_BATCH_TOKENS // longest))
            if batch and rows + len(window[index].seeds) > limit:
                yield batch
                batch, rows = [], 0
            batch.append(index)
            rows += len(window[index].seeds)
        if batch:
            yield batch

    def _write_batch(
        self, prompts: list[list[int]], seeds: list[tuple[int, ...]], sampling: Sampling
    ) -> Iterator[tuple[str, str, int]]:
        """Yield (text, finish reason, tokens) of each seed of each prompt.

        The N completions of a prompt share its keys and values: each prompt is read once.
        """
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        width = ids.shape[1]
        budget = min(sampling.max_new_tokens, self.context - width)
        rows = torch.tensor([at for at, own in enumerate(seeds) for _ in own], device=self.device)
        cache = None
        if len(rows) > len(prompts) and width > 1:
            positions = (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)
            cache = self.net(
                ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True, logits_to_keep=1
            ).past_key_values
            cache.batch_select_indices(rows)
        flat = [seed for own in seeds for seed in own]
        output = self.net.generate(
            input_ids=ids[rows],
            attention_mask=mask[rows],
            past_key_values=cache,
            max_new_tokens=budget,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[NucleusDraw(flat, sampling, budget, self.device)] if sampling.temperature > 0 else [],
            stopping_criteria=[StopTexts(self.tokenizer, width, sampling.stop)] if sampling.stop else [],
        )
        return iter([self._finished(row, sampling) for row in output[:, width:].tolist()])

    def _finished(self, tokens: list[int], sampling: Sampling) -> tuple[str, str, int]:
        end = next((at for at, token in enumerate(tokens) if token in self.stop_ids), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        stops = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        reason = "stop" if stops or end is not None else "length"
        return text[: min(stops)] if stops else text, reason, len(tokens) if end is None else end + 1

    # --- choices -----------------------------------------------------------------------------

    def _choose(self, window: list[Request], prompts: list[list[int]], asked: list[int], answers: list) -> None:
        """Fill in the completions of the requests at `asked`: one of its choices each, by probability.

        Each choice is tokenized together with the text before it, since a tokenizer may merge the
        two; what all have in common is run once.
        """
        begun: dict[int, tuple[list[int], list[list[int]]]] = {}
        for index in asked:
            chat = self._chat(window[index])
            branches = [self._tokens(chat + choice) for choice in window[index].choices]
            shared = len(os.path.commonprefix(branches))
            if max(map(len, branches)) > self.context:
                size = len(window[index].seeds)
                answers[index] = Completion([""] * size, ["prompt-too-long"] * size, len(prompts[index]), 0)
            else:
                begun[index] = branches[0][:shared], [branch[shared:] for branch in branches]
        # The usual case: every choice is one more token, so the logits behind the common text tell all.
        single = [index for index, (_, ends) in begun.items() if all(len(end) == 1 for end in ends)]
        single.sort(key=lambda index: len(begun[index][0]), reverse=True)
        for batch in self._choice_batches(single, begun):
            logits = self._last_logits([begun[index][0] for index in batch])
            for index, row in zip(batch, logits, strict=True):
                ends = torch.tensor([end[0] for end in begun[index][1]], device=row.device)
                answers[index] = self._chosen(window[index], len(prompts[index]), torch.softmax(row[ends], -1))
        for index in sorted(set(begun) - set(single)):
            answers[index] = self._chosen(window[index], len(prompts[index]), self._longer_choices(*begun[index]))

    def _choice_batches(self, indices: list[int], begun: dict) -> Iterator[list[int]]:
        """Cut requests, longest first, into batches that keep within the row and token limits."""
        while indices:
            size = max(1, min(self.batch_size, MAX_CHOICE_TOKENS // len(begun[indices[0]][0])))
            yield indices[:size]
            indices = indices[size:]

    def _last_logits(self, texts: list[list[int]]) -> torch.Tensor:
        """Return the logits behind each text, (texts, vocabulary), float32."""
        inputs = self.tokenizer.pad({"input_ids": texts}, return_tensors="pt").to(self.device)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.net(
            inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return output.logits[:, -1].float()

    def _longer_choices(self, text: list[int], ends: list[list[int]]) -> torch.Tensor:
        """Return the probability of each choice where some have several tokens.

        A choice that goes on to another one ("1" and "10") has only what the longer one leaves of it.
        """
        width = max(map(len, ends))
        ids = torch.full((len(ends), len(text) + width), self.tokenizer.pad_token_id)
        for row, end in enumerate(ends):
            ids[row, : len(text) + len(end)] = torch.tensor(text + end)
        logits = self.net(ids.to(self.device), use_cache=False, logits_to_keep=width + 1).logits.float()
        steps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, len(text) :, None].to(self.device))[..., 0]
        whole = [float(steps[row, : len(end)].sum().exp()) for row, end in enumerate(ends)]
        # Nearest extensions only: "10" is taken from "1", and "100" from "10".
        left = list(whole)
        for at, end in enumerate(ends):
            begins = [other for other, short in enumerate(ends) if short != end and end[: len(short)] == short]
            if begins:
                left[max(begins, key=lambda other: len(ends[other]))] -= whole[at]
        probabilities = torch.tensor(left).clamp(min=0.0)
        return probabilities / probabilities.sum()

    def _chosen(self, request: Request, tokens_in: int, probabilities: torch.Tensor) -> Completion:
        texts = [self._pick(request, probabilities, seed) for seed in request.seeds]
        return Completion(texts, ["stop"] * len(texts), tokens_in, len(texts), probabilities.tolist())

    @staticmethod
    def _pick(request: Request, probabilities: torch.Tensor, seed: int) -> str:
        if request.sampling.temperature <= 0:
            return request.choices[int(probabilities.argmax())]
        tempered = torch.softmax(probabilities.log() / request.sampling.temperature, -1).cpu()
        at = torch.multinomial(tempered, 1, generator=torch.Generator().manual_seed(seed))
        return request.choices[int(at)]


class NucleusDraw(LogitsProcessor):
    """Draw the next token of each row from its nucleus, with the row's own random numbers.

    The nucleus is the smallest set of most probable tokens whose probability reaches top-p (Holtzman
    et al., arXiv 1904.09751). It is looked for among the `PREFILTER` most probable tokens; a row
    whose nucleus is larger is sorted in full, so the draw is exact. All other logits become -inf:
    greedy decoding then takes the drawn token.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, steps: int, device: str) -> None:
        self.sampling = sampling
        draws = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniform = torch.stack(draws, dim=1).to(device)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = draw_nucleus(scores / self.sampling.temperature, self.sampling.top_p, self.uniform[self.step])
        self.step += 1
        drawn = torch.full_like(scores, float("-inf"))
        return drawn.scatter_(1, token[:, None], 0.0)


def draw_nucleus(logits: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """Return one token a row, drawn from the nucleus.

    logits: (rows, vocabulary), already divided by the temperature. uniform: (rows,) in [0, 1).
    Returns (rows,) token ids.
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    top, ids = torch.topk(logits, min(PREFILTER, logits.shape[-1]), dim=-1)
    cumulative = torch.cumsum((top - total).exp(), dim=-1)
    token = _draw_sorted(cumulative, ids, top_p, uniform)
    wide = (cumulative[:, -1] < top_p).nonzero()[:, 0]
    if len(wide) and ids.shape[-1] < logits.shape[-1]:
        top, ids = torch.sort(logits[wide], dim=-1, descending=True)
        cumulative = torch.cumsum((top - total[wide]).exp(), dim=-1)
        token[wide] = _draw_sorted(cumulative, ids, top_p, uniform[wide])
    return token


def _draw_sorted(cumulative: torch.Tensor, ids: torch.Tensor, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution of sorted tokens, cut where it reaches top-p."""
    size = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    mass = cumulative.gather(-1, size)
    at = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).minimum(size)
    return ids.gather(-1, at)[:, 0]


class StopTexts(StoppingCriteria):
    """End a row as soon as one of the stop texts stands in what it has written."""

    TAIL = 16

    def __init__(self, tokenizer, width: int, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.width, self.stops = tokenizer, width, stops

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, max(self.width, input_ids.shape[1] - self.TAIL) :])
        done = [any(stop in tail for stop in self.stops) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


def _stop_ids(net, tokenizer) -> list[int]:
    """Return every token that ends a turn: the tokenizer's EOS and those of the generation settings."""
    configured = net.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})
