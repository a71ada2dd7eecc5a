"""All options of `srlm judge`, as the modes take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from srlm_cli.commands.judge.limit import too_many_unparsed
from srlm_cli.engines import template_kwargs
from srlm_cli.engines.base import EngineSpec
from srlm_cli.errors import LimitExceeded, OptionError
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, identity
from srlm_cli.options.judge import JudgingOptions
from srlm_cli.options.judge_modes import WORDS
from srlm_cli.options.judging import EvidenceOptions, ScorerOptions
from srlm_cli.options.kinds import Draws, KindOptions
from srlm_cli.options.rules import RulesOfJudge
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import judge as stage
from srlm_cli.stages.evidence import EvidenceOptions as Evidence
from srlm_cli.stages.meta_judge import MetaOptions
from srlm_cli.stages.rules import RuleOptions
from srlm_cli.streams.reader import Reader
from srlm_cli.templates import Template

CHOICES = ("score", "conversation")  # options with few values, which are named with their value


@dataclass(frozen=True)
class Asked:
    """The options by their groups, and what follows from them."""

    stream: StreamOptions
    engine: EngineOptions
    sampling: SamplingOptions
    search: EvidenceOptions
    rules: RulesOfJudge
    kind: KindOptions
    scorer: ScorerOptions
    judging: JudgingOptions

    def words(self) -> Iterator[str]:
        """Yield the options that are not at their defaults and that only a judge that writes has a use for."""
        for group in (self.judging, self.search, self.rules, self.kind):
            for field in fields(group):
                if field.name in WORDS and (value := getattr(group, field.name)) != field.default:
                    name = f"--{field.name.replace('_', '-')}"
                    yield f"{name} {value}" if isinstance(value, str) and field.name in CHOICES else name

    @property
    def by_rules(self) -> bool:
        """Whether rules judge alone, without a model."""
        others = self.judging.meta or self.judging.rescore
        return (self.engine.engine, self.engine.model, others) == ("echo", "rules", False)

    @property
    def draws(self) -> Draws | None:
        """The range of the number of judgements, None if it is one number."""
        return self.judging.num_judgements if isinstance(self.judging.num_judgements, Draws) else None

    @property
    def by_prompt(self) -> bool:
        """Whether the responses to a prompt are needed together."""
        return self.kind.together or self.draws is not None

    def template(self) -> Template:
        """Return the template; raise OptionError for options that do not go together."""
        judging, form = self.judging, self.kind.template(self.judging.template, self.judging.system)
        if self.search.given and self.by_rules:
            raise OptionError("no judge is shown passages with --model rules", "leave out --evidence")
        stored = {"--meta": judging.meta, "--rescore": judging.rescore}
        by_rules = {"--model rules": self.by_rules}
        alone = {**stored, "--score expected": judging.score == "expected", "--force-score": judging.force_score}
        self.kind.check_draws(judging.num_judgements, form, judging.score, stored | by_rules)
        self.kind.check(form, judging.direct, alone | by_rules | {"--evidence": self.search.given})
        if judging.show and (judging.meta or judging.rescore or self.by_rules):
            raise OptionError("--show prints the prompt of a judge", "leave out --meta, --rescore and --model rules")
        return form

    def rule_options(self, form: Template) -> RuleOptions | None:
        """Return the rules beside the judge, or alone; None if none are asked for."""
        return self.rules.options(self.kind.scaled(form), alone=self.by_rules)

    def options(self, form: Template, spec: EngineSpec, rows: Reader, found: Evidence | None) -> stage.JudgeOptions:
        """Return how the judge is asked; `found` are the passages that it is shown."""
        judging = self.judging
        return stage.JudgeOptions(
            form,
            self.draws.high if self.draws else judging.num_judgements,
            self.sampling.sampling(spec),
            self.sampling.seed,
            judging.force_score,
            judging.score,
            judging.min_score_mass,
            judging.system,
            template_kwargs(spec) if rows.peek() else {},
            found,
            judging.last_turn,
        )

    def identity(self, options: stage.JudgeOptions, rows: Reader, metas: MetaOptions | None = None) -> dict[str, Any]:
        """Return what of the options decides the rows."""
        judging = self.judging
        own = {
            "num_judgements": judging.num_judgements,
            "template": options.template.hash,
            "force_score": judging.force_score,
            "score": judging.score,
            "min_score_mass": options.least_mass if judging.score == "expected" else None,
            "rescore": False,
            "system": judging.system,
            "conversation": judging.conversation,
        }
        own |= {"shard": rows.part, **self.search.identity(options.evidence)}
        own |= {"meta": judging.meta, "meta_template": metas and metas.meta_template.hash}
        own |= self.rules.identity()
        own |= {"meta_replies": metas and metas.replies, "direct": metas and metas.direct}
        return identity(self.sampling, **(own | self.kind.identity(judging.direct)))

    def limit(self, asked: str = "judgements") -> Callable[[Tally], LimitExceeded | None]:
        """Return the check of --max-unparsed; `asked` is the name of a judgement in the counts."""
        return lambda tally: too_many_unparsed(tally, self.judging.max_unparsed, asked, self.remedy(tally, asked))

    def remedy(self, tally: Tally, asked: str = "judgements") -> str:
        """Return what helps where judgements cannot be read, in options that this kind of judging takes."""
        judging = self.judging
        if asked == "verdicts":
            return "" if judging.direct else "--direct takes the more probable winner"
        if 2 * tally.counts["low score mass"] > tally.counts["unparsed"]:  # which --force-score does not change
            return "a lower --min-score-mass takes scores that are less probable"
        if self.kind.by == "group":
            return (
                "--by pairwise --direct takes the more probable winner, --by pointwise --force-score asks for a score"
            )
        if judging.rescore:
            return "judge the responses again, with --force-score"
        writes = self.engine.engine != "reward" and not self.scorer.implicit and not judging.force_score
        return "--force-score lets the model choose a missing score" if writes else ""
