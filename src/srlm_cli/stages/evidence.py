"""Passages for the judge: a query about each reply, what was found with it, and how the judge reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

from srlm_cli.engines.base import Completion, Engine, Request, Sampling
from srlm_cli.errors import BadRow
from srlm_cli.records import Record, as_messages, as_text, is_reply
from srlm_cli.seeds import derive
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.templates import Template

REMEMBERED = 64  # queries: replies to one prompt come one after another and can have the same one
TOGETHER = 256  # replies whose queries the judge writes before it judges them
A_LINE = r".*\S.*"
NOTHING = "(nothing was found)"


class Found(Protocol):
    """A passage: its number or name, its source and title, None or "" if there is none, and its text."""

    id: int | str | None
    source: str | None
    title: str
    text: str


class Retriever(Protocol):
    """What finds passages, for instance `srlm_cli.evidence.search.Corpus`."""

    def search(self, query: str, count: int) -> list[Any]:
        """Return at most `count` passages (`Found`) for a text, best first."""
        ...

    def close(self) -> str:
        """Close it; return how a program ended if that was not well, else ""."""
        ...


@dataclass(frozen=True)
class EvidenceOptions:
    """Where passages come from, how many are shown, and what is searched for.

    `query` is `prompt`, `response`, `both`, or `model`: the judge writes the query, asked with `query_template`, at
    temperature 0. `about` says in each row where its passages come from.
    """

    retriever: Retriever
    about: Record
    passages: int = 3
    query: str = "prompt"
    query_template: Template | None = None


Replies = tuple[list[Record], tuple[int, int]]  # and the tokens in and out that their queries took


def with_evidence(
    items: Iterable[list[Record]], engine: Engine, options: EvidenceOptions | None, sampling: Sampling
) -> Iterator[Iterable[Replies]]:
    """Yield lists of response records, each record with its passages as `evidence`, in groups.

    All are one lazy group, except with queries of the model: a group is then complete before it is yielded, because an
    engine cannot begin with another request inside of one. Such a query has the limits of `sampling`. Without options
    the records are unchanged.
    """
    if options is None:
        yield ((replies, (0, 0)) for replies in items)
        return
    find = lru_cache(REMEMBERED)(options.retriever.search)

    def shown(row: Record, query: str) -> Record:
        passages = find(query, options.passages) if is_reply(row) else []
        return {**row, "evidence": [as_record(passage, rank) for rank, passage in enumerate(passages, 1)]}

    if options.query != "model":
        yield (([shown(row, query_of(row, options.query)) for row in replies], (0, 0)) for replies in items)
        return
    items = iter(items)
    while group := list(islice(items, TOGETHER)):
        written = deque(queries(group, engine, options, sampling))
        found = []
        for replies in group:
            asked = [written.popleft() for _ in replies]
            rows = [
                {**shown(row, query), **({"evidence_query": query} if is_reply(row) else {})}
                for row, (query, _, _) in zip(replies, asked, strict=True)
            ]
            found.append((rows, (sum(one[1] for one in asked), sum(one[2] for one in asked))))
        yield found


def queries(
    group: list[list[Record]], engine: Engine, options: EvidenceOptions, sampling: Sampling
) -> Iterator[tuple[str, int, int]]:
    """Yield (the query that the model writes for a reply, its tokens in and out); the prompt if it writes none."""
    greedy = Sampling(
        0.0, 1.0, sampling.max_new_tokens, last_line=A_LINE, max_thinking_tokens=sampling.max_thinking_tokens
    )

    def ask(row: Record) -> Request | None:
        if not is_reply(row):
            return None
        chat = options.query_template.chat(row, prompt=as_text(row["prompt"]), response=row["response"])
        return Request(chat, greedy, (derive(0, "query", row["id"]),))

    for row, answer in generate_for((row for replies in group for row in replies), ask, engine):
        query = first_line(answer) or query_of(row, "prompt")
        yield query, answer.tokens_in if answer else 0, answer.tokens_out if answer else 0


def first_line(answer: Completion | None) -> str:
    """Return the first line of an answer that is not blank, without quotation marks around it."""
    lines = answer.texts[0].splitlines() if answer else []
    return next((line.strip().strip("\"'") for line in lines if line.strip()), "")


def query_of(row: Record, query: str) -> str:
    """Return what is searched for about a reply: the prompt without a system message, the reply, or both."""
    turns = [turn["content"] for turn in as_messages(row["prompt"]) if turn["role"] != "system"]
    texts = {"prompt": turns, "response": [row["response"] or ""], "both": [*turns, row["response"] or ""]}
    return "\n".join(texts[query])


def as_record(passage: Found, rank: int) -> Record:
    """Return a passage as rows have it; `rank` 1 is the best."""
    title = {"title": passage.title} if passage.title else {}
    return {"id": passage.id, "source": passage.source, **title, "text": passage.text, "rank": rank}


def evidence_text(passages: list[Record]) -> str:
    """Return the passages of a row as the judge reads them: numbered, each after its title."""
    lines = [f"{found.get('title', '')}: {found['text']}".removeprefix(": ") for found in passages]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1)) or NOTHING


def count_found(rows: Iterable[Record]) -> dict[str, int]:
    """Return how many replies have no passage, nothing if no passages were looked for."""
    return {"without evidence": sum("evidence" in row and not row["evidence"] and is_reply(row) for row in rows)}


def refuse_other_evidence(row: Record) -> Record:
    """Return a row whose `evidence` is as `srlm judge --evidence` writes it; raise BadRow for another."""
    found = row.get("evidence")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BadRow("expected `evidence`, the passages that `srlm judge --evidence` writes")
    for one in found:
        if not isinstance(one.get("text"), str) or not isinstance(one.get("title", ""), str):
            raise BadRow("expected each of `evidence` to have a `text`, and its `title` to be a text")
    return row
