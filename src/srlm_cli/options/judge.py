"""How `srlm judge` asks its judge, and what it does in place of asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli.errors import OptionError
from srlm_cli.options.common import ShardOption, System
from srlm_cli.options.kinds import draws_of

Score = Literal["text", "expected"]
Conversation = Literal["whole", "last"]


@dataclass(frozen=True)
class JudgingOptions:
    """The judgements of one response, and the modes that read stored ones."""

    num_judgements: Annotated[
        Any,
        Option(
            "--num-judgements",
            "-k",
            parser=draws_of,
            metavar="K|LOW:HIGH",
            help="Judgements per response, averaged (the paper: 3); LOW:HIGH stops early, see --settle; with --by "
            "pairwise verdicts per pair and order, with --by group orders of the responses.",
        ),
    ] = 3  # fmt: skip
    template: Annotated[
        str, Option("--template", help="Judge prompt: built-in template name or .toml file; --by has its own.")
    ] = "additive"
    score: Annotated[
        Score,
        Option(
            "--score",
            help="text: the score that the judge wrote; expected: the probability-weighted mean of the scores.",
        ),
    ] = "text"
    min_score_mass: Annotated[
        float | None,
        Option(
            "--min-score-mass",
            min=0.0,
            max=1.0,
            help="With expected: null if all scores have less probability (0.2; with criteria 0).",
        ),
    ] = None
    force_score: Annotated[
        bool,
        Option("--force-score/--no-force-score", help="Ask the model for a score when a judgement has none."),
    ] = False
    rescore: Annotated[
        bool, Option("--rescore", help="Read the stored `judgements` again with --template; no model runs.")
    ] = False
    meta: Annotated[
        bool, Option("--meta", help="Compare the stored `judgements` of a response in both orders (Meta-Rewarding).")
    ] = False
    meta_template: Annotated[
        str, Option("--meta-template", help="With --meta: meta-judge prompt, built-in template name or .toml file.")
    ] = "meta"
    meta_replies: Annotated[
        int,
        Option("--meta-replies", min=1, help="With --meta: N responses per prompt, those with the most varied scores."),
    ] = 1
    direct: Annotated[
        bool,
        Option(
            "--direct/--no-direct",
            help="With --meta or --by pairwise: read the verdict from probabilities, without reasons.",
        ),
    ] = False
    conversation: Annotated[
        Conversation,
        Option("--conversation", help="What the judge sees of a prompt with several turns: the whole, or its last."),
    ] = "whole"
    system: System = None
    max_unparsed: Annotated[
        float,
        Option(
            "--max-unparsed", min=0.0, max=1.0, help="Exit with 4 when a larger share of the judgements has no score."
        ),
    ] = 1.0
    show: Annotated[
        int | None, Option("--show", min=1, metavar="N", help="Print the judge's prompt for the first N rows and stop.")
    ] = None
    shard: ShardOption = None

    @property
    def last_turn(self) -> bool:
        """Whether the judge sees only the last message of a prompt."""
        return self.conversation == "last"

    def refuse_two_modes(self) -> None:
        """Raise OptionError for modes that exclude each other."""
        if self.meta and self.shard:
            raise OptionError(
                "--meta looks at all replies to a prompt, which --shard may part", "--meta on the joined rows"
            )
        if self.meta and self.rescore:
            raise OptionError("--meta and --rescore are two things to do", "run them separately")
