"""Write many completions at a time: one that ends makes room for the next one at once.

Completions of one prompt are computed as one row until they draw different tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from srlm_cli.engines.base import Request
from srlm_cli.engines.hf.choices import Choice, answer
from srlm_cli.engines.hf.sampling import draw, uniforms
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.engines.hf.tasks import Task, TaskWriter, Written
from srlm_cli.errors import EngineError
from srlm_cli.forward import memory
from srlm_cli.forward.kv_cache import PAGE, NoRoom, Pages, Span, pages_for
from srlm_cli.forward.packed import PackedModel
from srlm_cli.forward.prefix import LOOK_BACK, Text, alike, find_parents

# A beginning that all prompts share has keys of its own, if it is long enough to pay for one more attention call.
MIN_COMMON = 64
MAX_READ_TOKENS = 1 << 13
ROOM_TO_READ = 8  # prompts are read when one in so many rows is free
MAX_CLOSING = 16  # tokens that a row reads one by one behind what it wrote; with more to read its text is read anew


@dataclass(eq=False)
class Read:
    """What is left of reading a task's prompt: the text in pages, and the logits behind it."""

    task: Task
    text: Text
    logits: torch.Tensor | None = None
    rows: int = 0


@dataclass(eq=False)
class Closing:
    """What is asked behind a completion that is written: a choice, behind tokens that are still to be read."""

    choice: Choice
    unread: deque[int]
    written: Written


@dataclass(eq=False)
class Row:
    """Completions of a prompt that are alike so far; `uniforms` has the random numbers of each, by its place."""

    read: Read
    uniforms: dict[int, list[float]]
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    closing: Closing | None = None


