"""Run a causal LM in this process with transformers.

Each completion has its own seed, so it does not depend on the other sequences of the batch. If the layers of a model
allow it, sequences are packed without padding (`forward.packed`) and batched continuously (`engines.hf.scheduler`);
other models use `generate` (`engines.hf.fallback`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing

import torch

from srlm_cli import threads
from srlm_cli.engines.base import TEMPLATE_REFUSED, Completion, EngineSpec, Request
from srlm_cli.engines.chat_template import ChatTemplate, token_ids
from srlm_cli.engines.hf import workers
from srlm_cli.engines.hf.choices import ChoiceScorer, ScoringRequest
from srlm_cli.engines.hf.fallback import FallbackModel, FallbackScheduler
from srlm_cli.engines.hf.scheduler import Scheduler
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.engines.hf.tasks import TAIL, BaseScheduler, Task
from srlm_cli.engines.hf.workers import WorkerPool
from srlm_cli.errors import BadRow
from srlm_cli.forward import cpu
from srlm_cli.forward.packed import PackedModel, lay_by_input, size
from srlm_cli.models.hardware import pick_device, pick_dtype
from srlm_cli.models.load import load_model, load_tokenizer, quiet_libraries

BATCHES_A_WINDOW = 4

# PyTorch reads this at its first tensor: Linux then gives large ones memory by 2 MiB instead of 4 KiB at a time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class HfEngine:
    """A model and its tokenizer, loaded once; adapters are merged in."""

    name = "hf"

    def __init__(self, spec: EngineSpec) -> None:
        quiet_libraries()
        self.model = spec.model
        self.batch_size = spec.batch_size
        self.device = pick_device(spec.device)
        self.tokenizer = load_tokenizer(spec.model)
        self.template = ChatTemplate.of(self.tokenizer, spec)
        self.reader = _reader(spec, self.device)
        self.net = self.reader.net
        self.known = len(self.net.get_input_embeddings().weight)
        self.stops = Stops(self.net.generation_config.eos_token_id, self.template)
        self.scorer = ChoiceScorer(self.reader)
        self.context = getattr(self.net.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order.

        At most `BATCHES_A_WINDOW` batches of requests are started before the oldest one is finished: this is the work
        that a killed run has to repeat.
        """
        with closing(self._scheduler()) as scheduler:
            yield from self._written(iter(requests), scheduler)

    def _written(self, pending: Iterator[Request], scheduler: BaseScheduler) -> Iterator[Completion]:
        begun: deque[Task] = deque()
        while True:
            taken = self._take(pending, begun, scheduler)
            if not begun:  # no request is in progress and none was taken: there are no more
                return
            with torch.inference_mode():
                self._score_choices(taken)
                if scheduler.waiting or (begun and begun[0].answer is None):
                    scheduler.advance()
            while begun and begun[0].answer:
                yield begun.popleft().answer

    def _scheduler(self) -> BaseScheduler:
        if isinstance(self.reader, FallbackModel):
            return FallbackScheduler(self.reader, self.stops, self.batch_size)
        count = workers.count(self.batch_size, self.device)

        def one(limit: int) -> Scheduler:
            return Scheduler(self.reader, self.stops, limit, self.context, self._scoring_request, 1 / count)

        return WorkerPool(one, count, self.stops, self.batch_size) if count > 1 else one(self.batch_size)

    def _take(self, pending: Iterator[Request], begun: deque[Task], scheduler: BaseScheduler) -> list[Task]:
        """Take requests until a batch is ready; requests without choices go to the scheduler."""
        taken: list[Task] = []
        open_rows = sum(len(task.request.seeds) for task in begun)
        chosen = 0
        while max(scheduler.backlog, chosen) < self.batch_size and open_rows < self.batch_size * BATCHES_A_WINDOW:
            request = next(pending, None)
            if request is None:
                break
            task = self._task(request)
            begun.append(task)
            taken.append(task)
            if task.answer:
                continue
            open_rows += len(request.seeds)
            if request.choices:
                chosen += len(request.seeds)
            elif len(task.prompt) >= self.context:
                task.refuse("prompt-too-long")
            else:
                scheduler.add(task)
        return taken

    def _score_choices(self, tasks: list[Task]) -> None:
        """Answer the requests that have choices."""
        asked: list[tuple[Task, ScoringRequest]] = []
        for task in tasks:
            if not task.request.choices or task.answer:
                continue
            choice = self._scoring_request(task.request)
            if choice is None:
                task.refuse("prompt-too-long")
            else:
                asked.append((task, choice))
        answers = self.scorer.answer([choice for _, choice in asked])
        for (task, _), answer in zip(asked, answers, strict=True):
            task.answer = answer

    def _scoring_request(self, request: Request) -> ScoringRequest | None:
        """Return a request with choices in tokens, or None if it is longer than the context."""
        chat = self.template.turn(request)
        branches = [self._tokens(chat + choice) for choice in request.choices]
        if max(map(len, branches)) > self.context:
            return None
        return ScoringRequest.of(request, len(self._tokens(chat)), branches)

    def _task(self, request: Request) -> Task:
        """Return a request in tokens; if the chat template or the model cannot take it, it is answered already."""
        try:
            chat = self.template.turn(request)
            prompt = self._tokens(chat)  # one template, one BOS
        except BadRow as refusal:
            task = Task(request, [], 0)
            task.refuse(TEMPLATE_REFUSED, str(refusal))
            return task
        budget = min(request.sampling.max_new_tokens, self.context - len(prompt))
        return Task(request, prompt, budget, tail=chat[-TAIL:], opened=self.template.marks.opened(chat))

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a rendered text; raise BadRow for one that the tokenizer has and the model has not."""
        ids = token_ids(self.tokenizer, text)
        if (largest := max(ids, default=0)) >= self.known:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise BadRow(f"its prompt has the token {token!r} of the tokenizer, for which the model has no embedding")
        return ids


def _reader(spec: EngineSpec, device: str) -> PackedModel | FallbackModel:
    """Load a model, with compiled products in 16 bits if the CPU is faster in them and the model can be packed."""
    if spec.attn_implementation:  # packed passes have an attention of their own
        dtype = pick_dtype(spec.dtype, device)
        net = load_model(spec.model, dtype, device, attention=spec.attn_implementation).eval()
        return FallbackModel(net, device)
    if cpu.available():
        from srlm_cli.forward.cpu import linear

        if half := linear.type_for(pick_dtype(spec.dtype, device, float16=True), device):
            net = load_model(spec.model, "float32", device).eval()
            with threads.few(size(net)):  # thousands of short copies, after each of which threads would meet
                linear.use_in(net, half)
            if packed := _packed(net, device):
                return packed
            del net
    net = load_model(spec.model, pick_dtype(spec.dtype, device), device).eval()
    if device == "cpu":
        lay_by_input(net)
    return _packed(net, device) or FallbackModel(net, device)


def _packed(net, device: str) -> PackedModel | None:
    packed = PackedModel(net, device)
    with torch.inference_mode():
        return packed if packed.fits() else None
