"""srlm judge."""

from types import ModuleType

from srlm_cli.commands.judge import by_prompt, by_rules, meta, pointwise, rescore, scorer, show
from srlm_cli.commands.judge.asked import Asked
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, new_app
from srlm_cli.options.groups import grouped
from srlm_cli.options.judge import JudgingOptions
from srlm_cli.options.judge_modes import JudgeCommand
from srlm_cli.options.judging import EvidenceOptions, ScorerOptions
from srlm_cli.options.kinds import KindOptions
from srlm_cli.options.rules import RulesOfJudge

app = new_app()


@app.command(cls=JudgeCommand)
@grouped
def judge(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    search: EvidenceOptions,
    rules: RulesOfJudge,
    kind: KindOptions,
    scores: ScorerOptions,
    judging: JudgingOptions,
) -> None:
    """Score responses with a model as the judge, K judgements each.

    \b
    Examples:
      srlm judge --in responses.jsonl --out judged.jsonl
      srlm judge --in responses.jsonl --model M2/model --template score_only --force-score
      srlm judge --in ranked.jsonl --model M1/model --score expected | srlm eval reward
      srlm judge --in responses.jsonl --score text --num-judgements 2:9 --settle 0.9
      srlm judge --in responses.jsonl --by pairwise --direct --comparisons 2 | srlm make-pairs
      srlm judge --in responses.jsonl --by group --out judged.jsonl
      srlm judge --in responses.jsonl --template own.toml --show 1
      srlm judge --in responses.jsonl --template criteria --out judged.jsonl
      srlm judge --in responses.jsonl --template evidence --evidence corpus.db --out judged.jsonl
      srlm judge --in judged.jsonl --rescore --template own.toml --out read-again.jsonl
      srlm judge --in responses.jsonl --rule no-commas --rule words:..30 --combine gate
      srlm judge --in responses.jsonl --engine echo --model rules --rule no-commas
      srlm judge --in judged.jsonl --meta --out meta.jsonl
      srlm judge --in responses.jsonl --engine reward --model reward/model
      srlm judge --in responses.jsonl --implicit --model M2/model --ref M1/model

    Without --model the judge is the model in the `model` field of the responses: the model judges
    itself (self-rewarding). Reads rows of `srlm sample`, rows of any tool with `prompt` and `response`, and
    ranked rows (`responses`). Adds `score` (the mean of the readable scores, or null), `scores`,
    `score_from`, `judgements` and `judge`. The last well-formed score of a judgement counts. With
    `--score expected` the score is the probability-weighted mean of all scores at that position, so
    ties are rare; with a template that asks for the score directly, no token is generated. `score_mass` is
    the probability of all scores together at that position. If it is below --min-score-mass, the judge was
    about to write something else: the score is null and counted (`low score mass`). The defaults are
    the paper's: K=3 at temperature 0.7, top-p 0.9, scores 0 to 5.

    With a template that has criteria (`--template criteria`), the judge gives a reason and a value for each of
    them in one answer in JSON. `criteria` has these per judgement, and the score is their weighted mean.
    docs/templates.md shows how to write one.

    With --evidence the judge is shown passages from an index of `srlm index`, found for each response, in place
    of `$evidence` in its template. The row has them as `evidence`: a list of id, source, text and rank.
    docs/evidence.md has the details, and the protocol of --evidence-cmd.

    With --rule, --rule-file or --combine, rules that a program checks are a part of the score: those for all
    rows and those in the field `rules` of a row. `score_judge` is then the score of the judge, `score_rules`
    that of the rules, and `rules` has the result of each. `--engine echo --model rules` uses the rules alone.
    Without these options the field `rules` is not read. docs/rules.md lists the rules.

    With --by the responses to a prompt are judged against each other; they must be consecutive. pairwise: two
    responses in both orders, and `score` is 5 times the mean probability to win against another response to the
    prompt (Bradley-Terry); `comparisons` has the other response for each of the `judgements`. group: all responses in
    one call, in K orders; `places` is where the response was shown. docs/judge.md has the details.

    Two scorers write no words, so templates and sampling do not apply: `--engine reward` takes the logit of a
    reward model (a sequence classifier of transformers with one label) for the dialogue in its chat template.
    `--implicit` takes DPO's implicit reward, beta * (log-probability of the reply by --model - that by --ref).

    With --meta the command reads judged rows. For each prompt it compares the judgements of the response
    with the most varied scores, pair by pair, in both orders (arXiv 2407.19594, with K=11). --template must
    be the template of these judgements. Adds `battles`, `targets` and `judge_prompt` for `srlm make-pairs
    --of judgements`; --max-unparsed then applies to the verdicts. docs/pairs.md has the formulas.
    """
    asked = Asked(stream, engine, sampling, search, rules, kind, scores, judging)
    judging.refuse_two_modes()
    if scores.asked(engine.engine, asked.words()):
        scorer.run(asked)
        return
    form = asked.template()
    mode_of(asked).run(asked, form)


def mode_of(asked: Asked) -> ModuleType:
    """Return the module of the mode that the options ask for."""
    judging = asked.judging
    modes = {rescore: judging.rescore, meta: judging.meta, show: judging.show, by_rules: asked.by_rules}
    return next((mode for mode, on in modes.items() if on), by_prompt if asked.by_prompt else pointwise)