class Writer(TaskWriter):
    """Completions of many tasks, begun in order, at most `limit` at a time, less where memory is short."""

    def __init__(
        self,
        model: PackedModel,
        stops: Stops,
        limit: int,
        context: int,
        choice_of: Callable[[Request], Choice | None],
        memory_share: float = 1.0,
    ) -> None:
        super().__init__(stops, limit)
        self.model, self.context, self.choice_of, self.memory_share = model, context, choice_of, memory_share
        self.reads: dict[Task, Read] = {}
        self.rows: list[Row] = []
        self.pages: Pages | None = None
        self.common: Text | None = None
        self.last: Text | None = None
        self.has_read = False

    @property
    def open(self) -> int:
        """How many completions are to be written, those under way included."""
        return self.backlog + self.under_way

    @property
    def under_way(self) -> int:
        """How many completions are being written."""
        return sum(len(row.uniforms) for row in self.rows)

    def advance(self) -> None:
        """Begin completions where there is room, and write one token of each; halve them when memory runs out."""
        try:
            self._begin()
            if self.rows:
                self._step()
        except NoRoom:
            self._keep(self.under_way - 1)
        except RuntimeError as error:
            self.limit = memory.halve(min(self.limit, self.under_way or self.limit), error)
            self._keep(self.limit)

    # --- beginning ---------------------------------------------------------------------------

    def _begin(self) -> None:
        """Read the prompts that there is room for, and draw the first token of their completions."""
        older = self.under_way
        room = self.limit - older
        if not self.waiting or (self.rows and room * ROOM_TO_READ < self.limit):
            return
        chosen = self._choose(room)
        self._read([task for task in chosen if task not in self.reads])
        begun = []
        for task in chosen:
            places = [task.left.popleft() for _ in range(min(len(task.left), room))]
            room -= len(places)
            if places:
                drawing = {place: uniforms(task.request.seeds[place], task.budget) for place in places}
                begun.append(Row(self.reads[task], drawing))
                self.reads[task].rows += 1
        self.waiting = deque(task for task in self.waiting if task.left)
        self.rows += begun
        if begun:
            try:
                self._append(begun, torch.stack([row.read.logits for row in begun]))
            except RuntimeError:
                self._take_back(older)  # there is no token to go on from
                raise

    def _choose(self, room: int) -> list[Task]:
        """Return the waiting tasks that are next, as many as rows, pages and one reading have room for."""
        self._open_pages()
        self._move(self.pages.compact())
        chosen, seeds, tokens, pages = [], 0, 0, self.pages.free - self.under_way
        for task in self.waiting:
            read = task in self.reads
            tokens += 0 if read else len(task.prompt)
            pages -= (0 if read else pages_for(len(task.prompt))) + min(len(task.left), room - seeds)
            if seeds >= room or (chosen and tokens > MAX_READ_TOKENS) or pages < 0:
                break
            chosen.append(task)
            seeds += len(task.left)
        if not chosen and not self.rows and self.last:
            self._forget_last()
            return self._choose(room)
        if not chosen and not self.rows:
            raise EngineError(
                f"a prompt of {len(self.waiting[0].prompt)} tokens does not fit into memory",
                "a smaller model or prompt" + (", or --batch-size 32" if self.memory_share < 1 else ""),
            )
        return chosen

    def _open_pages(self) -> None:
        """Make the store when it is first needed: of all memory that may be used, no more than ever can be."""
        if self.pages is None:
            most = (self.limit + 1) * 2 * pages_for(self.context)
            room = int(memory.for_cache(self.model.device) * self.memory_share)
            count = room // (self.model.token_bytes() * PAGE)
            self.pages = Pages(self.model.layers, max(1, min(count, most)), self.model.stored, self.model.device)

    def _read(self, tasks: list[Task]) -> None:
        if not tasks:
            return
        if not self.has_read and len(tasks) > 1:
            self._find_common(tasks)
        self.has_read = True
        texts = [Text(task.prompt, common=self._common_with(task)) for task in tasks]
        find_parents(texts, self._known())
        reads = []
        try:
            for task, text in zip(tasks, texts, strict=True):
                text.take_pages(self.pages, join=self.model.compiled)
                reads.append(Read(task, text))
            texts[-1].kept = not self.model.compiled
            logits = self.model.read(texts, self.pages)
        except (NoRoom, RuntimeError):
            for read in reads:
                self.pages.give_back(read.text.pages, shared=True)
            raise
        self._forget_last()
        self.last = texts[-1]
        if self.model.compiled:
            self.pages.hold(self.last.pages)
        for read, behind in zip(reads, logits, strict=True):
            read.logits, read.text.parent = behind, None
            self.reads[read.task] = read

    def _known(self) -> list[Text]:
        """Return texts that others may go on from: the common one, what was read last, and what is in pages."""
        lately = [read.text for read in self.reads.values()][-LOOK_BACK:] if self.model.compiled else []
        return [text for text in (self.common, self.last, *lately) if text]

    def _forget_last(self) -> None:
        """Give back the pages of what was read last."""
        if self.last and self.model.compiled:
            self.pages.give_back(self.last.pages, shared=True)
        self.last = None

    def _find_common(self, tasks: list[Task]) -> None:
        """Read what the first prompts begin with, if it is long: the rubric of a judge, the frame of a question."""
        first = tasks[0].prompt
        length = min(min(alike(first, task.prompt), len(task.prompt) - 1) for task in tasks)
        if length >= MIN_COMMON:
            common = Text(first[:length], kept=True)
            if self.model.compiled:
                common.pages = self.pages.take(pages_for(length), shared=True)
            try:
                self.model.read([common], self.pages)
            except RuntimeError:
                self.pages.give_back(common.pages, shared=True)
                raise
            self.common = common

    def _common_with(self, task: Task) -> Text | None:
        """Return the common text if a prompt goes on from it."""
        if self.common is None or len(task.prompt) <= len(self.common.tokens):
            return None
        return self.common if task.prompt[: len(self.common.tokens)] == self.common.tokens else None

    # --- going on ----------------------------------------------------------------------------

    def _step(self) -> None:
        """Write one more token of every row."""
        self._move(self.pages.compact())
        seen_by: dict[Read, list[int]] = {}
        own = []
        full = [row for row in self.rows if len(row.tokens) > len(row.pages) * PAGE]
        for row, page in zip(full, self.pages.take(len(full)), strict=True):
            row.pages.append(page)
        if sum((len(row.uniforms) - 1) * len(row.pages) for row in self.rows) > self.pages.free:
            raise NoRoom  # for those that part now
        for at, row in enumerate(self.rows):
            seen_by.setdefault(row.read, []).append(at)
            own.append(Span(row.pages, len(row.tokens), len(row.read.task.prompt), [at]))
        shared = self._spans({read.text: rows for read, rows in seen_by.items()})
        members = [at for at, row in enumerate(self.rows) if row.read.text.common]
        logits = self.model.step([row.tokens[-1] for row in self.rows], self.pages, own, shared, self.common, members)
        self._append(self.rows, logits)

    def _spans(self, seen_by: dict[Text, list[int]]) -> list[Span]:
        """Return the spans of texts that rows see: each page that several texts begin with, and what is behind."""
        together: dict[int, Span] = {}
        alone = []
        for text, rows in seen_by.items():
            whole = (len(text.tokens) - text.first_slot) // PAGE
            begun = [page for page in text.pages[:whole] if page in self.pages.more_holders]
            for at, page in enumerate(begun):
                span = together.setdefault(page, Span([page], PAGE, text.first_slot + at * PAGE, []))
                span.rows.extend(rows)
            first = text.first_slot + len(begun) * PAGE
            if len(text.tokens) > first:
                alone.append(Span(text.pages[len(begun) :], len(text.tokens) - first, first, rows))
        return [*together.values(), *alone]

    def _append(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Go on by one token in each row, and let those go that have all they were asked for."""
        closing = [at for at, row in enumerate(rows) if row.closing]
        drawing = [at for at, row in enumerate(rows) if not row.closing]
        ended = [rows[at] for at in closing if self._close(rows[at], logits[at])]
        if drawing:
            some = [rows[at] for at in drawing]
            drawn = self._draw(some, logits[drawing] if closing else logits)
            for row, tokens in zip(some, drawn, strict=True):
                for part, token in self._part(row, tokens):
                    ended += self._write(part, token)
        self._let_go(ended)

    def _draw(self, rows: list[Row], logits: torch.Tensor) -> list[dict[int, int]]:
        """Return the next token of each completion of each row, by its place."""
        drawn: list[dict[int, int]] = [{} for _ in rows]
        for nth in range(max(len(row.uniforms) for row in rows)):
            some = [at for at, row in enumerate(rows) if nth < len(row.uniforms)]
            places = [list(rows[at].uniforms)[nth] for at in some]
            samplings = [rows[at].read.task.request.sampling for at in some]
            settings = [
                (sampling.temperature, sampling.top_p, rows[at].uniforms[place][len(rows[at].tokens)])
                for at, place, sampling in zip(some, places, samplings, strict=True)
            ]
            of_some = logits if len(some) == len(rows) else logits[some]
            tokens = draw(of_some, *torch.tensor(settings, device=logits.device).unbind(1)).tolist()
            for at, place, token in zip(some, places, tokens, strict=True):
                drawn[at][place] = token
        return drawn

    def _part(self, row: Row, tokens: dict[int, int]) -> list[tuple[Row, int]]:
        """Return rows with their next token: a row, and others for those of its completions that draw another one."""
        alike: dict[int, list[int]] = {}
        for place, token in tokens.items():
            alike.setdefault(token, []).append(place)
        (first, _), *others = alike.items()
        return [*((self._fork(row, places), token) for token, places in others), (row, first)]

    def _fork(self, row: Row, places: list[int]) -> Row:
        """Let some completions of a row go on as a row of their own."""
        apart = {place: row.uniforms.pop(place) for place in places}
        fork = Row(row.read, apart, list(row.tokens), self.pages.copied(row.pages))
        row.read.rows += 1
        self.rows.append(fork)
        return fork

    def _write(self, row: Row, token: int) -> list[Row]:
        """Add a token to the completions of a row; return the rows that have ended, and nothing is asked behind."""
        task, sampling = row.read.task, row.read.task.request.sampling
        row.tokens.append(token)
        if not self.stops.ended(row.tokens, sampling) and len(row.tokens) < task.budget:
            return []
        written = self.stops.finished(row.tokens, sampling)
        more = list(row.uniforms)[1:] if task.request.follow_up else []  # each may be asked something else
        ended = [row, *(self._fork(row, [place]) for place in more)]
        for one in ended:
            one.closing = self._closing(one, written)
            for place in one.uniforms if not one.closing else ():
                task.finish(place, written)
        return [one for one in ended if not one.closing]

    def _closing(self, row: Row, written: Written) -> Closing | None:
        """Take a row back to where its own tokens and what is asked behind it part; None where nothing can be asked."""
        task, (place, *_) = row.read.task, row.uniforms
        asked = task.request.follow_up(place, written[0]) if task.request.follow_up else None
        choice = self.choice_of(asked) if asked else None
        if choice is None or not choice.at_once:
            return None
        begun, known = len(task.prompt), len(task.prompt) + len(row.tokens) - 1  # the last token has not been read
        same = min(alike(choice.shared, [*task.prompt, *row.tokens]), known, len(choice.shared) - 1)
        if same < begun or len(choice.shared) - same > MAX_CLOSING:
            return None
        row.tokens = choice.shared[begun : same + 1]
        needed = pages_for(len(row.tokens))
        self.pages.give_back(row.pages[needed:])
        row.pages = row.pages[:needed]
        return Closing(choice, deque(choice.shared[same + 1 :]), written)

    def _close(self, row: Row, logits: torch.Tensor) -> bool:
        """Read on towards the choice behind a completion; tell whether it is made, by these logits, (vocabulary,)."""
        if row.closing.unread:
            row.tokens.append(row.closing.unread.popleft())
            return False
        (place,) = row.uniforms
        row.read.task.finish(place, row.closing.written, answer(row.closing.choice, {(): logits}))
        return True

    def _let_go(self, ended: list[Row]) -> None:
        gone = set(ended)
        self.rows = [row for row in self.rows if row not in gone]
        for row in ended:
            self.pages.give_back(row.pages)
            row.read.rows -= 1
            if not row.read.rows and not row.read.task.left:
                self._forget(row.read)

    def _forget(self, read: Read) -> None:
        self.pages.give_back(read.text.pages, shared=True)
        del self.reads[read.task]

    def _move(self, moved: dict[int, int]) -> None:
        if moved:
            texts = (read.text for read in self.reads.values())
            for holder in {*self.rows, *texts, *filter(None, (self.common, self.last))}:
                holder.pages = [moved.get(page, page) for page in holder.pages]

    def _keep(self, count: int) -> None:
        """Take the youngest completions back until `count` are left; they begin anew later, with the same seeds."""
        self._forget_last()
        idle = [read for read in self.reads.values() if not read.rows]
        if count < 1 and self.rows and not idle:
            raise EngineError("one completion does not fit into memory", "--max-new-tokens, or a smaller model")
        self._take_back(count)

    def _take_back(self, count: int) -> None:
        back: dict[Task, None] = {}
        for _ in range(self.under_way - count):
            row = self.rows[-1]
            place, _ = row.uniforms.popitem()
            row.read.task.left.appendleft(place)
            back[row.read.task] = None
            if not row.uniforms:
                self.pages.give_back(row.pages)
                row.read.rows -= 1
                self.rows.pop()
        for read in [read for read in self.reads.values() if not read.rows]:
            self._forget(read)
        again = [task for task in reversed(back) if task not in self.waiting]
        self.waiting.extendleft(reversed(again))
