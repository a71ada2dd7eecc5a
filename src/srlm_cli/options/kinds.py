"""How `srlm judge` looks at the replies to a prompt: each alone, two by two, or all together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

from typer import BadParameter, Option

from srlm_cli import templates
from srlm_cli.engines.base import Engine
from srlm_cli.errors import OptionError
from srlm_cli.options.judging import judge_template, refuse_two_systems
from srlm_cli.options.numbers import DRAWS
from srlm_cli.records import FULL_SCORE, Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.stages.rounds import IsNew
from srlm_cli.templates import Template


class Draws(NamedTuple):
    """How many judgements there are at least and at most."""

    low: int
    high: int


def draws_of(text: str) -> int | Draws:
    """Return a number of judgements, or `LOW:HIGH`."""
    low, colon, high = str(text).partition(":")  # srlm.toml may have a number
    right = [part.isascii() and part.isdecimal() and len(part) < 9 for part in ((low, high) if colon else (low,))]
    numbers = [int(part) for part in ((low, high) if colon else (low,))] if all(right) else []
    if not numbers or numbers[0] < 1 or numbers[-1] > DRAWS or (colon and numbers[0] >= numbers[1]):
        raise BadParameter(f"expected a number from 1 to {DRAWS}, or LOW:HIGH such as 2:9, got {text!r}")
    return Draws(*numbers) if colon else numbers[0]


Kind = Literal["pointwise", "pairwise", "group"]
DEFAULT = "additive"
DEFAULT_SETTLE = 0.9


@dataclass(frozen=True)
class KindOptions:
    """Which replies the judge sees together."""

    by: Annotated[
        Kind,
        Option(
            "--by",
            help="What one judgement is about: a response (pointwise), two responses to a prompt in both orders "
            "(pairwise), or all responses to a prompt (group).",
        ),
    ] = "pointwise"
    comparisons: Annotated[
        int | None,
        Option(
            "--comparisons",
            min=1,
            metavar="M",
            show_default="all",
            help="With --by pairwise: responses that each is compared with at most, in Swiss rounds.",
        ),
    ] = None

    settle: Annotated[
        float | None,
        Option(
            "--settle",
            min=0.5,
            max=0.999,
            show_default="0.9, with LOW:HIGH",
            help="With --num-judgements LOW:HIGH: stop for a prompt when more judgements would keep its best and "
            "its worst response with this probability.",
        ),
    ] = None

    @property
    def together(self) -> bool:
        """Whether the replies to a prompt are judged together."""
        return self.by != "pointwise"

    def template(self, name: str, system: str | None) -> Template:
        """Return the template of this kind; by default the own template of the kind."""
        if not self.together:
            return judge_template(name, system)
        name = self.by if name == DEFAULT else name
        if self.by == "group":
            from srlm_cli.templates.groups import load_group

            form = load_group(name)
        else:
            form = templates.load(name, fields={"prompt", "first", "second"}, reads=True)
        refuse_two_systems(form, name, system)
        return form

    def scaled(self, form: Template) -> Template:
        """Return the template with the lowest and highest score that this kind gives."""
        from dataclasses import replace

        return replace(form, low=0.0, high=float(FULL_SCORE)) if self.by == "pairwise" else form

    def check_draws(self, draws: int | Draws, form: Template, score: str, others: Mapping[str, bool]) -> None:
        """Raise OptionError for an option that does not fit a range of judgements; `others` are such options."""
        if not isinstance(draws, Draws):
            if self.settle is not None:
                raise OptionError("--settle needs a range of judgements", "--num-judgements LOW:HIGH, such as 2:9")
            return
        ranged = f"--num-judgements {draws.low}:{draws.high}"
        if self.together:
            raise OptionError(f"{ranged} is for --by pointwise", "--num-judgements K")
        if form.criteria:
            raise OptionError(f"{ranged}: not with template {form.name}, which has criteria", "--num-judgements K")
        if form.direct and score == "expected":
            raise OptionError(f"{ranged}: template {form.name} with --score expected draws nothing", "one is enough")
        for name, given in others.items():
            if given:
                raise OptionError(f"{ranged} cannot be used with {name}", "--num-judgements K")

    def check(self, form: Template, direct: bool, others: Mapping[str, bool]) -> None:
        """Raise OptionError for an option that this kind cannot have; `others` are those of `pointwise` alone."""
        if self.comparisons is not None and self.by != "pairwise":
            raise OptionError("--comparisons is about pairs of responses", "--by pairwise")
        if not self.together:
            return
        for name, given in others.items():
            if given:
                raise OptionError(f"{name} is for one response at a time, not for --by {self.by}", f"leave out {name}")
        if direct and self.by == "group":
            raise OptionError("--direct reads one verdict, and --by group has many", "leave out --direct")
        if direct and not (form.finish and form.choices):
            raise OptionError(f"template {form.name} has no `finish` and `choices`", "--direct needs them")

    def judge(
        self, rows: Iterable[Record], engine: Engine, options: JudgeOptions, direct: bool, is_new: IsNew, first: int = 0
    ) -> Iterator[Outcome]:
        """Return the outcomes of this kind, or of a range of judgements."""
        own = {field.name: getattr(options, field.name) for field in fields(options)}
        if not self.together:
            from srlm_cli.stages.settle import SettleOptions, judge_until_settled

            settle = SettleOptions(**own, first=first, settle=DEFAULT_SETTLE if self.settle is None else self.settle)
            return judge_until_settled(rows, engine, settle, is_new)
        if self.by == "group":
            from srlm_cli.stages.groupwise import judge_group

            return judge_group(rows, engine, options, is_new)
        from srlm_cli.stages.pairwise import PairwiseOptions, judge_pairwise

        pairwise = PairwiseOptions(**own, comparisons=self.comparisons, direct=direct)
        return judge_pairwise(rows, engine, pairwise, is_new)

    def prompts_shown(self, rows: Iterable[Record], options: JudgeOptions) -> Iterator[str]:
        """Yield the judge's prompts of the first round, as texts for people."""
        from srlm_cli.stages.groupwise import GroupJudging
        from srlm_cli.stages.pairwise import PairwiseJudging, PairwiseOptions
        from srlm_cli.stages.rounds import prompts_of
        from srlm_cli.stages.seen import never_seen

        own = {field.name: getattr(options, field.name) for field in fields(options)}
        for prompt in prompts_of(rows, never_seen()):
            judging = (
                GroupJudging(prompt, options) if self.by == "group" else PairwiseJudging(prompt, PairwiseOptions(**own))
            )
            for request in judging.ask():
                for turn in request.messages:
                    yield f"--- {prompt.rows[0]['prompt_id']}: {turn['role']}\n{turn['content']}\n"

    def identity(self, direct: bool) -> dict[str, Any]:
        """Return what of these options decides the rows."""
        own = {"by": self.by, "comparisons": self.comparisons, "settle": self.settle}
        return own | {"direct": direct} if self.together else own
