"""Continuous batching: generate many completions at the same time; when one ends, the next one starts immediately.

Completions of one prompt are computed as one sequence until they draw different tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from srlm_cli.engines.base import Request
from srlm_cli.engines.hf.choices import ScoringRequest, answer
from srlm_cli.engines.hf.sampling import draw, penalized, uniforms
from srlm_cli.engines.hf.stopping import Stops, Written
from srlm_cli.engines.hf.tasks import BaseScheduler, Task
from srlm_cli.errors import EngineError
from srlm_cli.forward import memory
from srlm_cli.forward.kv_cache import BLOCK_SIZE, OutOfBlocks, PagedKVCache, Span, blocks_for
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import LOOK_BACK, CachedPrefix, common_prefix_len, find_prefixes

# A prefix of all prompts is stored separately if it is long enough to be worth one more attention call.
MIN_COMMON = 64
MAX_READ_TOKENS = 1 << 13
ROOM_TO_READ = 8  # prompts are read when one in eight sequences is free
# Tokens that a sequence reads one by one after what it wrote; with more to read its text is read again.
MAX_FOLLOW_UP_TOKENS = 16


@dataclass(eq=False)
class PrefilledPrompt:
    """A prompt in the cache: its text in blocks, and the logits after it."""

    task: Task
    text: CachedPrefix
    logits: torch.Tensor | None = None
    num_sequences: int = 0


@dataclass(eq=False)
class FollowUpState:
    """The follow-up of a finished completion: the choices to score, and the tokens to read before them."""

    choice: ScoringRequest
    unread: deque[int]
    written: Written


@dataclass(eq=False)
class Sequence:
    """Completions of a prompt that are equal so far; `uniforms` has the random numbers of each, by its index.

    The tokens in `closing` come next in place of drawn ones. They close a thought that is `at_limit`.
    """

    read: PrefilledPrompt
    uniforms: dict[int, list[float]]
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    follow_up: FollowUpState | None = None
    closing: deque[int] = field(default_factory=deque)
    at_limit: bool = False


class Scheduler(BaseScheduler):
    """Generates the completions of many tasks in order, at most `limit` at a time, fewer if memory is low."""

    def __init__(
        self,
        model: PackedModel,
        stops: Stops,
        limit: int,
        context: int,
        choice_of: Callable[[Request], ScoringRequest | None],
        memory_share: float = 1.0,
    ) -> None:
        super().__init__(stops, limit)
        self.model, self.context, self.choice_of, self.memory_share = model, context, choice_of, memory_share
        self.reads: dict[Task, PrefilledPrompt] = {}
        self.sequences: list[Sequence] = []
        self.cache: PagedKVCache | None = None
        self.common: CachedPrefix | None = None
        self.last: CachedPrefix | None = None
        self.has_read = False

    @property
    def open(self) -> int:
        """How many completions are to be written, those under way included."""
        return self.backlog + self.num_running

    @property
    def num_running(self) -> int:
        """The number of completions in progress."""
        return sum(len(seq.uniforms) for seq in self.sequences)

    def advance(self) -> None:
        """Start completions if there is room, and generate one token of each; halve them if memory runs out."""
        try:
            self._begin()
            if self.sequences:
                self._step()
        except OutOfBlocks:
            self._keep(self.num_running - 1)
        except RuntimeError as error:
            self.limit = memory.halve(min(self.limit, self.num_running or self.limit), error)
            self._keep(self.limit)

    # --- beginning ---------------------------------------------------------------------------

    def _begin(self) -> None:
        """Read as many prompts as there is room for, and draw the first token of their completions."""
        older = self.num_running
        room = self.limit - older
        if not self.waiting or (self.sequences and room * ROOM_TO_READ < self.limit):
            return
        chosen = self._choose(room)
        self._read([task for task in chosen if task not in self.reads])
        begun = []
        for task in chosen:
            places = [task.left.popleft() for _ in range(min(len(task.left), room))]
            room -= len(places)
            if places:
                drawing = {place: uniforms(task.request.seeds[place], task.budget) for place in places}
                begun.append(Sequence(self.reads[task], drawing))
                self.reads[task].num_sequences += 1
        self.waiting = deque(task for task in self.waiting if task.left)
        self.sequences += begun
        if begun:
            try:
                self._append(begun, torch.stack([seq.read.logits for seq in begun]))
            except RuntimeError:
                self._take_back(older)  # there is no token to continue from
                raise

    def _choose(self, room: int) -> list[Task]:
        """Return the next waiting tasks, as many as fit into the sequences, the blocks and one pass."""
        self._open_cache()
        self._move(self.cache.compact())
        chosen, seeds, tokens, blocks = [], 0, 0, self.cache.num_free - self.num_running
        for task in self.waiting:
            read = task in self.reads
            tokens += 0 if read else len(task.prompt)
            blocks -= (0 if read else blocks_for(len(task.prompt))) + min(len(task.left), room - seeds)
            if seeds >= room or (chosen and tokens > MAX_READ_TOKENS) or blocks < 0:
                break
            chosen.append(task)
            seeds += len(task.left)
        if not chosen and not self.sequences and self.last:
            self._forget_last()
            return self._choose(room)
        if not chosen and not self.sequences:
            raise EngineError(
                f"a prompt of {len(self.waiting[0].prompt)} tokens does not fit in memory",
                "a smaller model or prompt" + (", or --batch-size 32" if self.memory_share < 1 else ""),
            )
        return chosen

    def _open_cache(self) -> None:
        """Allocate the cache when it is first needed, in all memory that may be used, or as much as can be needed."""
        if self.cache is None:
            most = (self.limit + 1) * 2 * blocks_for(self.context)
            room = int(memory.for_cache(self.model.device) * self.memory_share)
            count = room // (self.model.token_bytes() * BLOCK_SIZE)
            self.cache = PagedKVCache(self.model.layers, max(1, min(count, most)), self.model.stored, self.model.device)

    def _read(self, tasks: list[Task]) -> None:
        if not tasks:
            return
        if not self.has_read and len(tasks) > 1:
            self._find_common(tasks)
        self.has_read = True
        texts = [CachedPrefix(task.prompt, common=self._common_with(task)) for task in tasks]
        find_prefixes(texts, self._known())
        reads = []
        try:
            for task, text in zip(tasks, texts, strict=True):
                text.allocate_blocks(self.cache, join=self.model.compiled)
                reads.append(PrefilledPrompt(task, text))
            texts[-1].kept = not self.model.compiled
            logits = self.model.read(texts, self.cache)
        except (OutOfBlocks, RuntimeError):
            for read in reads:
                self.cache.free(read.text.blocks, shared=True)
            raise
        self._forget_last()
        self.last = texts[-1]
        if self.model.compiled:
            self.cache.incref(self.last.blocks)
        for read, behind in zip(reads, logits, strict=True):
            read.logits, read.text.prefix = behind, None
            self.reads[read.task] = read

    def _known(self) -> list[CachedPrefix]:
        """Return the cached prefixes: the common one, those that were read last, and those in blocks."""
        lately = [read.text for read in self.reads.values()][-LOOK_BACK:] if self.model.compiled else []
        return [text for text in (self.common, self.last, *lately) if text]

    def _forget_last(self) -> None:
        """Free the blocks of the prompts that were read last."""
        if self.last and self.model.compiled:
            self.cache.free(self.last.blocks, shared=True)
        self.last = None

    def _find_common(self, tasks: list[Task]) -> None:
        """Read the common prefix of the first prompts if it is long, such as the rubric of a judge."""
        first = tasks[0].prompt
        length = min(min(common_prefix_len(first, task.prompt), len(task.prompt) - 1) for task in tasks)
        if length >= MIN_COMMON:
            common = CachedPrefix(first[:length], kept=True)
            if self.model.compiled:
                common.blocks = self.cache.allocate(blocks_for(length), shared=True)
            try:
                self.model.read([common], self.cache)
            except RuntimeError:
                self.cache.free(common.blocks, shared=True)
                raise
            self.common = common

    def _common_with(self, task: Task) -> CachedPrefix | None:
        """Return the common prefix if a prompt starts with it."""
        if self.common is None or len(task.prompt) <= len(self.common.tokens):
            return None
        return self.common if task.prompt[: len(self.common.tokens)] == self.common.tokens else None

    # --- decoding ----------------------------------------------------------------------------

    def _step(self) -> None:
        """Generate one more token of every sequence."""
        self._move(self.cache.compact())
        seen_by: dict[PrefilledPrompt, list[int]] = {}
        own = []
        full = [seq for seq in self.sequences if len(seq.tokens) > len(seq.blocks) * BLOCK_SIZE]
        for seq, block in zip(full, self.cache.allocate(len(full)), strict=True):
            seq.blocks.append(block)
        if sum((len(seq.uniforms) - 1) * len(seq.blocks) for seq in self.sequences) > self.cache.num_free:
            raise OutOfBlocks  # for those that part now
        for at, seq in enumerate(self.sequences):
            seen_by.setdefault(seq.read, []).append(at)
            own.append(Span(seq.blocks, len(seq.tokens), len(seq.read.task.prompt), [at]))
        shared = self._spans({read.text: rows for read, rows in seen_by.items()})
        members = [at for at, seq in enumerate(self.sequences) if seq.read.text.common]
        logits = self.model.step(
            [seq.tokens[-1] for seq in self.sequences], self.cache, own, shared, self.common, members
        )
        self._append(self.sequences, logits)

    def _spans(self, seen_by: dict[CachedPrefix, list[int]]) -> list[Span]:
        """Return the spans that sequences see: shared blocks once, and the rest of each sequence."""
        together: dict[int, Span] = {}
        alone = []
        for text, rows in seen_by.items():
            whole = (len(text.tokens) - text.first_slot) // BLOCK_SIZE
            begun = [block for block in text.blocks[:whole] if block in self.cache.ref_counts]
            for at, block in enumerate(begun):
                span = together.setdefault(block, Span([block], BLOCK_SIZE, text.first_slot + at * BLOCK_SIZE, []))
                span.rows.extend(rows)
            first = text.first_slot + len(begun) * BLOCK_SIZE
            if len(text.tokens) > first:
                alone.append(Span(text.blocks[len(begun) :], len(text.tokens) - first, first, rows))
        return [*together.values(), *alone]

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Append one token to each sequence, and remove finished sequences."""
        following = [at for at, seq in enumerate(sequences) if seq.follow_up]
        drawing = [at for at, seq in enumerate(sequences) if not seq.follow_up]
        ended = [sequences[at] for at in following if self._continue_follow_up(sequences[at], logits[at])]
        if drawing:
            some = [sequences[at] for at in drawing]
            drawn = self._draw(some, logits[drawing] if following else logits)
            for seq, tokens in zip(some, drawn, strict=True):
                for part, token in self._part(seq, tokens):
                    ended += self._write(part, token)
        self._let_go(ended)

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> list[dict[int, int]]:
        """Return the next token of each completion of each sequence, by its index."""
        drawn: list[dict[int, int]] = [{} for _ in sequences]
        if any(seq.read.task.request.sampling.penalizes for seq in sequences):
            logits = torch.stack([_penalized(seq, row) for seq, row in zip(sequences, logits, strict=True)])
        for nth in range(max(len(seq.uniforms) for seq in sequences)):
            some = [at for at, seq in enumerate(sequences) if nth < len(seq.uniforms)]
            places = [list(sequences[at].uniforms)[nth] for at in some]
            samplings = [sequences[at].read.task.request.sampling for at in some]
            settings = [
                (
                    sampling.temperature,
                    sampling.top_p,
                    sequences[at].uniforms[place][len(sequences[at].tokens)],
                    sampling.top_k,
                    sampling.min_p,
                )
                for at, place, sampling in zip(some, places, samplings, strict=True)
            ]
            of_some = logits if len(some) == len(sequences) else logits[some]
            tokens = draw(of_some, *torch.tensor(settings, device=logits.device).unbind(1)).tolist()
            for at, place, token in zip(some, places, tokens, strict=True):
                drawn[at][place] = sequences[at].closing[0] if sequences[at].closing else token
        return drawn

    def _part(self, seq: Sequence, tokens: dict[int, int]) -> list[tuple[Sequence, int]]:
        """Return the sequence with its next token, and new sequences for completions that draw another token."""
        by_token: dict[int, list[int]] = {}
        for place, token in tokens.items():
            by_token.setdefault(token, []).append(place)
        (first, _), *others = by_token.items()
        return [*((self._fork(seq, places), token) for token, places in others), (seq, first)]

    def _fork(self, seq: Sequence, places: list[int]) -> Sequence:
        """Move some completions of a sequence to a new sequence."""
        apart = {place: seq.uniforms.pop(place) for place in places}
        fork = Sequence(seq.read, apart, list(seq.tokens), self.cache.copied(seq.blocks), at_limit=seq.at_limit)
        seq.read.num_sequences += 1
        self.sequences.append(fork)
        return fork

    def _write(self, seq: Sequence, token: int) -> list[Sequence]:
        """Add a token to the completions of a sequence; return the sequences that have ended without a follow-up."""
        task, sampling = seq.read.task, seq.read.task.request.sampling
        seq.tokens.append(token)
        if seq.closing:
            seq.closing.popleft()
            ended = False
        else:
            ended = self.stops.ended(seq.tokens, sampling, task.opened)
        if not ended and len(seq.tokens) == sampling.max_thinking_tokens:
            seq.closing = deque(self.stops.closing(seq.tokens, task.tail))
            seq.at_limit = bool(seq.closing)
        if not ended and len(seq.tokens) < task.budget:
            return []
        written = self.stops.finished(seq.tokens, sampling, task.opened, seq.at_limit)
        more = list(seq.uniforms)[1:] if task.request.follow_up else []  # each may be asked something else
        ended = [seq, *(self._fork(seq, [place]) for place in more)]
        for one in ended:
            one.follow_up = self._begin_follow_up(one, written)
            for place in one.uniforms if not one.follow_up else ():
                task.finish(place, written)
        return [one for one in ended if not one.follow_up]

    def _begin_follow_up(self, seq: Sequence, written: Written) -> FollowUpState | None:
        """Return a sequence cut to the common prefix of its tokens and its follow-up, or None without a follow-up."""
        task, (place, *_) = seq.read.task, seq.uniforms
        asked = task.request.follow_up(place, written.text, written.thought) if task.request.follow_up else None
        choice = self.choice_of(asked) if asked else None
        if choice is None or not choice.single_token:
            return None
        begun, known = len(task.prompt), len(task.prompt) + len(seq.tokens) - 1  # the last token has not been read
        same = min(common_prefix_len(choice.shared, [*task.prompt, *seq.tokens]), known, len(choice.shared) - 1)
        if same < begun or len(choice.shared) - same > MAX_FOLLOW_UP_TOKENS:
            return None
        seq.tokens = choice.shared[begun : same + 1]
        needed = blocks_for(len(seq.tokens))
        self.cache.free(seq.blocks[needed:])
        seq.blocks = seq.blocks[:needed]
        return FollowUpState(choice, deque(choice.shared[same + 1 :]), written)

    def _continue_follow_up(self, seq: Sequence, logits: torch.Tensor) -> bool:
        """Read on towards the follow-up of a completion; tell whether these logits, (vocabulary,), answer it."""
        if seq.follow_up.unread:
            seq.tokens.append(seq.follow_up.unread.popleft())
            return False
        (place,) = seq.uniforms
        seq.read.task.finish(place, seq.follow_up.written, answer(seq.follow_up.choice, {(): logits}))
        return True

    def _let_go(self, ended: list[Sequence]) -> None:
        gone = set(ended)
        self.sequences = [seq for seq in self.sequences if seq not in gone]
        for seq in ended:
            self.cache.free(seq.blocks)
            seq.read.num_sequences -= 1
            if not seq.read.num_sequences and not seq.read.task.left:
                self._forget(seq.read)

    def _forget(self, read: PrefilledPrompt) -> None:
        self.cache.free(read.text.blocks, shared=True)
        del self.reads[read.task]

    def _move(self, moved: dict[int, int]) -> None:
        if moved:
            texts = (read.text for read in self.reads.values())
            for holder in {*self.sequences, *texts, *filter(None, (self.common, self.last))}:
                holder.blocks = [moved.get(block, block) for block in holder.blocks]

    def _keep(self, count: int) -> None:
        """Remove the youngest completions until `count` are left; they restart later, with the same seeds."""
        self._forget_last()
        idle = [read for read in self.reads.values() if not read.num_sequences]
        if count < 1 and self.sequences and not idle:
            raise EngineError("one completion does not fit in memory", "--max-new-tokens, or a smaller model")
        self._take_back(count)

    def _take_back(self, count: int) -> None:
        back: dict[Task, None] = {}
        for _ in range(self.num_running - count):
            seq = self.sequences[-1]
            place, _ = seq.uniforms.popitem()
            seq.read.task.left.appendleft(place)
            back[seq.read.task] = None
            if not seq.uniforms:
                self.cache.free(seq.blocks)
                seq.read.num_sequences -= 1
                self.sequences.pop()
        for read in [read for read in self.reads.values() if not read.num_sequences]:
            self._forget(read)
        again = [task for task in reversed(back) if task not in self.waiting]
        self.waiting.extendleft(reversed(again))


def _penalized(seq: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of a sequence's next token, (vocabulary,), after the penalties of its sampling."""
    task = seq.read.task
    return (
        penalized(logits, task.prompt, seq.tokens, task.request.sampling) if task.request.sampling.penalizes else logits
    )
