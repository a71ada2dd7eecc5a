"""Which of two models answers better: a judge sees both replies in both orders (arXiv 2401.10020, section 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from srlm_cli.engines.base import Completion, Engine, Request, Sampling
from srlm_cli.evaluate.metric import metric
from srlm_cli.records import Row, as_messages, as_text
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome
from srlm_cli.stages.lookahead import generate_for
from srlm_cli.templates import Template


@dataclass(frozen=True)
class HeadToHeadOptions:
    """A pairwise template and how the judge is sampled.

    `direct` asks for the verdict at once, without reasons: the more probable of the template's choices.
    """

    template: Template
    sampling: Sampling
    seed: int
    direct: bool = False


def head_to_head(
    rows: Iterable[Row],
    others: Iterable[Row],
    engine: Engine,
    options: HeadToHeadOptions,
    *,
    kept: Iterable[Row] = (),
) -> Iterator[Outcome]:
    """Yield, for each response of A that B answered too, a match row with its `winner`: A, B or tie.

    The judge sees A first, then B first; a verdict counts only if both orders agree, everything
    else, a tie or an unreadable verdict too, is a tie. Of several responses to a prompt the first
    counts; responses without a partner are dropped and counted. `kept` are matches of an earlier run.
    """
    of_b: dict[str, Row] = {}
    for row in others:
        of_b.setdefault(row["prompt_id"], row)
    seen = {match["id"] for match in kept}
    passed: Counter[str] = Counter()  # rows without a match since the last match

    def matches() -> Iterator[tuple[Row, Row, bool, dict[str, int]]]:
        for a in rows:
            if a["prompt_id"] in seen:
                passed["not the first response"] += 1
            elif a["prompt_id"] not in of_b:
                passed["no response of the other model"] += 1
            else:
                seen.add(a["prompt_id"])
                before = dict(passed)
                passed.clear()
                for swapped in (False, True):
                    yield a, of_b[a["prompt_id"]], swapped, before

    def ask(match: tuple[Row, Row, bool, dict[str, int]]) -> Request:
        a, b, swapped, _ = match
        first, second = (b, a) if swapped else (a, b)
        text = options.template.render(prompt=as_text(a["prompt"]), first=first["response"], second=second["response"])
        seed = (derive(options.seed, "head-to-head", a["id"], b["id"], swapped),)
        begin = {"prefix": options.template.finish, "choices": options.template.choices} if options.direct else {}
        return Request(as_messages(text.strip()), options.sampling, seed, **begin)

    answers = generate_for(matches(), ask, engine)
    for (a, b, _, before), straight in answers:
        _, swapped = next(answers)
        yield _match(a, b, before, straight, swapped, options)
    if passed:
        yield Outcome(read=passed.total(), dropped=dict(passed))


def _match(
    a: Row, b: Row, before: dict[str, int], straight: Completion, swapped: Completion, options: HeadToHeadOptions
) -> Outcome:
    verdicts = [_verdict(straight, options), _verdict(swapped, options)]
    winners = [verdicts[0], {"A": "B", "B": "A"}.get(verdicts[1] or "", verdicts[1])]
    agreed = winners[0] == winners[1] and winners[0] in ("A", "B")
    row = {
        "id": a["prompt_id"],
        "prompt": a["prompt"],
        "winner": winners[0] if agreed else "tie",
        "verdicts": verdicts,
        "model_a": a.get("model"),
        "model_b": b.get("model"),
        "response_a": a["response"],
        "response_b": b["response"],
    }
    if straight.probabilities and swapped.probabilities:
        row["probability"] = (straight.probabilities[0] + swapped.probabilities[1]) / 2
    return Outcome(
        rows=[row],
        read=1 + sum(before.values()),
        dropped=before,
        counts={"verdicts": 2, "unparsed": verdicts.count(None)},
        tokens_in=straight.tokens_in + swapped.tokens_in,
        tokens_out=straight.tokens_out + swapped.tokens_out,
    )


def _verdict(completion: Completion, options: HeadToHeadOptions) -> str | None:
    text = completion.texts[0]
    verdict = text if options.direct and text else options.template.verdict(text)
    return verdict and {"a": "A", "b": "B"}.get(verdict.lower(), "tie")


def win_rates(matches: list[Row], seed: int = 0) -> list[Row]:
    """Return metric rows of judged matches, seen from A: win, tie and loss rates, order bias, mean lengths.

    `lean` is the share of matches whose `probability` that A is better, the mean over both orders and
    so free of position bias, is above one half. `first_position` is the share of readable verdicts
    for the reply that stood first: 0.5 is a judge without position bias. Lengths are in characters.
    """
    won = [row["winner"] for row in matches]
    groups = {
        "win": [[w == "A"] for w in won],
        "tie": [[w == "tie"] for w in won],
        "loss": [[w == "B"] for w in won],
        "win_rate": [[{"A": 1.0, "tie": 0.5, "B": 0.0}[w]] for w in won],
        "lean": [[row["probability"] > 0.5] for row in matches if "probability" in row],
        "first_position": [[v == "A" for v in row["verdicts"] if v in ("A", "B")] for row in matches],
        "length": [[len(row["response_a"])] for row in matches],
        "baseline_length": [[len(row["response_b"])] for row in matches],
    }
    models = {"model": matches[0]["model_a"], "baseline": matches[0]["model_b"]} if matches else {}
    groups = {name: values for name, values in groups.items() if values or name != "lean"}
    return [{**metric("head_to_head", name, values, seed), **models} for name, values in groups.items()]
