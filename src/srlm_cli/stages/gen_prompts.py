"""New prompts: few-shot from seeds and from prompts made before (arXiv 2401.10020, section 2.3, step 1).

The filters and their constants are those of Self-Instruct (arXiv 2212.10560) that the paper names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from rapidfuzz import process
from rapidfuzz.distance import Indel

from srlm_cli.engines.base import Engine, Request, Sampling, template_refusal
from srlm_cli.errors import EngineError
from srlm_cli.records import Record, as_text, prompt_id
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome, counts_of_ends
from srlm_cli.stages.words import length, words_of
from srlm_cli.templates import Template

MAX_ROUGE_L = 0.7
MIN_WORDS, MAX_WORDS = 4, 150
KEYWORDS = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot")
PHRASES = ("go to",)
BANNED_START = "write a program"
UNSEEN = re.compile(rf"\b(?:{'|'.join(KEYWORDS + PHRASES)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class GenPromptsOptions:
    """Stop when `count` prompts are kept or after `max_tries` tries; `prompt_batch_size` tries run in parallel.

    Each try shows `from_seeds` seed prompts and `from_generated` kept prompts, with more seeds while there are too few
    kept prompts. Each `iteration` draws other examples.
    """

    count: int
    max_tries: int
    template: Template
    sampling: Sampling
    seed: int
    from_seeds: int = 6
    from_generated: int = 2
    prompt_batch_size: int = 32
    max_rouge_l: float = MAX_ROUGE_L
    iteration: int = 1


def gen_prompts(
    seeds: list[Record],
    engine: Engine,
    options: GenPromptsOptions,
    *,
    avoid: Iterable[Record] = (),
    kept: Iterable[Record] = (),
    tried: int = 0,
) -> Iterator[Outcome]:
    """Yield one outcome per try: a new prompt, or the reason why it was dropped.

    A prompt is dropped if it is a near duplicate of one of `seeds`, of `avoid` (prompts of earlier iterations), or of
    a prompt that was kept before. `kept` and `tried` resume an earlier run with the same results: tries come in windows
    of `prompt_batch_size`, and each window sees the prompts that were kept in earlier windows.
    """
    made = list(kept)
    known = NearDuplicates([as_text(row["prompt"]) for row in [*seeds, *avoid, *made]], options.max_rouge_l)
    for start in range(tried - tried % options.prompt_batch_size, options.max_tries, options.prompt_batch_size):
        if len(made) >= options.count:
            return
        pool = [row for row in made if row["try"] < start]
        tries = range(start, min(start + options.prompt_batch_size, options.max_tries))
        requests = [few_shot(seeds, pool, number, options) for number in tries]
        for number, request, completion in zip(tries, requests, engine.generate(requests), strict=True):
            if number < tried:
                continue
            if refusal := template_refusal(completion):
                raise EngineError(refusal, "gen-prompts asks with one message of the user")
            text = clean(completion.texts[0])
            reason = fault(text, completion.finish_reasons[0]) or known.fault(text)
            row = None if reason else prompt_row(text, number, request, engine.model)
            if row:
                made.append(row)
                known.add(text)
            yield Outcome(
                rows=[row] if row else [],
                dropped={reason: 1} if reason else {},
                tokens_in=completion.tokens_in,
                tokens_out=completion.tokens_out,
            )
            if len(made) >= options.count:
                return


def few_shot(seeds: list[Record], generated: list[Record], number: int, options: GenPromptsOptions) -> Request:
    """Return the request of one try: demonstrations from both pools, shuffled, and the start of the next task."""
    draw = Random(derive(options.seed, "demonstrations", options.iteration, number))
    own = draw.sample(generated, min(options.from_generated, len(generated)))
    wanted = options.from_seeds + options.from_generated - len(own)
    shown = own + draw.sample(seeds, min(wanted, len(seeds)))
    draw.shuffle(shown)
    tasks = "\n".join(f"Task {at}: {as_text(row['prompt'])}" for at, row in enumerate(shown, 1))
    return Request(
        options.template.chat(tasks=tasks),
        options.sampling,
        (derive(options.seed, "gen-prompts", options.iteration, number),),
        prefix=options.template.start(next=str(len(shown) + 1)),
    )


def prompt_row(text: str, number: int, request: Request, model: str) -> Record:
    """Return the record of a new prompt, with its try and its model."""
    return {"id": prompt_id(text), "prompt": text, "source": "generated", "model": model, "try": number}


def clean(text: str) -> str:
    """Return a generated prompt without its label and without quotes around the whole."""
    text = re.sub(r"^\s*(?:task\s*\d+\s*[:.]|\d+[.)])\s*", "", text.strip(), flags=re.IGNORECASE)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1]
    return text.strip()


def fault(text: str, finish_reason: str = "stop") -> str:
    """Return why Self-Instruct's filters drop a generated prompt, or "".

    Their word lists are English. A script without spaces is measured by its letters (see `words.length`).
    """
    if finish_reason != "stop":
        return next(iter(counts_of_ends([finish_reason])))
    words, letters = length(text)
    if words < MIN_WORDS:
        return f"too short: {counted(letters, 'letter') if letters else counted(int(words), 'word')}"
    if words > MAX_WORDS:
        return f"too long: {'letters of ' if letters else ''}over {MAX_WORDS} words"
    if unseen := UNSEEN.search(text):
        return f"keyword: {unseen[0].lower()}"
    if text.lower().startswith(BANNED_START):
        return BANNED_START
    return start_fault(text)


def counted(number: int, what: str) -> str:
    """Return a number of things in words: 1 word, 3 words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def start_fault(text: str) -> str:
    """Return why the first visible character of a text is not accepted, or "".

    A letter or a number of any script is accepted, and an opening mark outside of ASCII directly before one, as in
    Spanish questions and Chinese titles.
    """
    kinds = [(sign, unicodedata.category(sign)) for sign in text[:8]]
    (first, kind), (second, _) = ([one for one in kinds if one[1] != "Cf"] + [("", "Cf")] * 2)[:2]
    opens = not first.isascii() and (kind in ("Ps", "Pi") or first in "\u00a1\u00bf")  # inverted ! and ?
    if first.isalnum() or (opens and second.isalnum()):
        return ""
    name = {"P": "punctuation", "S": "a symbol", "M": "a combining mark"}.get(kind[0], "a control character")
    return f"starts with {name}" + (f": {first}" if first.isprintable() and first else "")


class NearDuplicates:
    """Find prompts too like a known one by ROUGE-L F, that is 2 LCS / (m + n) over their `words_of`.

    That number is the normalized Indel similarity of two sequences.
    """

    def __init__(self, texts: Iterable[str], limit: float) -> None:
        self.limit = limit
        self.known = [words_of(text) for text in texts]

    def add(self, text: str) -> None:
        """Make a text known."""
        self.known.append(words_of(text))

    def highest(self, text: str) -> float:
        """Return the ROUGE-L F of the known text that is most like this one."""
        found = process.extractOne(words_of(text), self.known, scorer=Indel.normalized_similarity)
        return found[1] if found else 0.0

    def fault(self, text: str) -> str:
        """Return the reason to drop a near-duplicate, or an empty string."""
        return "near-duplicate" if self.highest(text) > self.limit else ""
