"""How `srlm judge` looks at the replies to a prompt: each alone, two by two, or all together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from typer import Context, Option

from srlm_cli import templates
from srlm_cli.engines.base import Engine
from srlm_cli.errors import OptionError
from srlm_cli.options.judging import judge_template, refuse_two_systems
from srlm_cli.records import FULL_SCORE, Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import JudgeOptions
from srlm_cli.stages.waves import IsNew
from srlm_cli.templates import Template

Kind = Literal["pointwise", "pairwise", "group"]
DEFAULT = "additive"
OF_ONE = ("template", "score", "force_score")


def without_settings_of_one(ctx: Context, by: str) -> str:
    """Return the kind; on the command line it also replaces the settings in srlm.toml that are for one response."""
    source = ctx.get_parameter_source("by")
    if by != "pointwise" and source and source.name == "COMMANDLINE" and ctx.default_map:
        ctx.default_map = {name: value for name, value in ctx.default_map.items() if name not in OF_ONE}
    return by


@dataclass(frozen=True)
class KindOptions:
    """Which replies the judge sees together."""

    by: Annotated[
        Kind,
        Option(
            "--by",
            callback=without_settings_of_one,
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
        self, rows: Iterable[Record], engine: Engine, options: JudgeOptions, direct: bool, is_new: IsNew
    ) -> Iterator[Outcome]:
        """Return the outcomes of this kind."""
        if self.by == "group":
            from srlm_cli.stages.groupwise import judge_group

            return judge_group(rows, engine, options, is_new)
        from srlm_cli.stages.pairwise import PairwiseOptions, judge_pairwise

        own = {field.name: getattr(options, field.name) for field in fields(options)}
        pairwise = PairwiseOptions(**own, comparisons=self.comparisons, direct=direct)
        return judge_pairwise(rows, engine, pairwise, is_new)

    def prompts_shown(self, rows: Iterable[Record], options: JudgeOptions) -> Iterator[str]:
        """Yield the judge's prompts of the first round, as texts for people."""
        from srlm_cli.stages.groupwise import Lineup
        from srlm_cli.stages.pairwise import PairwiseOptions, Tournament
        from srlm_cli.stages.seen import never_seen
        from srlm_cli.stages.waves import prompts_of

        own = {field.name: getattr(options, field.name) for field in fields(options)}
        for prompt in prompts_of(rows, never_seen()):
            session = Lineup(prompt, options) if self.by == "group" else Tournament(prompt, PairwiseOptions(**own))
            for request in session.ask():
                for turn in request.messages:
                    yield f"--- {prompt.rows[0]['prompt_id']}: {turn['role']}\n{turn['content']}\n"

    def identity(self, direct: bool) -> dict[str, Any]:
        """Return what of these options decides the rows."""
        own = {"by": self.by, "comparisons": self.comparisons}
        return own | {"direct": direct} if self.together else own
